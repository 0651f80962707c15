"""The Triton kernels: on a GPU where there is one, otherwise on the CPU by Triton's interpreter.

The interpreter must be chosen before Triton is imported, so these tests run in a process of their own there.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import normzoo.ops.triton as backend
from normzoo import ops
from normzoo.ops import Moments, Pattern, reference
from normzoo.ops.triton import kernels
from normzoo.ops.triton.plan import ALL, Nest, depth, make_plan, nested

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
READY = kernels.AVAILABLE and (DEVICE == "cuda" or kernels.INTERPRETED)
H200 = 132  # multiprocessors

PATTERNS: dict[str, dict[str, int]] = {
    "b c s -> c": {}, "b c s -> b s": {}, "b c s -> b": {}, "b c s -> b c": {}, "b (g c) s -> b g": {"g": 3},
    "b (g c) s -> g": {"g": 3}, "(n b) c s -> n c": {"n": 2}, "b c s -> s": {}, "b (g c) s -> b g s": {"g": 2},
    "b c s -> c s": {}, "b c (p s) -> b c p": {"p": 2}, "b c s ->": {}, "b (c g) s -> b g": {"g": 3},
    "(n b) (g c) s -> n g": {"n": 2, "g": 3}, "b (g c) (p s) -> b g p": {"g": 2, "p": 5},
}  # fmt: skip
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

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


# ---- what they compute -----------------------------------------------------------------------------------------------


class Case:
    """An input with its gradient and parameters, and the answers: of the kernels, and of the formula in float64."""

    def __init__(
        self,
        pattern: str,
        shape: tuple[int, int, int] = (4, 12, 10),
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
        parameters: tuple[torch.dtype | None, torch.dtype | None] = (torch.float32, torch.float32),
        masked: bool = False,
        fixed: bool = False,
        centred: bool = True,
        options: dict[str, int] | None = None,
        offset: float = 1.5,
        scale: float = 3.0,
        seed: int = 0,
    ) -> None:
        self.pattern, self.channels_last, self.centred = Pattern.parse(pattern), channels_last, centred
        self.options = PATTERNS[pattern] if options is None else options
        generator = torch.Generator().manual_seed(seed)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        b, c, s = shape
        size = (b, s, c) if channels_last else shape
        self.x = (scale * random(*size) + offset).to(DEVICE, dtype)
        self.dy = random(*size).to(DEVICE, dtype)
        self.weight, self.bias = (None if kind is None else (random(c) / 4 + 1).to(DEVICE, kind) for kind in parameters)
        self.mask = (random(b, s) < 0.5).to(DEVICE) if masked else None
        self.given = None
        if fixed:
            _, (mean, var, _) = self._formula(self.x.double(), None, None)
            self.given = Moments(mean + 0.1 * centred, 1.2 * var, 1.0)

    def _formula(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Moments]:
        y, moments = reference.standardize(
            x, self.pattern, self.options, channels_last=self.channels_last, eps=1e-5, centred=self.centred,
            mask=self.mask, given=getattr(self, "given", None),
        )  # fmt: skip
        y = ops.affine(y, weight, bias, self.channels_last)
        if self.mask is not None:
            y = torch.where(self.mask.unsqueeze(-1 if self.channels_last else 1), y, 0)
        return y, moments

    def _inputs(self, dtype: torch.dtype | None) -> list[Tensor | None]:
        return [
            None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
            for t in (self.x, self.weight, self.bias)
        ]

    def run(self) -> tuple[list[Tensor], Moments | None]:
        x, weight, bias = self._inputs(None)
        assert x is not None
        assert backend.serves(
            x, self.pattern, channels_last=self.channels_last, weight=weight, bias=bias, mask=self.mask,
            given=self.given,
        )  # fmt: skip
        y, moments = backend.standardize(
            x, self.pattern, self.options, channels_last=self.channels_last, eps=1e-5, centred=self.centred,
            weight=weight, bias=bias, mask=self.mask, given=self.given,
        )  # fmt: skip
        return self._with_gradients(y, [x, weight, bias], self.dy), moments

    def expected(self) -> tuple[list[Tensor], Moments]:
        x, weight, bias = self._inputs(torch.float64)
        assert x is not None
        y, moments = self._formula(x, weight, bias)
        return self._with_gradients(y, [x, weight, bias], self.dy.double()), moments

    @staticmethod
    def _with_gradients(y: Tensor, inputs: list[Tensor | None], dy: Tensor) -> list[Tensor]:
        return [y, *torch.autograd.grad(y, [t for t in inputs if t is not None], dy)]

    def check(self, tolerance: float | None = None) -> None:
        found, moments = self.run()
        wanted, exact = self.expected()
        for a, b in zip(found, wanted, strict=True):
            close(a, b, tolerance or TOLERANCE[self.x.dtype])
        assert found[0].dtype == found[1].dtype == self.x.dtype
        assert found[0].shape == self.x.shape
        if self.given is not None:
            assert moments is None
            return
        assert moments is not None
        assert moments.mean.shape == moments.var.shape == exact.mean.shape
        assert moments.var.dtype == torch.float32
        close(moments.mean, exact.mean, 2e-6)
        close(moments.var, exact.var, 2e-5)
        number = torch.as_tensor(moments.number, dtype=torch.float64, device=DEVICE)
        assert torch.equal(
            number.expand(exact.var.shape),
            torch.as_tensor(exact.number, device=DEVICE).double().expand(exact.var.shape),
        )


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    scale = wanted.abs().max().clamp(min=1e-3)
    error = ((found.double() - wanted).abs().max() / scale).item()
    assert error <= tolerance, f"off by {error:.1e} of the largest value, more than {tolerance:.1e}"


@needs_kernels
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_the_formula(pattern, channels_last):
    Case(pattern, channels_last=channels_last).check()


@needs_kernels
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_the_formula_with_a_mask(pattern, channels_last):
    case = Case(pattern, channels_last=channels_last, masked=True)
    assert case.mask is not None
    padding = ~case.mask.unsqueeze(-1 if channels_last else 1).expand_as(case.x)
    case.check(1e-3)  # a mask may leave a statistic few values
    clean, _ = case.run()
    case.x[padding] = math.nan
    case.dy[padding] = math.inf
    for a, b in zip(clean, case.run()[0], strict=True):
        assert torch.equal(a, b)  # whatever is in the padding goes no further
    assert not clean[0][padding].any()
    assert not clean[1][padding].any()


@needs_kernels
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_the_formula_with_given_statistics(pattern, channels_last):
    Case(pattern, channels_last=channels_last, fixed=True).check()
    Case(pattern, channels_last=channels_last, fixed=True, masked=True, seed=1).check()


@needs_kernels
@pytest.mark.parametrize("one_pass", [True, False], ids=["registers", "shares"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_programs_that_walk_and_merge(pattern, one_pass, small_tiles):
    """Small tiles and few programs, with whole statistics in a tile where the pattern lets it, and never."""
    small_tiles(one_pass)
    Case(pattern, (4, 12, 20), channels_last=False, masked=one_pass, centred=one_pass, seed=2).check(1e-4)
    Case(pattern, (4, 12, 20), channels_last=True, masked=not one_pass, seed=2).check(1e-4)


@pytest.fixture
def small_tiles(monkeypatch):
    def choose(one_pass: bool, target: int = 128) -> None:
        for name, value in {"_ONE_PASS": 2**14 if one_pass else 0, "_TARGET": target, "_WARPS": 1}.items():
            monkeypatch.setattr(f"normzoo.ops.triton.plan.{name}", value)
        monkeypatch.setattr(backend, "_processors", lambda index: 3)
        make_plan.cache_clear()

    yield choose
    make_plan.cache_clear()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", ["b c s -> c", "b c s -> b s", "b (g c) s -> b g", "b (g c) s -> g"])
def test_half_precision(pattern, dtype):
    for parameter in (torch.float32, dtype):
        for channels_last in (False, True):
            Case(pattern, channels_last=channels_last, dtype=dtype, parameters=(parameter, parameter)).check()


@needs_kernels
@pytest.mark.parametrize("parameters", [(None, None), (torch.float32, None), (None, torch.float32)], ids=str)
def test_gain_and_shift_are_optional(parameters):
    for pattern in ("b c s -> c", "b c s -> b s", "b (g c) s -> b g"):
        for channels_last in (False, True):
            Case(pattern, channels_last=channels_last, parameters=parameters).check()
            Case(pattern, channels_last=channels_last, parameters=parameters, centred=False).check()


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 6, 1), (5, 6, 1), (1, 6, 7), (3, 96, 5), (7, 6, 130), (2, 300, 3)], ids=str)
def test_sizes(shape):
    for pattern in ("b c s -> c", "b c s -> b s", "b c s -> b c", "b (g c) s -> b g", "b c s ->"):
        for channels_last in (False, True):
            Case(pattern, shape, channels_last, scale=0.5, offset=0.1).check(1e-3)  # one value has variance zero


@needs_kernels
@pytest.mark.parametrize("one_pass", [True, False], ids=["registers", "shares"])
@pytest.mark.parametrize("pattern", ["b c s -> c", "b c s -> b s", "b c s -> b", "b (g c) s -> b g"])
def test_a_far_offset_leaves_the_variance_right(pattern, one_pass, small_tiles):
    small_tiles(one_pass, 4096)
    for channels_last in (False, True):
        case = Case(pattern, (8, 96, 65), channels_last, offset=1e4, scale=1.0)
        _, moments = case.run()
        _, exact = case.expected()
        assert moments is not None
        # neighbours of 1e4 in float32 are 1e-3 apart; as a difference of squares the variance would be off by 1
        assert ((moments.var.double() - exact.var).abs() / exact.var).max() < 2e-3
        assert (moments.mean.double() - exact.mean).abs().max() < 2e-2  # the interpreter sums one by one


@needs_kernels
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_parameters_that_follow_from_the_statistics(channels_last, masked):
    """As in batch renorm: the gradient passes through the statistics once, in the standardisation."""
    case = Case("b c s -> c", channels_last=channels_last, masked=masked)

    def rescaled(weight: Tensor, bias: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
        root = (moments.var + 1e-5).sqrt()
        return weight * root / 2, bias + weight * moments.mean / 4

    results = []
    for dtype in (None, torch.float64):
        x, weight, bias = case._inputs(dtype)
        assert x is not None
        assert weight is not None
        assert bias is not None
        if dtype is None:
            y, moments = backend.standardize(
                x, case.pattern, {}, channels_last=channels_last, eps=1e-5, centred=True, mask=case.mask,
                rescale=lambda m, w=weight, b=bias: rescaled(w, b, m),
            )  # fmt: skip
            assert moments is not None
        else:
            _, moments = reference.standardize(
                x, case.pattern, {}, channels_last=channels_last, eps=1e-5, mask=case.mask
            )
            y, _ = case._formula(x, *rescaled(weight, bias, moments))
        results.append([*case._with_gradients(y, [x, weight, bias], case.dy.to(y.dtype)), moments.mean, moments.var])
    for a, b in zip(*results, strict=True):
        close(a, b, 2e-5)


@needs_kernels
def test_parameter_gradients_of_many_half_precision_rows():
    found, _ = (case := Case("b c s -> b s", (1, 32, 4096), True, torch.bfloat16)).run()
    wanted, _ = case.expected()
    for a, b in zip(found[2:], wanted[2:], strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() < 5e-3


@needs_kernels
def test_the_same_bits_each_time():
    for pattern in ("b c s -> c", "b (g c) s -> b g"):
        first, second = Case(pattern).run()[0], Case(pattern).run()[0]
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


@needs_kernels
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_pattern_and_size(data):
    factors, sizes, options = [], [], {}
    for axis, name in zip("bcs", "ngp", strict=True):
        split = data.draw(st.sampled_from(["", "before", "after"]))
        inner = data.draw(st.integers(1, 9))
        if split:
            options[name] = data.draw(st.integers(1, 4))
        factors.append({"": axis, "before": f"({name} {axis})", "after": f"({axis} {name})"}[split])
        sizes.append(inner * options.get(name, 1))
    axes = [a for f in factors for a in f.strip("()").split()]
    kept = [a for a in axes if data.draw(st.booleans())]
    text = f"{' '.join(factors)} -> {' '.join(kept)}"
    channels_last, masked = data.draw(st.booleans()), data.draw(st.booleans())
    if depth(Pattern.parse(text), channels_last, True, masked) > 5 or (masked and len(kept) == len(axes)):
        return
    case = Case(text, (sizes[0], sizes[1], sizes[2]), channels_last, masked=masked, options=options)
    found, moments = case.run()
    wanted, exact = case.expected()
    assert moments is not None
    close(moments.mean, exact.mean, 1e-5)
    close(moments.var, exact.var, 1e-4)
    if (exact.var > 0.1).all():  # else the output is a quotient of roundings
        for a, b in zip(found, wanted, strict=True):
            close(a, b, 1e-3)


# ---- as operators ----------------------------------------------------------------------------------------------------


def settings_of(pattern: str) -> tuple[str, list[int], bool, float, bool]:
    return pattern, list(PATTERNS[pattern].values()), False, 1e-5, True


@needs_kernels
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("pattern", ["b (g c) s -> b g", "b c s -> c"])
def test_operators_are_well_formed(pattern, masked):
    case = Case(pattern, masked=masked)
    x, weight, bias = case._inputs(None)
    rest = settings_of(pattern)
    forward = torch.ops.normzoo.triton_standardize.default
    opcheck(forward, (x, weight, bias, case.mask, None, None, None, *rest, False))
    where = (*rest[:3], rest[-1])
    opcheck(torch.ops.normzoo.triton_moments.default, (case.x, case.mask, *where))
    mean, var, count = torch.ops.normzoo.triton_moments(case.x, case.mask, *where)
    count = count if masked else None
    opcheck(forward, (x, weight, None, case.mask, mean, var, None, *rest, False))
    opcheck(forward, (x, weight, bias, case.mask, mean, var, count, *rest, True))
    dy = case.dy.clone().requires_grad_()
    back = torch.ops.normzoo.triton_standardize_backward.default
    opcheck(back, (dy, x, weight, case.mask, mean, var, count, *rest, False, True, True))
    opcheck(back, (dy, x, weight, case.mask, mean, var, None, *rest, True, True, False))


@needs_kernels
@pytest.mark.parametrize("pattern", ["b (g c) s -> b g", "b c s -> c"])
@pytest.mark.parametrize("fixed", [False, True], ids=["own", "given"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_double_backward_is_that_of_the_formula(pattern, fixed, masked):
    case = Case(pattern, fixed=fixed, masked=masked)

    def twice(dtype: torch.dtype | None) -> list[Tensor]:
        inputs = case._inputs(dtype)
        x, weight, bias = inputs
        assert x is not None
        dy = case.dy.to(x.dtype).requires_grad_()
        if dtype is None:
            y, _ = backend.standardize(
                x, case.pattern, case.options, channels_last=False, eps=1e-5, centred=True, weight=weight, bias=bias,
                mask=case.mask, given=case.given,
            )  # fmt: skip
        else:
            y, _ = case._formula(x, weight, bias)
        first = torch.autograd.grad([y], [x, weight, bias], [dy], create_graph=True)  # pyright: ignore[reportCallIssue, reportArgumentType]
        penalty = sum(((g - 1) ** 2).sum() for g in first)
        return list(torch.autograd.grad(penalty, [x, weight, dy]))  # pyright: ignore[reportCallIssue, reportArgumentType]

    for a, b in zip(twice(None), twice(torch.float64), strict=True):
        close(a, b, 1e-4)


@needs_kernels
def test_compiles_whole_and_for_any_batch():
    case = Case("b (g c) s -> b g")

    def f(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert backend.serves(x, case.pattern, channels_last=False, weight=weight, bias=bias)
        y, moments = backend.standardize(
            x, case.pattern, case.options, channels_last=False, eps=1e-5, centred=True, weight=weight, bias=bias
        )
        assert moments is not None
        return y.sin() + moments.var.sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (4, 6):
        x, weight, bias = Case("b (g c) s -> b g", (n, 12, 10))._inputs(None)
        inputs = [t for t in (x, weight, bias) if t is not None]
        results = [torch.autograd.grad(g(*inputs).sum(), inputs) for g in (compiled, f)]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@needs_kernels
def test_the_formula_serves_what_the_kernels_do_not():
    x, pattern = torch.randn(4, 12, 10, device=DEVICE), Pattern.parse("b c s -> c")
    statistic = torch.ones(12, device=DEVICE)

    def serves(t: Tensor = x, **options) -> bool:
        return backend.serves(t, pattern, channels_last=False, **options)

    assert serves()
    assert not serves(x.double())
    assert not serves(x[:0])
    with TorchDispatchMode():  # no operator shows it what the processes do
        assert not serves(sync=True)
    assert serves(sync=True)
    assert not serves(weight=statistic.double())
    assert not serves(given=Moments(statistic, statistic.clone().requires_grad_(), 1.0))
    deep = Pattern.parse("(n b) (g c) (p s) -> n g p")
    assert not backend.serves(x, deep, channels_last=False)
    inside = []
    torch.func.vmap(lambda t: inside.append(serves(t)) or t)(x.unsqueeze(0))
    torch.func.grad(lambda t: inside.append(serves(t)) or t.sum())(x)
    assert inside == [False, False]


@needs_kernels
def test_any_strides():
    case = Case("b (g c) s -> b g")
    straight, _ = case.run()
    case.x, case.dy = (torch.stack([t, t], -1)[..., 0] for t in (case.x, case.dy))
    assert not case.x.is_contiguous()
    for a, b in zip(straight, case.run()[0], strict=True):
        assert torch.equal(a, b)


@needs_kernels
def test_statistics_of_two_processes(tmp_path):
    home = Path(__file__).with_name("sync_worker.py")
    spec = importlib.util.spec_from_file_location("sync_worker", home)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    done = subprocess.run([sys.executable, home, tmp_path, DEVICE], check=False, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank} of 2.pt", map_location="cpu") for rank in range(2)]
    assert [rank.pop("gradients") for rank in ranks] == [len(worker.OPERATIONS)] * 2
    for text, layout, turn in ranks[0]:
        with ops.backend("reference"):
            one = worker.operation(
                text, worker.LAYOUTS[layout], worker.TURNS[turn], slice(0, 8), torch.float64, sync=False
            )
        worker.agree([rank[text, layout, turn] for rank in ranks], one, text)


# ---- the plan, which needs neither Triton nor a GPU ------------------------------------------------------------------


def indices(nest: Nest, bits: int) -> np.ndarray:
    """Of each element in memory order: its row-major index over a set of dimensions."""
    found = np.zeros(nest.sizes, dtype=int)
    for i, (n, coordinate) in enumerate(zip(nest.sizes, np.indices(nest.sizes), strict=True)):
        if bits >> len(nest.sizes) - 1 - i & 1:
            found = found * n + coordinate
    return found.reshape(-1)


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_nest_is_the_pattern(pattern, channels_last, affine, masked):
    parsed, options, (b, c, s) = Pattern.parse(pattern), PATTERNS[pattern], (4, 12, 10)
    nest = nested(parsed, options, (b, c, s), channels_last, affine, masked)
    number = np.arange(b * c * s).reshape((b, s, c) if channels_last else (b, c, s))
    number = number.transpose(0, 2, 1) if channels_last else number  # memory place of each (b, c, s)
    place = [n.reshape(-1)[np.argsort(number.reshape(-1))] for n in np.indices((b, c, s))]
    if affine:
        assert np.array_equal(indices(nest, nest.channel), place[1])
    if masked:
        assert np.array_equal(indices(nest, nest.mask), place[0] * s + place[2])
    # the formula's mean of a tensor that holds the number of each element's statistic is that number
    statistic = indices(nest, nest.kept)
    x = torch.as_tensor(statistic, dtype=torch.float64).view((b, s, c) if channels_last else (b, c, s))
    _, moments = reference.standardize(x, parsed, options, channels_last=channels_last, eps=1.0)
    assert torch.equal(moments.mean.reshape(-1), torch.arange(nest.product(nest.kept), dtype=torch.float64))
    assert not moments.var.any()
    assert nest.product(ALL) == x.numel()


def h200(pattern: str, shape: tuple[int, int, int], channels_last: bool, options=(), itemsize: int = 2):
    return make_plan(pattern, tuple(options), shape, channels_last, True, False, itemsize, H200)


@pytest.mark.parametrize(
    ("pattern", "options", "shape", "channels_last"),
    [
        ("b c s -> b s", (), (1, 4096, 16384), True),
        ("b c s -> b s", (), (32, 512, 512), True),
        ("b c s -> b s", (), (64, 64, 1024), False),
        ("b (g c) s -> b g", (8,), (64, 64, 1024), False),
        ("b (g c) s -> b g", (8,), (64, 64, 1024), True),
        ("b (g c) s -> b g", (8,), (16384, 512, 1), True),
        ("b c s -> b c", (), (64, 64, 1024), False),
        ("b c s -> b c", (), (64, 64, 1024), True),
        ("b c s -> c", (), (64, 256, 1), True),
    ],
)
def test_memory_is_read_once_where_registers_hold_a_statistic(pattern, options, shape, channels_last):
    for itemsize in (2, 4):
        planned = h200(pattern, shape, channels_last, options, itemsize)
        for tile in (planned.forward, planned.backward):
            assert tile is not None
            reduced = [n for i, n in enumerate(reversed(planned.nest.sizes)) if planned.nest.reduced >> i & 1]
            assert math.prod(tile.blocks) >= math.prod(reduced)
            assert math.prod(tile.blocks) <= 32 * 1024


def test_few_large_statistics_are_shared_out():
    for pattern, options, channels_last in [
        ("b c s -> c", (), False), ("b c s -> c", (), True), ("b (g c) s -> g", (8,), False), ("b c s -> b", (), False),
    ]:  # fmt: skip
        planned = h200(pattern, (64, 64, 1024), channels_last, options)
        assert planned.forward is None
        assert planned.backward is None
        assert H200 <= planned.share.programs <= 16 * H200
        assert planned.share.step * planned.statistics * 12 < 0.05 * 2 * 64 * 64 * 1024  # bytes of the shares


@settings(max_examples=200, deadline=None)
@given(
    pattern=st.sampled_from(list(PATTERNS)),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300), st.integers(1, 3000)),
    channels_last=st.booleans(),
    itemsize=st.sampled_from([2, 4]),
)
def test_every_tile_fits(pattern, size, channels_last, itemsize):
    options = PATTERNS[pattern]
    b, c, s = size
    shape = (b * options.get("n", 1), c * options.get("g", 1), s * options.get("p", 1))
    planned = h200(pattern, shape, channels_last, options.values(), itemsize)
    nest = planned.nest
    for tile in (planned.forward, planned.backward, planned.share, planned.forward_given, planned.backward_given):
        if tile is None:
            continue
        assert all(n & n - 1 == 0 for n in tile.blocks)
        assert math.prod(tile.blocks) <= 32 * 1024
        assert 1 <= tile.warps <= 32
        assert tile.step <= tile.loops
        covered = math.prod(-(-n // k) for n, k in zip(nest.sizes, (1, 1, *tile.blocks), strict=True))
        assert tile.fixed * tile.loops == covered
    assert planned.statistics * planned.number == math.prod(shape)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, whose compiler works without a GPU")
def test_the_kernels_compile_for_an_h200(tmp_path):
    script = Path(__file__).parent / "triton_hopper.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["kernel"] for line in built} == {"forward", "moments", "merge", "sums", "backward"}
    narrow = [line for line in built if line["kernel"] != "merge" and line["widest load"] != 16]
    assert not narrow  # 16 bytes are the most that a thread loads at once
