"""The compiled CPU kernels against the definition in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func  # pyright: ignore[reportPrivateImportUsage]
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import normzoo as nz
from normzoo import ops
from normzoo.ops import Moments, Pattern, cpu, kernels

PATTERNS: dict[str, dict[str, int]] = {
    "b c s -> c": {},
    "b c s -> b s": {},
    "b c s -> b": {},
    "b c s -> b c": {},
    "b (g c) s -> b g": {"g": 2},
    "b (g c) s -> g": {"g": 3},
    "(n b) c s -> n c": {"n": 2},
    "b c s -> s": {},
    "b (g c) s -> b g s": {"g": 2},
    "b c (p s) -> b c p": {"p": 3},
    "b c (s p) -> b p": {"p": 2},
    "b (c g) s -> b g": {"g": 3},
    "(n b) (g c) (p s) -> b c s": {"n": 2, "g": 2, "p": 2},
    "(b n) (c g) (s p) -> n g p": {"n": 2, "g": 3, "p": 2},
    "b c s -> ": {},
    "b c s -> c s": {},
    "b (g h c) s -> b h": {"g": 2, "h": 3},
}
SHARES = ["b c s -> c", "b c s -> b s", "b c s -> b c", "b (g c) s -> b g", "b (g c) s -> g", "b c (s p) -> b p"]
HALVES = (torch.bfloat16, torch.float16)
BCS, BSC = False, True


@pytest.fixture(autouse=True)
def compiled(chosen_backend: None) -> Iterator[None]:
    if not kernels.load():
        pytest.skip(f"no compiled kernels: {kernels.status().reason}")
    with ops.backend("cpu"):
        yield


# ---- two answers -----------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """An output, its statistics and the gradients of x, weight and bias."""

    y: Tensor
    moments: Moments
    gradients: list[Any]  # tensors, or None


def leaf(t: Tensor | None, needed: bool = True) -> Any:
    return None if t is None else t.detach().requires_grad_(needed)


def answer(
    x: Tensor, text: str, options: dict[str, int], dy: Tensor, weight: Tensor | None, bias: Tensor | None, **rest: Any
) -> Answer:
    leaves = [leaf(x), leaf(weight), leaf(bias)]
    y, moments = ops.standardize(
        leaves[0], Pattern.parse(text), options, weight=leaves[1], bias=leaves[2], **dict[str, Any](eps=1e-5) | rest
    )
    y.backward(dy)
    moments = moments or rest.get("given") or statistics(x, text, options, **rest)
    return Answer(y.detach(), moments, [None if t is None else t.grad for t in leaves])


def statistics(
    x: Tensor, text: str, options: dict[str, int], *, channels_last: bool = False, mask: Tensor | None = None,
    centred: bool = True, eps: float = 1e-5, **_: Any,
) -> Moments:  # fmt: skip
    """What the kernels take for the statistics, which not every call returns."""
    axes = Pattern.parse(text).code(options)
    found = torch.ops.normzoo.moments.default(x.detach(), mask, axes, -1 if channels_last else 1, centred, eps)
    return Moments(found[0], found[1], x.numel() / found[0].numel() if mask is None else found[2])


def operator(x: Tensor, text: str, options: dict[str, int] | None = None, **named: Any) -> dict[str, Any]:
    """The arguments of the operator behind, by their names."""
    operation = torch.ops.normzoo.standardize.default
    defaults = {"channel_dim": 1, "centred": True, "eps": 1e-5, "constant": False, "momentum": 0.0}
    given = defaults | {"x": x, "axes": Pattern.parse(text).code(PATTERNS[text] if options is None else options)}
    return {argument.name: (given | named).get(argument.name) for argument in operation._schema.arguments}


def double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def both(
    x: Tensor, text: str, options: dict[str, int], dy: Tensor, weight: Tensor | None, bias: Tensor | None, **rest: Any
) -> tuple[Answer, Answer]:
    """What the kernels say, and what the definition says in float64."""
    got = answer(x, text, options, dy, weight, bias, **rest)
    given = rest.get("given")
    exact = rest | ({"given": Moments(given.mean.double(), given.var.double(), 1.0)} if given else {})
    with ops.backend("reference"):
        expected = answer(x.double(), text, options, dy.double(), double(weight), double(bias), **exact)
    return got, expected


def near(got: Tensor | None, expected: Tensor | None, slack: Tensor | float, what: str) -> None:
    """Equal to a rounding in the dtype of the answer, and ``slack``."""
    assert (got is None) == (expected is None), what
    if got is None or expected is None:
        return
    assert got.shape == expected.shape, what
    error = (got.double() - expected).abs()
    allowed = 1.01 * torch.finfo(got.dtype).eps * expected.abs() + slack
    wrong = ~(error <= allowed)  # a NaN too
    assert not wrong.any(), f"{what}: {float((error / allowed)[wrong].max()):.3g} times the rounding that is allowed"


def agree(x: Tensor, text: str, options: dict[str, int], *, seed: int = 0, **rest: Any) -> Answer:
    """The kernels give what the definition gives: output, layout, statistics and gradients."""
    dtype, channels = x.dtype, x.shape[-1 if rest.get("channels_last") else 1]
    generator = torch.Generator().manual_seed(seed)
    dy = rest.pop("dy", None)
    dy = torch.randn(x.shape, generator=generator).to(dtype) if dy is None else dy
    affine, parameters = rest.pop("affine", True), rest.pop("parameters", torch.float32)
    weight = bias = None
    if affine:
        weight = (0.5 + torch.rand(channels, generator=generator)).to(parameters)
    if affine and affine != "weight":
        bias = torch.randn(channels, generator=generator).to(parameters)
    got, expected = both(x, text, options, dy, weight, bias, **rest)
    assert got.y.dtype == dtype

    real = x if rest.get("mask") is None else torch.where(spread(rest["mask"], x, rest), x, 0)
    largest = float(real.double().abs().max())
    assert largest > 0 or rest.get("mask") is not None
    narrow = float((expected.moments.var.double() + rest.get("eps", 1e-5)).rsqrt().max())
    gain = 1.0 if weight is None else float(weight.abs().max())
    shift = 0.0 if bias is None else float(bias.abs().max())
    peak = 2 * (float(expected.y.abs().max()) + shift)
    blur = 4e-6 + 1e-6 * peak + 4e-7 * largest * narrow  # of what is standardised
    near(got.moments.mean, expected.moments.mean, 1e-6 * largest, "mean")
    std, step = expected.moments.var.double().sqrt(), 5e-7 * largest  # a few roundings of the mean
    near(got.moments.var, expected.moments.var, 2e-5 * std.square() + step * std + step**2, "var")
    numbers = [torch.as_tensor(answer.moments.number, dtype=torch.float64) for answer in (got, expected)]
    assert torch.equal(numbers[0].expand_as(numbers[1]), numbers[1])
    near(got.y, expected.y, gain * blur + 3e-7 * shift, "y")
    push = float(dy.double().abs().max())
    near(got.gradients[0], expected.gradients[0], 4 * gain * narrow * push * blur, "gradient of x")
    sums = push * (x.numel() / channels) ** 0.5 + float(dy.double().abs().sum()) / channels
    near(got.gradients[1], expected.gradients[1], sums * (blur + 3e-7 * peak), "gradient of weight")
    near(got.gradients[2], expected.gradients[2], sums * 2e-6, "gradient of bias")
    return got


def spread(mask: Tensor, x: Tensor, rest: dict[str, Any]) -> Tensor:
    return mask.unsqueeze(-1 if rest.get("channels_last") else 1).expand_as(x)


def data(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.5 + 2 * torch.randn(shape, generator=generator)).to(dtype)


def masked(*shape: int, seed: int = 0, share: float = 0.6) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < share


def names(function: Callable[[], object]) -> set[str]:
    """The operators that run inside a function."""
    seen: set[str] = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func.name())
            return func(*args, **(kwargs or {}))

    with Record():
        function()
    return seen


# ---- layouts ---------------------------------------------------------------------------------------------------------


def layouts(dtype: torch.dtype) -> dict[str, tuple[Tensor, bool]]:
    """The same sizes, b 4, c 12 and s 18, in every way that memory may lie."""
    x = data(4, 12, 18, dtype=dtype)
    image = x.view(4, 12, 3, 6)
    return {
        "bcs": (x, BCS),
        "bsc": (x.mT.contiguous(), BSC),
        "bcs, channels last in memory": (x.mT.contiguous().mT, BCS),
        "bsc, channels first in memory": (x.mT, BSC),
        "image": (image, BCS),
        "image, channels_last": (image.contiguous(memory_format=torch.channels_last), BCS),
        "image of tokens": (image.movedim(1, -1).contiguous(), BSC),
        "image, transposed": (image.mT.contiguous().mT, BCS),
        "volume, channels_last": (
            x.view(4, 12, 3, 3, 2).contiguous(memory_format=torch.channels_last_3d),
            BCS,
        ),
        "every second": (data(4, 12, 36, dtype=dtype)[..., ::2], BCS),
        "every second channel": (data(4, 18, 24, dtype=dtype)[..., ::2], BSC),
        "part of a batch": (data(9, 12, 18, dtype=dtype)[1::2], BCS),
        "shifted": (data(4 * 12 * 18 + 1, dtype=dtype)[1:].view(4, 12, 18), BCS),
        "expanded positions": (data(4, 12, 1, dtype=dtype).expand(4, 12, 18), BCS),
        "expanded batch": (data(1, 18, 12, dtype=dtype).expand(4, 18, 12), BSC),
    }


LAYOUTS = list(layouts(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("text", PATTERNS)
def test_every_layout_is_the_definition(text, dtype):
    for i, (name, (x, channels_last)) in enumerate(layouts(dtype).items()):
        where = {"channels_last": channels_last, "seed": i}
        with_mask = {"mask": masked(4, *(x.shape[1:-1] if channels_last else x.shape[2:]), seed=i)}
        turn = [{}, {"centred": False}, {"affine": False}, {"affine": "weight", "parameters": dtype}][i % 4]
        try:
            agree(x, text, PATTERNS[text], **where)
            agree(x, text, PATTERNS[text], **where, **turn)
            agree(x, text, PATTERNS[text], **where, **with_mask, **turn)
        except AssertionError as error:
            raise AssertionError(f"{name}, {turn}: {error}") from error


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", ["b c s -> c", "b c s -> b s", "b (g c) s -> b g", "b c s -> c s"])
def test_output_gradients_of_any_layout(text, layout):
    x, channels_last = layouts(torch.float32)[layout]
    turned = torch.randn(x.shape[::-1]).permute(*reversed(range(x.ndim)))
    for dy in (torch.ones(()).expand(x.shape), torch.randn(x.shape[-1]).expand(x.shape), turned):
        agree(x, text, PATTERNS[text], channels_last=channels_last, dy=dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", ["b c s -> c", "b c s -> b s", "b c s -> b c", "b (g c) s -> b g", "b c s -> "])
def test_rows_without_positions(text, dtype):
    for rows, channels in ((1, 6), (7, 12), (64, 2), (1000, 30)):
        x = data(rows, channels, dtype=dtype)
        for channels_last in (BCS, BSC):
            for mask in (None, masked(rows)):
                agree(x, text, PATTERNS[text], channels_last=channels_last, mask=mask)


@pytest.mark.parametrize("text", PATTERNS)
def test_the_output_has_the_strides_of_the_input(text):
    for name in ("bcs", "bsc", "bcs, channels last in memory", "image, channels_last", "volume, channels_last"):
        x, channels_last = layouts(torch.float32)[name]
        x = x.detach().requires_grad_()
        y, _ = ops.standardize(x, Pattern.parse(text), PATTERNS[text], channels_last=channels_last, eps=1e-5)
        assert y.stride() == x.stride(), name
        (dx,) = torch.autograd.grad(y, x, torch.randn(x.shape))
        assert dx.stride() == x.stride(), name


# ---- sizes -----------------------------------------------------------------------------------------------------------

SIZES = [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 513]


@st.composite
def calls(draw: st.DrawFn, text: str) -> dict[str, Any]:
    """A shape that the pattern divides, of at most 40,000 elements, and the other arguments."""
    options, factors = PATTERNS[text], Pattern.parse(text).factors
    sizes = [1, 1, 1]
    for i, group in enumerate(factors):
        for axis in group:
            sizes[i] *= options.get(axis, 1)
    left = 40_000 // (sizes[0] * sizes[1] * sizes[2])
    for i in draw(st.permutations(range(3))):
        size = draw(st.sampled_from([n for n in SIZES if n <= left]))
        sizes[i] *= size
        left //= size
    return {
        "sizes": sizes,
        "channels_last": draw(st.booleans()),
        "centred": draw(st.booleans()),
        "affine": draw(st.sampled_from([True, "weight", False])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float32, *HALVES])),
        "share": draw(st.sampled_from([None, None, 0.0, 0.1, 0.6, 1.0])),
        "eps": draw(st.sampled_from([1e-5, 1e-3])),
        "seed": draw(st.integers(0, 99)),
    }


@pytest.mark.parametrize("text", PATTERNS)
def test_any_size_is_the_definition(text):
    @settings(max_examples=40, deadline=None, derandomize=True)
    @drawn(calls(text))
    def run(call: dict[str, Any]) -> None:
        (b, c, s), dtype, share = call.pop("sizes"), call.pop("dtype"), call.pop("share")
        shape = (b, s, c) if call["channels_last"] else (b, c, s)
        mask = None if share is None else masked(b, s, seed=call["seed"], share=share)
        agree(data(*shape, dtype=dtype, seed=call["seed"]), text, PATTERNS[text], mask=mask, **call)

    run()


@pytest.mark.parametrize("text", SHARES)
def test_sizes_beyond_a_block(text):
    """Sums go through blocks of 4096 elements or 256 rows; these are longer, and no multiple."""
    for shape, channels_last in (((2, 6, 9002), BCS), ((6, 1030, 6), BSC), ((2, 2, 1026 * 6), BSC)):
        options = {axis: 2 for axis in PATTERNS[text]}
        agree(data(*shape), text, options, channels_last=channels_last)
        agree(data(*shape, dtype=torch.bfloat16), text, options, channels_last=channels_last)
        mask = masked(shape[0], shape[1] if channels_last else shape[2])
        agree(data(*shape), text, options, channels_last=channels_last, mask=mask)


@pytest.mark.parametrize("text", ["b c s -> c", "b c s -> b c", "b c s -> b s", "b (g c) s -> b g"])
def test_results_that_go_past_the_caches(text):
    """Large results are written by another instruction."""
    for shape, channels_last in (((8, 64, 128, 129), BCS), ((8, 128, 129, 64), BSC)):
        x = data(*shape)
        assert x.nbytes >= 32 << 20
        dy, options = torch.randn(shape), {axis: 2 for axis in PATTERNS[text]}
        weight, bias = torch.randn(64), torch.randn(64)
        got = answer(x, text, options, dy, weight, bias, channels_last=channels_last)
        with ops.backend("reference"):
            expected = answer(x, text, options, dy, weight, bias, channels_last=channels_last)
        torch.testing.assert_close(got.y, expected.y, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.gradients[0], expected.gradients[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.gradients[1], expected.gradients[1], rtol=1e-3, atol=1e-1)


@pytest.mark.parametrize("groups", [15, 30, 60])
def test_small_groups_that_go_past_the_caches(groups):
    """Rows of 120 channels, of which every second begins amid a line of the cache."""
    x, dy = data(70_000, 120), torch.randn(70_000, 120)
    assert x.nbytes >= 32 << 20
    arguments = (x, "b (g c) s -> b g", {"g": groups}, dy, torch.randn(120), torch.randn(120))
    got = answer(*arguments)
    with ops.backend("reference"):
        expected = answer(*arguments)
    torch.testing.assert_close(got.y, expected.y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.gradients[0], expected.gradients[0], rtol=1e-3, atol=1e-3)


# ---- given statistics and rescaling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("text", PATTERNS)
def test_given_statistics(text, with_mask):
    for i, (x, channels_last) in enumerate(layouts(torch.float32).values()):
        mask = masked(4, *(x.shape[1:-1] if channels_last else x.shape[2:])) if with_mask else None
        own = statistics(x, text, PATTERNS[text], channels_last=channels_last)
        centred = i % 3 > 0
        given = Moments(torch.randn(own.mean.shape) * centred, 0.5 + torch.rand(own.var.shape), 1.0)
        agree(x, text, PATTERNS[text], channels_last=channels_last, given=given, mask=mask, centred=centred)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("text", ["b c s -> c", "b c s -> ", "(n b) c s -> n c"])
def test_weight_and_bias_from_the_statistics(text, with_mask):
    """As batch renorm has it: the gain depends on the statistics, which are constants to it alone."""

    def rescale(moments: Moments) -> tuple[Tensor, Tensor]:
        assert not moments.var.requires_grad
        std = moments.var.reshape(-1, moments.var.shape[-1] if moments.var.ndim else 1).mean(0).sqrt()
        return std.expand(12) * 0.7, std.expand(12) + 0.1

    for x, channels_last in layouts(torch.float32).values():
        mask = masked(4, *(x.shape[1:-1] if channels_last else x.shape[2:])) if with_mask else None
        agree(x, text, PATTERNS[text], channels_last=channels_last, mask=mask, rescale=rescale, affine=False)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def signs(*shape: int) -> Tensor:
    """One and minus one in turn along every axis: any even number of neighbours has mean 0 and variance 1."""
    grid = sum(torch.arange(n).view(-1, *[1] * (len(shape) - 1 - i)) for i, n in enumerate(shape))
    assert isinstance(grid, Tensor)
    return 1 - 2 * (grid % 2).float()


@pytest.mark.parametrize("centre", [0.0, 1e4, -1e6])
@pytest.mark.parametrize("text", PATTERNS)
def test_a_large_mean_leaves_the_variance(text, centre):
    options = {axis: 2 for axis in PATTERNS[text]} | ({"g": 2, "h": 3} if "h" in PATTERNS[text] else {})
    for shape, channels_last in (((4, 12, 68), BCS), ((4, 68, 12), BSC)):
        x = centre + signs(*shape)
        y, _ = ops.standardize(x, Pattern.parse(text), options, channels_last=channels_last, eps=1e-5)
        moments = statistics(x, text, options, channels_last=channels_last)
        if (Pattern.parse(text).factors, Pattern.parse(text).kept) == ((("b",), ("c",), ("s",)), ("c",)):
            assert torch.equal(moments.mean, torch.full((12,), centre))
            torch.testing.assert_close(moments.var, torch.ones(12), rtol=1e-5, atol=0)
        with ops.backend("reference"):  # exact: interleaved axes may see one sign alone
            z, exact = ops.standardize(x.double(), Pattern.parse(text), options, channels_last=channels_last, eps=1e-5)
        assert exact is not None
        torch.testing.assert_close(moments.var.double(), exact.var, rtol=1e-5, atol=0)
        torch.testing.assert_close(moments.mean.double(), exact.mean, rtol=1e-7, atol=1e-6)
        torch.testing.assert_close(y.double(), z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", PATTERNS)
def test_a_first_element_far_away(text):
    """Sums are taken from the first element on: it may be the one that is unlike the others."""
    for shape, channels_last in (((4, 12, 18), BCS), ((4, 18, 12), BSC)):
        x = data(*shape)
        x[0, 0, 0] = 3e3
        agree(x, text, PATTERNS[text], channels_last=channels_last)
        x[:, :, :1] = 1e4 + data(*x[:, :, :1].shape)
        agree(x, text, PATTERNS[text], channels_last=channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("length", [2, 4, 6, 7, 8, 15, 16, 17, 32, 48, 64, 65, 96, 128, 130, 300])
def test_rows_of_any_length(length, dtype):
    """Short rows stay in registers, and are read again where the first element is far from the mean."""
    for text, options in (
        ("b c s -> b s", {}), ("b (g c) s -> b g s", {"g": 3}), ("b (g c) s -> b g s", {"g": 16}),
    ):  # fmt: skip
        x = data(5, 7, length * options.get("g", 1), dtype=dtype)
        agree(x, text, options, channels_last=BSC)
        agree(x, text, options, channels_last=BSC, centred=False, affine=False)
        agree(x, text, options, channels_last=BSC, mask=masked(5, 7))
        x[..., 0] += 50
        agree(x, text, options, channels_last=BSC)
        x[1] = 3.0
        y, _ = ops.standardize(x, Pattern.parse(text), options, channels_last=BSC, eps=1e-5)
        assert not y[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("length", [2, 3, 15, 16, 17, 49, 64, 255, 256, 257])
def test_short_runs_of_any_length(length, dtype):
    """Many channels with few positions: several are summed together, and again where the first element is far away."""
    for text, options in (
        ("b c s -> b c", {}), ("b c s -> b", {}), ("b (g c) s -> b g", {"g": 2}), ("b (g c) s -> b g", {"g": 18}),
    ):  # fmt: skip
        for channels in (36, 144) if length < 20 else (36,):
            x = data(3, channels, length, dtype=dtype)
            agree(x, text, options)
            agree(x, text, options, centred=False, affine=False)
            x[1, ::5, 0] += 50
            agree(x, text, options)
            x[1] = 3.0
            y, _ = ops.standardize(x, Pattern.parse(text), options, eps=1e-5)
            assert not y[1].any()


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("text", PATTERNS)
def test_tiny_and_huge_inputs(text, scale):
    for shape, channels_last in (((4, 12, 18), BCS), ((4, 18, 12), BSC)):
        for eps in (0.0, 1e-5):
            for centred in (True, False):
                agree(scale * data(*shape), text, PATTERNS[text], channels_last=channels_last, eps=eps, centred=centred)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 3.7, -1234.5])
@pytest.mark.parametrize("text", PATTERNS)
def test_a_constant_gives_the_bias(text, value, dtype):
    bias = data(12, seed=5)
    for shape, channels_last in (((4, 12, 18), BCS), ((4, 18, 12), BSC)):
        for mask in (None, masked(4, 18)):
            x = torch.full(shape, value, dtype=dtype)
            y, _ = ops.standardize(
                x, Pattern.parse(text), PATTERNS[text], weight=data(12), bias=bias, channels_last=channels_last,
                eps=1e-5, mask=mask,
            )  # fmt: skip
            moments = statistics(x, text, PATTERNS[text], channels_last=channels_last, mask=mask)
            expected = (bias if channels_last else bias[:, None]).to(dtype).expand(shape)
            if mask is not None:
                expected = torch.where(mask.unsqueeze(-1 if channels_last else 1), expected, 0)
            assert torch.equal(y, expected)
            assert float(moments.var.abs().max()) <= (1e-7 * value) ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", PATTERNS)
def test_padding_is_not_read(text, dtype):
    for (x, channels_last), bad in zip(layouts(dtype).values(), [torch.nan, torch.inf, -torch.inf] * 5, strict=True):
        mask = masked(4, *(x.shape[1:-1] if channels_last else x.shape[2:]))
        real = mask.unsqueeze(-1 if channels_last else 1)
        dy = torch.randn(x.shape).to(dtype)
        weight, bias = data(12), data(12, seed=1)
        clean = answer(torch.where(real, x, 0), text, PATTERNS[text], torch.where(real, dy, 0), weight, bias,
                       channels_last=channels_last, mask=mask)  # fmt: skip
        dirty = answer(torch.where(real, x, bad), text, PATTERNS[text], torch.where(real, dy, bad), weight, bias,
                       channels_last=channels_last, mask=mask)  # fmt: skip
        for a, b in zip([clean.y, *clean.moments, *clean.gradients], [dirty.y, *dirty.moments, *dirty.gradients],
                        strict=True):  # fmt: skip
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        assert not clean.y.masked_select(~real).any()
        assert clean.gradients[0] is not None
        assert not clean.gradients[0].masked_select(~real).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("text", PATTERNS)
def test_a_fault_reaches_its_statistic_and_no_other(text, bad):
    for shape, channels_last in (((4, 12, 18), BCS), ((4, 18, 12), BSC)):
        for mask in (None, torch.ones(4, 18, dtype=torch.bool)):
            x = data(*shape)
            at = (1, 2, 3)
            dy, weight, bias = torch.randn(shape), data(12), data(12)
            clean = answer(x, text, PATTERNS[text], dy, weight, bias, channels_last=channels_last, mask=mask)
            x[at] = bad
            got = answer(x, text, PATTERNS[text], dy, weight, bias, channels_last=channels_last, mask=mask)
            with ops.backend("reference"):
                expected = answer(x, text, PATTERNS[text], dy, weight, bias, channels_last=channels_last, mask=mask)
            assert got.y[at].isnan()
            assert torch.equal(got.y.isfinite(), expected.y.isfinite())
            assert torch.equal(got.moments.var.isfinite(), expected.moments.var.isfinite())
            assert got.gradients[0] is not None
            assert expected.gradients[0] is not None
            assert torch.equal(got.gradients[0].isfinite(), expected.gradients[0].isfinite())
            assert torch.equal(got.y[got.y.isfinite()], clean.y[got.y.isfinite()])


def test_one_value_for_each_statistic():
    """Not centred, a value divided by its own size."""
    for shape, channels_last in (((3, 4, 5), BCS), ((3, 5, 4), BSC)):
        x = data(*shape)
        agree(x, "b c s -> b c s", {}, channels_last=channels_last, centred=False, affine="weight")
        y, _ = ops.standardize(
            x, Pattern.parse("b c s -> b c s"), {}, channels_last=channels_last, eps=0, centred=False
        )
        torch.testing.assert_close(y, x.sign())


def test_a_batch_that_is_all_padding():
    for text, options in PATTERNS.items():
        for shape, channels_last in (((4, 12, 18), BCS), ((4, 18, 12), BSC)):
            x, mask = data(*shape).requires_grad_(), torch.zeros(4, 18, dtype=torch.bool)
            y, _ = ops.standardize(
                x, Pattern.parse(text), options, channels_last=channels_last, eps=1e-5, mask=mask, bias=data(12)
            )
            moments = statistics(x, text, options, channels_last=channels_last, mask=mask)
            (dx,) = torch.autograd.grad(y, x, torch.randn(shape))
            for t in (y, dx, *moments):
                assert isinstance(t, Tensor)
                assert not t.any()


@pytest.mark.parametrize("text", ["b c s -> b s", "b c s -> c", "b (g c) s -> b g", "b c s -> b"])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_parameter_gradients_over_many_rows(text, dtype):
    """Within half a per cent of float64 over 65,536 rows, where sums in half precision would be far off."""
    shapes = [((65536, 64), BSC), ((16, 64, 64, 64), BCS), ((16, 4096, 64), BSC)]
    for shape, channels_last in shapes[: 2 if dtype == torch.float16 else 3]:
        if text == "b c s -> b" and len(shape) == 2:
            continue
        generator = torch.Generator().manual_seed(1)
        x = data(*shape, dtype=dtype)
        # a part of the gradient that has a sign, or the sum would be noise
        dy = (0.2 + 0.1 * x.float() + torch.randn(shape, generator=generator)).to(dtype)
        weight, bias = (1 + 0.2 * torch.randn(64, generator=generator)).to(dtype), torch.zeros(64, dtype=dtype)
        options = {axis: 8 for axis in PATTERNS[text]}
        for centred in (True, False) if text == "b c s -> b s" else (True,):
            got, expected = both(x, text, options, dy, weight, bias, channels_last=channels_last, centred=centred)
            for name, a, b in zip(("weight", "bias"), got.gradients[1:], expected.gradients[1:], strict=True):
                assert a is not None
                assert b is not None
                assert a.dtype == dtype
                assert float(((a.double() - b) / b).abs().max()) < 0.005, f"{name}, {shape}"


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("channels", [1, 2, 3, 64])
@pytest.mark.parametrize("text", ["b c s -> c", "b c s -> ", "b c s -> b s", "b c s -> b c", "b c s -> s"])
def test_two_threads_give_what_one_gives(text, channels, two_threads):
    """Few statistics are each shared by the threads, many are dealt out."""
    for shape, channels_last in (((6, channels, 6000), BCS), ((6, 6000, channels), BSC)):
        x, dy = data(*shape), torch.randn(shape)
        weight, bias, mask = data(channels), data(channels), masked(6, 6000)
        for rest in ({}, {"mask": mask}, {"centred": False}):
            answers = []
            for threads in (1, 2, 3):
                two_threads(threads)
                answers.append(answer(x, text, {}, dy, weight, bias, channels_last=channels_last, **rest))
            for other in answers[1:]:
                torch.testing.assert_close(other.y, answers[0].y, rtol=1e-5, atol=5e-5)
                torch.testing.assert_close(other.moments[:2], answers[0].moments[:2], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(other.gradients[0], answers[0].gradients[0], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(other.gradients[1:], answers[0].gradients[1:], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("text", PATTERNS)
def test_two_threads_give_the_definition(text, two_threads):
    two_threads(2)
    options = {axis: 2 for axis in PATTERNS[text]}
    for shape, channels_last in (((4, 4, 9000), BCS), ((4, 9000, 4), BSC)):
        if "h" in options:
            shape = (4, 8, 9000) if not channels_last else (4, 9000, 8)
        agree(data(*shape), text, options, channels_last=channels_last)
        agree(1e4 + data(*shape), text, options, channels_last=channels_last)
        agree(data(*shape, dtype=torch.bfloat16), text, options, channels_last=channels_last, mask=masked(4, 9000))


@pytest.mark.parametrize("text", ["b c s -> b c", "b c s -> b", "b (g c) s -> b g", "b (g c) s -> b g s"])
def test_two_threads_share_short_runs_and_small_groups(text, two_threads):
    two_threads(2)
    for samples, positions in ((1, 9), (3, 49), (80, 49)):
        for shape, channels_last in (((samples, 36, positions), BCS), ((samples, positions, 36), BSC)):
            agree(data(*shape), text, {"g": 9} if "g" in text else {}, channels_last=channels_last)


# ---- what torch asks of an operator ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("layout", ["bcs", "image, channels_last", "every second"])
@pytest.mark.parametrize("text", ["b c s -> c", "b (g c) s -> b g", "(n b) (g c) (p s) -> b c s"])
def test_opcheck(text, layout, with_mask):
    x, _ = layouts(torch.float32)[layout]
    mask = masked(4, *x.shape[2:]) if with_mask else None
    x, weight, bias = x.detach().requires_grad_(), data(12).requires_grad_(), data(12).requires_grad_()
    arguments = operator(x, text, weight=weight, bias=bias, mask=mask)
    torch.library.opcheck(torch.ops.normzoo.standardize.default, (), arguments)
    plain = (x.detach(), mask, arguments["axes"], 1, True, 1e-5)
    torch.library.opcheck(torch.ops.normzoo.moments.default, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", PATTERNS)
def test_shapes_without_data(text, dtype):
    """What the compiler is told of the results is what the results are."""
    for x, channels_last in layouts(dtype).values():
        for mask in (None, masked(4, *(x.shape[1:-1] if channels_last else x.shape[2:]))):
            arguments = operator(
                x, text, weight=data(12), bias=data(12, dtype=dtype), mask=mask, channel_dim=-1 if channels_last else 1
            )
            real = torch.ops.normzoo.standardize.default(**arguments)
            with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = torch.ops.normzoo.standardize.default(**arguments | {"x": mode.from_tensor(x)})
            for a, b in zip(real, fake, strict=True):
                assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("the compiled kernels were called")


@pytest.fixture
def formula_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever calls the kernels fails."""
    monkeypatch.setattr(cpu, "standardize", refuse)


def test_the_kernels_are_what_runs():
    x = data(4, 12, 18).requires_grad_()

    def run() -> None:
        with torch.autograd.set_multithreading_enabled(False):
            ops.standardize(x, Pattern.parse("b c s -> c"), {}, eps=1e-5)[0].sum().backward()

    for name in ("cpu", "auto"):
        with ops.backend(name):
            assert {"normzoo::standardize", "normzoo::standardize_backward"} <= names(run), name
    for name in ("native", "reference"):
        with ops.backend(name):
            assert not any(called.startswith("normzoo") for called in names(run)), name


class Plain(nn.Module):
    """A pattern, its parameters and nothing else."""

    def __init__(self, text: str, channels_last: bool = False, channels: int = 12) -> None:
        super().__init__()
        self.pattern, self.options, self.channels_last = Pattern.parse(text), PATTERNS[text], channels_last
        self.weight, self.bias = nn.Parameter(data(channels)), nn.Parameter(data(channels, seed=1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return ops.standardize(
            x, self.pattern, self.options, channels_last=self.channels_last, eps=1e-5,
            weight=self.weight, bias=self.bias, mask=mask,
        )[0]  # fmt: skip


@pytest.mark.parametrize("text", ["b c s -> c", "b c s -> b s", "b (g c) s -> b g", "b c (s p) -> b p"])
@pytest.mark.parametrize("channels_last", [BCS, BSC])
def test_compiled_in_one_graph_for_all_sizes(text, channels_last):
    torch._dynamo.reset()
    graphs: list[Any] = []
    first = 0

    def keep(module: Any, _: Any) -> Any:
        graphs.append(module)
        return make_boxed_func(module)

    norm = Plain(text, channels_last)
    fast = torch.compile(norm, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=keep))
    for i, (b, s) in enumerate(((4, 18), (6, 10), (2, 32))):
        shape = (b, s, 12) if channels_last else (b, 12, s)
        x = data(*shape).requires_grad_()
        torch.testing.assert_close(fast(x), norm(x))
        found = torch.autograd.grad(fast(x).square().sum(), [x, *norm.parameters()])
        torch.testing.assert_close(found, torch.autograd.grad(norm(x).square().sum(), [x, *norm.parameters()]))
        if i == 0:
            first = len(graphs)
            assert any("normzoo.standardize" in module.code for module in graphs)
    assert len(graphs) == first, "it was compiled again for another size"


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compiled_by_inductor():
    torch._dynamo.reset()
    norm = nn.Sequential(nz.create("batch_norm", 12), nn.GELU(), nz.create("group_norm", 12))
    fast: Any = torch.compile(copy.deepcopy(norm), fullgraph=True, dynamic=True)
    for b, size in ((3, 5), (4, 7)):
        x = data(b, 12, size, size + 1).contiguous(memory_format=torch.channels_last)
        a, b = (x.detach().requires_grad_() for _ in range(2))
        torch.testing.assert_close(fast(a), norm(b), rtol=1e-5, atol=1e-5)
        v = torch.randn(x.shape)
        for function, t in ((norm, b), (fast, a)):
            (function(t) * v).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    for buffer, expected in zip(fast.buffers(), norm.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize(
    "layout", ["bcs", "bsc", "image, channels_last", "bsc, channels first in memory", "every second"]
)
@pytest.mark.parametrize("text", SHARES)
def test_second_and_third_derivatives(text, layout, with_mask):
    x, channels_last = layouts(torch.float32)[layout]
    mask = masked(4, *(x.shape[1:-1] if channels_last else x.shape[2:])) if with_mask else None
    torch.manual_seed(0)
    directions = [[torch.randn(shape) for shape in (x.shape, (12,), (12,))] for _ in range(3)]
    dy = torch.randn(x.shape)

    def derivatives(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).detach().requires_grad_() for t in (x, data(12), data(12, seed=1))]
        push = dy.to(dtype).requires_grad_()
        y, _ = ops.standardize(
            leaves[0], Pattern.parse(text), PATTERNS[text], channels_last=channels_last, eps=1e-3, weight=leaves[1],
            bias=leaves[2], mask=mask,
        )  # fmt: skip
        inputs, out, found = [*leaves, push], y.tanh() * push, []
        for order in range(3):
            grads = torch.autograd.grad(out.sum(), inputs, create_graph=True, materialize_grads=True)
            found += grads
            out = torch.stack([(g * v.to(dtype)).sum() for g, v in zip(grads, directions[order], strict=False)])
        return found

    found = derivatives(torch.float32)
    with ops.backend("reference"):
        expected = derivatives(torch.float64)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4 * float(b.detach().abs().max()) + 1e-6)


def test_second_derivative_with_given_statistics():
    x, given = data(4, 12, 18), Moments(torch.randn(12), 0.5 + torch.rand(12), 1.0)

    def second(x: Tensor, given: Moments, weight: Tensor) -> tuple[Tensor, ...]:
        x, weight = x.requires_grad_(), weight.requires_grad_()
        y, _ = ops.standardize(x, Pattern.parse("b c s -> c"), {}, eps=1e-5, given=given, weight=weight)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.pow(2).sum(), [x, weight])

    found = second(x.clone(), given, data(12))
    expected = second(x.double(), Moments(given.mean.double(), given.var.double(), 1.0), data(12).double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
@pytest.mark.parametrize("text", SHARES)
def test_gradients_of_some(text, needed):
    full = answer(data(4, 12, 18), text, PATTERNS[text], torch.ones(4, 12, 18), data(12), data(12))
    leaves = [leaf(t, need) for t, need in zip((data(4, 12, 18), data(12), data(12)), needed, strict=True)]
    y, _ = ops.standardize(leaves[0], Pattern.parse(text), PATTERNS[text], eps=1e-5, weight=leaves[1], bias=leaves[2])
    y.sum().backward()
    for t, need, expected in zip(leaves, needed, full.gradients, strict=True):
        assert t is not None
        assert (t.grad is not None) == need
        assert not need or torch.equal(t.grad, expected)


def test_nothing_is_differentiated_without_need():
    x = data(4, 12, 18)
    y, _ = ops.standardize(x, Pattern.parse("b c s -> c"), {}, eps=1e-5, weight=data(12))
    assert not y.requires_grad
    with torch.no_grad():
        y, moments = ops.standardize(x.requires_grad_(), Pattern.parse("b c s -> c"), {}, eps=1e-5)
    assert not y.requires_grad
    y, moments = ops.standardize(x, Pattern.parse("b c s -> c"), {}, eps=1e-5)
    assert y.requires_grad
    assert moments is not None
    assert not moments.mean.requires_grad
    assert not moments.var.requires_grad


def test_inference_mode():
    norm, x = Plain("b (g c) s -> b g"), data(4, 12, 18)
    with torch.inference_mode():
        y = norm(x)
        again = norm(y)
    assert y.is_inference()
    torch.testing.assert_close(y, norm(x), rtol=0, atol=0)
    assert again.shape == x.shape


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    norms = nn.Sequential(nz.create("batch_norm", 12), nz.create("layer_norm", 12), nz.create("instance_norm", 12))
    plain, x = copy.deepcopy(norms), data(4, 12, 6, 5)
    a, b = leaf(x), leaf(x)
    checkpoint(norms, a, use_reentrant=reentrant).square().sum().backward()
    plain(b).square().sum().backward()
    assert torch.equal(a.grad, b.grad)
    found, expected = ([p.grad for p in m.parameters()] for m in (norms, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for first, second in zip(norms.buffers(), plain.buffers(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own rules, on first use
@pytest.mark.parametrize("text", SHARES)
def test_function_transforms_take_the_formula(text, formula_alone):
    norm = Plain(text)
    x, parameters = data(4, 12, 18), {name: p.detach() for name, p in norm.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(norm, parameters, (x,)).tanh().square().sum()

    exact = Plain(text).double()
    z = x.double().requires_grad_()
    value = exact(z).tanh().square().sum()
    dx, *dparameters = torch.autograd.grad(value, [z, *exact.parameters()])
    found = grad(loss, (0, 1))(parameters, x)
    torch.testing.assert_close(found[1].double(), dx, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close([g.double() for g in found[0].values()], dparameters, rtol=1e-4, atol=1e-3)

    v = torch.randn(x.shape)
    slope: Any = jvp(lambda x: loss(parameters, x), (x,), (v,))[1]
    torch.testing.assert_close(float(slope), float((dx * v).sum()), rtol=1e-3, atol=1e-3)
    with forward_ad.dual_level():
        dual: Any = forward_ad.unpack_dual(loss(parameters, forward_ad.make_dual(x, v)))
    torch.testing.assert_close(float(dual.tangent), float((dx * v).sum()), rtol=1e-3, atol=1e-3)

    many = torch.stack([x, 2 * x, x.flip(2)])
    expected = torch.stack([exact(each.double()) for each in many]).detach()
    torch.testing.assert_close(vmap(lambda x: functional_call(norm, parameters, (x,)))(many).double(), expected,
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    rows = jacrev(lambda x: functional_call(norm, parameters, (x,)).sum((0, 2)))(x)
    total = jacrev(lambda x: functional_call(norm, parameters, (x,)).sum())(x)
    torch.testing.assert_close(rows.sum(0), total, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("text", ["b c s -> c", "b (g c) s -> b g", "(n b) c s -> n c"])
def test_exported_programs_hold_torchs_operators_alone(text):
    norm, x = Plain(text), data(4, 12, 18)
    program = torch.export.export(norm, (x,), dynamic_shapes={"x": {0: 2 * torch.export.Dim("half")}})
    assert "normzoo" not in program.graph_module.code
    larger = data(6, 12, 18)
    torch.testing.assert_close(program.module()(larger), norm(larger), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_traced_programs_hold_torchs_operators_alone():
    norm, x = Plain("b (g c) s -> b g"), data(4, 12, 18)
    traced: Any = torch.jit.trace(norm, x)
    assert "normzoo::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), norm(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", ["batch_norm", "ghost_batch_norm"])
def test_traced_running_statistics(spec):
    norm, x = nz.create(spec, 12), data(4, 12, 18)
    norm(x + 1)
    traced: Any = torch.jit.trace(norm.eval(), x)
    torch.testing.assert_close(traced(3 * x), norm(3 * x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(traced(3 * x), norm(3 * x), rtol=1e-4, atol=1e-4)


def test_autocast_changes_nothing():
    norm, x = Plain("b c s -> b s", BSC), data(4, 18, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = norm(x)
        half = norm(x.bfloat16())
        mixed = norm(nn.functional.linear(x, torch.eye(12)))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, norm(x))
    assert half.dtype == mixed.dtype == torch.bfloat16
    assert torch.equal(half, norm(x.bfloat16()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_batch(dtype):
    for text in SHARES:
        for shape, channels_last in (((0, 12, 18), BCS), ((0, 18, 12), BSC), ((4, 12, 0), BCS)):
            x, norm = torch.empty(shape, dtype=dtype, requires_grad=True), Plain(text, channels_last)
            y = norm(x)
            assert (y.shape, y.dtype) == (x.shape, dtype)
            y.sum().backward()
            assert x.grad is not None
            assert norm.weight.grad is not None
            assert not norm.weight.grad.any()


def test_what_the_kernels_do_not_serve_is_the_definition(formula_alone):
    with pytest.raises(AssertionError, match="were called"):
        Plain("b c s -> c")(data(4, 12, 18))
    double = Plain("b c s -> c").double()(data(4, 12, 18).double())
    moments = Moments(torch.zeros(12, requires_grad=True), torch.ones(12), 1.0)
    y, _ = ops.standardize(data(4, 12, 18), Pattern.parse("b c s -> c"), {}, eps=1e-5, given=moments)
    assert double.dtype == torch.float64
    y.sum().backward()
    assert moments.mean.grad is not None


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("norm", ["batch_norm", "batch_norm(momentum=None)", "ghost_batch_norm(ghost_batch_size=2)",
                                  "batch_renorm"])  # fmt: skip
def test_running_statistics(norm, with_mask):
    fast, slow = nz.create(norm, 12), nz.create(norm, 12)
    with torch.no_grad():
        for i, (x, channels_last) in enumerate(layouts(torch.float32).values()):
            if channels_last:
                continue
            mask = masked(4, *x.shape[2:], seed=i, share=0.0 if i == 5 else 0.4) if with_mask else None
            fast(x, mask)
            with ops.backend("reference"):
                slow(x, mask)
            for (name, got), expected in zip(fast.named_buffers(), slow.buffers(), strict=True):
                assert torch.allclose(got.double(), expected.double(), rtol=1e-5, atol=1e-5), name
    x = data(4, 12, 18)
    got = fast.eval()(x)
    with ops.backend("reference"):
        torch.testing.assert_close(got, slow.eval()(x), rtol=1e-5, atol=1e-5)


def test_called_directly_and_by_the_schema(monkeypatch):
    assert kernels._direct is not None
    x, answers = data(4, 12, 18), []
    for direct in (True, False):
        if not direct:
            monkeypatch.setattr(kernels, "_direct", None)
        norms = [nz.create(name, 12) for name in ("batch_norm", "batch_norm(momentum=None)", "layer_norm")]
        leaf = x.clone().requires_grad_()
        results = [norm(leaf) for norm in norms]
        sum(y.sin().sum() for y in results).backward()  # pyright: ignore[reportAttributeAccessIssue]
        answers.append([leaf.grad, *results, *(t for norm in norms for t in norm.state_dict().values())])
    for got, expected in zip(*answers, strict=True):
        assert torch.equal(got, expected)


def test_a_subclass_of_tensor_sees_the_operator():
    seen = []

    class Watched(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    x = data(4, 12, 18)
    y = nz.create("batch_norm", 12)(x.as_subclass(Watched))
    assert type(y) is Watched
    assert "normzoo.standardize.default" in seen
    assert torch.equal(y.as_subclass(Tensor), nz.create("batch_norm", 12)(x))


def test_a_direct_call_with_other_arguments_is_refused():
    assert kernels._direct is not None
    arguments = [*operator(data(4, 12, 18), "b c s -> c").values(), False]
    with pytest.raises(TypeError, match="16 arguments"):
        kernels._direct(*arguments[:-1])
    with pytest.raises(TypeError, match="expected a tensor, got int"):
        kernels._direct(3, *arguments[1:])
    with pytest.raises(TypeError):
        kernels._direct(*arguments[:13], "eps", *arguments[14:])


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="divisor of 12"), ops.backend("reference"):
        ops.standardize(data(4, 12, 18), Pattern.parse("b (g c) s -> b g"), {"g": 5}, eps=1e-5)
    with pytest.raises((ValueError, RuntimeError), match="12"):
        ops.standardize(data(4, 12, 18), Pattern.parse("b (g c) s -> b g"), {"g": 5}, eps=1e-5)
    given = Moments(torch.zeros(11), torch.ones(11), 1.0)
    with pytest.raises(RuntimeError, match="statistics"):
        ops.standardize(data(4, 12, 18), Pattern.parse("b c s -> c"), {}, eps=1e-5, given=given)


@pytest.mark.parametrize("name", ["batch_norm", "group_norm", "layer_norm", "rms_norm", "instance_norm"])
def test_modules_are_copied_and_pickled(name):
    norm, x = nz.create(name, 12), data(4, 12, 6, 5)
    y = norm(x)
    y.sum().backward()
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(other.eval()(x), norm.eval()(x))


# ---- a floor below the output ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("text", ["b c s -> b c", "b c s -> c", "b (g c) s -> b g", "b c s -> b"])
def test_a_floor_for_each_channel(text, with_mask):
    """The operator's floor is the maximum of the result and a learned number, as a thresholded unit has it."""
    axes = Pattern.parse(text).code(PATTERNS[text])
    for layout, (x, channels_last) in layouts(torch.float32).items():
        channel_dim = -1 if channels_last else 1
        mask = masked(4, *(x.shape[1:-1] if channels_last else x.shape[2:])) if with_mask else None
        dy = torch.randn(x.shape)
        found = []
        for dtype in (torch.float32, torch.float64):
            leaves = [t.to(dtype).detach().requires_grad_() for t in (x, data(12), data(12, seed=1), data(12, seed=2))]
            if dtype == torch.float32:
                parts = dict(zip(("weight", "bias", "floor"), leaves[1:], strict=True))
                y = torch.ops.normzoo.standardize.default(
                    **operator(leaves[0], text, **parts, mask=mask, channel_dim=channel_dim, centred=False)
                )[0]
            else:
                x64, weight, bias, floor = leaves
                y = cpu.formula(x64, weight, bias, floor, mask, None, axes, channel_dim, False, 1e-5)
            found.append([y, *torch.autograd.grad(y, leaves, dy.to(dtype))])
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a.double(), b, rtol=1e-4, atol=2e-4), layout
