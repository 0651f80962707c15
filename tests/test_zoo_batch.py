"""The family of batch norms against closed forms, hand-written loops and one another."""

from __future__ import annotations

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from scipy.integrate import simpson
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import normzoo as nz
from normzoo.layers.base import MomentNorm, Norm

HOMES = ("batch_moments",)
FAMILY = [name for name in nz.list_norms() if nz.info(name).family in HOMES]
LEARNS = [name for name in FAMILY if name != "frozen_batch_norm"]
TIGHT = {"rtol": 0, "atol": 1e-10}


def make(name: str, channels: int = 8, **options) -> Norm:
    norm = nz.create(name, channels, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5, generator=generator)
    return norm


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape or (6, 8, 4, 5), generator=generator, dtype=torch.float64) + 1.5).to(dtype)


def gradients(norm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the input's gradient of a fixed functional of it."""
    x = x.clone().requires_grad_()
    y = norm(x)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).sin()
    return y.detach(), torch.autograd.grad((y * dy).sum(), x)[0]


def same(norm, formula, x: Tensor) -> None:
    for got, wanted in zip(gradients(norm, x), gradients(formula, x), strict=True):
        torch.testing.assert_close(got, wanted, **TIGHT)


def per_channel(x: Tensor) -> Tensor:
    return x.movedim(1, 0).flatten(1)


def wide(x: Tensor, like: Tensor) -> Tensor:
    return x.view(1, -1, *[1] * (like.ndim - 2))


# ---- what holds for all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_both_layouts_are_one_norm(name):
    x = data()
    for training in (True, False):
        first, last = make(name).train(training), make(name, channel_dim=-1).train(training)
        for seed in range(3):
            y = first(data(seed=seed))
            torch.testing.assert_close(last(data(seed=seed).movedim(1, -1)).movedim(-1, 1), y, **TIGHT)
        image = x.to(memory_format=torch.channels_last)
        y = first(image)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, last(x.movedim(1, -1)).movedim(-1, 1), **TIGHT)
        for key, buffer in first.named_buffers():
            torch.testing.assert_close(last.get_buffer(key), buffer, **TIGHT)
    two = data(6, 8)
    torch.testing.assert_close(make(name)(two), make(name, channel_dim=-1)(two), **TIGHT)
    torch.testing.assert_close(make(name)(two), make(name)(two[..., None])[..., 0], **TIGHT)


@pytest.mark.parametrize("padding", [0.0, 1e30, float("nan")])
@pytest.mark.parametrize("name", FAMILY)
def test_padding_is_not_there(name, padding):
    lengths = (7, 2, 4, 5)
    clean = data(4, 7, 8)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    dirty = torch.where(mask[..., None], clean, padding)
    norm, twin = make(name, channel_dim=-1), make(name, channel_dim=-1)
    for training in (True, True, False):
        norm.train(training), twin.train(training)
        x = dirty.clone().requires_grad_()
        y = norm(x, mask)
        assert (y[~mask] == 0).all()
        grads = torch.autograd.grad(y.sin().sum(), [x, *norm.parameters()])
        assert all(g.isfinite().all() for g in grads)
        assert (grads[0][~mask] == 0).all()
        torch.testing.assert_close(twin(torch.where(mask[..., None], clean, 7.0), mask), y, **TIGHT)
        full = torch.ones(4, 7, dtype=torch.bool)
        torch.testing.assert_close(copy.deepcopy(twin)(clean, full), copy.deepcopy(twin)(clean), **TIGHT)
    for buffer in norm.buffers():
        assert buffer.isfinite().all()


SAMPLE_STATISTICS: set[str] = set()


@pytest.mark.parametrize("name", [n for n in FAMILY if n not in SAMPLE_STATISTICS])
def test_statistics_with_a_mask_are_those_of_the_real_positions(name):
    x = data(4, 7, 8)
    mask = torch.arange(7) < torch.tensor((7, 2, 4, 5))[:, None]
    norm, alone = make(name, channel_dim=-1), make(name, channel_dim=-1)
    for _ in range(2):
        torch.testing.assert_close(norm(x, mask)[mask], alone(x[mask][None])[0], **TIGHT)
    for key, buffer in norm.named_buffers():
        torch.testing.assert_close(alone.get_buffer(key), buffer, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILY)
def test_half_precision_and_what_it_keeps(name, dtype):
    for scale in (1e-2, 1.0, 1e3):
        x = (scale * data() / 5).to(dtype)
        y = nz.create(name, 8)(x)
        assert y.dtype == dtype
        expected = nz.create(name, 8, dtype=torch.float64)(x.double())
        torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    norm = nz.create(name, 8).to(dtype)
    assert norm(x).dtype == dtype
    assert all(b.dtype == torch.float32 for b in norm.buffers() if b.is_floating_point())


@pytest.mark.parametrize("name", FAMILY)
def test_extremes_stay_finite(name):
    for x in (torch.zeros(4, 8, 3), torch.full((4, 8, 3), 7.0), data(4, 8, 3, dtype=torch.float32) * 1e12):
        norm, x = nz.create(name, 8), x.requires_grad_()
        for training in (True, False):
            y = norm.train(training)(x)
            gradient = torch.autograd.grad(y.sum(), x)[0]
            assert y.isfinite().all()
            assert gradient.isfinite().all()
    norm, empty = nz.create(name, 8), torch.zeros(0, 8, 3, requires_grad=True)
    before = copy.deepcopy(norm.state_dict())
    norm(empty).sum().backward()
    assert norm(empty).shape == (0, 8, 3)
    for key, buffer in norm.named_buffers():
        if buffer.is_floating_point():
            assert buffer.isfinite().all(), key
    norm.load_state_dict(before)


@pytest.mark.parametrize("name", FAMILY)
def test_large_mean_with_small_variance(name):
    x = 300 + 0.01 * data()
    y = nz.create(name, 8)(x.float()).double()
    torch.testing.assert_close(y, nz.create(name, 8, dtype=torch.float64)(x.float().double()), rtol=1e-4, atol=5e-3)


@pytest.mark.parametrize("name", FAMILY)
def test_derivatives(name):
    norm = make(name, 4)
    norm(data(3, 4, 3, seed=9))

    def formula(x, *parameters):
        held = copy.deepcopy(norm)
        names = [n for n, _ in norm.named_parameters()]
        return torch.func.functional_call(held, dict(zip(names, parameters, strict=True)), (x,))

    inputs = [data(3, 4, 3).requires_grad_(), *(p.detach().clone().requires_grad_() for p in norm.parameters())]
    assert gradcheck(formula, inputs)
    assert gradgradcheck(formula, inputs)


@pytest.mark.parametrize("name", FAMILY)
def test_copies_and_state(name):
    norm = nz.create(name, 8, channel_dim=-1)
    x = data(4, 5, 8, dtype=torch.float32)
    norm(x)
    norm(x + 1)
    file = io.BytesIO()
    torch.save(norm.state_dict(), file)
    file.seek(0)
    loaded = nz.create(name, 8, channel_dim=-1)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), loaded):
        for training in (True, False):
            assert torch.equal(copy.deepcopy(twin).train(training)(x), copy.deepcopy(norm).train(training)(x))
        assert repr(twin) == repr(norm)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", FAMILY)
def test_checkpointing_counts_once_and_holding_not_at_all(name, reentrant):
    plain, twice = make(name), make(name)
    for seed in range(3):
        x, z = data(seed=seed).requires_grad_(), data(seed=seed).requires_grad_()
        plain(x).sin().sum().backward()
        checkpoint(twice, z, use_reentrant=reentrant).sin().sum().backward()
        torch.testing.assert_close(z.grad, x.grad, **TIGHT)
    for key, buffer in plain.named_buffers():
        torch.testing.assert_close(twice.get_buffer(key), buffer, **TIGHT)
    before = copy.deepcopy(plain.state_dict())
    with nz.hold_statistics(plain):
        plain(data(seed=7))
    for key, value in plain.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", FAMILY)
def test_traits_are_true(name):
    norm = make(name)
    norm(data(seed=3))
    traits = norm.traits
    x, rest = data(4, 8, 6), data(4, 8, 6, seed=5)
    for training, promised in ((True, traits.causal_in_training), (False, traits.causal)):
        changed = torch.cat([x[..., :3], rest[..., 3:]], -1)
        y, z = (copy.deepcopy(norm).train(training)(v)[..., :3] for v in (x, changed))
        assert torch.allclose(y, z, rtol=0, atol=1e-12) == promised
    for training, promised in ((True, not traits.batch_dependent), (False, True)):
        changed = torch.cat([x[:1], rest[1:]])
        y, z = (copy.deepcopy(norm).train(training)(v)[:1] for v in (x, changed))
        assert torch.allclose(y, z, rtol=0, atol=1e-12) == promised
    y, shifted, scaled = (copy.deepcopy(norm)(v) for v in (x, x + 5, 1e6 * x))
    if traits.shift_invariant:
        torch.testing.assert_close(shifted, y, **TIGHT)
    if traits.scale_invariant:
        torch.testing.assert_close(scaled, y, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", LEARNS)
def test_compiles_without_a_break(name):
    norm, eager = make(name), make(name)
    torch._dynamo.reset()
    fast = torch.compile(norm, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        x, z = data(seed=seed).requires_grad_(), data(seed=seed).requires_grad_()
        y, w = eager(x), fast(z)
        torch.testing.assert_close(w, y, **TIGHT)
        y.sin().sum().backward()
        w.sin().sum().backward()
        torch.testing.assert_close(z.grad, x.grad, **TIGHT)
    for key, buffer in eager.named_buffers():
        torch.testing.assert_close(norm.get_buffer(key), buffer, **TIGHT)


@pytest.mark.parametrize("name", FAMILY)
def test_the_input_and_the_generator_stay(name):
    x = data()
    before, state = x.clone(), torch.get_rng_state()
    nz.create(name, 8)(x.float())
    norm = nz.create(name, 8, dtype=torch.float64)
    norm(x)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", FAMILY)
def test_the_paper_is_in_the_docstring(name):
    info = nz.info(name)
    assert info.paper is not None
    assert str(info.paper.year) in info.norm.__doc__
    assert (info.paper.arxiv or info.paper.venue) in info.norm.__doc__
    assert info.formula.startswith("y =")
    assert isinstance(nz.create(name, 8), Norm)


# ---- the halves of batch norm ----------------------------------------------------------------------------------------


def test_mean_only():
    norm = make("mean_only_batch_norm")
    same(norm, lambda x: x - x.mean((0, 2, 3), keepdim=True) + wide(norm.bias, x), data())
    assert [n for n, _ in norm.named_parameters()] == ["bias"]
    norm = make("mean_only_batch_norm", momentum=0.25)
    expected = torch.zeros(8, dtype=torch.float64)
    for seed in range(3):
        norm(data(seed=seed))
        expected = 0.75 * expected + 0.25 * per_channel(data(seed=seed)).mean(1)
    torch.testing.assert_close(norm.running_mean, expected, **TIGHT)
    norm.eval()
    same(norm, lambda x: x - wide(expected, x) + wide(norm.bias, x), data(seed=9))
    gained = nn.Sequential(make("mean_only_batch_norm", affine=False), make("variance_norm"))
    same(gained, make("batch_norm"), data())


def test_mean_only_cumulates():
    norm = make("mean_only_batch_norm", momentum=None)
    for seed in range(4):
        norm(data(seed=seed))
    torch.testing.assert_close(
        norm.running_mean, torch.stack([per_channel(data(seed=s)).mean(1) for s in range(4)]).mean(0), **TIGHT
    )
    norm.reset_running_stats()
    assert (norm.running_mean == 0).all()
    assert norm.num_batches_tracked == 0


def test_variance_norm():
    norm = make("variance_norm")

    def formula(x):
        return wide(norm.weight / (per_channel(x).var(1, correction=0) + 1e-5).sqrt(), x) * x + wide(norm.bias, x)

    same(norm, formula, data())
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * per_channel(data()).var(1), **TIGHT)
    assert "running_mean" not in norm.state_dict()
    norm.eval()
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    same(norm, lambda x: wide(scale, x) * x + wide(norm.bias, x), data(seed=2))


# ---- other deviations ------------------------------------------------------------------------------------------------


def deviation_norm(norm, scale):
    def formula(x):
        mean = wide(per_channel(x).mean(1), x)
        s = wide(scale(per_channel(x) - per_channel(x).mean(1, keepdim=True)), x)
        return wide(norm.weight, x) * (x - mean) / (s**2 + norm.eps).sqrt() + wide(norm.bias, x)

    return formula


@pytest.mark.parametrize("matched", [True, False])
def test_l1(matched):
    norm = make("l1_batch_norm", matched=matched)
    factor = math.sqrt(math.pi / 2) if matched else 1

    def scale(d):
        return factor * d.abs().mean(1)

    same(norm, deviation_norm(norm, scale), data())
    d = per_channel(data())
    expected = 0.9 + 0.1 * scale(d - d.mean(1, keepdim=True))
    torch.testing.assert_close(norm.running_scale, expected, **TIGHT)
    norm.eval()

    def evaluated(x):
        spread = (expected**2 + 1e-5).sqrt()
        return wide(norm.weight / spread, x) * (x - wide(norm.running_mean, x)) + wide(norm.bias, x)

    same(norm, evaluated, data(seed=4))


def test_l1_is_the_papers_up_to_epsilon():
    """Wu et al., algorithm 1, and the constant of Hoffer et al.: the scale of a Gaussian is its standard deviation."""
    x = np.random.default_rng(0).normal(2, 3, (200_000, 1))
    plain = nz.create("l1_batch_norm(matched=False, affine=False, eps=0)", 1, dtype=torch.float64)
    paper = (x - x.mean()) / np.abs(x - x.mean()).mean()
    np.testing.assert_allclose(plain(torch.from_numpy(x)).numpy(), paper, atol=1e-10)
    for name in ("l1_batch_norm", "lp_batch_norm(p=1.5)", "lp_batch_norm(p=4)", "lp_batch_norm(p=7)"):
        y = nz.create(name, 1, affine=False, dtype=torch.float64)(torch.from_numpy(x))
        assert y.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, 4, 10])
def test_lp(p):
    norm = make("lp_batch_norm", p=p)
    grid = np.linspace(0, 40, 400_001)
    moment = 2 * simpson(grid**p * np.exp(-(grid**2) / 2), x=grid) / math.sqrt(2 * math.pi)

    def scale(d):
        return ((d.abs() ** p).mean(1) / moment) ** (1 / p)

    for got, wanted in zip(gradients(norm, data()), gradients(deviation_norm(norm, scale), data()), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-8)  # the integral is good to 1e-9
    for size in (1e-8, 1e8):  # powers neither overflow nor vanish
        y = nz.create("lp_batch_norm", 8, p=p, eps=0, affine=False)((data() * size).float())
        torch.testing.assert_close(
            y, nz.create("lp_batch_norm", 8, p=p, eps=0, affine=False)(data().float()), rtol=1e-4, atol=1e-4
        )


def test_lp_at_its_corners():
    same(make("lp_batch_norm", p=2), make("batch_norm"), data())
    same(make("lp_batch_norm", p=1), make("l1_batch_norm"), data())
    for p in (0.5, math.inf, math.nan):
        with pytest.raises(TypeError, match="p="):
            nz.create("lp_batch_norm", 4, p=p)


@pytest.mark.parametrize("k", [1, 3, 10, 500])
def test_top_k(k):
    norm = make("top_k_batch_norm", k=k)

    def scale(d):
        n = d.shape[1]
        factor = 0.5 * (1 + (math.pi * math.log(4)) ** 0.5) / (2 * math.log(n)) ** 0.5
        return factor * d.abs().sort(1, descending=True).values[:, :k].mean(1)

    same(norm, deviation_norm(norm, scale), data())


def test_top_k_refuses():
    with pytest.raises(TypeError, match="k=0"):
        nz.create("top_k_batch_norm", 4, k=0)


# ---- groups, frozen --------------------------------------------------------------------------------------------------


def test_batch_group_norm():
    norm = make("batch_group_norm", groups=2)

    def formula(x):
        g = x.view(6, 2, 4, 4, 5)
        dims = (0, 2, 3, 4)
        y = (g - g.mean(dims, keepdim=True)) / (g.var(dims, correction=0, keepdim=True) + 1e-5).sqrt()
        return wide(norm.weight, x) * y.view(x.shape) + wide(norm.bias, x)

    same(norm, formula, data())
    assert norm.running_mean.shape == (2,)
    same(make("batch_group_norm", groups=8), make("batch_norm"), data())
    alone = data(1, 8, 4, 5)
    same(make("batch_group_norm", groups=4), make("group_norm", groups=4), alone)
    # the paper's own cut: the flattened channels, rows and columns in G equal parts
    cut = data().flatten(1).view(6, 2, -1)
    paper = (cut - cut.mean((0, 2), keepdim=True)) / (cut.var((0, 2), correction=0, keepdim=True) + 1e-5).sqrt()
    plain = nz.create("batch_group_norm", 8, groups=2, affine=False, dtype=torch.float64)
    torch.testing.assert_close(plain(data()), paper.view(6, 8, 4, 5), **TIGHT)


def test_frozen():
    trained, frozen = make("batch_norm"), make("frozen_batch_norm")
    for seed in range(3):
        trained(data(seed=seed))
    frozen.load_state_dict(trained.state_dict())
    trained.eval()
    for training in (True, False):
        same(frozen.train(training), trained, data(seed=5))
    assert not list(frozen.parameters())
    torch.testing.assert_close(frozen.running_var, trained.running_var, **TIGHT)
    twin = nn.BatchNorm2d(8).double().eval()
    twin.load_state_dict(frozen.state_dict())
    same(frozen, twin, data())
    assert frozen(data(1, 8)).shape == (1, 8)
    plain = nz.create("frozen_batch_norm", 8, affine=False, eps=0, dtype=torch.float64)
    torch.testing.assert_close(plain(data()), data(), **TIGHT)
    with pytest.raises(nz.NormzooError, match="keeps its statistics"):
        frozen.reset_running_stats()


@pytest.mark.parametrize("name", ["mean_only_batch_norm", "variance_norm", "l1_batch_norm", "top_k_batch_norm"])
def test_one_value_is_refused(name):
    with pytest.raises(nz.NormzooError, match="one value per statistic"):
        nz.create(name, 8)(torch.randn(1, 8))
    assert isinstance(nz.create(name, 8), MomentNorm)
