"""Norms that mix statistics, of the batch among them, each against a closed form of its own, in float64."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import norm as norm_distribution
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import normzoo as nz
from normzoo.layers.base import Norm
from normzoo.layers.mixture import sparsemax, sparsestmax

BATCH = [
    "batch_instance_norm", "evonorm_b0", "evonorm_b1", "evonorm_b2", "exemplar_norm", "ibn", "mixture_norm",
    "mode_norm", "mode_norm(modes=1)", "sparse_switchable_norm(ramp=10)", "switchable_norm",
]  # fmt: skip


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


def fresh_of(spec: str, **options):
    """A function that calls a new norm each time, so that no call knows of another."""

    def call(x):
        return randomize(make(spec, **options))(x)

    return call


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


# ---- switchable ------------------------------------------------------------------------------------------------------


def three_moments(x, running=None):
    over = [(2,), (1, 2), (0, 2)]
    pairs = [(x.mean(d, keepdim=True), x.var(d, unbiased=False, keepdim=True)) for d in over]
    if running is not None:
        pairs[2] = running
    return pairs


def mixed(norm, p, q, x, running=None):
    pairs = three_moments(x, running)
    mu = sum(share * pair[0] for share, pair in zip(p, pairs, strict=True))
    var = sum(share * pair[1] for share, pair in zip(q, pairs, strict=True))
    return (x - mu) / (var + 1e-5).sqrt() * column(norm.weight) + column(norm.bias)


def test_switchable_norm():
    norm = randomize(make("switchable_norm"))
    formula = lambda x, running=None: mixed(  # noqa: E731
        norm, norm.mean_weight.softmax(0), norm.var_weight.softmax(0), x, running
    )
    mean, var = torch.zeros(16).double(), torch.ones(16).double()
    for seed in range(3):
        x = data(seed=seed)
        assert_formula(norm, formula, x)
        mean, var = 0.9 * mean + 0.1 * x.mean((0, 2)), 0.9 * var + 0.1 * x.var((0, 2))
    torch.testing.assert_close(norm.running_mean, mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(norm.running_var, var, rtol=0, atol=1e-10)
    norm.eval()
    assert_formula(norm, lambda x: formula(x, (column(mean), column(var))))


@pytest.mark.parametrize("name", ["switchable_norm", "sparse_switchable_norm"])
@pytest.mark.parametrize(("which", "component"), [(0, "instance_norm"), (1, "layer_norm_joint"), (2, "batch_norm")])
def test_all_of_the_share_on_one_is_that_one(name, which, component):
    norm, single = make(name), make(component)
    with torch.no_grad():
        for weights in (norm.mean_weight, norm.var_weight):
            weights.fill_(-1000.0)
            weights[which] = 1000.0
    for training in (True, True, False):
        x = data((4, 16, 3, 5))
        norm.train(training)
        single.train(training)
        expected = gradients(single, x, [single.weight, single.bias])
        for g, e in zip(gradients(norm, x, [norm.weight, norm.bias]), expected, strict=True):
            torch.testing.assert_close(g, e, rtol=0, atol=1e-10)
    if component == "batch_norm":
        torch.testing.assert_close(norm.running_var, single.running_var, rtol=0, atol=1e-10)


def test_sparsestmax_is_the_nearest_point():
    """Against a search over the simplex, for every radius."""
    steps = torch.linspace(0, 1, 801, dtype=torch.float64)
    a, b = torch.meshgrid(steps, steps, indexing="ij")
    grid = torch.stack([a, b, 1 - a - b], -1)[a + b <= 1]
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        z = torch.randn(3, generator=generator, dtype=torch.float64) * 0.7
        radius = torch.rand((), generator=generator, dtype=torch.float64) * (2 / 3) ** 0.5
        p = sparsestmax(z, radius)
        assert p.sum() == pytest.approx(1)
        assert p.min() >= 0
        assert (p - 1 / 3).norm() >= radius - 1e-9
        allowed = grid[(grid - 1 / 3).norm(dim=-1) >= radius]
        assert (p - z).norm() <= (allowed - z).norm(dim=-1).min() + 1e-9


def test_sparsestmax_has_the_gradient_of_sparsemax_where_it_is_far_enough():
    for values in ([0.5, 0.3, -0.05], [0.9, 0.5, -0.3]):
        z = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        for radius in (0.0, 0.4, 0.75, 0.8165):
            assert gradcheck(lambda z, radius=radius: sparsestmax(z, torch.tensor(radius, dtype=torch.float64)), z)
        torch.testing.assert_close(sparsestmax(z, torch.zeros(()).double()), sparsemax(z), rtol=0, atol=1e-12)


def test_sparse_switchable_norm_ends_with_one_norm():
    norm = make("sparse_switchable_norm", ramp=4)
    with torch.no_grad():
        norm.mean_weight.copy_(torch.tensor([0.2, 0.3, 0.1]))
        norm.var_weight.copy_(torch.tensor([0.4, 0.3, 0.35]))
    for step in range(6):
        radius = torch.tensor(min(step / 4, 1) * (2 / 3) ** 0.5, dtype=torch.float64)
        p, q = (sparsestmax(w.detach(), radius) for w in (norm.mean_weight, norm.var_weight))
        torch.testing.assert_close(norm(data(seed=step)), mixed(norm, p, q, data(seed=step)), rtol=0, atol=1e-10)
    torch.testing.assert_close(p, torch.tensor([0.0, 1.0, 0.0]).double())
    torch.testing.assert_close(q, torch.tensor([1.0, 0.0, 0.0]).double())
    saved = make("sparse_switchable_norm", ramp=4)
    saved.load_state_dict(norm.state_dict())
    assert torch.equal(saved.eval()(data()), norm.eval()(data()))


# ---- batch and instance ----------------------------------------------------------------------------------------------


def test_batch_instance_norm():
    norm, x = randomize(make("batch_instance_norm")), data()
    with torch.no_grad():
        norm.gate.copy_(torch.linspace(0, 1, 16))

    def formula(x):
        (mu_in, var_in), _, (mu, var) = three_moments(x)
        rho = column(norm.gate)
        mix = rho * (x - mu) / (var + 1e-5).sqrt() + (1 - rho) * (x - mu_in) / (var_in + 1e-5).sqrt()
        return mix * column(norm.weight) + column(norm.bias)

    assert_formula(norm, formula, x)
    corners = {1.0: "batch_norm", 0.0: "instance_norm", 7.0: "batch_norm", -7.0: "instance_norm"}
    for gate, name in corners.items():
        norm, single = make("batch_instance_norm"), make(name)
        with torch.no_grad():
            norm.gate.fill_(gate)
        for training in (True, False):
            torch.testing.assert_close(norm.train(training)(x), single.train(training)(x), rtol=0, atol=1e-10)
    gate_gradient = gradients(norm, x, [norm.gate])[2]
    assert gate_gradient.abs().min() > 0  # outside of 0 to 1 there is a way back


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_ibn(channel_dim):
    norm, x = randomize(make("ibn", ratio=0.25, channel_dim=channel_dim)), data((4, 16, 3, 5))
    x = x.movedim(1, channel_dim)
    instance, batch = make("instance_norm", 4, channel_dim=channel_dim), make("batch_norm", 12, channel_dim=channel_dim)
    instance.load_state_dict(norm.instance.state_dict())
    batch.load_state_dict(norm.batch.state_dict())
    for training in (True, False):
        batch.train(training)
        expected = torch.cat([instance(x.narrow(channel_dim, 0, 4)), batch(x.narrow(channel_dim, 4, 12))], channel_dim)
        torch.testing.assert_close(norm.train(training)(x), expected, rtol=0, atol=1e-10)
    one = norm(x[..., :1, :1] if channel_dim == 1 else x[:, :1, :1])
    first = one.movedim(channel_dim, -1)[..., :4]
    torch.testing.assert_close(first, norm.instance.bias.expand_as(first))
    with pytest.raises(nz.NormzooError, match="at least one for each"):
        make("ibn", channels=1)


# ---- modes -----------------------------------------------------------------------------------------------------------


def test_mode_norm():
    norm = make("mode_norm", modes=3)
    with torch.no_grad():
        for seed, parameter in enumerate(norm.parameters()):
            parameter.copy_(data(parameter.shape, seed) / 4)
    mean, var = torch.zeros(3, 16).double(), torch.ones(3, 16).double()

    def formula(x, given=None):
        gates = (x.mean(2) @ norm.gate_weight.mT + norm.gate_bias).softmax(1)
        y = 0
        for k in range(3):
            share = gates[:, k, None, None].expand_as(x)
            if given is None:
                mu = (share * x).sum((0, 2)) / share.sum((0, 2))
                sigma = (share * (x - column(mu)) ** 2).sum((0, 2)) / share.sum((0, 2))
            else:
                mu, sigma = given[0][k], given[1][k]
            y = y + share * (x - column(mu)) / column((sigma + 1e-5).sqrt())
        return y * column(norm.weight) + column(norm.bias)

    for seed in range(3):
        x = data(seed=seed)
        assert_formula(norm, formula, x)
        gates = (x.mean(2) @ norm.gate_weight.mT + norm.gate_bias).softmax(1).detach()
        for k in range(3):
            share = gates[:, k, None, None].expand_as(x)
            mu = (share * x).sum((0, 2)) / share.sum((0, 2))
            sigma = (share * (x - column(mu)) ** 2).sum((0, 2)) / share.sum((0, 2))
            mean[k], var[k] = 0.9 * mean[k] + 0.1 * mu, 0.9 * var[k] + 0.1 * sigma * 42 / 41
    torch.testing.assert_close(norm.running_mean, mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(norm.running_var, var, rtol=0, atol=1e-10)
    norm.eval()
    assert_formula(norm, lambda x: formula(x, (mean, var)))
    assert {"running_mean", "running_var", "num_batches_tracked"} < norm.state_dict().keys()


def test_one_mode_is_batch_norm_and_two_modes_part_two_populations():
    single, batch = randomize(make("mode_norm", modes=1)), make("batch_norm")
    batch.load_state_dict(
        {k: v for k, v in single.state_dict().items() if not k.startswith(("gate", "running"))}, False
    )
    for training in (True, True, False):
        x = data()
        expected = gradients(batch.train(training), x, [batch.weight, batch.bias])
        for g, e in zip(gradients(single.train(training), x, [single.weight, single.bias]), expected, strict=True):
            torch.testing.assert_close(g, e, rtol=0, atol=1e-10)
    torch.testing.assert_close(single.running_var[0], batch.running_var, rtol=0, atol=1e-10)

    norm = make("mode_norm", affine=False)
    with torch.no_grad():
        norm.gate_weight.copy_(torch.tensor([[100.0], [-100.0]]))
    x = torch.cat([10 + data((3, 16, 7)), -10 + 0.1 * data((3, 16, 7), seed=1)])
    plain = make("batch_norm", affine=False)
    torch.testing.assert_close(norm(x), torch.cat([plain(x[:3]), plain(x[3:])]), rtol=0, atol=1e-8)


def em(x: np.ndarray, steps: int, k: int, eps: float = 1e-5) -> np.ndarray:
    """Responsibilities of a diagonal Gaussian mixture for points (n, c), by SciPy's densities."""
    mu = np.stack([x.mean(0) + norm_distribution.ppf((j + 0.5) / k) * x.std(0) for j in range(k)])
    var, weight = np.stack([x.var(0)] * k), np.full(k, 1 / k)
    for step in range(steps):
        density = [norm_distribution.logpdf(x, mu[j], np.sqrt(var[j] + eps)).sum(1) for j in range(k)]
        p = softmax(np.log(weight) + np.stack(density, 1), 1)
        if step < steps - 1:
            mu = np.stack([np.average(x, 0, p[:, j]) for j in range(k)])
            var = np.stack([np.average((x - mu[j]) ** 2, 0, p[:, j]) for j in range(k)])
            weight = p.mean(0)
    return p


@pytest.mark.parametrize("components", [2, 3])
def test_mixture_norm(components):
    norm = randomize(make("mixture_norm", channels=2, components=components))
    start = {key: value.clone() for key, value in norm.state_dict().items()}
    x = data((6, 2, 7)) * torch.where(torch.arange(6) < 3, 0.2, 3.0)[:, None, None]
    points = x.movedim(1, -1).reshape(-1, 2)
    p = torch.from_numpy(em(points.numpy(), 3, components)).view(6, 7, components)
    assert ((p > 0.02) & (p < 0.98)).any()  # a soft assignment

    def formula(x):
        y = 0
        for k in range(components):
            q = p[..., k].unsqueeze(1)
            mu = (q * x).sum((0, 2), keepdim=True) / q.sum()
            var = (q * (x - mu) ** 2).sum((0, 2), keepdim=True) / q.sum()
            y = y + q / q.mean().sqrt() * (x - mu) / (var + 1e-5).sqrt()
        return y * column(norm.weight) + column(norm.bias)

    assert_formula(norm, formula, x)
    q = p.reshape(-1, components)
    torch.testing.assert_close(norm.running_weight, 0.9 / components + 0.1 * q.mean(0), rtol=0, atol=1e-10)
    for k in range(components):
        mu = (q[:, k, None] * points).sum(0) / q[:, k].sum()
        var = (q[:, k, None] * (points - mu) ** 2).sum(0) / q[:, k].sum() * q[:, k].sum() / (q[:, k].sum() - 1)
        torch.testing.assert_close(norm.running_mean[k], 0.9 * start["running_mean"][k] + 0.1 * mu)
        torch.testing.assert_close(norm.running_var[k], 0.9 * start["running_var"][k] + 0.1 * var)
    norm.reset_running_stats()
    assert all(torch.equal(norm.state_dict()[key], value) for key, value in start.items())


def test_one_component_is_batch_norm_and_two_part_what_is_apart():
    single, batch = make("mixture_norm", components=1), make("batch_norm")
    for training in (True, True, False):
        x = data()
        expected = gradients(batch.train(training), x, [batch.weight, batch.bias])
        for g, e in zip(gradients(single.train(training), x, [single.weight, single.bias]), expected, strict=True):
            torch.testing.assert_close(g, e, rtol=0, atol=1e-10)
    torch.testing.assert_close(single.running_var[0], batch.running_var, rtol=0, atol=1e-10)
    x = torch.cat([100 + data((3, 16, 7)), -100 + 0.1 * data((3, 16, 7), seed=1)])
    plain = make("batch_norm", affine=False)
    expected = 2**0.5 * torch.cat([plain(x[:3]), plain(x[3:])])
    torch.testing.assert_close(make("mixture_norm", affine=False)(x), expected, rtol=0, atol=1e-8)


# ---- shares of the sample's own --------------------------------------------------------------------------------------


def test_exemplar_norm():
    norm, x = randomize(make("exemplar_norm", reduction=4, hidden=5)), data()
    assert norm.narrow.shape == (4, 16)

    def formula(x):
        pairs = three_moments(x)
        pooled = x.mean(2, keepdim=True)
        rows = [norm.narrow @ ((pooled - m) / (v + 1e-5).sqrt()) for m, v in pairs]
        z = torch.cat(rows, 2).mT
        gram = torch.einsum("bic,bjc->bij", z, z).reshape(6, 9)
        shares = ((gram @ norm.first.mT).tanh() @ norm.second.mT).softmax(1)
        y = sum(shares[:, k, None, None] * (x - m) / (v + 1e-5).sqrt() for k, (m, v) in enumerate(pairs))
        return y * column(norm.weight) + column(norm.bias)

    assert_formula(norm, formula, x)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2)))


def test_exemplar_norm_starts_with_equal_shares():
    x = data()
    parts = [make(name)(x) for name in ("instance_norm", "layer_norm_joint", "batch_norm")]
    torch.testing.assert_close(make("exemplar_norm")(x), sum(parts) / 3, rtol=0, atol=1e-10)


# ---- style -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("exchange", "dim"), [("samples", 0), ("channels", 1)])
def test_cross_norm(exchange, dim):
    norm, x = make("cross_norm", exchange=exchange, p=1.0), data()
    assert torch.equal(norm.eval()(x), x)
    norm.train()
    for seed in range(3):
        torch.manual_seed(seed)
        torch.rand(())  # whether at all
        other = torch.rand(x.shape[dim]).argsort()

        def formula(x, other=other):
            mu, std = x.mean(2, keepdim=True), (x.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
            return std.index_select(dim, other) * (x - mu) / std + mu.index_select(dim, other)

        def call(x, seed=seed):
            torch.manual_seed(seed)
            return norm(x)

        for g, e in zip(gradients(call, x), gradients(formula, x), strict=True):
            torch.testing.assert_close(g, e, rtol=0, atol=1e-10)
    assert torch.equal(make("cross_norm", p=0.0)(x), x)
    torch.manual_seed(0)
    passed = sum(torch.equal(make("cross_norm", p=0.3)(x), x) for _ in range(200))
    assert 110 < passed < 170  # 200 * 0.7, four standard deviations
    with pytest.raises(nz.NormzooError, match="exchange='space'"):
        make("cross_norm", exchange="space")


def test_cross_norm_takes_moments_without_the_padding():
    norm, x = make("cross_norm", p=1.0, channel_dim=-1), data((4, 7, 16))
    mask = torch.arange(7) < torch.tensor([7, 2, 4, 5])[:, None]
    x[~mask] = float("nan")
    torch.manual_seed(0)
    y = norm(x, mask)
    torch.manual_seed(0)
    torch.rand(())
    other = torch.rand(4).argsort()
    for row in range(4):
        own, style = x[row][mask[row]], x[other[row]][mask[other[row]]]
        std, target = ((z.var(0, unbiased=False) + 1e-5).sqrt() for z in (own, style))
        torch.testing.assert_close(y[row][mask[row]], (own - own.mean(0)) / std * target + style.mean(0))
    assert y[~mask].abs().max() == 0
    mask[1] = False
    for seed in range(10):
        torch.manual_seed(seed)
        y = norm(x, mask)[[0, 2, 3]]
        torch.manual_seed(seed)
        without = norm(x[[0, 2, 3]], mask[[0, 2, 3]])
        styles = [
            sorted(row[m][:, 0].var(unbiased=False).item() for row, m in zip(z, mask[[0, 2, 3]], strict=True))
            for z in (y, without)
        ]
        assert styles[0] == pytest.approx(styles[1], rel=1e-4)  # handed round among the others


def test_self_norm():
    norm, x = make("self_norm"), data()
    torch.testing.assert_close(norm(x), x / 2)
    with torch.no_grad():
        for seed, parameter in enumerate(norm.parameters()):
            parameter.copy_(data(parameter.shape, seed) / 5)

    def formula(x):
        mu, std = x.mean(2, keepdim=True), (x.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        f = torch.sigmoid(column(norm.f_weight[0]) * mu + column(norm.f_weight[1]) * std + column(norm.f_bias))
        g = torch.sigmoid(column(norm.g_weight[0]) * mu + column(norm.g_weight[1]) * std + column(norm.g_bias))
        return (g * std) * (x - mu) / std + f * mu

    assert_formula(norm, formula)
    y = norm(x)
    mu = x.mean(2, keepdim=True)
    std = (x.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    f = torch.sigmoid(column(norm.f_weight[0]) * mu + column(norm.f_weight[1]) * std + column(norm.f_bias))
    torch.testing.assert_close(y.mean(2, keepdim=True), f * mu)  # the new mean, as the paper has it


# ---- what all of them keep -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", BATCH)
def test_both_layouts_and_any_number_of_dimensions(spec):
    x = data((3, 16, 4, 5))
    first, last = (fresh_of(spec, channel_dim=dim) for dim in (1, -1))
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
    before = {key: b.clone() for key, b in norm.named_buffers() if not key.endswith("num_batches_tracked")}
    assert norm(x, torch.zeros_like(mask)).abs().max() == 0
    assert all(torch.equal(norm.get_buffer(key), b) for key, b in before.items())


@pytest.mark.parametrize("spec", [spec for spec in BATCH if spec != "mixture_norm"])  # its responsibilities are fixed
def test_gradients_of_first_and_second_order(spec):
    x = data((2, 8, 3)).requires_grad_()
    for training in (True, False):
        norm = randomize(make(spec, 8)).train(training)
        with nz.hold_statistics(norm):
            assert gradcheck(norm, x, fast_mode=True)
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
    with pytest.raises(nz.NormzooError, match="one value per"):
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
    norm, x, traits = fresh_of(spec, eps=1e-20), data((3, 16, 4, 5)), make(spec).traits
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


@pytest.mark.parametrize("spec", [*BATCH, "cross_norm", "self_norm"])
def test_papers_are_cited(spec):
    found = nz.info(spec.partition("(")[0])
    assert found.paper is not None
    assert str(found.paper.year) in (found.norm.__doc__ or "")
    assert (found.paper.arxiv or found.paper.venue or "?") in (found.norm.__doc__ or "")
    assert "y =" in found.formula
