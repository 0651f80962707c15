"""Norms that are linear in their input, cell by cell, against float64 formulas of their own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import normzoo as nz
from normzoo.ops import Moments, backend, cells, kernels
from normzoo.ops.cells import cellwise, pool, thresholded

SPECS = [
    "batch_instance_norm", "exemplar_norm", "extended_batch_norm", "filter_response_norm",
    "filter_response_norm(tlu=False)", "instance_enhancement_batch_norm", "mean_only_batch_norm", "revin", "self_norm",
    "sparse_switchable_norm(ramp=10)", "switchable_norm", "variance_norm",
]  # fmt: skip
compiled = pytest.mark.skipif(not kernels.load(), reason="there is no compiler for the kernels")


def data(shape: tuple[int, ...] = (6, 8, 33), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64) + 1


def randomize(norm: nz.Norm) -> nz.Norm:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.2, 0.9, generator=generator)
    return norm


def gradients(function, x: Tensor, parameters=()) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    y = function(x)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).mul(40).sin().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)]


# ---- the operation ---------------------------------------------------------------------------------------------------


def gated(own: Moments, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Layer and instance norm in shares, with a shift that remembers the mean."""
    layer = pool(own, 1)
    centre = share * own.mean + (1 - share) * layer.mean
    return centre, torch.rsqrt(share * own.var + (1 - share) * layer.var + 1e-5), 0.3 * torch.tanh(own.mean)


def gated_by_hand(x: Tensor, mask: Tensor | None, share: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same from the elements."""
    real = torch.ones_like(x[:, :1]) if mask is None else mask.unsqueeze(1).to(x.dtype)
    n, c = real.sum(2, keepdim=True), x.shape[1]
    mean = (x * real).sum(2, keepdim=True) / n
    whole = (x * real).sum((1, 2), keepdim=True) / (n * c)
    var = ((x - mean).square() * real).sum(2, keepdim=True) / n
    spread = ((x - whole).square() * real).sum((1, 2), keepdim=True) / (n * c)
    z = (x - share * mean - (1 - share) * whole) / (share * var + (1 - share) * spread + 1e-5).sqrt()
    return ((z + 0.3 * torch.tanh(mean)) * weight[:, None] + bias[:, None]) * real


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_all_gradients(dtype, channels_last, masked):
    x = data().to(dtype).double()
    mask = torch.arange(33) < torch.tensor([33, 20, 1, 7, 32, 16])[:, None] if masked else None
    share, weight, bias = (torch.linspace(a, b, 8, dtype=torch.float64) for a, b in ((0.1, 0.8), (0.5, 2), (-1, 1)))
    leaves = [p.requires_grad_() for p in (share[:, None].clone(), weight, bias)]
    expected = gradients(lambda x: gated_by_hand(x, mask, *leaves), x, leaves)

    own = [p.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_() for p in leaves]

    def run(x):
        x = x.mT.contiguous().mT if channels_last else x
        y, moments = cellwise(x, mask, False, gated, own[:1], weight=own[1], bias=own[2])
        assert y.dtype == dtype
        assert y.stride() == x.stride()
        assert moments.mean.shape == (6, 8, 1)
        assert not moments.mean.requires_grad
        return y

    got = gradients(run, x.to(dtype), own)
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=tolerance)
    if not masked:
        last, _ = cellwise(x.to(dtype).mT, None, True, gated, own[:1], weight=own[1], bias=own[2])
        torch.testing.assert_close(last.mT, got[0])


def test_what_is_masked_takes_no_part_even_when_it_is_not_a_number():
    x, mask = data().float(), torch.arange(33).expand(6, -1) < 20
    broken = torch.where(mask.unsqueeze(1), x, torch.nan).requires_grad_()
    share = torch.full((8, 1), 0.4, requires_grad=True)
    y, own = cellwise(broken, mask, False, gated, [share])
    dx, dshare = torch.autograd.grad(y, [broken, share], torch.full_like(y, torch.nan).where(~mask.unsqueeze(1), x))
    assert (y[..., 20:] == 0).all()
    assert (dx[..., 20:] == 0).all()
    assert dx.isfinite().all()
    assert dshare.isfinite().all()
    assert torch.equal(torch.as_tensor(own.number).flatten(), torch.full((6 * 8,), 20.0))
    torch.testing.assert_close(y[..., :20], cellwise(x[..., :20], None, False, gated, [share])[0])


def test_not_centred_is_the_second_moment():
    x = data((3, 4, 9)).float()
    y, own = cellwise(x, None, False, lambda own: (own.mean, torch.rsqrt(own.var), 1.0), centred=False)
    torch.testing.assert_close(y, x / x.square().mean(2, keepdim=True).sqrt() + 1)
    assert (own.mean == 0).all()


def test_second_derivatives():
    x = data((3, 4, 9))
    share, dy = torch.full((4, 1), 0.4, dtype=torch.float64), data((3, 4, 9), seed=2)

    def penalty(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x.clone(), share.clone(), dy.clone())]
        y, _ = cellwise(leaves[0], None, False, gated, leaves[1:2])
        first = torch.autograd.grad(y, leaves[:2], leaves[2], create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves)

    assert torch.autograd.gradgradcheck(
        lambda x, share: cellwise(x, None, False, gated, [share])[0],
        (x.clone().requires_grad_(), share.clone().requires_grad_()),
    )
    for g, e in zip(penalty(torch.float32), penalty(torch.float64), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-3, atol=1e-4)


@compiled
def test_a_learned_tensor_that_is_not_given_is_refused():
    share = torch.full((8, 1), 0.4, requires_grad=True)
    with pytest.raises(nz.NormzooError, match="add these to 'tensors'"):
        cellwise(data().float(), None, False, lambda own: gated(own, share))


@compiled
def test_gradients_that_nobody_asks_for_are_not_computed():
    x, share = data().float().requires_grad_(), torch.full((8, 1), 0.4, requires_grad=True)
    y, _ = cellwise(x, None, False, gated, [share])
    assert type(y.grad_fn).__name__ == "_CellwiseBackward"
    both = torch.autograd.grad(y, [x, share], torch.ones_like(y).cos() * x.detach(), retain_graph=True)
    (alone,) = torch.autograd.grad(y, [share], torch.ones_like(y).cos() * x.detach())
    torch.testing.assert_close(alone, both[1], rtol=0, atol=0)
    y, _ = cellwise(x.detach(), None, False, gated, [share])
    y.sum().backward()
    assert share.grad is not None


@pytest.mark.parametrize("dim", [0, 1])
def test_cells_pool_to_the_moments_of_their_elements(dim):
    x, lengths = data((3, 4, 9)), torch.tensor([9, 4, 0])
    mask = (torch.arange(9) < lengths[:, None])[:, None].expand(3, 4, 9)
    number = mask.sum(2, keepdim=True).double()
    mean = (x * mask).sum(2, keepdim=True) / number.clamp(min=1)
    var = ((x - mean).square() * mask).sum(2, keepdim=True) / number.clamp(min=1)
    pooled = pool(Moments(mean, var, number), dim)
    for k in range(pooled.mean.numel()):
        elements = x.select(1 - dim, k)[mask.select(1 - dim, k)]
        if len(elements):
            got = [torch.as_tensor(moment).flatten()[k] for moment in pooled]
            torch.testing.assert_close(
                got, [elements.mean(), elements.var(correction=0), number.new_tensor(len(elements))]
            )
        else:
            assert [torch.as_tensor(moment).flatten()[k].item() for moment in pooled] == [0, 0, 0]
    whole = pool(Moments(x.mean(2, keepdim=True), x.var(2, keepdim=True, correction=0), 9), dim)
    torch.testing.assert_close(whole.var.flatten(), x.var((dim, 2), correction=0))
    assert whole.number == 9 * x.shape[dim]


@compiled
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_threshold_and_its_gradients(dtype, channels_last):
    x = data().to(dtype).double()
    leaves = [torch.linspace(a, b, 8, dtype=torch.float64) for a, b in ((0.5, 2), (-1, 1), (-0.5, 0.7))]
    leaves = [p.to(dtype).double().requires_grad_() for p in leaves]

    def formula(x):
        weight, bias, tau = (p[:, None] for p in leaves)
        return torch.maximum(x / (x.square().mean(2, keepdim=True) + 1e-6).sqrt() * weight + bias, tau)

    own = [p.detach().to(dtype).requires_grad_() for p in leaves]

    def run(x):
        x = x.mT.contiguous() if channels_last else x
        y = thresholded(x, None, channels_last, own[2], eps=1e-6, weight=own[0], bias=own[1])
        assert y is not None
        return y.mT if channels_last else y

    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    for g, e in zip(gradients(run, x.to(dtype), own), gradients(formula, x, leaves), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=tolerance, atol=tolerance)
    assert thresholded(x, None, False, None, eps=1e-6) is None  # float64 is for the formula


# ---- the norms -------------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", ["images", "channels_last", "tokens", "masked"])
@pytest.mark.parametrize("spec", SPECS)
def test_kernels_and_formula_agree(spec, layout, training, monkeypatch):
    """Outputs, gradients and running statistics."""
    tokens = layout == "tokens"
    x = data((6, 5, 7, 8) if tokens else (6, 8, 5, 7)).float()
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    mask = (torch.arange(35) < torch.tensor([[35], [20], [3], [7], [30], [16]])).view(6, 5, 7)
    given = [mask] if layout == "masked" else []
    results = []
    for name in ("cpu", "reference"):
        if name == "cpu":
            monkeypatch.setattr(cells, "formula", None)
        norm = randomize(nz.create(spec, 8, channel_dim=-1 if tokens else 1)).train(training)
        if training and norm.traits and norm.traits.stateful:
            norm(data((6, 5, 7, 8) if tokens else (6, 8, 5, 7), seed=3).float(), *given)
        with backend(name):
            leaves = list(norm.parameters())
            results.append([*gradients(lambda x, norm=norm: norm(x, *given), x, leaves), *norm.buffers()])
        monkeypatch.undo()
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert results[0][0].stride() == x.stride()


def test_switchable_norm_is_the_closed_form_in_single_precision():
    norm, x = randomize(nz.create("switchable_norm", 8)), data((6, 8, 5, 7))
    parameters = [p.detach().double().requires_grad_() for p in norm.parameters()]
    named = dict(zip([name for name, _ in norm.named_parameters()], parameters, strict=True))

    def formula(x):
        p, q = named["mean_weight"].softmax(0), named["var_weight"].softmax(0)
        over = ((2, 3), (1, 2, 3), (0, 2, 3))
        mean = sum(a * x.mean(dims, keepdim=True) for a, dims in zip(p, over, strict=True))
        var = torch.stack(
            [a * x.var(dims, correction=0, keepdim=True).expand(6, 8, 1, 1) for a, dims in zip(q, over, strict=True)]
        ).sum(0)
        return (x - mean) / (var + 1e-5).sqrt() * named["weight"].view(-1, 1, 1) + named["bias"].view(-1, 1, 1)

    for g, e in zip(
        gradients(norm, x.float(), list(norm.parameters())), gradients(formula, x, parameters), strict=True
    ):
        torch.testing.assert_close(g.double(), e, rtol=3e-5, atol=3e-5)
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean.double(), 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * x.var((0, 2, 3)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("spec", ["switchable_norm", "sparse_switchable_norm(ramp=10)", "batch_instance_norm"])
def test_checkpointing_counts_once_and_changes_nothing(spec, reentrant):
    plain, again = (randomize(nz.create(spec, 8)) for _ in range(2))
    x = data().float()
    for step in range(3):
        expected = gradients(plain, x + step, list(plain.parameters()))
        got = gradients_by_backward(lambda x: checkpoint(again, x, use_reentrant=reentrant), x + step, again)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert again.num_batches_tracked == 3
    for got, expected in zip(again.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def gradients_by_backward(function, x: Tensor, norm: nz.Norm) -> list[Tensor | None]:
    x = x.detach().clone().requires_grad_()
    norm.zero_grad()
    y = function(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).mul(40).sin().to(y.dtype))
    return [y.detach(), x.grad, *[p.grad for p in norm.parameters()]]


@pytest.mark.parametrize("spec", ["switchable_norm", "filter_response_norm"])
def test_compiled_in_one_graph(spec):
    torch._dynamo.reset()
    plain, other = (randomize(nz.create(spec, 8)) for _ in range(2))
    x = data((4, 8, 6)).float()
    function = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        expected = gradients(plain, x, list(plain.parameters()))
        got = gradients(function, x, list(other.parameters()))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for got, expected in zip(other.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, expected)


@compiled
@pytest.mark.parametrize("spec", ["switchable_norm", "filter_response_norm"])
def test_half_precision_is_as_good_as_its_input(spec):
    norm = randomize(nz.create(spec, 8)).eval()
    x = data((4, 8, 40)).bfloat16()
    exact = norm.double()(x.double())
    y = norm.float()(x)
    assert y.dtype == torch.bfloat16
    error = (y.double() - exact).abs().max() / exact.abs().max()
    assert error < math.ldexp(1, -8)


@pytest.mark.parametrize("spec", SPECS)
def test_a_cell_of_one_position(spec):
    norm = randomize(nz.create(spec, 8))
    if spec == "revin":
        with pytest.raises(nz.NormzooError, match="one position"):
            norm(data((6, 8)).float())
        return
    x = data((6, 8)).float()
    y = gradients(norm, x, list(norm.parameters()))
    double = randomize(nz.create(spec, 8, dtype=torch.float64))
    with torch.no_grad():
        for p, q in zip(norm.parameters(), double.parameters(), strict=True):
            q.copy_(p)
    for got, expected in zip(y, gradients(double, x.double(), list(double.parameters())), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)
