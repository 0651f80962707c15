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
from normzoo.layers.batch_domain import use_domain
from normzoo.layers.batch_memory import capture_reference

HOMES = ("batch_calibrated", "batch_domain", "batch_memory", "batch_moments", "batch_stream")
FAMILY = [name for name in nz.list_norms() if nz.info(name).norm.__module__.rpartition(".")[2] in HOMES]
LEARNS = [name for name in FAMILY if name != "frozen_batch_norm"]
STEERED = {"mabn", "online_norm", "power_norm", "unified_norm"}  # their gradient is not that of their output
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
        grads = torch.autograd.grad(y.sin().sum(), [x, *norm.parameters()], allow_unused=True)
        assert all(g.isfinite().all() for g in grads if g is not None)
        assert (grads[0][~mask] == 0).all()
        torch.testing.assert_close(twin(torch.where(mask[..., None], clean, 7.0), mask), y, **TIGHT)
        full = torch.ones(4, 7, dtype=torch.bool)
        torch.testing.assert_close(copy.deepcopy(twin)(clean, full), copy.deepcopy(twin)(clean), **TIGHT)
    for buffer in norm.buffers():
        assert buffer.isfinite().all()


SAMPLE_STATISTICS = {  # or the order of the samples, or their number: not one row of positions
    "representative_batch_norm", "instance_enhancement_batch_norm", "batch_channel_norm", "split_batch_norm",
    "momentum_batch_norm", "virtual_batch_norm", "online_norm",
}  # fmt: skip


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
    norm.train(name not in ("online_norm", "unified_norm"))  # the others start by themselves, with an exact gradient

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
    norm, fresh = make(name), make(name)
    norm(data(seed=3))
    traits = norm.traits
    x, rest = data(4, 8, 6), data(4, 8, 6, seed=5)
    for training, promised in ((True, traits.causal_in_training), (False, traits.causal)):
        changed = torch.cat([x[..., :3], rest[..., 3:]], -1)
        y, z = (copy.deepcopy(norm).train(training)(v)[..., :3] for v in (x, changed))
        assert torch.allclose(y, z, rtol=0, atol=1e-12) == promised
    for training, promised in ((True, not traits.batch_dependent), (False, True)):
        changed = torch.cat([rest[:-1], x[-1:]])
        start = fresh if name == "virtual_batch_norm" else norm  # its samples meet in the first batch only
        y, z = (copy.deepcopy(start).train(training)(v)[-1:] for v in (x, changed))
        assert torch.allclose(y, z, rtol=0, atol=1e-12) == promised
    y, shifted, scaled = (copy.deepcopy(norm)(v) for v in (x, x + 5, 1e6 * x))
    if traits.shift_invariant:
        torch.testing.assert_close(shifted, y, **TIGHT)
    if traits.scale_invariant:
        torch.testing.assert_close(scaled, y, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo, of any Function
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


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "spec",
    ["momentum_batch_norm(ramp=3)", "memorized_batch_norm", "cross_iteration_batch_norm", "power_norm(warmup=1)",
     "mabn(window=2, warmup=0, rescale_after=0)", "unified_norm(window=2, warmup=0, rescale_after=0)",
     "batch_channel_norm(estimate=True)", "streaming_norm(period=2)", "virtual_batch_norm"],
)  # fmt: skip
def test_a_compiled_backward_pass_sees_what_the_forward_pass_saw(spec):
    norm, eager = nz.create(spec, 8), nz.create(spec, 8)
    torch._dynamo.reset()
    fast = torch.compile(norm, backend="aot_eager", fullgraph=True)
    for seed in range(4):
        x, z = (data(4, 8, 3, seed=seed, dtype=torch.float32).requires_grad_() for _ in range(2))
        eager(x).sin().sum().backward()
        fast(z).sin().sum().backward()
        torch.testing.assert_close(z.grad, x.grad, rtol=0, atol=1e-5)


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


# ---- beside and after batch norm -------------------------------------------------------------------------------------


def test_rep():
    norm, plain = make("rep_batch_norm"), make("batch_norm")
    for training in (True, False):
        norm.train(training), plain.train(training)
        same(norm, lambda x: plain(x) + norm.eta * x, data())
    # lemma 4.1 of the paper: one affine map
    spread = (norm.running_var + norm.eps).sqrt()
    with torch.no_grad():
        plain.weight += norm.eta * spread
        plain.bias += norm.eta * norm.running_mean
    same(norm, plain, data(seed=3))
    assert nz.create("rep_batch_norm", 4).eta.tolist() == [1.0]


def test_representative():
    norm = make("representative_batch_norm")
    standard = make("batch_norm", affine=False)

    def formula(x):
        centred = x + wide(norm.center_weight, x) * x.mean((2, 3), keepdim=True)
        y = standard(centred)
        gate = torch.sigmoid(wide(norm.scale_weight, x) * y.mean((2, 3), keepdim=True) + wide(norm.scale_bias, x))
        return wide(norm.weight, x) * gate * y + wide(norm.bias, x)

    for training in (True, False):
        norm.train(training), standard.train(training)
        same(norm, formula, data())
    fresh = nz.create("representative_batch_norm", 8, dtype=torch.float64)
    plain = nz.create("batch_norm", 8, dtype=torch.float64)
    same(fresh, lambda x: plain(x) / (1 + math.exp(-1)), data())


def test_instance_enhancement():
    norm, standard = make("instance_enhancement_batch_norm"), make("batch_norm", affine=False)

    def formula(x):
        gate = torch.sigmoid(wide(norm.gate_weight, x) * x.mean((2, 3), keepdim=True) + wide(norm.gate_bias, x))
        return wide(norm.weight, x) * gate * standard(x) + wide(norm.bias, x)

    for training in (True, False):
        norm.train(training), standard.train(training)
        same(norm, formula, data())
    fresh = nz.create("instance_enhancement_batch_norm", 8, dtype=torch.float64)
    plain = nz.create("batch_norm", 8, dtype=torch.float64)
    same(fresh, lambda x: plain(x) / (1 + math.e), data())


@pytest.mark.parametrize("name", ["representative_batch_norm", "instance_enhancement_batch_norm", "batch_channel_norm"])
def test_a_padded_sample_counts_only_its_real_positions(name):
    x = data(2, 8, 6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 4:] = False  # the same for all samples: cropping is the truth
    norm, alone = make(name), make(name)
    torch.testing.assert_close(norm(x, mask)[..., :4], alone(x[..., :4]), **TIGHT)
    norm.eval(), alone.eval()
    torch.testing.assert_close(norm(x, mask)[..., :4], alone(x[..., :4]), **TIGHT)


def test_batch_channel():
    norm, batch, group = make("batch_channel_norm", groups=2), make("batch_norm"), make("group_norm", groups=2)
    with torch.no_grad():
        batch.weight.copy_(norm.weight)
        batch.bias.copy_(norm.bias)
        group.weight.copy_(norm.group_weight.repeat_interleave(4))
        group.bias.copy_(norm.group_bias.repeat_interleave(4))
    for training in (True, False):
        norm.train(training), batch.train(training)
        same(norm, lambda x: group(batch(x)), data())
    assert norm.group_weight.shape == (2,)


def test_batch_channel_estimates():
    """The authors' EstBN, written out: the batch moves the running statistics, which then standardise it."""
    norm = nz.create("batch_channel_norm(groups=2, estimate=True, momentum=0.3)", 8, dtype=torch.float64)
    group = nz.create("group_norm(groups=2, affine=False)", 8, dtype=torch.float64)
    mean, var = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    for seed in range(3):
        x = data(2, 8, 3, 3, seed=seed)
        old = mean
        mean = 0.7 * mean + 0.3 * per_channel(x).mean(1)
        var = 0.7 * var + 0.3 * (per_channel(x) - old[:, None]).square().mean(1)
        m, v = mean, var
        same(copy.deepcopy(norm), lambda x, m=m, v=v: group((x - wide(m, x)) / (wide(v, x) + 1e-5).sqrt()), x)
        norm(x)
    torch.testing.assert_close(norm.running_mean, mean, **TIGHT)
    torch.testing.assert_close(norm.running_var, var, **TIGHT)
    assert norm(data(1, 8)).isfinite().all()


# ---- samples of several kinds ----------------------------------------------------------------------------------------


def test_domains_are_batch_norms_of_their_own():
    norm = make("domain_batch_norm", num_domains=3)
    twins = [copy.deepcopy(twin) for twin in norm.domains]
    for domain in (0, 2, 2, 1, 0):
        with use_domain(nn.Sequential(norm), domain):
            same(norm, twins[domain], data(seed=domain))
    assert norm.domain == 0
    norm.eval(), twins[1].eval()
    norm.domain = 1
    same(norm, twins[1], data(seed=4))


def test_domains_may_share_a_batch():
    norm, apart = make("domain_batch_norm"), make("domain_batch_norm")
    domains = torch.tensor([0, 1, 1, 0, 1, 1])
    x = data()
    for training in (True, False):
        norm.train(training), apart.train(training)
        with use_domain(norm, domains):
            y = norm(x)
            mask = torch.rand(6, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.3
            assert (norm.eval()(x, mask).movedim(1, -1)[~mask] == 0).all()
            norm.train(training)
        for domain in (0, 1):
            with use_domain(apart, domain):
                torch.testing.assert_close(y[domains == domain], apart(x[domains == domain]), **TIGHT)
    for key, buffer in norm.named_buffers():
        torch.testing.assert_close(apart.get_buffer(key), buffer, **TIGHT)


def test_wrong_domains_are_refused():
    norm = make("domain_batch_norm")
    for domain in (2, -1, "photo", True, torch.zeros(2, 2, dtype=torch.long), torch.zeros(2)):
        with pytest.raises(nz.NormzooError, match="domain"):
            norm.domain = domain
    norm.domain = torch.zeros(4, dtype=torch.long)
    with pytest.raises(nz.NormzooError, match="4 domains for a batch of 6"):
        norm(data())
    with pytest.raises(TypeError, match="num_domains"):
        nz.create("domain_batch_norm", 4, num_domains=0)


@pytest.mark.parametrize("batch", [4, 6, 7])
def test_split(batch):
    norm = make("split_batch_norm", splits=3 if batch == 6 else 2)
    twins = [make("batch_norm") for _ in range(norm.splits)]
    for twin, owner in zip(twins, [norm, *norm.auxiliary], strict=True):
        twin.load_state_dict({k: v for k, v in owner.state_dict().items() if "auxiliary" not in k})
    x = data(batch, 8, 5)

    def formula(x):
        return torch.cat([twin(part) for twin, part in zip(twins, x.tensor_split(norm.splits), strict=True)])

    same(norm, formula, x)
    norm.eval(), twins[0].eval()
    same(norm, twins[0], x)
    for twin, owner in zip(twins, [norm, *norm.auxiliary], strict=True):
        torch.testing.assert_close(owner.running_var, twin.running_var, **TIGHT)
    same(make("split_batch_norm", splits=1), make("batch_norm"), x)


def test_split_takes_the_state_of_a_batch_norm():
    norm, trained = make("split_batch_norm"), make("batch_norm")
    trained(data())
    assert not norm.load_state_dict(trained.state_dict(), strict=False).unexpected_keys
    same(norm.eval(), trained.eval(), data(seed=1))
    assert norm.train()(data(2, 8, 3)).shape == (2, 8, 3)
    with pytest.raises(TypeError, match="splits"):
        nz.create("split_batch_norm", 4, splits=0)


# ---- more than the batch ---------------------------------------------------------------------------------------------


def test_eval_norm():
    norm, plain = make("eval_norm", sample_weight=0.2), make("batch_norm")
    for seed in range(3):
        same(norm, plain, data(seed=seed))
    norm.eval(), plain.eval()

    def four_things(x):
        """The authors' code: raw moments of the running statistics and of each example, mixed."""
        own, own_2 = x.mean((2, 3), keepdim=True), x.square().mean((2, 3), keepdim=True)
        running, running_2 = wide(norm.running_mean, x), wide(norm.running_var + norm.running_mean**2, x)
        mean, square = 0.8 * running + 0.2 * own, 0.8 * running_2 + 0.2 * own_2
        return wide(norm.weight, x) * (x - mean) / (square - mean**2 + 1e-5).sqrt() + wide(norm.bias, x)

    same(norm, four_things, data(seed=5))
    torch.testing.assert_close(norm(data(seed=5))[:1], norm(data(seed=5)[:1]), **TIGHT)
    norm.sample_weight = 0
    same(norm, plain, data(seed=6))
    norm.sample_weight = 1
    same(norm, make("instance_norm"), data(seed=6))
    with pytest.raises(TypeError, match="sample_weight=2"):
        nz.create("eval_norm", 4, sample_weight=2)
    assert nz.create("eval_norm(sample_weight=0)", 4).traits.causal
    assert not nz.create("eval_norm", 4).traits.causal


def test_momentum_batch_norm():
    norm = make("momentum_batch_norm", ideal_batch_size=24, ramp=4, momentum=0.3)
    mean, var = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    running = mean
    for step in range(1, 8):
        memory = 0.25 ** (max(4 - step, 0) / 3) - 0.25  # rho = 6 / 24
        assert float(norm.memory(6)) == pytest.approx(memory, abs=1e-12)
        old = mean, var

        def formula(x, old=old, memory=memory):
            m = memory * old[0] + (1 - memory) * per_channel(x).mean(1)
            v = memory * old[1] + (1 - memory) * per_channel(x).var(1, correction=0)
            return wide(norm.weight, x) * (x - wide(m, x)) / wide(v + 1e-5, x).sqrt() + wide(norm.bias, x)

        x = data(seed=step)
        mean = memory * mean + (1 - memory) * per_channel(x).mean(1)
        var = memory * var + (1 - memory) * per_channel(x).var(1, correction=0)
        running = 0.7 * running + 0.3 * per_channel(x).mean(1)
        same(norm, formula, x)
    assert memory == 0.75
    torch.testing.assert_close(norm.running_mean, running, **TIGHT)
    large, plain = make("momentum_batch_norm", ideal_batch_size=6, ramp=2), make("batch_norm")
    for seed in range(3):  # a batch that is large enough needs no memory
        same(large, plain, data(seed=seed))
    large.eval(), plain.eval()
    same(large, plain, data(seed=9))
    with pytest.raises(TypeError, match="ramp=1"):
        nz.create("momentum_batch_norm", 4, ramp=1)


def pooled(batches, weights):
    """Moments of batches together, through their raw moments."""
    weights = torch.tensor(weights, dtype=torch.float64)[:, None] / sum(weights)
    mean = (weights * torch.stack([per_channel(x).mean(1) for x in batches])).sum(0)
    square = (weights * torch.stack([per_channel(x).square().mean(1) for x in batches])).sum(0)
    return mean, square - mean**2


@pytest.mark.parametrize(("name", "decay"), [("memorized_batch_norm", 0.6), ("cross_iteration_batch_norm", 1.0)])
def test_recent_batches(name, decay):
    options = {"window": 3} | ({"decay": decay} if decay < 1 else {})
    norm, plain = make(name, **options), make("batch_norm")
    for step in range(6):
        before = [data(seed=s).detach() for s in reversed(range(max(0, step - 2), step))]

        def formula(x, before=before):
            mean, var = pooled([x, *before], [decay**i for i in range(len(before) + 1)])
            return wide(norm.weight, x) * (x - wide(mean, x)) / wide(var + 1e-5, x).sqrt() + wide(norm.bias, x)

        same(norm, formula, data(seed=step))
        plain(data(seed=step))
    assert norm.num_batches_tracked == 6
    norm.eval(), plain.eval()
    if name == "cross_iteration_batch_norm":
        same(norm, plain, data(seed=9))
    else:
        mean, var = pooled([data(seed=s) for s in (5, 4, 3)], [1, 0.6, 0.36])
        y = wide(norm.weight, data()) * (data() - wide(mean, data())) / wide(var + 1e-5, data()).sqrt()
        torch.testing.assert_close(norm(data()), y + wide(norm.bias, data()), **TIGHT)
    alone, plain = make(name, window=1), make("batch_norm")
    for seed in range(2):
        same(alone, plain, data(seed=seed))
    with pytest.raises(TypeError, match="window=0"):
        nz.create(name, 4, window=0)


def test_the_window_of_equal_batches_is_the_batch_of_all():
    """Iterations of equal size together are one large batch: what cross-iteration is for, when weights stand still."""
    norm = make("cross_iteration_batch_norm", window=4)
    batches = [data(seed=seed) for seed in range(4)]
    for x in batches:
        y = norm(x)
    torch.testing.assert_close(y, make("batch_norm")(torch.cat(batches))[-6:], **TIGHT)


def test_cross_iteration_burns_in():
    norm, plain = make("cross_iteration_batch_norm", window=2, burn_in=2), make("batch_norm")
    for seed in range(2):
        same(norm, plain, data(seed=seed))
    assert not torch.allclose(norm(data(seed=2)), plain(data(seed=2)))


def test_memorized_starts_as_the_identity_in_evaluation():
    norm = nz.create("memorized_batch_norm(affine=False, eps=0)", 8, dtype=torch.float64).eval()
    torch.testing.assert_close(norm(data()), data(), **TIGHT)


def test_virtual_batch_norm():
    norm, plain = make("virtual_batch_norm"), make("batch_norm")
    reference = data(12, 8, 4, 5)
    same(norm, plain, reference)  # the reference is standardised by itself
    for training in (True, False):
        norm.train(training)

        def formula(x):
            """The authors' code: raw moments of reference and sample with coefficient 1 / (R + 1)."""
            w = 1 / 13
            mean = w * x.mean((2, 3), keepdim=True) + (1 - w) * reference.mean((0, 2, 3), keepdim=True)
            square = w * x.square().mean((2, 3), keepdim=True) + (1 - w) * reference.square().mean((0, 2, 3), True)
            return wide(norm.weight, x) * (x - mean) / (square - mean**2 + 1e-5).sqrt() + wide(norm.bias, x)

        same(norm, formula, data(seed=3))
        torch.testing.assert_close(norm(data(seed=3))[:1], norm(data(seed=3)[:1]), **TIGHT)
    norm.train()
    with capture_reference(nn.Sequential(norm)):
        norm(data(4, 8, 2, seed=8))
    assert norm.reference_samples == 4
    torch.testing.assert_close(norm.reference_mean, per_channel(data(4, 8, 2, seed=8)).mean(1), **TIGHT)
    with pytest.raises(nz.NormzooError, match="no virtual_batch_norm"), capture_reference(nn.Linear(2, 2)):
        pass
    with pytest.raises(nz.NormzooError, match="one value"), capture_reference(norm):
        norm(data(1, 8))
    fresh = nz.create("virtual_batch_norm(affine=False, eps=0)", 8, dtype=torch.float64).eval()
    torch.testing.assert_close(fresh(data()), data(), **TIGHT)


# ---- moving averages, forwards and backwards -------------------------------------------------------------------------


def steer(norm, x: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A training step: output, the gradient that came, the gradient that left."""
    x = x.clone().requires_grad_()
    y = norm(x)
    dy = data(*x.shape, seed=seed)
    return y.detach(), dy, torch.autograd.grad(y, x, dy)[0]


def mean(x: Tensor) -> Tensor:
    return per_channel(x).mean(1)


def test_power_norm():
    """Algorithm 2 of the paper, step by step."""
    norm = make("power_norm", warmup=2, momentum=0.2, backward_momentum=0.3)
    power, nu = torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for step in range(6):
        x = data(seed=step)
        batch = mean(x * x)
        used = batch if step < 2 else power
        z = x / wide(used + 1e-5, x).sqrt()
        y, dy, dx = steer(norm, x, 50 + step)
        torch.testing.assert_close(y, wide(norm.weight, x) * z + wide(norm.bias, x), **TIGHT)
        g = wide(norm.weight, x).detach() * dy
        steered = g - wide(mean(g * z) if step < 2 else nu, x) * z  # PN-V in the warm-up
        torch.testing.assert_close(dx, steered / wide(used + 1e-5, x).sqrt(), **TIGHT)
        nu = nu * (1 - 0.3 * mean(z * z)) + 0.3 * mean(g * z)
        power = 0.8 * power + 0.2 * batch
        torch.testing.assert_close(norm.running_var, power, **TIGHT)
        torch.testing.assert_close(norm.gradient_average, nu, **TIGHT)
    norm.eval()
    same(norm, lambda x: wide(norm.weight / (power + 1e-5).sqrt(), x) * x + wide(norm.bias, x), data(seed=8))


def test_power_norm_projects_as_the_authors_code():
    """Their ema_gz, without its factor: nu = (1 - alpha) ema_gz."""
    norm = nz.create("power_norm(warmup=0, affine=False, backward_momentum=0.1)", 8, dtype=torch.float64)
    ema = torch.zeros(8, dtype=torch.float64)
    for step in range(4):
        x = data(seed=step)
        z = x / wide(norm.running_var.clone() + 1e-5, x).sqrt()
        _, g, _ = steer(norm, x, 20 + step)
        ema = ema + mean((g - 0.1 * wide(ema, x) * z) * z)
    torch.testing.assert_close(norm.gradient_average, 0.1 * ema, **TIGHT)


def test_mabn():
    """The authors' code, step by step, through warm-up, full windows and rescaling."""
    norm = make("mabn", window=3, warmup=5, rescale_after=7, momentum=0.02, r_max=1.05)
    running = torch.ones(8, dtype=torch.float64)
    powers, projections = [], []
    for step in range(1, 12):
        x = data(seed=step) * (1 + 0.1 * step)
        powers.append(mean(x * x))
        warm = step <= 3 or step < 5
        power = powers[-1] if warm else torch.stack(powers[-3:]).mean(0)
        r = ((power + 1e-5) / (running + 1e-5)).sqrt().clamp(1 / 1.05, 1.05)
        r = torch.ones_like(r) if step <= 7 else r
        z = x / wide(power + 1e-5, x).sqrt()
        y, dy, dx = steer(norm, x, 50 + step)
        torch.testing.assert_close(y, wide(norm.weight * r, x) * z + wide(norm.bias, x), **TIGHT)
        g = wide(norm.weight * r, x).detach() * dy
        projections.append(mean(g * z))
        projection = projections[-1] if warm else torch.stack(projections[-3:]).mean(0)
        torch.testing.assert_close(dx, (g - z * wide(projection, x)) / wide(power + 1e-5, x).sqrt(), **TIGHT)
        running = 0.98 * running + 0.02 * power
    torch.testing.assert_close(norm.running_var, running, **TIGHT)
    norm.eval()
    same(norm, lambda x: wide(norm.weight / (running + 1e-5).sqrt(), x) * x + wide(norm.bias, x), data(seed=8))


@pytest.mark.parametrize("window", [1, 3])
def test_unified_norm(window):
    """The authors' code, step by step, through warm-up, full windows, an outlier and rescaling."""
    norm = make("unified_norm", window=window, warmup=4, rescale_after=5, momentum=0.1)
    running, ema = torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    x2s, gzs = (torch.zeros(window, 8, dtype=torch.float64) for _ in range(2))
    outliers = 0
    for step in range(1, 13):
        x = data(seed=step) * (30 if step == 9 else 1)
        skip = window == 1
        spread = torch.var(x2s.sqrt())
        x2s[step % window] = x2 = mean(x * x)
        if step >= 4:
            am, gm = x2s.mean(0), x2s.log().mean(0).exp()
            if (am - gm > spread * window).any():
                x2s[step % window] = running
                skip, outliers = True, outliers + 1
        warm = step <= window or step < 4 or skip
        power = x2 if warm else x2s.log().mean(0).exp()
        r = ((power + 1e-5) / (running + 1e-5)).sqrt().clamp(1 / 5, 5)
        r = torch.ones_like(r) if step <= 5 or skip else r
        z = x / wide(power + 1e-5, x).sqrt()
        y, dy, dx = steer(norm, x, 50 + step)
        torch.testing.assert_close(y, wide(norm.weight, x) * z + wide(norm.bias, x), **TIGHT)
        g = wide(norm.weight * r, x).detach() * dy
        gzs[step % window] = ema if skip else mean(g * z)
        projection = mean(g * z) if warm else gzs.mean(0)
        ema = 0.9 * ema + 0.1 * projection
        torch.testing.assert_close(
            dx, (g - z * wide(projection if skip else ema, x)) / wide(power + 1e-5, x).sqrt(), **TIGHT
        )
        running = 0.9 * running + 0.1 * power
        torch.testing.assert_close(norm.running_var, running, **TIGHT)
        torch.testing.assert_close(norm.gradient_average, ema, **TIGHT)
    assert window == 1 or 0 < outliers < 9
    norm.eval()
    same(norm, lambda x: wide(norm.weight / (running + 1e-5).sqrt(), x) * x + wide(norm.bias, x), data(seed=8))


@pytest.mark.parametrize("guard", ["layer_scaling", "clamp", None])
def test_online_norm(guard):
    """The authors' code in NumPy, sample by sample."""
    norm = make("online_norm", forward_decay=0.8, backward_decay=0.9, guard=guard)
    mu, var = np.zeros(8), np.ones(8)
    along, level = np.zeros(8), np.zeros(8)
    weight, bias = (p.detach().numpy()[:, None, None] for p in (norm.weight, norm.bias))

    def guarded(y: Tensor) -> Tensor:
        if guard == "clamp":
            return y.clamp(-5, 5)
        return y / (y.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt() if guard else y

    for step in range(3):
        x, dy = data(seed=step).numpy(), data(seed=50 + step).numpy()
        y, _, dx = steer(norm, data(seed=step), 50 + step)
        z, scales = np.empty_like(x), []
        for i, sample in enumerate(x):
            scales.append(np.sqrt(var + 1e-5)[:, None, None])
            z[i] = (sample - mu[:, None, None]) / scales[i]
            m = sample.mean((1, 2))
            var = 0.8 * var + 0.2 * sample.var((1, 2)) + 0.8 * 0.2 * (m - mu) ** 2
            mu = 0.8 * mu + 0.2 * m
        inner = torch.from_numpy(weight * z + bias).requires_grad_()
        torch.testing.assert_close(y, guarded(inner).detach(), **TIGHT)
        (g,) = torch.autograd.grad(guarded(inner), inner, torch.from_numpy(dy))
        g = weight * g.numpy()
        for i in range(len(x)):
            grad = g[i] - 0.1 * along[:, None, None] * z[i]
            along = along + (grad * z[i]).mean((1, 2))
            grad = grad / scales[i] - 0.1 * level[:, None, None]
            level = level + grad.mean((1, 2))
            np.testing.assert_allclose(dx[i].numpy(), grad, atol=1e-10)
    for buffer, wanted in ((norm.running_mean, mu), (norm.running_var, var), (norm.gradient_level, level)):
        np.testing.assert_allclose(buffer.numpy(), wanted, atol=1e-10)
    norm.eval()
    z = (data(seed=9) - wide(norm.running_mean, data())) / wide(norm.running_var + 1e-5, data()).sqrt()
    expected = guarded(wide(norm.weight, z) * z + wide(norm.bias, z))
    torch.testing.assert_close(norm(data(seed=9)), expected, **TIGHT)
    assert norm.traits.causal == (guard != "layer_scaling")


def test_online_norm_does_not_see_batches():
    whole, parts = make("online_norm"), make("online_norm")
    y = whole(data())
    torch.testing.assert_close(torch.cat([parts(sample) for sample in data().split(1)]), y, **TIGHT)
    torch.testing.assert_close(parts.running_var, whole.running_var, **TIGHT)


@pytest.mark.parametrize("p", [1, 2])
def test_streaming_norm(p):
    norm = make("streaming_norm", long_weight=0.3, period=3, momentum=0.2, p=p)
    long = [torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)]
    short: list[tuple[Tensor, Tensor]] = []

    def moments(x):
        centre = mean(x)
        return centre, mean((x - wide(centre, x)).abs() ** p) ** (1 / p)

    for step in range(8):
        before = list(short)

        def formula(x, before=before, old=tuple(long)):
            means, scales = zip(*before, moments(x), strict=True)
            m = 0.3 * old[0] + 0.7 * torch.stack(means).mean(0)
            s = 0.3 * old[1] + 0.7 * torch.stack(scales).mean(0)
            return wide(norm.weight / (s**2 + 1e-5).sqrt(), x) * (x - wide(m, x)) + wide(norm.bias, x)

        same(norm, formula, data(seed=step))
        short.append(moments(data(seed=step)))
        if len(short) == 3:
            averages = [torch.stack(values).mean(0) for values in zip(*short, strict=True)]
            long, short = [0.8 * old + 0.2 * new for old, new in zip(long, averages, strict=True)], []
    torch.testing.assert_close(norm.running_mean, long[0], **TIGHT)
    torch.testing.assert_close(norm.running_scale, long[1], **TIGHT)
    norm.eval()
    spread = (long[1] ** 2 + 1e-5).sqrt()
    same(norm, lambda x: wide(norm.weight / spread, x) * (x - wide(long[0], x)) + wide(norm.bias, x), data(seed=9))
    alone = "l1_batch_norm(matched=False)" if p == 1 else "batch_norm"  # without a long memory
    same(make("streaming_norm", long_weight=0, p=p), make(alone), data())
    norm.reset_running_stats()
    assert (norm.short_scale == 0).all()
    assert (norm.running_scale == 1).all()


@pytest.mark.parametrize("name", sorted(STEERED))
def test_a_held_backward_pass_leaves_the_averages(name):
    options = {} if name == "online_norm" else {"warmup": 0}
    norm = make(name, **options)
    for seed in range(20):
        norm(data(4, 8, seed=seed).requires_grad_()).sin().sum().backward()
    before = copy.deepcopy(norm.state_dict())
    with nz.hold_statistics(norm):
        x = data(4, 8, seed=30).requires_grad_()
        (gradient,) = torch.autograd.grad(norm(x).sin().sum(), x, create_graph=True)
        gradient.square().sum().backward()  # second derivatives exist
        assert x.grad.isfinite().all()
    for key, value in norm.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert any("gradient" in key and value.abs().sum() > 0 for key, value in before.items())


def test_wrong_options_of_moving_averages():
    for spec in ("power_norm(warmup=-1)", "power_norm(backward_momentum=2)", "power_norm(momentum=None)",
                 "mabn(window=0)", "mabn(r_max=0.5)", "unified_norm(window=0)", "online_norm(forward_decay=2)",
                 "online_norm(guard='belt')", "streaming_norm(p=3)", "streaming_norm(period=0)"):  # fmt: skip
        with pytest.raises(TypeError, match="expected"):
            nz.create(spec, 4)


@pytest.mark.parametrize("name", ["mean_only_batch_norm", "variance_norm", "l1_batch_norm", "top_k_batch_norm"])
def test_one_value_is_refused(name):
    with pytest.raises(nz.NormzooError, match="one value per statistic"):
        nz.create(name, 8)(torch.randn(1, 8))
    assert isinstance(nz.create(name, 8), MomentNorm)
