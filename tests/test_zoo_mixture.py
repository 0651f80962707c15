"""Norms that mix statistics, of the batch among them, each against a closed form of its own, in float64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import normzoo as nz
from normzoo.layers.base import Norm

BATCH = ["evonorm_b0", "evonorm_b1", "evonorm_b2"]


def make(spec: str, channels: int = 16, **options) -> Norm:
    return nz.create(spec, channels, dtype=torch.float64, **options)


def randomize(norm: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5, generator=generator)
    return norm


def data(shape=(6, 16, 7), seed=0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator, dtype=torch.float64) + 1.5).to(dtype)


def gradients(function, x: torch.Tensor, parameters=()) -> tuple[torch.Tensor, ...]:
    x = x.clone().requires_grad_()
    y = function(x)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).sin()
    grads = torch.autograd.grad((y * dy).sum(), [x, *parameters], allow_unused=True)
    return (y, *[torch.zeros(()) if g is None else g for g in grads])


def assert_formula(norm: Norm, formula, x: torch.Tensor | None = None) -> None:
    """The output and all gradients are those of ``formula``, which uses the norm's parameters."""
    x = data() if x is None else x
    got, expected = (gradients(f, x, list(norm.parameters())) for f in (norm, formula))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-10)


def column(parameter: torch.Tensor) -> torch.Tensor:
    return parameter[:, None]


# ---- evonorms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["evonorm_b0", "evonorm_b1", "evonorm_b2"])
def test_evonorm_b(name):
    norm = randomize(make(name))
    assert norm.traits.includes_activation
    assert {key for key, _ in norm.named_buffers()} == {"running_var", "num_batches_tracked"}
    running = torch.ones(16, dtype=torch.float64)

    def formula(x, var=None):
        var = x.var((0, 2), unbiased=False) if var is None else var
        std = column((var + 1e-5).sqrt())
        if name == "evonorm_b0":
            other = norm.v[:, None] * x + (x.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        elif name == "evonorm_b1":
            other = (x + 1) * (x.square().mean(2, keepdim=True) + 1e-5).sqrt()
        else:
            other = (x.square().mean(2, keepdim=True) + 1e-5).sqrt() - x
        return x / torch.maximum(std, other) * column(norm.weight) + column(norm.bias)

    for seed in range(3):
        x = data(seed=seed)
        assert_formula(norm, formula, x)
        running = 0.9 * running + 0.1 * x.var((0, 2))
    torch.testing.assert_close(norm.running_var, running, rtol=0, atol=1e-10)
    norm.eval()
    assert_formula(norm, lambda x: formula(x, running))


# ---- what all of them keep -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", BATCH)
def test_both_layouts_and_any_number_of_dimensions(spec):
    x = data((3, 16, 4, 5))
    first, last = (randomize(make(spec, channel_dim=dim)) for dim in (1, -1))
    torch.testing.assert_close(last(x.movedim(1, -1)).movedim(-1, 1), first(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(first(x.flatten(2)).view(x.shape), first(x), rtol=0, atol=1e-10)
    assert first(x[..., 0, 0]).shape == (3, 16)


@pytest.mark.parametrize("padding", [0.0, 1e30, float("nan")])
@pytest.mark.parametrize("spec", BATCH)
def test_padding_is_not_there(spec, padding):
    """Longer padding changes nothing, whatever is in it; a mask that is all true is no mask."""
    x, lengths = data((4, 7, 16)), [7, 2, 4, 5]
    full = torch.ones(4, 7, dtype=torch.bool)
    torch.testing.assert_close(
        randomize(make(spec, channel_dim=-1))(x, full), randomize(make(spec, channel_dim=-1))(x), rtol=0, atol=1e-10
    )
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    expected = randomize(make(spec, channel_dim=-1))(x, mask[:, :7])
    norm = randomize(make(spec, channel_dim=-1))
    x = torch.cat([x, x[:, :2]], 1)
    x[~mask] = padding
    x.requires_grad_()
    y = norm(x, mask)
    torch.testing.assert_close(y[:, :7], expected, rtol=0, atol=1e-10)
    assert (y[~mask] == 0).all()
    grads = torch.autograd.grad(y.sin().sum(), [x, *norm.parameters()], allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)
    assert (grads[0][~mask] == 0).all()
    assert all(b.isfinite().all() for b in norm.buffers())
    before = {key: b.clone() for key, b in norm.named_buffers() if key != "num_batches_tracked"}
    assert norm(x, torch.zeros_like(mask)).abs().max() == 0
    assert all(torch.equal(norm.get_buffer(key), b) for key, b in before.items())


@pytest.mark.parametrize("spec", BATCH)
def test_gradients_of_first_and_second_order(spec):
    norm = randomize(make(spec, 8))
    x = data((2, 8, 3)).requires_grad_()
    for training in (True, False):
        assert gradcheck(norm.train(training), x, fast_mode=True)
        assert gradgradcheck(norm, x, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", BATCH)
def test_half_precision_and_memory_format(spec, dtype):
    for scale in (1e-1, 1.0, 1e3):
        x = (scale * data((3, 16, 4, 5)) / 10).to(dtype).to(memory_format=torch.channels_last)
        norm = nz.create(spec, 16)
        y = norm(x)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        expected = make(spec)(x.double())
        torch.testing.assert_close(y.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=4e-3)
        assert nz.create(spec, 16)(x.contiguous()).is_contiguous()
        assert all(b.dtype == torch.float32 for b in norm.to(dtype).buffers() if b.is_floating_point())


@pytest.mark.parametrize("spec", BATCH)
def test_zeros_and_constants_and_nothing(spec):
    for x in (torch.zeros(3, 16, 4), torch.full((3, 16, 4), 7.0), torch.zeros(0, 16, 4)):
        norm, x = randomize(nz.create(spec, 16)), x.requires_grad_()
        y = norm(x)
        assert y.shape == x.shape
        grads = torch.autograd.grad(y.sum(), [x, *norm.parameters()], allow_unused=True)
        assert all(t is None or t.isfinite().all() for t in (y, *grads, *norm.buffers()))
    with pytest.raises(nz.NormzooError, match="one value per channel"):
        nz.create(spec, 16)(torch.ones(1, 16))


@pytest.mark.parametrize("spec", BATCH)
def test_state_is_complete_and_counted_once(spec):
    norm, x = randomize(make(spec)), data((3, 16, 4, 5))
    before = x.clone()
    norm(x)
    assert torch.equal(x, before)
    once = copy.deepcopy(norm).eval()(x)
    with nz.hold_statistics(norm):
        norm(data((3, 16, 4, 5), seed=3))
    assert torch.equal(norm.eval()(x), once)
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(twin(x), once)
        assert repr(twin) == repr(norm)
    fresh = make(spec).eval()
    fresh.load_state_dict(norm.state_dict())
    assert torch.equal(fresh(x), once)
    repeated = randomize(make(spec))
    checkpoint(repeated, x.clone().requires_grad_(), use_reentrant=False).sum().backward()
    assert torch.equal(repeated.eval()(x), once)


@pytest.mark.parametrize("spec", BATCH)
def test_declared_invariances(spec):
    norm, x = randomize(make(spec, track_running_stats=False)), data((3, 16, 4, 5))
    norm.eps = 1e-20
    traits = norm.traits
    same = lambda a, b: torch.allclose(a, b, rtol=0, atol=1e-8)  # noqa: E731
    assert same(norm(5 * x), norm(x)) == traits.scale_invariant
    assert same(norm(x + 5), norm(x)) == traits.shift_invariant
    norm = randomize(make(spec))
    norm(x)
    norm.eval()
    changed = x.clone()
    changed[..., -1, -1] += 1
    assert same(norm(changed).flatten(2)[..., :-1], norm(x).flatten(2)[..., :-1]) == norm.traits.causal
    changed = x.clone()
    changed[-1] += 1
    assert same(norm(changed)[:-1], norm(x)[:-1])  # evaluation knows no batch
    norm.train()
    assert not same(norm(changed)[:-1], norm(x)[:-1])


@pytest.mark.parametrize("spec", BATCH)
def test_papers_are_cited(spec):
    found = nz.info(spec.partition("(")[0])
    assert found.paper is not None
    assert str(found.paper.year) in (found.norm.__doc__ or "")
    assert (found.paper.arxiv or found.paper.venue or "?") in (found.norm.__doc__ or "")
    assert "y =" in found.formula
