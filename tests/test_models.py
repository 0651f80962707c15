"""The models: any norm goes into them, and what is not the norm is the same for all."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from normzoo.errors import NormzooError, OptionError
from normzoo.layers.base import MomentNorm, Norm, Traits, parameter_roles
from normzoo.models import (
    Dropout,
    Inputs,
    Network,
    PerStep,
    Placement,
    Sites,
    create_model,
    list_models,
    model_info,
    register_model,
    register_placement,
    seed_dropout,
)
from normzoo.models import base as models_base
from normzoo.models import transformer as transformer_room
from normzoo.models.layer import activation_beside
from normzoo.models.rnn import CELLS
from normzoo.registry import create, list_norms

CORE = [
    "batch_norm",
    "layer_norm",
    "layer_norm_joint",
    "instance_norm",
    "group_norm",
    "sync_batch_norm",
    "batch_renorm",
    "ghost_batch_norm",
    "rms_norm",
    "none",
]
INPUTS = {
    "mlp": Inputs((12,)),
    "cnn": Inputs((3, 8, 8)),
    "rnn": Inputs((5, 3)),
    "transformer": Inputs((6, 3)),
}
REPRESENTATIVES = ["mlp", "cnn", "cnn_28", "resnet20", "lstm", "gru", "rnn_tanh", "transformer"]


class NoisyNorm(nn.Module):
    """A stranger that draws from the global random numbers whenever it can."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(num_features))
        nn.init.normal_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != len(self.scale):
            raise ValueError("channels last")
        return x * self.scale + 0.01 * torch.randn_like(x)


class Bare(nn.Module):
    """A stranger without parameters, for any layout."""

    def __init__(self, num_features: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


def inputs_of(name: str, per_position: bool = False) -> Inputs:
    inputs = INPUTS[model_info(name).family]
    return Inputs(inputs.shape, inputs.vocabulary, per_position)


def build(name: str, norm, seed: int = 0, inputs: Inputs | None = None, outputs: int = 4, **options) -> Network:
    torch.manual_seed(seed)
    return create_model(name, norm=norm, inputs=inputs or inputs_of(name), outputs=outputs, **options)


def batch(inputs: Inputs, n: int = 5, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if inputs.vocabulary:
        return torch.randint(inputs.vocabulary, (n, *inputs.shape), generator=generator)
    return torch.randn(n, *inputs.shape, generator=generator, dtype=dtype)


def norm_parameters(model: nn.Module) -> set[str]:
    return set(parameter_roles(model))


# ---- any norm in any model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [*CORE, Bare, NoisyNorm, nn.BatchNorm1d, partial(create, "group_norm", groups=1)])
@pytest.mark.parametrize("name", list_models())
def test_every_model_trains_with_every_norm(name, norm):
    small = {"lstm": {"width": 8}, "gru": {"width": 8}, "rnn_tanh": {"width": 8}, "transformer": {"width": 16}}
    model = build(name, norm, **small.get(name, {}))
    x = batch(model.inputs)
    # one unit of one sample is all that instance norm would have where there are no positions
    if norm == "instance_norm" and name in ("mlp", "mlp_784", "mlp_decay9", "cnn_28", "lstm", "gru", "rnn_tanh"):
        with pytest.raises(NormzooError, match="one value per statistic"):
            model(x)
        return
    y = model(x)
    assert y.shape == (5, 4)
    y.square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    y = model.eval()(x)
    assert y.isfinite().all()
    assert y.std(0).min() > 0  # the answer depends on the sample


def test_the_core_norms_are_those_of_the_registry():
    assert set(CORE) <= set(list_norms())


@pytest.mark.parametrize("norm", CORE)
@pytest.mark.parametrize(("name", "options"), [("lstm", {"placement": "between", "width": 8}), ("transformer", {})])
def test_sequences_take_every_norm_per_position(name, options, norm):
    model = build(name, norm, inputs=Inputs((6,), vocabulary=7, per_position=True), **options)
    y = model(batch(model.inputs))
    assert y.shape == (5, 6, 4)
    assert y.isfinite().all()


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_a_model_survives_deepcopy_and_its_state_dict(name):
    options = {"dropout": 0.1}
    model = build(name, "batch_norm", **options)
    seed_dropout(model, 1)
    x = batch(model.inputs)
    for _ in range(3):
        model(x)
    twin = copy.deepcopy(model)
    fresh = build(name, "batch_norm", seed=9, **options)
    fresh.load_state_dict(model.state_dict())
    expected = model(x)  # the masks of the fourth pass
    assert torch.equal(expected, twin(x))
    assert torch.equal(expected, fresh(x))
    assert torch.equal(model.eval()(x), fresh.eval()(x))
    assert not torch.equal(expected, model.train()(x))


@pytest.mark.parametrize("name", ["cnn", "resnet20"])
def test_memory_format_changes_nothing(name):
    model = build(name, "group_norm", dropout=0.3, **{"cnn": {"convs": (8, 8)}, "resnet20": {"width": 8}}[name])
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    x = batch(model.inputs)
    for net in (model, twin):
        seed_dropout(net, 3)
    torch.testing.assert_close(model(x), twin(x.to(memory_format=torch.channels_last)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_half_precision(name):
    model = build(name, "batch_norm", dropout=0.1).bfloat16()
    seed_dropout(model, 0)
    y = model(batch(model.inputs).bfloat16())
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


# ---- pairing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_models())
def test_what_is_not_a_norm_starts_the_same_with_every_norm(name):
    reference = dict(build(name, "none").named_parameters())
    assert reference
    for norm in ["batch_norm", "rms_norm", NoisyNorm]:
        model = build(name, norm)
        rest = {n: p for n, p in model.named_parameters() if n not in norm_parameters(model)}
        assert rest.keys() == reference.keys()
        assert norm_parameters(model)
        assert all(torch.equal(p, reference[n]) for n, p in rest.items())
    other = dict(build(name, "none", seed=1).named_parameters())
    assert not all(torch.equal(p, reference[n]) for n, p in other.items())


def masks(model: nn.Module, x: Tensor, passes: int) -> list[Tensor]:
    """Which units each dropout drops; activations here are nowhere exactly zero."""
    dropped = []
    hooks = [
        module.register_forward_hook(lambda module, args, y: dropped.append(y == 0))
        for module in model.modules()
        if isinstance(module, Dropout)
    ]
    for _ in range(passes):
        model(x)
    for hook in hooks:
        hook.remove()
    return dropped


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {"activation": "tanh"}),
        ("cnn", {"activation": "silu"}),
        ("lstm", {"depth": 2}),
        ("transformer", {}),
    ],
)
def test_dropout_drops_the_same_units_with_every_norm(name, options):
    seen = []
    for norm in ["none", "batch_norm", NoisyNorm]:
        model = build(name, norm, dropout=0.25, **options)
        seed_dropout(model, 5)
        torch.rand(len(seen))  # the global random numbers are elsewhere each time
        seen.append(masks(model, batch(model.inputs), passes=2))
    assert len(seen[0]) >= 4
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))
    half = len(seen[0]) // 2
    assert all(not torch.equal(a, b) for a, b in zip(seen[0][:half], seen[0][half:], strict=True))  # new every step
    assert torch.cat([m.flatten() for m in seen[0]]).float().mean().item() == pytest.approx(0.25, abs=0.05)
    seed_dropout(model, 6)
    assert not torch.equal(masks(model, batch(model.inputs), 1)[0], seen[0][0])


def test_two_places_drop_different_units():
    model = nn.Sequential(Dropout(0.5), Dropout(0.5))
    seed_dropout(model, 0)
    a, b = (layer(torch.ones(100)) for layer in model)
    assert not torch.equal(a, b)


# ---- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_scales_what_it_keeps():
    layer = Dropout(0.2)
    layer.seed(7)
    y = layer(torch.ones(100_000, dtype=torch.float64))
    assert set(y.unique().tolist()) == {0.0, 1.25}
    assert y.mean().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(layer.eval()(y), y)


def test_dropout_leaves_the_global_random_numbers_alone():
    layer = Dropout(0.2)
    layer.seed(7)
    before = torch.get_rng_state()
    layer(torch.ones(10))
    assert torch.equal(before, torch.get_rng_state())


def test_dropout_without_a_key_is_torchs():
    x = torch.randn(50)
    torch.manual_seed(0)
    expected = F.dropout(x, 0.3)
    torch.manual_seed(0)
    assert torch.equal(Dropout(0.3)(x), expected)


@pytest.mark.parametrize("p", [1, -0.1, "half", True, float("nan")])
def test_dropout_refuses_what_is_no_probability(p):
    with pytest.raises(NormzooError, match="probability"):
        Dropout(p)


class Shared(nn.Module):
    """A block that uses one dropout twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.dropout = Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.second(self.dropout(self.first(x).tanh())).tanh())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("scene", ["once", "twice", "same input twice", "an older pass", "again"])
def test_checkpointing_repeats_the_mask(reentrant, scene):
    def gradients(run) -> list[Tensor]:
        torch.manual_seed(0)
        block = Shared().double()
        seed_dropout(block, 3)
        x = torch.randn(8, 16, dtype=torch.float64, requires_grad=True)
        call = partial(run, block)
        if scene == "once":
            loss = call(x).square().sum()
        elif scene == "twice":
            loss = (call(x) * call(2 * x)).sum()
        elif scene == "same input twice":
            loss = (call(x) * call(x).exp()).sum()
        elif scene == "an older pass":
            loss = call(x).square().sum()
            call(3 * x)  # its result is not used
        else:
            call(x).square().sum().backward()
            loss = call(x).square().sum()
        loss.backward()
        return [p.grad for p in (x, *block.parameters()) if p.grad is not None]

    plain = gradients(lambda block, x: block(x))
    repeated = gradients(lambda block, x: checkpoint(block, x, use_reentrant=reentrant))
    assert len(plain) == 5
    for a, b in zip(plain, repeated, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_of_a_transformer(reentrant):
    def run(wrap: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = build("transformer", "batch_norm", dropout=0.3).double()
        seed_dropout(model, 1)
        if wrap:
            for block in model.get_submodule("blocks").children():
                block.forward = partial(checkpoint, block.forward, use_reentrant=reentrant)
        for step in range(2):
            model(batch(model.inputs, seed=step, dtype=torch.float64)).square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())  # pyright: ignore

    plain, repeated = run(False), run(True)
    for a, b in zip(plain, repeated, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-12, msg=name)


# ---- which norm goes where -------------------------------------------------------------------------------------------


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, Norm)}


def test_a_norm_for_each_site():
    choice = {"*": "layer_norm", "attention": "rms_norm", "blocks.1.*": "batch_norm", "final": "group_norm"}
    assert kinds(build("transformer", choice)) == {
        "blocks.0.attention_residual.norm": "RMSNorm",
        "blocks.0.mlp_residual.norm": "LayerNorm",
        "blocks.1.attention_residual.norm": "RMSNorm",  # the first pattern that matches
        "blocks.1.mlp_residual.norm": "BatchNorm",
        "final_norm": "GroupNorm",
    }
    assert kinds(build("cnn_28", {"input": "none", "dense*": "layer_norm", "*": "instance_norm"})) == {
        "input_norm": "NoNorm",
        "body.conv1.norm": "InstanceNorm",
        "body.conv2.norm": "InstanceNorm",
        "body.dense1.norm": "LayerNorm",
    }


def test_cnn_28_with_layer_norm_needs_its_own_input_norm():
    grey = Inputs((1, 28, 28))
    with pytest.raises(NormzooError, match="one value per statistic"):
        build("cnn_28", "layer_norm", inputs=grey)(batch(grey))
    assert build("cnn_28", {"input": "none", "*": "layer_norm"}, inputs=grey)(batch(grey)).shape == (5, 4)


def test_a_site_without_norm_and_a_pattern_without_site():
    with pytest.raises(NormzooError, match=r"no norm is given for the site 'blocks\.0\.mlp'"):
        build("transformer", {"attention": "rms_norm", "final": "none"})
    with pytest.raises(NormzooError, match="unknown site of a norm 'atention'; did you mean 'attention'"):
        build("transformer", {"atention": "rms_norm", "*": "none"})
    with pytest.raises(NormzooError, match="unknown site of a norm 'final'"):
        build("transformer", {"final": "rms_norm", "*": "none"}, placement="post")
    with pytest.raises(NormzooError, match="is empty"):
        build("mlp", {})


def test_the_error_of_a_model_is_not_hidden_by_unused_patterns():
    with pytest.raises(NormzooError, match="unknown norm 'bach_norm'"), Sites({"a": "bach_norm"}, channel_dim=1) as at:
        at("a", 8)


class Activated(Norm):
    """A norm with its activation."""

    @property
    def traits(self) -> Traits:
        return Traits(batch_dependent=False, causal=True, causal_in_training=True, includes_activation=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x.abs()


def test_a_norm_that_includes_an_activation_gets_none_beside_it():
    assert isinstance(activation_beside(Activated(4), "relu"), nn.Identity)
    assert isinstance(activation_beside(create("batch_norm", 4), "relu"), nn.ReLU)
    x = batch(INPUTS["mlp"])
    model = build("mlp", Activated, activation="sigmoid", widths=(7,))
    linear, head = model.get_submodule("body.layer1.linear"), model.get_submodule("head")
    assert torch.equal(model(x), head(linear(x).abs()))


# ---- MLP -------------------------------------------------------------------------------------------------------------


def test_mlp_before_and_after_the_activation():
    x = batch(INPUTS["mlp"])
    for position in ("before", "after"):
        model = build("mlp", "layer_norm", widths=(6,), activation="silu", norm_position=position)
        h = model.get_submodule("body.layer1.linear")(x)
        h = F.silu(F.layer_norm(h, (6,))) if position == "before" else F.layer_norm(F.silu(h), (6,))
        torch.testing.assert_close(model(x), model.get_submodule("head")(h))


def test_mlp_784():
    model = build("mlp_784", "batch_norm", inputs=Inputs((1, 28, 28)), outputs=10)
    assert order(model, torch.randn(2, 1, 28, 28)) == ["Linear(784,256)", "BatchNorm", "ReLU", "Linear(256,10)"]
    assert sum(p.numel() for p in model.parameters()) == 784 * 256 + 256 + 2 * 256 + 2560 + 10


def test_mlp_decay9_keeps_nine_tenths():
    model = build("mlp_decay9", "batch_renorm")
    x = batch(model.inputs)
    model(x)
    linear, norm = (model.get_submodule(f"body.layer1.{part}") for part in ("linear", "norm"))
    h = linear(x).detach()
    torch.testing.assert_close(norm.running_mean, 0.1 * h.mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * h.var(0))

    def momentum(norm) -> float:
        layer = build("mlp_decay9", norm).get_submodule("body.layer1.norm")
        return getattr(layer, "module", layer).momentum

    assert momentum("batch_norm") == momentum("ghost_batch_norm") == 0.1
    assert momentum("batch_norm(momentum=0.3)") == 0.3
    assert momentum(partial(nn.BatchNorm1d, momentum=0.4)) == 0.4
    assert momentum(nn.BatchNorm1d) == 0.1
    assert build("mlp", "batch_renorm").get_submodule("body.layer1.norm").momentum == 0.01  # its own


# ---- CNN -------------------------------------------------------------------------------------------------------------


def order(model: nn.Module, x: Tensor) -> list[str]:
    """The layers in the order in which they are called."""
    called: list[str] = []

    def note(module, args, y):
        if isinstance(module, nn.Linear | nn.Conv2d):
            called.append(f"{type(module).__name__}({module.weight.shape[1]},{module.weight.shape[0]})")
        elif isinstance(module, Norm | nn.ReLU | nn.MaxPool2d):
            called.append(type(module).__name__)

    for module in model.modules():
        module.register_forward_hook(note)
    model(x)
    return called


def test_cnn_28():
    model = build("cnn_28", "batch_norm", inputs=Inputs((1, 28, 28)), outputs=10)
    assert order(model, torch.randn(2, 1, 28, 28)) == [
        "BatchNorm",
        *("Conv2d(1,32)", "BatchNorm", "ReLU", "MaxPool2d"),
        *("Conv2d(32,64)", "BatchNorm", "ReLU", "MaxPool2d"),
        *("Linear(3136,128)", "BatchNorm", "ReLU", "Linear(128,10)"),
    ]


def test_cnn_32():
    model = build("cnn_32", "batch_norm", inputs=Inputs((3, 32, 32)), outputs=10)
    assert order(model, torch.randn(2, 3, 32, 32)) == [
        *("Conv2d(3,64)", "ReLU", "BatchNorm", "MaxPool2d"),
        *("Conv2d(64,128)", "ReLU", "BatchNorm", "MaxPool2d"),
        *("Linear(8192,1000)", "ReLU", "Linear(1000,10)"),
    ]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 12, 9), (1, 1, 1)])
def test_small_cnns_take_images_of_any_size(shape):
    for name in ("cnn", "cnn_28"):
        assert build(name, "batch_norm", inputs=Inputs(shape))(batch(Inputs(shape))).shape == (5, 4)


def resnet_parameters(depth: int, shortcut: str) -> int:
    """Counted from the paper's table: 2n convolutions of 3x3 a stage, two numbers a channel for each norm."""
    n = (depth - 2) // 6
    convolutions = [(3, 16)]
    for before, after in ((16, 16), (16, 32), (32, 64)):
        convolutions += [(before, after)] + (2 * n - 1) * [(after, after)]
    total = sum(9 * before * after + 2 * after for before, after in convolutions) + 64 * 10 + 10
    if shortcut == "B":
        total += 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    return total


@pytest.mark.parametrize(
    ("depth", "count"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_resnets_have_the_published_number_of_parameters(depth, count):
    images = Inputs((3, 32, 32))
    model = build(f"resnet{depth}", "batch_norm", inputs=images, outputs=10)
    assert sum(p.numel() for p in model.parameters()) == resnet_parameters(depth, "A") == count
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth
    wide = build(f"resnet{depth}", "batch_norm", inputs=images, outputs=10, shortcut="B")
    assert sum(p.numel() for p in wide.parameters()) == resnet_parameters(depth, "B")


def test_resnet_block_is_the_papers():
    model = build("resnet", "batch_norm", depth=8, width=4).double().eval()
    block = model.get_submodule("stages.1.0")
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64).relu()
    h = F.conv2d(x, block.conv1.weight, stride=2, padding=1) / math.sqrt(1 + 1e-5)
    h = F.conv2d(h.relu(), block.conv2.weight, padding=1) / math.sqrt(1 + 1e-5)
    h[:, :4] += x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), h.relu(), rtol=1e-12, atol=1e-12)


def test_resnet_starts_as_he_says():
    weight = build("resnet110", "none").get_submodule("stages.2.0.conv1").weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 32)), rel=0.02)


def test_resnet_refuses_what_is_none():
    with pytest.raises(NormzooError, match="6 n"):
        build("resnet", "none", depth=18)
    with pytest.raises(NormzooError, match="unknown shortcut 'C'"):
        build("resnet20", "none", shortcut="C")
    with pytest.raises(NormzooError, match="halves them twice"):
        build("resnet20", "none", inputs=Inputs((1, 3, 3)))


# ---- RNN -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["inside", "between"])
@pytest.mark.parametrize(
    ("name", "torchs"), [("lstm", nn.LSTM), ("gru", nn.GRU), ("rnn_tanh", nn.RNN)], ids=["lstm", "gru", "tanh"]
)
def test_without_a_norm_it_is_torchs(name, torchs, placement):
    inputs = Inputs((5, 3), per_position=True)
    model = build(name, "none", inputs=inputs, width=7, depth=2, placement=placement).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    reference = torchs(3, 7, num_layers=2, batch_first=True).double()
    for i in range(2):
        cell = model.get_submodule(f"layers.{i}.cell")
        for key, parameter in cell.named_parameters():
            getattr(reference, f"{key}_l{i}").data.copy_(parameter)
    x = batch(inputs, dtype=torch.float64).requires_grad_()
    y, expected = model(x), model.get_submodule("head")(reference(x)[0])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad, expected_grad = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)
    last = build(name, "none", inputs=Inputs((5, 3)), width=7, depth=2, placement=placement).double()
    last.load_state_dict(model.state_dict())
    torch.testing.assert_close(last(x), expected[:, -1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", sorted(CELLS))
def test_cells_load_torchs_state_dicts(cell):
    torchs = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "tanh": nn.RNNCell}[cell](3, 4)
    ours = CELLS[cell](3, 4, "orthogonal")
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(2, 3)
    state = ours(x @ ours.weight_ih.T, ours.start(x), lambda point, value: value)
    expected = torchs(x)
    torch.testing.assert_close(state[0], expected[0] if cell == "lstm" else expected)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh"])
def test_recurrences_start_well(name):
    model = build(name, "none", width=6)
    cell = model.get_submodule("layers.0.cell")
    for gate in cell.weight_hh.chunk(cell.gates):
        torch.testing.assert_close(gate @ gate.T, torch.eye(6), rtol=1e-5, atol=1e-5)
    forget = torch.zeros(cell.gates * 6)
    if name == "lstm":
        forget[6:12] = 1
    assert torch.equal((cell.bias_ih + cell.bias_hh).detach(), forget)
    identity = build(name, "none", width=6, recurrent_init="identity").get_submodule("layers.0.cell")
    assert torch.equal(identity.weight_hh.detach(), torch.eye(6).repeat(cell.gates, 1))


def bn_lstm(x: Tensor, cell: nn.Module, gain: float) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """Cooijmans et al. 2016, equations 6 to 8, in training; and what the three norms saw at each step."""

    def norm(v: Tensor) -> Tensor:
        return gain * (v - v.mean(0)) / torch.sqrt(v.var(0, correction=0) + 1e-5)

    h = c = x.new_zeros(len(x), cell.width)
    seen = []
    for x_t in x.unbind(1):
        wx, wh = x_t @ cell.weight_ih.T, h @ cell.weight_hh.T
        i, f, g, o = (norm(wx) + norm(wh) + cell.bias_ih + cell.bias_hh).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * norm(c).tanh()
        seen.append((wx, wh, c))
    return h, seen


def test_recurrent_batch_norm_is_the_papers():
    model = build("lstm", "batch_norm", width=7).double()
    layer = model.get_submodule("layers.0")
    x = batch(model.inputs, n=9, dtype=torch.float64)
    gain = layer.norms["cell"].steps[0].weight[0].item()
    assert gain == pytest.approx(0.1)
    h, seen = bn_lstm(x, layer.cell, gain)
    torch.testing.assert_close(model(x), model.get_submodule("head")(h), rtol=1e-10, atol=1e-12)
    for point, values in zip(("input", "hidden", "cell"), zip(*seen, strict=True), strict=True):
        for norm, value in zip(layer.norms[point].steps, values, strict=True):
            torch.testing.assert_close(norm.running_mean, 0.1 * value.mean(0), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * value.var(0), rtol=1e-10, atol=1e-12)
            assert norm.num_batches_tracked == 1
    assert len(layer.norms["cell"].steps) == 5


def test_beyond_the_trained_length_the_last_statistics_are_used():
    model = build("lstm", "batch_norm", width=4, max_steps=8).double()
    x = torch.randn(6, 12, 3, dtype=torch.float64)
    for _ in range(3):
        model(x[:, :5])
    model.eval()
    layer = model.get_submodule("layers.0")
    used: dict[str, list[int]] = {"input": [], "hidden": [], "cell": []}
    for point, steps in used.items():
        for i, norm in enumerate(layer.norms[point].steps):
            norm.register_forward_hook(lambda *_, steps=steps, i=i: steps.append(i))
    y = model(x)
    assert all(steps == [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 4, 4] for steps in used.values())
    assert y.isfinite().all()
    fresh = build("lstm", "batch_norm", width=4, max_steps=8).double().eval()
    fresh.load_state_dict(model.state_dict())  # how far it was trained is saved
    assert torch.equal(fresh(x), y)
    model.train()(x)  # longer than there are statistics: the last is shared
    assert int(layer.norms["input"].trained_steps) == 8
    assert int(layer.norms["input"].steps[7].num_batches_tracked) == 5
    assert int(layer.norms["input"].steps[6].num_batches_tracked) == 1


def test_steps_share_parameters_and_nothing_else():
    layer = PerStep(create("batch_norm", 4, channel_dim=-1), 3)
    assert [name for name, _ in layer.named_parameters()] == ["steps.0.weight", "steps.0.bias"]
    twin = copy.deepcopy(layer)
    for module in (layer, twin, layer.double()):
        assert len({id(norm.weight) for norm in module.steps}) == 1
        assert len({id(norm.running_mean) for norm in module.steps}) == 3
    assert twin.steps[0].weight is not layer.steps[0].weight
    stateless = PerStep(create("layer_norm", 4, channel_dim=-1), 3)
    assert len(stateless.steps) == 1
    assert stateless.last(7) == 0
    foreign = PerStep(create(nn.BatchNorm1d, 4, channel_dim=-1), 3)
    assert len(foreign.steps) == 3
    roles = parameter_roles(build("lstm", "batch_norm"))
    named = dict(build("lstm", "batch_norm").named_parameters())
    assert {roles[n] for n in named if n in roles} == {"gain", "shift"}
    assert sum(n in roles for n in named) == 6


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", "rms_norm", nn.LayerNorm, nn.BatchNorm1d])
def test_gains_start_small_inside_the_recurrence_only(norm):
    def gains(**options) -> set[float]:
        model = build("lstm", norm, **options)
        roles = parameter_roles(model)
        return {
            v
            for n, p in model.named_parameters()
            if roles.get(n) == "gain"
            for v in p.double().round(decimals=6).tolist()
        }

    assert gains() == {0.1}
    assert gains(gain=0.5) == {0.5}
    assert gains(gain=None) == gains(placement="between") == {1.0}


def test_points_can_be_chosen():
    model = build("lstm", {"input": "batch_norm", "*": "rms_norm"}, norm_points=("input", "cell"), depth=2, width=4)
    sites = {name.rpartition(".steps.")[0]: kind for name, kind in kinds(model).items()}
    assert sites == {
        f"layers.{i}.norms.{p}": k for i in range(2) for p, k in (("input", "BatchNorm"), ("cell", "RMSNorm"))
    }
    with pytest.raises(NormzooError, match=r"unknown norm point of the cell 'gru' 'cell'; known: hidden, input"):
        build("gru", "none", norm_points=("cell",))
    with pytest.raises(NormzooError, match="leave them"):
        build("lstm", "none", norm_points=("cell",), placement="between")
    with pytest.raises(NormzooError, match="unknown placement 'betwen'; did you mean 'between'"):
        build("lstm", "none", placement="betwen")


def test_between_layers_statistics_are_over_batch_and_time():
    model = build("gru", "batch_norm", placement="between", width=4).double()
    x = batch(model.inputs, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 1, 4])[:, None]
    model(torch.where(mask[..., None], x, torch.nan), mask)
    layer = model.get_submodule("layers.0")
    real = (x @ layer.cell.weight_ih.T)[mask]
    torch.testing.assert_close(layer.between.running_mean, 0.1 * real.mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.between.running_var, 0.9 + 0.1 * real.var(0), rtol=1e-10, atol=1e-12)


# ---- masks -----------------------------------------------------------------------------------------------------------

LENGTHS = [5, 2, 3, 1, 5, 4]


def padded(inputs: Inputs) -> tuple[Tensor, Tensor]:
    x = batch(inputs, n=len(LENGTHS), dtype=torch.float64)
    mask = torch.arange(inputs.shape[0]) < torch.tensor(LENGTHS)[:, None]
    return torch.where(
        mask if inputs.vocabulary else mask[..., None], x, -100 if inputs.vocabulary else torch.nan
    ), mask


@pytest.mark.parametrize("norm", ["layer_norm", "group_norm", "none"])
@pytest.mark.parametrize("vocabulary", [0, 11])
@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lstm", {"depth": 2}),
        ("lstm", {"depth": 2, "placement": "between"}),
        ("gru", {}),
        ("rnn_tanh", {}),
        ("transformer", {"placement": "pre"}),
        ("transformer", {"placement": "post", "embedding_norm": True}),
        ("transformer", {"pool": "mean"}),
        ("transformer", {"causal": False}),
        ("transformer", {"causal": True}),
    ],
)
def test_a_padded_batch_equals_its_sequences_one_by_one(name, options, per_position, vocabulary, norm):
    if norm == "group_norm" and (name == "transformer" or options.get("placement") == "between"):
        norm = "layer_norm_joint" if not options.get("causal") and not per_position else "rms_norm"
    if per_position and "pool" in options:
        options = {"causal": False}
    inputs = Inputs((6,) if vocabulary else (6, 3), vocabulary, per_position)
    model = build(name, norm, inputs=inputs, width=8, **options).double()
    x, mask = padded(inputs)
    y = model(x, mask)
    y[mask if per_position else ...].square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    single = [model(x[i : i + 1, :length]) for i, length in enumerate(LENGTHS)]
    for i, length in enumerate(LENGTHS):
        ours = y[i, :length] if per_position else y[i]
        torch.testing.assert_close(ours, single[i][0], rtol=1e-10, atol=1e-10)
    torch.stack([s.square().sum() for s in single]).sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(grads[n], p.grad, rtol=1e-9, atol=1e-10, msg=n)


@pytest.mark.parametrize("name", ["lstm", "transformer"])
@pytest.mark.parametrize("norm", [norm for norm in CORE if norm != "instance_norm"])
def test_padding_reaches_nothing(name, norm):
    """Batch statistics depend on the other samples, never on what is in the padding or on how much there is."""
    x, mask = padded(Inputs((6, 3)))
    wider = F.pad(x, (0, 0, 0, 1), value=float("inf")), F.pad(mask, (0, 1))
    inputs = Inputs((7, 3))
    for training in (True, False):
        results = []
        for values, real in ((x, mask), (x.nan_to_num(7.0), mask), wider):
            model = build(name, norm, inputs=inputs, width=8).double().train(training)
            y = model(values, real)
            y.square().sum().backward()
            assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
            results.append((y, model))
        for y, model in results[1:]:
            torch.testing.assert_close(y, results[0][0], rtol=1e-10, atol=1e-10)
            for (n, a), (_, b) in zip(results[0][1].named_buffers(), model.named_buffers(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=n)


def test_statistics_of_a_step_are_over_the_sequences_that_last():
    model = build("rnn_tanh", "batch_norm", inputs=Inputs((6, 3)), width=4).double()
    x, mask = padded(model.inputs)
    mask[0, 4] = False  # one sequence alone lasts to step 4, none to step 5
    model(x, mask)
    layer = model.get_submodule("layers.0")
    norms = layer.norms["input"].steps
    for t in range(4):
        value = x[mask[:, t], t] @ layer.cell.weight_ih.T
        torch.testing.assert_close(norms[t].running_mean, 0.1 * value.mean(0), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(norms[t].running_var, 0.9 + 0.1 * value.var(0), rtol=1e-10, atol=1e-12)
    for t in (4, 5):  # a lonely sequence has no variance to learn from
        assert norms[t].num_batches_tracked == 0
        assert torch.equal(norms[t].running_var, torch.ones_like(norms[t].running_var))
    assert layer.norms["input"].trained_steps == 4
    assert all(norm.training for norm in norms)


def test_a_mask_with_holes_holds_the_state():
    model = build("lstm", "layer_norm", inputs=Inputs((6, 3), per_position=True), width=4).double()
    x = batch(model.inputs, n=2, dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True, False, True], [False, False, True, False, True, True]])
    y = model(x, mask)
    for i in range(2):
        torch.testing.assert_close(y[i, mask[i]], model(x[i : i + 1, mask[i]])[0], rtol=1e-10, atol=1e-10)
    assert torch.equal(y[0, 1], y[0, 0])


@pytest.mark.parametrize("options", [{}, {"causal": True}])
@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_an_empty_sequence_is_finite(name, options):
    if name == "lstm":
        options = {}
    model = build(name, "batch_norm", **options)
    mask = torch.ones(5, INPUTS[model_info(name).family].shape[0], dtype=torch.bool)
    mask[2] = False
    mask[1, :3] = False  # padding on the left
    y = model(batch(model.inputs), mask)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- Transformer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_causal_decoder_does_not_see_what_comes(placement, masked):
    inputs = Inputs((6,), vocabulary=9, per_position=True)
    model = build("transformer", "layer_norm", inputs=inputs, placement=placement).double()
    x = batch(inputs)
    mask = torch.ones_like(x, dtype=torch.bool) if masked else None
    y = model(x, mask)
    for t in range(5):
        other = x.clone()
        other[:, t + 1 :] = (other[:, t + 1 :] + 1) % 9
        z = model(other, mask)
        torch.testing.assert_close(z[:, : t + 1], y[:, : t + 1], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(z[:, t + 1], y[:, t + 1])
    encoder = build("transformer", "layer_norm", inputs=inputs, causal=False).double()
    assert not torch.allclose(encoder(x)[:, 0], encoder(other)[:, 0])


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_the_block_is_that_of_the_paper(placement):
    width, heads = 8, 2
    model = build("transformer", "layer_norm", depth=1, width=width, heads=heads, placement=placement).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    block = model.get_submodule("blocks.0")
    torchs = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=placement == "pre"
    ).double()
    ours = {
        "self_attn.in_proj_": block.attention.qkv,
        "self_attn.out_proj.": block.attention.out,
        "linear1.": block.mlp[0],
        "linear2.": block.mlp[3],
        "norm1.": block.attention_residual.norm,
        "norm2.": block.mlp_residual.norm,
    }
    torchs.load_state_dict({f"{key}{part}": getattr(m, part) for key, m in ours.items() for part in ("weight", "bias")})
    x = torch.randn(3, 5, width, dtype=torch.float64)
    torch.testing.assert_close(block(x, None, None, False), torchs(x), rtol=1e-10, atol=1e-12)
    hooked = {}
    for name in ("attention", "mlp"):
        block.get_submodule(name).register_forward_hook(lambda m, args, y, name=name: hooked.update({name: y}))
    y = block(x, None, None, False)

    def norm(v: Tensor, layer: Norm) -> Tensor:
        centred = v - v.mean(-1, keepdim=True)
        return layer.weight * centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5) + layer.bias

    if placement == "post":
        h = norm(x + hooked["attention"], block.attention_residual.norm)
        expected = norm(h + hooked["mlp"], block.mlp_residual.norm)
    else:
        expected = x + hooked["attention"] + hooked["mlp"]
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)


def test_a_placement_of_ones_own():
    try:

        @register_placement("sandwich_of_a_test")
        class Sandwich(Placement):
            final = True

            def __init__(self, norm_at: Sites, site: str, width: int) -> None:
                super().__init__(norm_at, f"{site}.before", width)
                self.after = norm_at(f"{site}.after", width)

            def forward(self, x, branch, mask):
                return x + self.after(branch(self.norm(x, mask)), mask)

        norm = {"after": "rms_norm", "*": "layer_norm"}
        model = build("transformer", norm, placement="sandwich_of_a_test", depth=1)
        assert sorted(kinds(model).values()) == ["LayerNorm"] * 3 + ["RMSNorm"] * 2
        assert model(batch(model.inputs)).isfinite().all()
        with pytest.raises(NormzooError, match="registered already"):
            register_placement("sandwich_of_a_test")(Sandwich)

        @register_placement("inner_of_a_test")
        class Inner(Placement):
            final = False

            def forward(self, x, branch, mask):
                return x + self.norm(branch(x), mask)  # nothing clears the padding after this

        model = build("transformer", "rms_norm", placement="inner_of_a_test", pool="mean").double()
        x, mask = padded(model.inputs)
        for y, row, length in zip(model(x, mask), x, LENGTHS, strict=True):
            torch.testing.assert_close(y, model(row[None, :length])[0], rtol=1e-10, atol=1e-10)
    finally:
        transformer_room.PLACEMENTS.pop("sandwich_of_a_test", None)
        transformer_room.PLACEMENTS.pop("inner_of_a_test", None)
    with pytest.raises(NormzooError, match="unknown placement 'sandwich_of_a_test'"):
        build("transformer", "none", placement="sandwich_of_a_test")


def test_transformer_options_that_do_not_fit():
    tokens = Inputs((6,), vocabulary=9, per_position=True)
    with pytest.raises(NormzooError, match="does not divide"):
        build("transformer", "none", width=10, heads=4)
    with pytest.raises(NormzooError, match="leave it out"):
        build("transformer", "none", inputs=tokens, pool="mean")
    with pytest.raises(NormzooError, match="see itself alone"):
        build("transformer", "none", causal=True, pool="cls")
    with pytest.raises(NormzooError, match="7 positions; it has learned positions for 6"):
        build("transformer", "none")(torch.randn(2, 7, 3))
    assert build("transformer", "none")(torch.randn(2, 4, 3)).shape == (2, 4)


# ---- names, options, inputs ------------------------------------------------------------------------------------------


def test_unknown_names_and_options():
    with pytest.raises(NormzooError, match=r"unknown model 'resnet2O'; did you mean .*'resnet20'"):
        build("resnet2O", "none", inputs=INPUTS["cnn"])
    with pytest.raises(OptionError, match="the model 'mlp' has no option 'width'; did you mean 'widths'"):
        build("mlp", "none", width=(3,))
    with pytest.raises(OptionError, match="the model 'resnet20' has no option 'depth'"):
        build("resnet20", "none", depth=32)
    with pytest.raises(NormzooError, match="unknown norm 'bach_norm'; did you mean 'batch_norm'"):
        build("mlp", "bach_norm")
    with pytest.raises(NormzooError, match="unknown activation 'rellu'; did you mean 'relu'"):
        build("mlp", "none", activation="rellu")
    with pytest.raises(NormzooError, match="unknown norm_position 'befor'; did you mean 'before'"):
        build("cnn", "none", norm_position="befor")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {"widths": 64}),
        ("mlp", {"widths": (64, 0)}),
        ("mlp", {"widths": "64"}),
        ("cnn", {"convs": (8, 2.5)}),
        ("resnet", {"width": -1}),
        ("lstm", {"width": True}),
        ("lstm", {"max_steps": 0}),
        ("transformer", {"depth": 0}),
        ("mlp", {"outputs": 0}),
    ],
)
def test_sizes_are_positive_whole_numbers(name, options):
    with pytest.raises(NormzooError, match="whole number"):
        build(name, "none", **options)


def test_info_lists_the_options_that_are_left():
    info = model_info("resnet56")
    assert info.family == "cnn"
    assert dict(info.fixed) == {"depth": 56}
    assert info.options["shortcut"] == "A"
    assert "depth" not in info.options
    assert all(model_info(name).summary for name in list_models())
    assert {model_info(name).family for name in list_models()} == {"mlp", "cnn", "rnn", "transformer"}


def test_a_model_of_ones_own():
    try:

        @register_model("line_of_a_test")
        class Line(Network):
            """One linear map and its norm."""

            family = "mlp"

            def __init__(self, *, norm, inputs: Inputs, outputs: int, bias: bool = True) -> None:
                super().__init__(inputs, outputs)
                self.line = nn.Linear(self.features, outputs, bias=bias)
                with Sites(norm, channel_dim=1) as norm_at:
                    self.norm = norm_at("line", outputs)

            def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
                return self.norm(self.line(self.admit(x, mask)))

        assert dict(model_info("line_of_a_test").options) == {"bias": True}
        assert model_info("line_of_a_test").summary == "One linear map and its norm."
        assert build("line_of_a_test", "layer_norm", bias=False)(batch(INPUTS["mlp"])).shape == (5, 4)
        with pytest.raises(NormzooError, match="registered already"):
            register_model("line_of_a_test")(Line)
        with pytest.raises(OptionError, match="no option 'bis'; did you mean 'bias'"):
            register_model("another_line", bis=True)(Line)
    finally:
        models_base._models.pop("line_of_a_test", None)


def test_inputs_are_checked_when_a_model_is_built():
    with pytest.raises(NormzooError, match="positive whole numbers"):
        Inputs((3, 0))
    with pytest.raises(NormzooError, match="symbols of shape"):
        Inputs((3, 2), vocabulary=5)
    with pytest.raises(NormzooError, match="number of symbols"):
        Inputs((3,), vocabulary=-1)
    assert Inputs([4, 2]).shape == (4, 2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(NormzooError, match="images"):
        build("cnn", "none", inputs=Inputs((8, 8)))
    with pytest.raises(NormzooError, match="sequences"):
        build("lstm", "none", inputs=Inputs((8,)))
    with pytest.raises(NormzooError, match="rnn and transformer"):
        build("mlp", "none", inputs=Inputs((8,), vocabulary=3))
    with pytest.raises(NormzooError, match="rnn and transformer"):
        build("cnn", "none", inputs=Inputs((1, 8, 8), per_position=True))


def test_batches_are_checked_when_a_model_is_called():
    mask = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(NormzooError, match=r"got x of shape \(2, 11\) .* built for \(N, 12\) floats"):
        build("mlp", "none")(torch.randn(2, 11))
    with pytest.raises(NormzooError, match="built for"):
        build("lstm", "none")(torch.randn(2, 5, 4))
    with pytest.raises(NormzooError, match=r"dtype torch\.int64"):
        build("lstm", "none")(torch.ones(2, 5, 3, dtype=torch.long))
    with pytest.raises(NormzooError, match="integers"):
        build("lstm", "none", inputs=Inputs((5,), vocabulary=3))(torch.rand(2, 5))
    with pytest.raises(NormzooError, match="only sequences"):
        build("mlp", "none")(torch.randn(2, 12), torch.ones(2, 12, dtype=torch.bool))
    for wrong in (mask.float(), mask[:, :4], mask[0]):
        with pytest.raises(NormzooError, match="got a mask of shape"):
            build("lstm", "none")(torch.randn(2, 5, 3), wrong)


def test_three_lines_make_a_norm_for_every_family():
    class HaloNorm(MomentNorm):
        """Groups of channels share a statistic over the whole batch."""

        moments = "b (g c) s -> g"

    for name in REPRESENTATIVES:
        model = build(name, partial(HaloNorm, groups=1))
        model(batch(model.inputs)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
