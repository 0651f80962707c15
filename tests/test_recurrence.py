"""The recurrence as one operation: it equals the loop over its steps, and gives way to it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normzoo import create
from normzoo.errors import NormzooError
from normzoo.layers.base import hold_statistics
from normzoo.layers.batch import BatchNorm
from normzoo.layers.sample import LayerNorm
from normzoo.models import create_model, rnn
from normzoo.models.base import Inputs
from normzoo.models.rnn import RecurrentLayer
from normzoo.ops import backend, kernels
from normzoo.ops.recurrence import CELLS, KINDS, CellNorm, recurrence, reference

GATES = {"lstm": 4, "gru": 3, "tanh": 1}
NORMS = ["none", "batch_norm", "layer_norm", "rms_norm"]


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if not kernels.load():
        pytest.skip(f"the CPU kernels are not to be had: {kernels.status().reason}")


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The cells that went through the operation, as long as the test lasts."""
    seen: list[str] = []

    def counted(cell: str, *args, **kwargs):
        seen.append(cell)
        return recurrence(cell, *args, **kwargs)

    monkeypatch.setattr(rnn, "recurrence", counted)
    return seen


def lengths_to_mask(lengths: Sequence[int], steps: int) -> Tensor:
    return torch.arange(steps) < torch.tensor(lengths)[:, None]


# ---- the operator ----------------------------------------------------------------------------------------------------


class Case:
    """The arguments of the operator, in float64, with small gains."""

    def __init__(
        self, cell: str, kinds: Sequence[str], n: int, steps: int, features: int, width: int, *, seed: int = 0
    ):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        rows = GATES[cell] * width
        channels = [rows, rows, width]
        self.cell = cell
        self.kinds = [kind if cell == "lstm" or i < 2 else "none" for i, kind in enumerate(kinds)]
        x = normal(n, steps, features or rows)
        weight_ih = normal(rows, features) / math.sqrt(features) if features else None
        self.learned: list[Tensor | None] = [x, weight_ih, normal(rows, width) / math.sqrt(width)]
        for i, (kind, c) in enumerate(zip(self.kinds, channels, strict=True)):
            self.learned.append(0.2 + 0.05 * normal(c) if kind != "none" else None)
            self.learned.append(0.1 * normal(c) if i < 2 or cell == "lstm" else None)
        self.mask: Tensor | None = None
        self.running = [
            torch.stack([0.1 * normal(max(1, steps - 1), c), normal(max(1, steps - 1), c).abs() + 0.5], 1)
            if kind in ("batch", "running")
            else None
            for kind, c in zip(self.kinds, channels, strict=True)
        ]
        self.output_weight = normal(n, steps, width)

    def arguments(self, dtype: torch.dtype, requires_grad: bool = True) -> list:
        learned = [t if t is None else t.to(dtype, copy=True).requires_grad_(requires_grad) for t in self.learned]
        running = [r if r is None else r.to(dtype, copy=True) for r in self.running]
        kinds = [KINDS.index(kind) for kind in self.kinds]
        return [*learned, self.mask, *running, CELLS.index(self.cell), kinds, [1e-5] * 3, [0.1] * 3]

    def run(self, dtype: torch.dtype, *, compiled: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs with running statistics, and gradients."""
        args = self.arguments(dtype)
        if compiled:
            result = torch.ops.normzoo.recurrence(*args, True)
            out, moved = result[0], list(result[8:])
        else:
            out, moved = reference(*args)
        learned = [t for t in args[:9] if t is not None]
        grads = torch.autograd.grad((out * self.output_weight.to(dtype)).sum(), learned)
        return [out.detach(), *(m for m in moved if m is not None and m.numel())], list(grads)

    def check(self, rtol: float = 1e-5) -> None:
        expected, expected_grads = self.run(torch.float64, compiled=False)
        got, got_grads = self.run(torch.float32, compiled=True)
        single, single_grads = self.run(torch.float32, compiled=False)
        # where few sequences have almost the same value, float32 has few digits left, whoever computes
        for ours, loops, exact in zip(got + got_grads, single + single_grads, expected + expected_grads, strict=True):
            scale = float(exact.norm())
            error, allowed = float((ours - exact).norm()), float((loops - exact).norm())
            assert error <= rtol * scale + 20 * allowed, (ours.shape, error / scale, allowed / scale)
            assert error <= 2e-3 * scale + 1e-6


UNIFORM = [(kind,) * 3 for kind in KINDS]
MIXED = [
    ("batch", "layer", "none"),
    ("none", "rms", "batch"),
    ("layer", "none", "running"),
    ("running", "batch", "layer"),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kinds", UNIFORM + MIXED, ids="-".join)
@pytest.mark.parametrize("cell", CELLS)
def test_the_operator_is_its_reference(cell, kinds, masked):
    case = Case(cell, kinds, 11, 6, 5, 21)
    if masked:
        case.mask = lengths_to_mask([6, 4, 4, 1, 5, 2, 3, 4, 2, 1, 3], 6)
        case.mask[2, 1] = False
    case.check()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    cell=st.sampled_from(CELLS),
    kinds=st.tuples(*[st.sampled_from(KINDS)] * 3),
    n=st.integers(1, 20),
    steps=st.integers(1, 5),
    features=st.sampled_from([0, 1, 3, 16, 33]),
    width=st.integers(1, 37),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_any_size(cell, kinds, n, steps, features, width, seed, data):
    if width < 3:  # of one or two units layer and RMS norm leave little but signs
        kinds = tuple("running" if kind in ("layer", "rms") else kind for kind in kinds)
    n = max(n, 8) if "batch" in kinds else n
    case = Case(cell, kinds, n, steps, features, width, seed=seed)
    if data.draw(st.booleans()):
        # one or two values have no gradient through batch norm but what rounding leaves: at no step are there so few
        whole = 4 if "batch" in kinds else 0
        lengths = data.draw(st.lists(st.integers(0, steps), min_size=n - whole, max_size=n - whole))
        case.mask = lengths_to_mask([steps] * whole + lengths, steps)
    got, got_grads = case.run(torch.float32, compiled=True)
    assert all(t.isfinite().all() for t in got + got_grads)
    case.check()


@pytest.mark.parametrize("kinds", [("none",) * 3, ("layer",) * 3, ("batch", "none", "rms")], ids="-".join)
@pytest.mark.parametrize("cell", CELLS)
def test_threads_change_nothing_but_the_order_of_sums(cell, kinds):
    case = Case(cell, kinds, 45, 7, 64, 48)
    one = case.run(torch.float32, compiled=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = case.run(torch.float32, compiled=True)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one[0] + one[1], two[0] + two[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def alone(x: Tensor) -> list:
    """Arguments of a tanh cell that passes on ``tanh(x)``."""
    zero = torch.zeros(1)
    return [
        x.view(-1, 1, 1),
        None,
        zero.view(1, 1),
        None,
        zero,
        None,
        zero,
        *[None] * 6,
        2,
        [0] * 3,
        [0.0] * 3,
        [0.0] * 3,
    ]


def units(value: Tensor, exact: Tensor) -> float:
    """The largest error, in units in the last place."""
    spacing = np.spacing(exact.abs().float().numpy()).astype(np.float64)
    return float((np.abs(value.double().numpy() - exact.numpy()) / spacing).max())


def test_tanh_and_sigmoid_are_good_to_two_units_in_the_last_place():
    x = torch.cat([torch.linspace(-12, 12, 100001), torch.logspace(-30, 1, 20001), -torch.logspace(-30, 1, 20001)])
    x = torch.cat([x, torch.linspace(-86, 86, 50001)]).float()
    out = torch.ops.normzoo.recurrence(*alone(x), False)[0].flatten()
    assert units(out, x.double().tanh()) < 2
    # an LSTM whose other gates are open and whose cell is full shows its output gate
    gates = torch.stack([torch.full_like(x, 90), torch.zeros_like(x), torch.full_like(x, 90), x], 1).unsqueeze(1)
    zero = torch.zeros(4)
    args = [gates, None, torch.zeros(4, 1), None, zero, None, zero, None, torch.full((1,), 50.0)]
    out = torch.ops.normzoo.recurrence(*args, *[None] * 4, 0, [0] * 3, [0.0] * 3, [0.0] * 3, False)[0].flatten()
    assert units(out, x.double().sigmoid()) < 2


def test_extremes_of_tanh():
    x = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0])
    out = torch.ops.normzoo.recurrence(*alone(x), False)[0].flatten()
    torch.testing.assert_close(out, x.tanh(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kinds", [("batch",) * 3, ("layer", "none", "rms"), ("none",) * 3], ids="-".join)
@pytest.mark.parametrize("cell", CELLS)
def test_what_torch_is_told_of_the_operator_is_true(cell, kinds):
    args = Case(cell, kinds, 5, 3, 4, 6).arguments(torch.float32)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.normzoo.recurrence.default, (*args, True), test_utils=tests)


def test_what_does_not_fit_is_refused():
    args = Case("lstm", ("running",) * 3, 5, 3, 4, 6).arguments(torch.float32, requires_grad=False)
    for at, wrong in {
        0: torch.zeros(5, 3, 7),
        1: None,
        2: torch.zeros(18, 6),
        3: torch.zeros(6),
        9: torch.ones(3, 5) > 0,
        10: None,
        12: torch.zeros(0, 2, 6),
    }.items():
        with pytest.raises(RuntimeError, match="normzoo::recurrence"):
            torch.ops.normzoo.recurrence(*args[:at], wrong, *args[at + 1 :], True)
    with pytest.raises(RuntimeError, match="Float"):
        torch.ops.normzoo.recurrence(args[0].double(), *args[1:], True)


def test_only_what_the_gradient_needs_is_kept():
    for cell, kinds, kept in [
        ("lstm", ("layer",) * 3, {1: 24, 2: 24, 4: 6}),  # both products, and the cell state
        ("lstm", ("none", "layer", "none"), {2: 24, 3: 24, 4: 6}),  # one product, and the gates
        ("lstm", ("none",) * 3, {3: 24, 4: 6}),
        ("gru", ("layer",) * 3, {1: 18, 2: 18}),
        ("gru", ("none",) * 3, {3: 24}),
        ("tanh", ("none",) * 3, {}),
    ]:
        args = Case(cell, kinds, 5, 3, 4, 6).arguments(torch.float32, requires_grad=False)
        result = torch.ops.normzoo.recurrence(*args, True)
        assert {i: t.shape[2] for i, t in enumerate(result[:5]) if i and t.numel()} == kept
        assert all(t.numel() == 0 for t in torch.ops.normzoo.recurrence(*args, False)[1:8])


# ---- in the model ----------------------------------------------------------------------------------------------------


def layer(
    cell: str, norm, *, steps: int = 6, features: int = 5, width: int = 12, seed: int = 0, **options
) -> RecurrentLayer:
    torch.manual_seed(seed)
    name = {"tanh": "rnn_tanh"}.get(cell, cell)
    inputs = Inputs((steps, features), per_position=True)
    model = create_model(name, norm=norm, inputs=inputs, outputs=2, width=width, gain=0.2, **options)
    layer = model.get_submodule("layers.0")
    assert isinstance(layer, RecurrentLayer)
    for p in layer.cell.parameters():
        if p.ndim == 1:
            nn.init.normal_(p, std=0.2)
    return layer


def run(layer: RecurrentLayer, x: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """The output; gradients of the input and all parameters; and the buffers afterwards."""
    x = x.detach().requires_grad_()
    out = layer(x, mask, None if mask is None else mask.sum(0).tolist())
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    if mask is not None:
        weight = weight * mask.unsqueeze(-1)
    grads = torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()], allow_unused=True)
    return out, [torch.zeros(1) if g is None else g for g in grads], dict(layer.named_buffers())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_the_layer_is_its_loop(cell, norm, masked, training, calls):
    whole = layer(cell, norm, steps=5)  # longer sequences share the statistics of the last step
    x = torch.randn(9, 7, 5, generator=torch.Generator().manual_seed(2))
    # one sequence alone reaches the last step, none step 2
    mask = lengths_to_mask([7, 6, 4, 5, 3, 6, 1, 2, 5], 7) if masked else None
    if mask is not None:
        mask[:, 2] = False
    for _ in range(2):  # statistics that are not the first ones
        whole(x + torch.randn(x.shape), None, None)
    whole.train(training)
    loop, exact = copy.deepcopy(whole), copy.deepcopy(whole).double()
    calls.clear()
    got, grads, buffers = run(whole, x, mask)
    assert calls == [cell]
    with backend("reference"):
        expected, loop_grads, expected_buffers = run(loop, x, mask)
    _, exact_grads, _ = run(exact, x.double(), mask)
    assert calls == [cell]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)
    assert got.is_contiguous()
    assert got.stride() == expected.stride()
    for ours, theirs, true in zip(grads, loop_grads, exact_grads, strict=True):
        error, allowed = (ours - true).norm(), (theirs - true).norm()
        assert error <= 1e-5 * true.norm() + 10 * allowed + 1e-7
    assert buffers.keys() == expected_buffers.keys()
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, expected_buffers[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("cell", CELLS)
def test_a_norm_between_layers_leaves_the_recurrence_whole(cell, calls):
    whole = layer(cell, "batch_norm", placement="between")
    x, mask = torch.randn(6, 6, 5), lengths_to_mask([6, 2, 3, 6, 1, 4], 6)
    loop = copy.deepcopy(whole)
    got, grads, buffers = run(whole, x, mask)
    assert calls == [cell]
    with backend("reference"):
        expected, expected_grads, expected_buffers = run(loop, x, mask)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(buffers, expected_buffers)


def test_points_without_a_norm_and_norms_without_parameters(calls):
    norms = {"input": partial(create, "batch_norm", track_running_stats=False), "hidden": "rms_norm", "cell": "none"}
    for points in (("input", "cell"), ("hidden",), ("input", "hidden", "cell")):
        used = {point: norms[point] for point in points}
        for affine in (True, False):
            given = {
                p: n if affine or p == "cell" else partial(create, "layer_norm", affine=False) for p, n in used.items()
            }
            whole = layer("lstm", given, norm_points=points)
            x, loop = torch.randn(6, 6, 5), copy.deepcopy(whole)
            got, grads, _ = run(whole, x, None)
            with backend("reference"):
                expected, expected_grads, _ = run(loop, x, None)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-5)
    assert calls == ["lstm"] * 6


def test_batches_are_counted_once(calls):
    x = torch.randn(6, 6, 5, requires_grad=True)
    plain, repeated = layer("lstm", "batch_norm"), layer("lstm", "batch_norm")
    a = plain(x, None, None)
    b = checkpoint(repeated, x, None, None, use_reentrant=False)
    assert isinstance(b, Tensor)
    grads = [
        torch.autograd.grad(out.square().sum(), module.cell.weight_hh)[0] for out, module in ((a, plain), (b, repeated))
    ]
    assert calls == ["lstm"] * 3
    torch.testing.assert_close(grads[1], grads[0])
    for name, buffer in repeated.named_buffers():
        assert torch.equal(buffer, plain.get_buffer(name)), name
    assert int(plain.get_buffer("norms.cell.steps.3.num_batches_tracked")) == 1
    with hold_statistics(plain):
        plain(x, None, None)
    for name, buffer in repeated.named_buffers():
        assert torch.equal(buffer, plain.get_buffer(name)), name
    assert calls == ["lstm"] * 4


def test_a_graph_outlives_the_next_batch(calls):
    module = layer("gru", "batch_norm").eval()
    x = torch.randn(6, 6, 5)
    expected = torch.autograd.grad(module(x, None, None).square().sum(), module.cell.weight_hh)[0]
    out = module(x, None, None)
    module.train()(10 * x, None, None)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), module.cell.weight_hh)[0], expected)
    assert len(calls) == 3


class Loud(LayerNorm):
    moments = "b c s -> b s"


@pytest.mark.parametrize(
    "norm",
    [
        "group_norm",
        nn.LayerNorm,
        Loud,
        partial(create, "batch_norm", momentum=None),
        partial(create, "batch_norm", sync=True),
    ],
)
def test_other_norms_go_step_by_step(norm, calls):
    module = layer("lstm", norm)
    assert module(torch.randn(6, 6, 5), None, None).isfinite().all()
    assert calls == []


def test_what_the_operation_cannot_have_goes_step_by_step(calls):
    x = torch.randn(6, 6, 5)
    module = layer("lstm", "layer_norm")
    with backend("reference"):
        module(x, None, None)
    copy.deepcopy(module).double()(x.double(), None, None)
    with torch.autocast("cpu", torch.bfloat16):
        module(x, None, None)
    seen: list[tuple[int, ...]] = []
    for name in ("norms.hidden.steps.0", "norms.input", "cell"):
        watched = copy.deepcopy(module)
        watched.get_submodule(name).register_forward_hook(lambda *_: seen.append((1,)))
        watched(x, None, None)
    assert len(seen) == 18
    for_all = nn.modules.module.register_module_forward_hook(lambda *_: seen.append((2,)))
    module(x, None, None)
    for_all.remove()
    assert seen.count((2,)) > 18
    one = layer("tanh", "layer_norm", width=1)
    with pytest.raises(NormzooError, match="one value per statistic"):
        one(x, None, None)
    with pytest.raises(NormzooError, match="one value per statistic"):
        layer("lstm", "batch_norm")(x[:1], None, None)
    assert calls == []
    module(x, None, None)
    assert calls == ["lstm"]


def test_copies_that_became_different_go_step_by_step(calls):
    x = torch.randn(6, 6, 5)
    for change in ("hold", "eval", "untie", "hook", "replace"):
        module = layer("lstm", "batch_norm")
        step = module.get_submodule("norms.hidden.steps.2")
        assert isinstance(step, BatchNorm)
        if change == "hold":
            step.hold = True
        elif change == "eval":
            step.eval()
        elif change == "untie":
            step.weight = nn.Parameter(torch.ones(48))
        elif change == "replace":
            module.get_submodule("norms.hidden.steps")[2] = create("rms_norm", 48)  # pyright: ignore[reportIndexIssue]
        else:
            step.register_forward_pre_hook(lambda *_: None)
        module(x, None, None)
    assert calls == []


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own forward mode
def test_transforms_of_functions_go_step_by_step(calls):
    module = layer("gru", "layer_norm")
    x = torch.randn(4, 6, 5)
    parameters: dict[str, Tensor] = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        out = torch.func.functional_call(module, parameters, (x.unsqueeze(0), None, None))
        return out.square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(module(dual, None, None)).tangent
    assert tangent is not None
    assert calls == []
    total = torch.autograd.grad(module(x, None, None).square().sum(), module.cell.weight_ih)[0]
    assert calls == ["gru"]
    torch.testing.assert_close(each["cell.weight_ih"].sum(0), total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_it_can_be_differentiated_twice(cell, norm, calls):
    module = layer(cell, norm)
    exact = copy.deepcopy(module).double()
    x = torch.randn(7, 6, 5, generator=torch.Generator().manual_seed(3))
    mask = lengths_to_mask([6, 5, 4, 6, 2, 3, 6], 6)
    seconds = []
    for m, z in ((module, x), (exact, x.double())):
        z = z.requires_grad_()
        out = m(z, mask, mask.sum(0).tolist())
        (first,) = torch.autograd.grad(out.square().sum(), z, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), [z, *m.parameters()], allow_unused=True))
    assert calls == [cell]
    for ours, true in zip(*seconds, strict=True):
        assert (ours is None) == (true is None)
        if ours is not None and true is not None:
            assert (ours - true).norm() <= 1e-3 * true.norm() + 1e-5


def test_many_gradients_at_once(calls):
    module = layer("lstm", "layer_norm")
    out = module(torch.randn(4, 6, 5), None, None)
    weights = torch.randn(3, *out.shape)
    parameters = list(module.parameters())
    many = torch.autograd.grad(out, parameters, weights, retain_graph=True, is_grads_batched=True)
    assert calls == ["lstm"]
    for i, weight in enumerate(weights):
        one = torch.autograd.grad(out, parameters, weight, retain_graph=True)
        for a, b in zip(many, one, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)


def test_an_input_that_another_was_computed_from_has_its_own_gradient():
    weight = torch.randn(6, 6, dtype=torch.float32, requires_grad=True)
    x = torch.randn(3, 4, 6)
    bias = torch.zeros(6)

    def gradient(dtype: torch.dtype, create_graph: bool) -> Tensor:
        w = weight.to(dtype)
        z = x.to(dtype) @ w
        if dtype == torch.float32:
            out, _ = recurrence("tanh", z, w, w, bias, bias, {})
        else:
            b = bias.to(dtype)
            out, _ = reference(
                z, w, w, None, b, None, b, None, None, None, None, None, None, 2, [0] * 3, [0.0] * 3, [0.0] * 3
            )
        return torch.autograd.grad(out.square().sum(), weight, create_graph=create_graph)[0]

    exact = gradient(torch.float64, False)
    for create_graph in (False, True):
        torch.testing.assert_close(gradient(torch.float32, create_graph).detach(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm"])
def test_it_compiles_in_one_graph(norm, training, calls):
    x = torch.randn(6, 4, 5)
    eager = layer("lstm", norm, steps=4).train(training)
    module = copy.deepcopy(eager)
    torch.compiler.reset()
    compiled = torch.compile(module.forward, backend="aot_eager", fullgraph=training)
    for _ in range(2):
        a, b = eager(x, None, None), compiled(x, None, None)
        torch.testing.assert_close(b, a)
        for out, m in ((a, eager), (b, module)):
            m.zero_grad()
            out.square().sum().backward()
        for (name, p), q in zip(eager.named_parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, msg=name)
        for name, buffer in module.named_buffers():
            torch.testing.assert_close(buffer, eager.get_buffer(name), msg=name)


def test_the_state_of_a_model_does_not_depend_on_the_backend():
    torch.manual_seed(0)
    inputs = Inputs((6, 5))
    whole = create_model("lstm", norm="batch_norm", inputs=inputs, outputs=3, width=8, depth=2)
    loop = copy.deepcopy(whole)
    x, y = torch.randn(32, 6, 5), torch.randn(32, 3)
    for model, name in ((whole, "auto"), (loop, "reference")):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with backend(name):
            for _ in range(3):
                optimizer.zero_grad()
                (model(x) - y).square().mean().backward()
                optimizer.step()
    for (name, a), b in zip(whole.state_dict().items(), loop.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_a_norm_at_a_point_is_nothing_unless_it_is_given():
    assert CellNorm() == ("none", 0.0, None, None, None, 0.0)
    x, weight, bias = torch.randn(3, 2, 8), torch.randn(8, 8), torch.randn(8)
    out, moved = recurrence("tanh", x, weight, weight, bias, bias, {})
    first = (x[:, 0] @ weight.T + 2 * bias).tanh()
    torch.testing.assert_close(out[:, 0], first)
    torch.testing.assert_close(
        out[:, 1], (x[:, 1] @ weight.T + first @ weight.T + 2 * bias).tanh(), rtol=1e-5, atol=1e-5
    )
    assert moved == {}
