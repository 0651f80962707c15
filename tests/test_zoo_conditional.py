"""Norms whose affine part follows a condition, each against a closed form of its own, in float64."""

from __future__ import annotations

import copy
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import normzoo as nz
from normzoo.checks import check_norm
from normzoo.layers.base import Norm
from normzoo.layers.conditional import AdaRMSNorm, ConditionalBatchNorm, FiLM, SandwichBatchNorm, condition

BASES = {
    "conditional_batch_norm": "batch_norm",
    "conditional_instance_norm": "instance_norm",
    "film": "batch_norm",
    "ada_layer_norm": "layer_norm",
    "ada_layer_norm_zero": "layer_norm",
    "ada_rms_norm": "rms_norm",
    "ada_group_norm": "group_norm",
    "sandwich_batch_norm": "batch_norm",
    "ada_lin": None,
    "ada_in": "instance_norm(affine=False)",
    "spade": "batch_norm",
}
VECTOR = [name for name in BASES if name not in ("ada_in", "spade")]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def make(spec: str, channels: int = 8, **options) -> Norm:
    return nz.create(spec, channels, dtype=torch.float64, **options)


def randomize(norm: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) - 0.5)
    return norm


def data(shape=(4, 8, 6, 5), seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(shape, generator=generator, dtype=torch.float64) + 1.5


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, **CLOSE)


def given(norm: nn.Module, z: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    with condition(norm, z):
        return norm(x, mask)


def base_of(name: str, **options) -> Norm:
    """The norm without an affine part, made apart from the one under test."""
    if name == "ada_lin":
        return make(name, affine=False, **options)
    spec = BASES[name]
    return make(spec, **options) if "affine" in spec else make(spec, affine=False, **options)


def column(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return values.view(*values.shape, *[1] * (x.ndim - 2))


# ---- without a condition, and at the start ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BASES, "attentive_norm"])
def test_made_for_no_condition_it_is_the_plain_norm(name: str) -> None:
    if name in ("ada_lin", "attentive_norm"):
        return
    norm, plain, x = make(name), make(BASES[name]), data()
    close(norm(x), plain(x))
    close(norm.eval()(x), plain.eval()(x))
    assert sum(p.numel() for p in norm.parameters()) == sum(p.numel() for p in plain.parameters())
    assert norm.traits == plain.traits


@pytest.mark.parametrize("name", [*VECTOR, "spade"])
def test_zero_at_the_start_it_is_the_plain_norm(name: str) -> None:
    x = data()
    conditions = {"condition_features": (3, data((4, 3)))}
    if name == "spade":
        conditions = {"condition_features": (3, data((4, 3, 12, 10)))}
    else:
        conditions["classes"] = 5, torch.tensor([0, 4, 4, 2])
    for option, (size, z) in conditions.items():
        norm = make(name, **{option: size})
        expected = make(name)(x)
        close(given(norm, z, x), expected)


@pytest.mark.parametrize("name", VECTOR)
def test_the_affine_part_follows_a_vector(name: str) -> None:
    norm, x, z = randomize(make(name, condition_features=3)), data(), data((4, 3), seed=2)
    base = base_of(name)
    if name == "ada_lin":
        base.load_state_dict({key: value for key, value in norm.state_dict().items() if key.startswith("norm.")})
    hidden = z
    predictor = norm.predictor
    if name in ("ada_layer_norm", "ada_layer_norm_zero", "ada_group_norm"):
        hidden = z * torch.sigmoid(z)
    if name == "conditional_batch_norm":
        hidden = (z @ predictor.hidden_weight.T + predictor.hidden_bias).clamp(min=0)
    parts = (hidden @ predictor.weight.T).split(8, 1)
    x_hat = base(x)
    if name == "sandwich_batch_norm":
        shared = x_hat * norm.weight[:, None, None] + norm.bias[:, None, None]
        expected = shared * (1 + column(parts[0], x)) + column(parts[1], x)
    else:
        expected = x_hat * column(norm.weight + parts[0], x)
        if name != "ada_rms_norm":
            expected = expected + column(norm.bias + parts[1], x)
    close(given(norm, z, x), expected)


@pytest.mark.parametrize("name", VECTOR)
def test_classes_are_rows_of_a_table(name: str) -> None:
    norm, x, ids = randomize(make(name, classes=5)), data(), torch.tensor([0, 4, 4, 2])
    y = given(norm, ids, x)
    close(given(norm, F.one_hot(ids, 5).double(), x), y)  # weights that choose one row
    gain = norm.table[ids][:, :8]
    changed = copy.deepcopy(norm)
    with torch.no_grad():  # a gain and shift per sample, done by hand
        changed.table.zero_()
    if name not in ("sandwich_batch_norm", "ada_rms_norm"):
        x_hat = (given(changed, ids, x) - norm.bias[:, None, None]) / norm.weight[:, None, None]
        shift = norm.table[ids][:, 8:16]
        close(y, x_hat * column(norm.weight + gain, x) + column(norm.bias + shift, x))
    half = torch.tensor([[0.5, 0.0, 0.5, 0.0, 0.0]], dtype=torch.float64).expand(4, -1)
    both = [given(copy.deepcopy(norm), torch.full((4,), k), x) for k in (0, 2)]
    close(given(copy.deepcopy(norm), half, x), (both[0] + both[1]) / 2)  # linear in the table


def test_classes_of_batch_norm_share_the_statistics() -> None:
    norm, x = make("conditional_batch_norm", classes=2), data()
    given(norm, torch.tensor([0, 0, 1, 1]), x)
    plain = make("batch_norm")
    plain(x)
    close(norm.norm.running_mean, plain.running_mean)
    close(norm.norm.running_var, plain.running_var)


# ---- what each of them says ------------------------------------------------------------------------------------------


def test_film_alone_is_a_line_for_each_channel() -> None:
    norm, x, z = randomize(make("film", norm="none", condition_features=3)), data((4, 8)), data((4, 3))
    weight = norm.predictor.weight
    expected = (norm.weight + z @ weight[:8].T) * x + norm.bias + z @ weight[8:].T
    close(given(norm, z, x), expected)
    # linear in the condition
    origin = given(norm, torch.zeros_like(z), x)
    close(given(norm, 3 * z, x) - origin, 3 * (given(norm, z, x) - origin))


def test_film_with_a_condition_for_each_position() -> None:
    norm = randomize(make("film", norm="layer_norm", condition_features=3, channel_dim=-1))
    x, z = data((4, 6, 8)), data((4, 6, 3), seed=3)
    each = [given(norm, z[:, t], x[:, t]) for t in range(6)]
    close(given(norm, z, x), torch.stack(each, 1))
    first = make("film", norm="layer_norm", condition_features=3)
    first.load_state_dict(norm.state_dict())
    close(given(first, z, x.mT).mT, torch.stack(each, 1))


def test_ada_in_takes_on_the_statistics_of_the_style() -> None:
    x, style = data(), data((4, 8, 3, 9), seed=5) * 2 - 7
    y = given(make("ada_in", style=True, eps=0.0), style, x)
    close(y.mean((2, 3)), style.mean((2, 3)))
    close(y.var((2, 3), correction=0), style.var((2, 3), correction=0))
    eps = 0.5
    y = given(make("ada_in", style=True, eps=eps), style, x).numpy()
    moments = lambda v: (v.mean((2, 3), keepdims=True), np.sqrt(v.var((2, 3), keepdims=True) + eps))  # noqa: E731
    (mu, sigma), (mu_style, sigma_style) = moments(x.numpy()), moments(style.numpy())
    np.testing.assert_allclose(y, sigma_style * (x.numpy() - mu) / sigma + mu_style, atol=1e-10)


def test_ada_in_of_its_own_style_is_the_identity() -> None:
    x = data()
    close(given(make("ada_in", style=True), x, x), x)
    assert not list(make("ada_in", style=True).parameters())


def test_ada_lin_between_its_two_norms() -> None:
    x = data()
    for share, name in ((1.0, "instance_norm"), (0.0, "layer_norm_joint")):
        close(make("ada_lin", share=share)(x), make(name)(x))
    norm = make("ada_lin")
    expected = 0.9 * make("instance_norm")(x) + 0.1 * make("layer_norm_joint")(x)
    close(norm(x), expected)
    with torch.no_grad():  # cut off outside
        norm.norm.rho.copy_(torch.tensor([-1.0, 2.0] * 4))
    y, one, zero = norm(x), make("instance_norm")(x), make("layer_norm_joint")(x)
    close(y[:, 1::2], one[:, 1::2])
    close(y[:, ::2], zero[:, ::2])


def test_spade_against_convolutions() -> None:
    norm, x, z = randomize(make("spade", condition_features=3, hidden=5)), data(), data((4, 3, 12, 10), seed=4)
    p = norm.predictor
    small = z[:, :, ::2, ::2]  # the nearest of twice as many
    changes = F.conv2d(F.conv2d(small, p.hidden_weight, p.hidden_bias, padding=1).relu(), p.weight, padding=1)
    x_hat = make("batch_norm", affine=False)(x)
    gain, shift = norm.weight[:, None, None] + changes[:, :8], norm.bias[:, None, None] + changes[:, 8:]
    close(given(norm, z, x), gain * x_hat + shift)
    last = make("spade", condition_features=3, hidden=5, channel_dim=-1)
    last.load_state_dict({k: v for k, v in norm.state_dict().items() if "running" not in k}, strict=False)
    close(given(last, z.movedim(1, -1), x.movedim(1, -1)).movedim(-1, 1), gain * x_hat + shift)


def test_spade_with_a_constant_map_is_class_conditional() -> None:
    x, ids = data((4, 8, 7, 7)), torch.tensor([0, 2, 2, 1])
    one_hot = F.one_hot(ids, 3).double()
    constant = one_hot[:, :, None, None].expand(-1, -1, 7, 7)
    for kernel_size in (1, 3):
        norm = randomize(make("spade", condition_features=3, hidden=5, kernel_size=kernel_size))
        classes = make("conditional_batch_norm", classes=3)
        p = norm.predictor
        with torch.no_grad():  # where a constant is all that the kernels see
            classes.weight.copy_(norm.weight)
            classes.bias.copy_(norm.bias)
            classes.table.copy_((p.hidden_weight.sum((2, 3)).T + p.hidden_bias).relu() @ p.weight.sum((2, 3)).T)
        inner = slice(kernel_size - 1, 8 - kernel_size)
        close(given(norm, constant, x)[:, :, inner, inner], given(classes, ids, x)[:, :, inner, inner])


@pytest.mark.parametrize("dims", [1, 3])
def test_spade_for_sequences_and_volumes(dims: int) -> None:
    shape = (5, 4, 3)[:dims]
    norm = randomize(make("spade", condition_features=2, hidden=3, dims=dims))
    x, z = data((2, 8, *shape)), data((2, 2, *shape))
    x_hat = make("batch_norm", affine=False)(x)
    changes = norm.predictor(z)
    parameters = [column(v, x) for v in (norm.weight[None], norm.bias[None])]
    close(given(norm, z, x), (parameters[0] + changes[:, :8]) * x_hat + parameters[1] + changes[:, 8:])


def test_ada_layer_norm_zero_closes_the_branch_at_the_start() -> None:
    norm, x, z = make("ada_layer_norm_zero", condition_features=3, channel_dim=-1), data((4, 6, 8)), data((4, 3))
    branch = nn.Linear(8, 8, dtype=torch.float64)
    with condition(norm, z):
        y = x + norm.gate(branch(norm(x)))
        assert torch.equal(y, x)
        y.square().sum().backward()
    rows = norm.predictor.weight.grad.split(8)
    assert not rows[0].any()  # behind a closed gate
    assert not rows[1].any()
    assert rows[2].any()  # which learns to open
    assert norm.gate_bias.grad.any()
    randomize(norm)
    alpha = norm.gate_bias + F.silu(z) @ norm.predictor.weight[16:].T
    with condition(norm, z):
        close(norm.gate(x), alpha[:, None] * x)
    plain = make("ada_layer_norm_zero", channel_dim=-1)
    assert plain.gate(x) is x
    assert plain.gate_bias is None


def test_sandwich_without_a_shared_part_is_conditional_batch_norm() -> None:
    x, ids = data(), torch.tensor([0, 4, 4, 2])
    sandwich = make("sandwich_batch_norm", classes=5, affine=False)
    other = make("conditional_batch_norm", classes=5, affine=False)
    randomize(sandwich)
    other.load_state_dict(sandwich.state_dict())
    close(given(sandwich, ids, x), given(other, ids, x))


def test_attentive_norm_is_the_closed_form() -> None:
    for name, base in (("batch_norm", "batch_norm"), ("group_norm(groups=2)", "group_norm(groups=2)")):
        norm, x = randomize(make("attentive_norm", mixtures=3, norm=name)), data()
        mu, var = x.mean((2, 3)), x.var((2, 3), correction=0)
        logits = (mu / (var + 1e-3).sqrt()) @ norm.attention_weight.T + norm.attention_bias
        shares = (logits + 3).clamp(0, 6) / 6
        x_hat = make(base, affine=False)(x)
        expected = sum(
            shares[:, k, None, None, None] * (norm.gains[k][:, None, None] * x_hat + norm.shifts[k][:, None, None])
            for k in range(3)
        )
        close(norm(x), expected)
    assert not norm.traits.batch_dependent


def test_attentive_norm_with_equal_parts_is_the_plain_norm() -> None:
    norm, x = make("attentive_norm", mixtures=2), data()
    with torch.no_grad():
        norm.attention_weight.zero_()  # each share is one half
        norm.gains.fill_(1)
        norm.shifts.zero_()
    close(norm(x), make("batch_norm")(x))


def test_any_norm_can_be_conditioned() -> None:
    x, z = data((6, 8, 5)), data((6, 3))
    for spec in ("layer_norm", "zca_norm(groups=2)", "batch_norm(momentum=0.5)", "rms_norm", "none", "switchable_norm"):
        norm = make("film", norm=spec, condition_features=3)
        plain = nz.create("none", 8) if spec == "none" else make(spec, affine=False)
        close(given(norm, z, x), plain(x))
        assert norm.traits == plain.traits
    assert make("film", norm="batch_norm(eps=0.5)").norm.eps == 0.5
    assert make("film", eps=0.25).norm.eps == 0.25


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VECTOR)
def test_gradients_reach_the_condition(name: str) -> None:
    norm = randomize(make(name, 4, condition_features=3))
    function = lambda x, z: given(copy.deepcopy(norm), z, x)  # noqa: E731
    inputs = [data((3, 4, 5)).requires_grad_(), data((3, 3), seed=6).requires_grad_()]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)
    inputs[1].grad = None
    function(*inputs).sin().sum().backward()
    assert inputs[1].grad.any()


def test_gradients_reach_styles_maps_and_tables() -> None:
    for name, options, shape in (
        ("ada_in", {"style": True}, (2, 4, 4)), ("spade", {"condition_features": 2, "hidden": 3, "dims": 1}, (2, 2, 5)),
    ):  # fmt: skip
        norm = randomize(make(name, 4, **options))
        function = lambda x, z, norm=norm: given(copy.deepcopy(norm), z, x)  # noqa: E731
        inputs = [data((2, 4, 5)).requires_grad_(), data(shape, seed=6).requires_grad_()]
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs, fast_mode=True)
    norm = make("conditional_batch_norm", classes=5)
    given(norm, torch.tensor([1, 3, 3, 1]), data()).sin().sum().backward()
    assert norm.table.grad.any(1).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    x, z = data().requires_grad_(), data((4, 3)).requires_grad_()
    plain = randomize(make("conditional_batch_norm", condition_features=3))
    repeated = copy.deepcopy(plain)
    expected = torch.autograd.grad(given(plain, z, x).sin().sum(), [x, z, *plain.parameters()])

    # the block inside of what is checkpointed: with both kinds, and whatever happens in between
    y = checkpoint(lambda x, z: given(repeated, z, x), x, z, use_reentrant=reentrant)
    with condition(repeated, z + 100):
        y.sin().sum().backward()
    for got, wanted in zip([x.grad, z.grad, *(p.grad for p in repeated.parameters())], expected, strict=True):
        close(got, wanted)
    assert repeated.norm.num_batches_tracked == 1


def test_checkpointing_inside_the_block() -> None:
    x, z = data().requires_grad_(), data((4, 3)).requires_grad_()
    norm = randomize(make("conditional_batch_norm", condition_features=3))
    expected = torch.autograd.grad(given(copy.deepcopy(norm), z, x).sin().sum(), [x, z])
    with condition(norm, z):
        y = checkpoint(norm, x, use_reentrant=False)
        got = torch.autograd.grad(y.sin().sum(), [x, z])
    for one, other in zip(got, expected, strict=True):
        close(one, other)
    with condition(norm, z):
        y = checkpoint(norm, x, use_reentrant=False)
    with pytest.raises(nz.NormzooError, match="repeated inside the backward pass; call backward inside the block"):
        y.sum().backward()


# ---- the condition ---------------------------------------------------------------------------------------------------


def test_a_condition_reaches_the_norms_of_a_model_and_ends_with_its_block() -> None:
    model = nn.Sequential(
        make("film", 3, condition_features=2, norm="none"), nn.Linear(3, 8, dtype=torch.float64),
        make("conditional_batch_norm"), make("ada_layer_norm", condition_features=2),
    )  # fmt: skip
    one, other = data((4, 2)), data((4, 2), seed=1)
    with condition(model, one):
        assert model[0].given is one
        assert model[3].given is one
        assert model[2].given is None
        with condition(model[3], other):
            assert model[0].given is one
            assert model[3].given is other
        assert model[3].given is one
        model(data((4, 3)))
    assert model[0].given is None
    with pytest.raises(RuntimeError, match="stop"), condition(model, one):
        raise RuntimeError("stop")
    assert model[3].given is None


def test_a_parameter_as_condition_stays_where_it_belongs() -> None:
    norm = make("film", condition_features=3)
    style = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    with condition(norm, style):
        assert "given" not in dict(norm.named_parameters())
        norm(data()).sum().backward()
    assert style.grad is not None
    again = pickle.loads(pickle.dumps(norm))
    close(given(again, style, data()), given(copy.deepcopy(norm), style, data()))


def test_errors_say_what_to_do() -> None:
    x = data()
    film, table = make("film", condition_features=3), make("film", classes=3)
    with pytest.raises(nz.NormzooError, match="was given none; call the model inside 'with"):
        film(x)
    with (
        pytest.raises(nz.NormzooError, match="no norm of this BatchNorm takes a condition"),
        condition(make("batch_norm"), x),
    ):
        pass
    with pytest.raises(nz.NormzooError, match=re.escape("got a condition of shape (4, 2)")):
        given(film, data((4, 2)), x)
    with pytest.raises(nz.NormzooError, match="for each of 4 samples"):
        given(film, data((3, 3)), x)
    with pytest.raises(nz.NormzooError, match="vectors of 3 features"):
        given(film, torch.zeros(4, 3, dtype=torch.long), x)
    with pytest.raises(nz.NormzooError, match="for each of 4 samples"):
        given(table, torch.zeros(3, dtype=torch.long), x)
    with pytest.raises(nz.NormzooError, match="or 3 weights for each sample"):
        given(table, data((4, 2)), x)
    with pytest.raises(nz.NormzooError, match="a feature map of 8 channels"):
        given(make("ada_in", style=True), data((4, 7, 3)), x)
    with pytest.raises(nz.NormzooError, match="a map of 2 channels, 2 axes"):
        given(make("spade", condition_features=2), data((4, 2, 3)), x)
    with pytest.raises(nz.NormzooError, match="expected one of them"):
        make("film", classes=2, condition_features=3)
    with pytest.raises(nz.NormzooError, match="classes=0"):
        make("film", classes=0)
    with pytest.raises(nz.NormzooError, match="which takes none"):
        make("film", norm="none", eps=0.1)
    with pytest.raises(nz.NormzooError, match="in its name"):
        make("film", norm="batch_norm(eps=0.5)", eps=0.1)
    with pytest.raises(nz.NormzooError, match="needs a vector"):
        make("film", classes=3, hidden=4)
    with pytest.raises(nz.NormzooError, match="odd size"):
        make("spade", kernel_size=2)
    with pytest.raises(nz.NormzooError, match="unknown norm 'bach_norm'; did you mean 'batch_norm'"):
        make("film", norm="bach_norm")
    with pytest.raises(nz.NormzooError, match="of its own"):
        make("film", norm=nn.LayerNorm)


# torch's own compiler makes an instance of the autograd function that it traces
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_once_for_all_conditions() -> None:
    norm = randomize(make("conditional_batch_norm", condition_features=3))
    plain = copy.deepcopy(norm)
    counter = CompileCounter()
    compiled = torch.compile(norm, fullgraph=True, backend=counter)
    for seed in range(4):
        x, z = data(seed=seed), data((4, 3), seed=seed).requires_grad_()
        with condition(norm, z):
            y = compiled(x)
        other = z.detach().clone().requires_grad_()
        expected = given(plain, other, x)
        close(y, expected)
        y.sin().sum().backward()
        expected.sin().sum().backward()
        close(z.grad, other.grad)
    assert counter.frame_count == 1


def test_half_precision_and_autocast() -> None:
    norm = randomize(nz.create("film", 8, condition_features=3, norm="layer_norm"))
    x, z = data().float(), data((4, 3)).float()
    expected = given(norm, z, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(given(norm, z, x), expected)
    y = given(norm, z.bfloat16(), x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=5e-2, atol=1e-1)


@pytest.mark.parametrize("name", ["film", "sandwich_batch_norm", "ada_layer_norm"])
def test_masked_positions_come_out_as_zero(name: str) -> None:
    x, z = data((4, 8, 6)), data((4, 3))
    mask = torch.arange(6) < torch.tensor([6, 2, 5, 1])[:, None]
    norm = randomize(make(name, condition_features=3))
    y = given(copy.deepcopy(norm), z, torch.where(mask[:, None], x, torch.nan), mask)
    assert not y.masked_select(~mask[:, None]).any()
    rows = x.mT[mask]  # all real positions, as samples of their own
    expected = given(norm, z.repeat_interleave(mask.sum(1), 0), rows)
    close(y.mT[mask], expected)


# ---- the kit over norms that have a condition ------------------------------------------------------------------------


class ConditionedFiLM(FiLM):
    """FiLM with a condition that is always the same, so that a norm with one can be checked like any other."""

    def __init__(self, num_features, *, channel_dim=1, device=None, dtype=None):
        super().__init__(num_features, condition_features=3, channel_dim=channel_dim, device=device, dtype=dtype)

    def demand(self, x):
        return torch.linspace(-1, 1, 3, device=x.device, dtype=x.dtype).expand(x.shape[0], 3)


class ConditionedBatchNorm(ConditionalBatchNorm):
    """The same with a hidden layer."""

    def __init__(self, num_features, *, channel_dim=1, device=None, dtype=None):
        super().__init__(
            num_features, condition_features=3, hidden=4, channel_dim=channel_dim, device=device, dtype=dtype
        )

    demand = ConditionedFiLM.demand


class ConditionedSandwich(SandwichBatchNorm):
    """The same with a class."""

    def __init__(self, num_features, *, channel_dim=1, device=None, dtype=None):
        super().__init__(num_features, classes=3, channel_dim=channel_dim, device=device, dtype=dtype)

    def demand(self, x):
        return torch.ones(x.shape[0], device=x.device, dtype=torch.long)


class ConditionedRMSNorm(AdaRMSNorm):
    """The same with a condition for each position."""

    def __init__(self, num_features, *, channel_dim=1, device=None, dtype=None):
        super().__init__(num_features, condition_features=3, channel_dim=channel_dim, device=device, dtype=dtype)

    def demand(self, x):
        positions = x.shape[:1] + (x.shape[2:] if self.channel_dim == 1 else x.shape[1:-1])
        return torch.linspace(-1, 1, 3, device=x.device, dtype=x.dtype).expand(*positions, 3)


@pytest.mark.parametrize("norm", [ConditionedFiLM, ConditionedBatchNorm, ConditionedSandwich, ConditionedRMSNorm])
def test_conformance_with_a_condition(norm: type[Norm]) -> None:
    check_norm(norm, slow=False).raise_on_failure()
