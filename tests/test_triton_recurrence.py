"""The recurrence by Triton kernels: on a GPU where there is one, otherwise on the CPU by Triton's interpreter.

The interpreter must be chosen before Triton is imported, so these tests run in a process of their own there.
"""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import normzoo.ops.triton.recurrence as fused
from normzoo.errors import NormzooError
from normzoo.layers.base import hold_statistics
from normzoo.models import create_model, rnn
from normzoo.models.base import Inputs
from normzoo.models.rnn import RecurrentLayer
from normzoo.ops import backend
from normzoo.ops.recurrence import CELLS, GATES, KINDS, recurrence, reference
from normzoo.ops.triton import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
READY = kernels.AVAILABLE and (DEVICE == "cuda" or kernels.INTERPRETED)
H200 = 132, 227 * 1024  # multiprocessors, and bytes of shared memory that a program can have there

needs_kernels = pytest.mark.skipif(
    not READY, reason="these run in the process that test_in_a_process_of_their_own starts, which needs Triton"
)


@pytest.mark.timeout(1200)
@pytest.mark.skipif(not kernels.AVAILABLE or READY, reason="needs Triton, and is not needed where kernels can run")
def test_in_a_process_of_their_own():
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def lengths_to_mask(lengths: Sequence[int], steps: int) -> Tensor:
    return torch.arange(steps) < torch.tensor(lengths)[:, None]


# ---- the operator ----------------------------------------------------------------------------------------------------


class Case:
    """The arguments of the operator, in float64; gains are small, as steps would multiply what rounding did."""

    def __init__(self, cell: str, kinds: Sequence[str], n: int, steps: int, features: int, width: int):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        rows = GATES[cell] * width
        channels = [rows, rows, width]
        self.cell = cell
        self.kinds = [kind if cell == "lstm" or i < 2 else "none" for i, kind in enumerate(kinds)]
        weight_ih = normal(rows, features) / math.sqrt(features) if features else None
        self.learned: list[Tensor | None] = [normal(n, steps, features or rows), weight_ih]
        self.learned.append(normal(rows, width) / math.sqrt(width))
        for i, (kind, c) in enumerate(zip(self.kinds, channels, strict=True)):
            self.learned.append(0.2 + 0.05 * normal(c) if kind != "none" else None)
            self.learned.append(0.1 * normal(c) if i < 2 or cell == "lstm" else None)
        self.mask: Tensor | None = None
        steps_with_statistics = max(1, steps - 1)
        self.running = [
            torch.stack([0.1 * normal(steps_with_statistics, c), normal(steps_with_statistics, c).abs() + 0.5], 1)
            if kind in ("batch", "running")
            else None
            for kind, c in zip(self.kinds, channels, strict=True)
        ]
        self.output_weight = normal(n, steps, width)

    def arguments(self, dtype: torch.dtype, requires_grad: bool = True) -> list:
        def given(tensors: list[Tensor | None], requires_grad: bool = False) -> list[Tensor | None]:
            copies = [None if t is None else t.to(DEVICE, dtype, copy=True) for t in tensors]
            return [None if t is None else t.requires_grad_(requires_grad) for t in copies]

        mask = None if self.mask is None else self.mask.to(DEVICE)
        kinds = [KINDS.index(kind) for kind in self.kinds]
        learned, running = given(self.learned, requires_grad), given(self.running)
        return [*learned, mask, *running, CELLS.index(self.cell), kinds, [1e-5] * 3, [0.1] * 3]

    def run(self, dtype: torch.dtype, *, kernel: bool) -> list[Tensor]:
        """Outputs, running statistics, and gradients."""
        args = self.arguments(dtype)
        if kernel:
            result = torch.ops.normzoo.triton_recurrence(*args, True)
            out, moved = result[0], list(result[8:])
        else:
            out, moved = reference(*args)
        learned = [t for t in args[:9] if t is not None]
        grads = torch.autograd.grad((out * self.output_weight.to(out)).sum(), learned)
        return [out.detach(), *(m for m in moved if m is not None and m.numel()), *grads]

    def check(self) -> None:
        expected = self.run(torch.float64, kernel=False)
        found = self.run(torch.float32, kernel=True)
        single = self.run(torch.float32, kernel=False)
        # where few sequences have almost the same value, float32 has few digits left, whoever computes
        for ours, loops, exact in zip(found, single, expected, strict=True):
            scale = float(exact.norm())
            error, allowed = float((ours - exact).norm()), float((loops - exact).norm())
            assert error <= 1e-5 * scale + 20 * allowed, (ours.shape, error / scale, allowed / scale)
            assert error <= 2e-3 * scale + 1e-6


UNIFORM = [(kind,) * 3 for kind in KINDS]
MIXED = [
    ("batch", "layer", "none"), ("none", "rms", "batch"), ("layer", "none", "running"), ("running", "batch", "layer"),
    ("none", "batch", "none"),
]  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("kinds", UNIFORM + MIXED, ids="-".join)
@pytest.mark.parametrize("cell", CELLS)
def test_the_operator_is_its_reference(cell, kinds, masked):
    case = Case(cell, kinds, 17, 4, 5, 11)  # two programs, where sequences can be apart
    if masked:
        # one sequence alone reaches the last step
        case.mask = lengths_to_mask([4, 3, 3, 1, 2, 2, 3, 3, 2, 1, 3, 0, 2, 1, 3, 3, 2], 4)
        case.mask[2, 1] = False
        if cell == "lstm":
            case.mask[:, 2] = False
    case.check()


@needs_kernels
@pytest.mark.parametrize("kinds", [("none",) * 3, ("batch",) * 3, ("running", "none", "batch")], ids="-".join)
@pytest.mark.parametrize("cell", CELLS)
def test_programs_that_share_the_units(cell, kinds, monkeypatch):
    """Each launch is a step then."""
    case = Case(cell, kinds, 19, 3, 5, 37 if cell != "tanh" else 67)
    monkeypatch.setattr(fused, "_ALONE", 0)
    monkeypatch.setattr(fused, "_ELEMENTS", 4096 if "batch" in case.kinds else 256)
    tile = fused.make_tile(cell, case.kinds, 19, case.output_weight.shape[2], 2, 2**17)
    assert tile is not None
    assert tile.units < case.output_weight.shape[2]
    case.mask = lengths_to_mask([3, 2, 1, 3, 0, 2, 2, 3, 1, 1, 3, 2, 2, 3, 3, 1, 2, 3, 2], 3)
    case.check()


@needs_kernels
@pytest.mark.parametrize(
    ("n", "steps", "features", "width"), [(1, 1, 1, 1), (1, 3, 0, 5), (2, 1, 3, 16), (5, 2, 0, 33), (9, 2, 7, 40)]
)
def test_sizes(n, steps, features, width):
    for cell in CELLS:
        kinds = ("rms", "rms", "running") if n == 1 else ("batch", "none", "batch")
        Case(cell, kinds, n, steps, features, width).check()
        Case(cell, ("layer" if width > 1 else "rms", "running", "rms"), n, steps, features, width).check()


@needs_kernels
@pytest.mark.parametrize("kinds", [("layer",) * 3, ("batch", "none", "batch")], ids="-".join)
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_kept_without_a_gradient(cell, kinds):
    args = Case(cell, kinds, 6, 3, 4, 7).arguments(torch.float32, requires_grad=False)
    kept, without = (torch.ops.normzoo.triton_recurrence(*args, keep) for keep in (True, False))
    assert all(t.numel() == 0 for t in without[1:8])
    for i in (0, 8, 9, 10):
        torch.testing.assert_close(kept[i], without[i], rtol=1e-5, atol=1e-6)


@needs_kernels
def test_inputs_need_not_be_contiguous():
    args = Case("lstm", ("layer",) * 3, 6, 3, 4, 7).arguments(torch.float32, requires_grad=False)
    args[9] = torch.ones(6, 3, dtype=torch.bool, device=DEVICE)
    strided = [
        torch.stack([a, a], -1)[..., 0].requires_grad_(a.dtype == torch.float32) if isinstance(a, Tensor) else a
        for a in args
    ]
    for a in args[:9]:
        a.requires_grad_()
    results = []
    for these in (args, strided):
        out = torch.ops.normzoo.triton_recurrence(*these, True)[0]
        results.append([out, *torch.autograd.grad(out.sum(), these[:9])])  # whose gradient is expanded
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_the_same_bits_each_time():
    for kinds in (("layer",) * 3, ("batch",) * 3):
        case = Case("lstm", kinds, 17, 3, 5, 11)
        for a, b in zip(case.run(torch.float32, kernel=True), case.run(torch.float32, kernel=True), strict=True):
            assert torch.equal(a, b)


@needs_kernels
@pytest.mark.parametrize("kinds", [("batch",) * 3, ("layer", "none", "rms"), ("none",) * 3], ids="-".join)
@pytest.mark.parametrize("cell", CELLS)
def test_what_torch_is_told_of_the_operator_is_true(cell, kinds):
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for features in (4, 0):
        args = Case(cell, kinds, 5, 2, features, 6).arguments(torch.float32)
        torch.library.opcheck(torch.ops.normzoo.triton_recurrence.default, (*args, True), test_utils=tests)


@needs_kernels
def test_what_does_not_fit_is_refused():
    args = Case("lstm", ("running",) * 3, 5, 3, 4, 6).arguments(torch.float32, requires_grad=False)
    for at, wrong in {
        0: torch.zeros(5, 3, 7, device=DEVICE),
        1: None,
        2: torch.zeros(18, 6, device=DEVICE),
        3: torch.zeros(6, device=DEVICE),
        5: args[5].double(),
        9: torch.ones(3, 5, device=DEVICE) > 0,
        10: None,
        12: torch.zeros(0, 2, 6, device=DEVICE),
    }.items():
        with pytest.raises(NormzooError, match="triton_recurrence"):
            torch.ops.normzoo.triton_recurrence(*args[:at], wrong, *args[at + 1 :], True)
    large = Case("lstm", ("layer",) * 3, 2, 1, 1, 257).arguments(torch.float32, requires_grad=False)
    with pytest.raises(NormzooError, match="257 units"):
        torch.ops.normzoo.triton_recurrence(*large, True)


# ---- the layer -------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The cells that went through the operation, as long as the test lasts."""
    seen: list[str] = []

    def counted(cell: str, *args, **kwargs):
        seen.append(cell)
        return recurrence(cell, *args, **kwargs)

    monkeypatch.setattr(rnn, "recurrence", counted)
    return seen


def layer(cell: str, norm, *, steps: int = 4, width: int = 7, **options) -> RecurrentLayer:
    torch.manual_seed(0)
    name = {"tanh": "rnn_tanh"}.get(cell, cell)
    inputs = Inputs((steps, 5), per_position=True)
    model = create_model(name, norm=norm, inputs=inputs, outputs=2, width=width, gain=0.2, **options).to(DEVICE)
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
    grads = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()], allow_unused=True)
    return out, [torch.zeros(1, device=DEVICE) if g is None else g for g in grads], dict(layer.named_buffers())


@needs_kernels
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("norm", "options"),
    [("none", {}), ("batch_norm", {}), ("layer_norm", {}), ("rms_norm", {}), ("batch_norm", {"placement": "between"})],
    ids=["none", "batch", "layer", "rms", "between"],
)
@pytest.mark.parametrize("cell", CELLS)
def test_the_layer_is_its_loop(cell, norm, options, training, calls):
    whole = layer(cell, norm, steps=3, **options)  # longer sequences share the statistics of the last step
    x = torch.randn(6, 5, 5, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    mask = lengths_to_mask([5, 4, 4, 2, 3, 1], 5).to(DEVICE)  # one sequence alone reaches the last step
    with backend("triton"):
        whole(x, None, None)  # statistics that are not the first ones
        whole.train(training)
        loop = copy.deepcopy(whole)
        found, grads, buffers = run(whole, x, mask)
    assert calls == [cell] * 2
    with backend("reference"):
        expected, loop_grads, expected_buffers = run(loop, x, mask)
    assert calls == [cell] * 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads, loop_grads, rtol=1e-3, atol=1e-4)
    assert found.is_contiguous()
    assert buffers.keys() == expected_buffers.keys()
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, expected_buffers[name], rtol=1e-4, atol=1e-5, msg=name)


@needs_kernels
def test_statistics_that_are_held_stay(calls):
    module = layer("gru", "batch_norm")
    before = copy.deepcopy(dict(module.named_buffers()))
    x = torch.randn(6, 4, 5, device=DEVICE)
    with backend("triton"), hold_statistics(module):
        module(x, None, None)
        module.eval()(x, None, None)
    assert len(calls) == 2
    for name, buffer in module.named_buffers():
        if "trained_steps" not in name:
            assert torch.equal(buffer, before[name]), name


@needs_kernels
def test_what_the_kernels_cannot_have_goes_step_by_step(calls):
    x = torch.randn(6, 3, 5, device=DEVICE)
    with backend("triton"):
        layer("lstm", "layer_norm").double()(x.double(), None, None)
        layer("lstm", "group_norm")(x, None, None)
        layer("lstm", "layer_norm", width=257)(x, None, None)
        assert layer("lstm", {"input": "batch_norm", "*": "layer_norm"}, width=200)(x, None, None).isfinite().all()
        with torch.autocast(DEVICE, torch.bfloat16):
            layer("lstm", "layer_norm")(x, None, None)
        assert calls == []
        layer("lstm", {"*.input": "batch_norm", "*": "layer_norm"})(x, None, None)
        assert calls == ["lstm"]


@needs_kernels
@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_it_can_be_differentiated_twice(cell, norm, calls):
    module = layer(cell, norm)
    exact = copy.deepcopy(module).double()
    x = torch.randn(5, 3, 5, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    seconds = []
    with backend("triton"):
        for m, z in ((module, x), (exact, x.double())):
            z = z.requires_grad_()
            (first,) = torch.autograd.grad(m(z, None, None).square().sum(), z, create_graph=True)
            seconds.append(torch.autograd.grad(first.square().sum(), [z, *m.parameters()], allow_unused=True))
    assert calls == [cell]
    for ours, true in zip(*seconds, strict=True):
        assert (ours is None) == (true is None)
        if ours is not None and true is not None:
            assert (ours - true).norm() <= 1e-3 * true.norm() + 1e-5


@needs_kernels
def test_many_gradients_at_once(calls):
    module = layer("gru", "layer_norm")
    parameters = list(module.parameters())
    with backend("triton"):
        out = module(torch.randn(4, 3, 5, device=DEVICE), None, None)
    weights = torch.randn(2, *out.shape, device=DEVICE)
    many = torch.autograd.grad(out, parameters, weights, retain_graph=True, is_grads_batched=True)
    assert calls == ["gru"]
    for i, weight in enumerate(weights):
        one = torch.autograd.grad(out, parameters, weight, retain_graph=True)
        for a, b in zip(many, one, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm"])
def test_it_compiles_in_one_graph(norm, calls):
    x = torch.randn(6, 3, 5, device=DEVICE)
    eager = layer("lstm", norm, steps=3)
    module = copy.deepcopy(eager)
    torch.compiler.reset()
    with backend("triton"):
        compiled = torch.compile(module.forward, backend="aot_eager", fullgraph=True)
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


# ---- for an H200 -----------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    cell=st.sampled_from(CELLS),
    kinds=st.tuples(*[st.sampled_from(KINDS)] * 3),
    batch=st.integers(1, 5000),
    width=st.integers(1, 3000),
    shared=st.sampled_from([48, 64, 99, 227]),
)
def test_every_tile_has_what_its_norms_need(cell, kinds, batch, width, shared):
    shared *= 1024
    tile = fused.make_tile(cell, kinds, batch, width, 132, shared)
    whole, together = "layer" in kinds or "rms" in kinds, "batch" in kinds
    if tile is None:
        assert whole or (together and batch > 512)
        return
    assert tile.units >= width or not whole
    assert tile.rows >= batch or not together
    assert tile.rows * tile.wide <= 4096
    for columns in (tile.wide, tile.units):  # of the weights
        depth, ahead = tile.fetched(columns, shared)
        assert 1 <= ahead <= 3
        assert depth >= 16
        assert 4 * ahead * depth * (tile.rows + columns) <= shared
    assert all(n & n - 1 == 0 for n in tile)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_usual_sizes_are_served(cell):
    for kind in KINDS:
        for width in (32, 64, 128, 200, 256):
            for batch in (1, 8, 64, 100, 128, 512):
                assert fused.make_tile(cell, [kind] * 3, batch, width, *H200), (kind, width, batch)


@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not kernels.AVAILABLE or kernels.INTERPRETED, reason="needs Triton, whose compiler works without a GPU"
)
def test_the_kernels_compile_for_an_h200(tmp_path):
    script = Path(__file__).parent / "triton_hopper.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(script), "recurrence"]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["kernel"] for line in built} == {"forward", "backward"}
    for line in built:
        assert line["shared"] <= H200[1], line
        assert line["spilled"] <= (100 if line["units"] % 4 == 0 else 400), line  # bytes of a thread
        assert line["widest load"] == 16, line  # bytes, the most that a thread loads at once
