"""Norms without batch statistics, each against a closed form of its own, in float64."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import normzoo as nz
from normzoo.layers.base import Norm
from normzoo.layers.positional import moment_shortcut

PER_POSITION = [
    "ada_norm", "detach_norm", "local_response_norm", "positional_norm", "unit_norm(k=0.5)",
    "divisive_norm(window=1, suppression=1)", "local_context_norm(window=1)",
    "bias_norm", "multihead_rms_norm", "partial_rms_norm", "pixel_norm", "qk_norm(heads=4)", "scale_norm",
    "seed_norm(heads=2)", "simple_rms_norm", "zero_centred_rms_norm",
]  # fmt: skip
POINTWISE = ["derf", "dyisru", "dyt", "layer_scale", "rezero", "skip_init"]
PER_SAMPLE = [
    "divisive_norm", "evonorm_s0", "evonorm_s1", "evonorm_s2", "filter_response_norm",
    "filter_response_norm(learned_eps=True, tlu=False)", "grn", "local_context_norm(window=3)", "region_norm", "revin",
    "self_norm",
]  # fmt: skip
SPATIAL = ["divisive_norm", "local_context_norm(window=3)"]  # they know which positions are neighbours
ALL = [*PER_POSITION, *POINTWISE, *PER_SAMPLE]


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
    return (y, *torch.autograd.grad((y * dy).sum(), [x, *parameters]))


def assert_formula(norm: Norm, formula, x: torch.Tensor | None = None) -> None:
    """The output and all gradients are those of ``formula``, which uses the norm's parameters."""
    x = data() if x is None else x
    got, expected = (gradients(f, x, list(norm.parameters())) for f in (norm, formula))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-10)


# ---- root mean square ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "p", "k"), [(16, 0.0625, 1), (16, 0.3, 5), (30, 0.1, 3), (16, 1.0, 16)])
def test_partial_rms_norm(channels, p, k):
    norm = randomize(make("partial_rms_norm", channels, p=p))
    assert norm.measured == k

    def formula(x):
        return norm.weight[:, None] * x / (x[:, :k].square().sum(1, keepdim=True) / k + 1e-6).sqrt()

    assert_formula(norm, formula, data((4, channels, 5)))


def test_partial_rms_norm_of_all_channels_is_rms_norm():
    x = data()
    torch.testing.assert_close(make("partial_rms_norm", p=1.0)(x), make("rms_norm")(x), rtol=0, atol=1e-10)
    with pytest.raises(nz.NormzooError, match=r"\(0, 1\]|above 0 and up to 1"):
        make("partial_rms_norm", p=0.0)


def test_zero_centred_gain_starts_at_one_and_moves_from_there():
    x, norm, plain = data(), make("zero_centred_rms_norm"), make("rms_norm")
    assert (norm.weight == 0).all()
    torch.testing.assert_close(norm(x), plain(x), rtol=0, atol=1e-10)
    randomize(norm)
    with torch.no_grad():
        plain.weight.copy_(1 + norm.weight)
    for g, e in zip(gradients(norm, x, [norm.weight]), gradients(plain, x, [plain.weight]), strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-10)


def test_a_small_gain_in_half_precision_is_not_lost():
    norm = nz.create("zero_centred_rms_norm", 16, dtype=torch.bfloat16)
    with torch.no_grad():
        norm.weight.fill_(0.001)  # 1 + 0.001 is 1 in bfloat16
    x = data(dtype=torch.float32)
    torch.testing.assert_close(norm(x), nz.create("rms_norm", 16)(x) * (1 + norm.weight[0].float()))


def test_simple_rms_norm_and_pixel_norm_have_no_parameters():
    for name, eps in (("simple_rms_norm", 1e-6), ("pixel_norm", 1e-8)):
        norm = make(name)
        assert list(norm.parameters()) == []
        assert_formula(norm, lambda x, eps=eps: x / (x.square().mean(1, keepdim=True) + eps).sqrt())


def test_scale_norm():
    norm = make("scale_norm")
    assert norm.weight.item() == 4
    torch.testing.assert_close(norm(data()), make("simple_rms_norm", eps=0.0)(data()), rtol=0, atol=1e-10)
    randomize(norm)
    assert_formula(norm, lambda x: norm.weight * x / x.norm(dim=1, keepdim=True).clamp(min=1e-5))
    fixed = make("scale_norm", affine=False)
    torch.testing.assert_close(fixed(data()).norm(dim=1), torch.full((6, 7), 4.0, dtype=torch.float64))


def test_the_smallest_length_is_the_limit():
    x = torch.full((1, 16, 1), 1e-7, dtype=torch.float64)
    torch.testing.assert_close(make("scale_norm", eps=1e-5)(x), 4 * x / 1e-5)


@pytest.mark.parametrize("learned_eps", [False, True])
@pytest.mark.parametrize("tlu", [False, True])
def test_filter_response_norm(tlu, learned_eps):
    norm = make("filter_response_norm", tlu=tlu, learned_eps=learned_eps)
    assert norm.traits.includes_activation == tlu
    if learned_eps:
        assert norm.eps_l.item() == pytest.approx(1e-4)
    randomize(norm)

    def formula(x):
        eps = 1e-6 + (norm.eps_l.abs() if learned_eps else 0)
        y = norm.weight[:, None] * x / (x.square().mean(2, keepdim=True) + eps).sqrt() + norm.bias[:, None]
        return torch.maximum(y, norm.tau[:, None]) if tlu else y

    assert_formula(norm, formula)
    torch.testing.assert_close(make("filter_response_norm", affine=False)(data()), make("filter_response_norm")(data()))


def test_grn():
    norm, x = make("grn"), data()
    assert torch.equal(norm(x), x)
    randomize(norm)

    def formula(x):
        g = x.norm(dim=2, keepdim=True)
        return norm.weight[:, None] * (x * (g / (g.mean(1, keepdim=True) + 1e-6))) + norm.bias[:, None] + x

    assert_formula(norm, formula)
    g = x.norm(dim=2, keepdim=True)
    torch.testing.assert_close(make("grn", affine=False)(x), x + x * g / (g.mean(1, keepdim=True) + 1e-6))


def test_bias_norm():
    norm = make("bias_norm")
    torch.testing.assert_close(norm(data()), math.e * make("simple_rms_norm")(data()))
    randomize(norm)

    def formula(x):
        return x * (x - norm.bias[:, None]).square().mean(1, keepdim=True) ** -0.5 * norm.log_scale.exp()

    norm.eps = 0.0
    assert_formula(norm, formula)


def test_bias_norm_forgets_a_channel_that_is_always_large():
    norm, x = make("bias_norm", log_scale=0.0), data()
    x[:, 0] = 50.0
    with torch.no_grad():
        norm.bias[0] = 50.0
    expected = x[:, 1:] / (x[:, 1:].square().sum(1, keepdim=True) / 16).sqrt()
    torch.testing.assert_close(norm(x)[:, 1:], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("heads", [1, 2, 16])
def test_seed_norm(heads):
    norm = make("seed_norm", heads=heads)
    torch.testing.assert_close(norm(data()), make("rms_norm")(data()), rtol=0, atol=1e-10)
    with torch.no_grad():
        for seed, parameter in enumerate(norm.parameters()):
            parameter.copy_(data((16,), seed) / 10)

    def formula(x):
        width = 16 // heads
        gain = [
            torch.tanh((x[:, i : i + width] * norm.beta[i : i + width, None]).sum(1, keepdim=True))
            * norm.alpha[i : i + width, None]
            + norm.weight[i : i + width, None]
            for i in range(0, 16, width)
        ]
        return torch.cat(gain, 1) * x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()

    assert_formula(norm, formula)


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_multihead_rms_norm_is_rms_norm_of_each_head(channel_dim):
    norm = randomize(make("multihead_rms_norm", heads=4, channel_dim=channel_dim))

    def formula(x):
        x = x if channel_dim == 1 else x.mT
        parts = [
            nn.functional.rms_norm(h.mT, (4,), w, 1e-6).mT
            for h, w in zip(x.split(4, 1), norm.weight.split(4), strict=True)
        ]
        y = torch.cat(parts, 1)
        return y if channel_dim == 1 else y.mT

    assert_formula(norm, formula, data() if channel_dim == 1 else data((6, 7, 16)))
    one = randomize(make("multihead_rms_norm", heads=1))
    torch.testing.assert_close(one(data()), randomize(make("rms_norm"))(data()), rtol=0, atol=1e-10)
    with pytest.raises(nz.NormzooError, match="heads=3"):
        make("multihead_rms_norm", heads=3)


def test_qk_norm_gives_the_attention_of_the_paper():
    q, k = data((2, 5, 16)), data((2, 5, 16), seed=1)
    length = 512
    norms = [make("qk_norm", heads=4, length=length, channel_dim=-1) for _ in "qk"]
    g0 = math.log2(length**2 - length)
    split = lambda x: x.unflatten(-1, (4, 4)).transpose(1, 2)  # noqa: E731
    logits = split(norms[0](q)) @ split(norms[1](k)).mT
    unit = nn.functional.normalize
    expected = g0 * unit(split(q), dim=-1) @ unit(split(k), dim=-1).mT
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    norm = randomize(make("qk_norm", heads=2))
    assert_formula(norm, lambda x: norm.weight * unit(x.unflatten(1, (2, 8)), dim=2).flatten(1, 2))


# ---- instead of norms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "function", "start"),
    [("dyt", lambda x, n: torch.tanh(n.alpha * x), {"alpha": 0.5}),
     ("derf", lambda x, n: torch.erf(n.alpha * x + n.shift), {"alpha": 0.5, "shift": 0.0}),
     ("dyisru", lambda x, n: 4 * x / (n.log_b.exp() + x**2) ** 0.5, {"log_b": math.log(16)})],
)  # fmt: skip
def test_squashing_functions(name, function, start):
    norm = make(name)
    named = dict(norm.named_parameters())
    assert named.keys() == {"weight", "bias", *start}
    for key, value in start.items():
        assert named[key].shape == (1,)
        assert named[key].item() == pytest.approx(value)
    randomize(norm)
    assert_formula(norm, lambda x: norm.weight[:, None] * function(x, norm) + norm.bias[:, None])
    assert not norm.traits.includes_activation


def test_dyisru_is_rms_norm_seen_from_one_channel():
    x = data((1, 16, 1))
    rms = make("rms_norm", eps=0.0)(x)
    for channel in (0, 7):
        others = x.square().sum() - x[0, channel, 0] ** 2
        norm = make("dyisru", b=others.item())
        torch.testing.assert_close(norm(x)[0, channel], rms[0, channel], rtol=0, atol=1e-10)
    with pytest.raises(nz.NormzooError, match="b=-1"):
        make("dyisru", b=-1.0)


@pytest.mark.parametrize(("name", "start", "size"), [("layer_scale", 1e-5, 16), ("rezero", 0, 1), ("skip_init", 0, 1)])
def test_gates(name, start, size):
    norm, x = make(name), data()
    assert norm.weight.shape == (size,)
    torch.testing.assert_close(norm(x), start * x)
    assert gradients(norm, x, [norm.weight])[2].abs().min() > 0  # the way out of zero
    randomize(norm)
    assert_formula(norm, lambda x: norm.weight[:, None] * x)
    torch.testing.assert_close(make(name, init=0.3)(x), 0.3 * x)


def test_they_have_no_eps():
    for name in POINTWISE:
        with pytest.raises(TypeError, match="eps"):
            nz.create(name, 16, eps=1e-5)


# ---- evonorms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("name", ["evonorm_s0", "evonorm_s1", "evonorm_s2"])
def test_evonorm_s(name, groups):
    norm = randomize(make(name, groups=groups))
    assert norm.traits.includes_activation

    def formula(x):
        z = x.view(6, groups, -1, 7)
        if name == "evonorm_s2":
            size = (z.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
        else:
            size = (z.var((2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        v = norm.v[:, None] if name == "evonorm_s0" else 1
        swish = x * torch.sigmoid(v * x)
        return (swish.view_as(z) / size).view_as(x) * norm.weight[:, None] + norm.bias[:, None]

    assert_formula(norm, formula)


# ---- per position ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_positional_norm_and_its_moments(channel_dim):
    norm, x = make("positional_norm", channel_dim=channel_dim), data((3, 16, 4, 5)).movedim(1, channel_dim)
    assert list(norm.parameters()) == []
    layer = make("layer_norm", affine=False, channel_dim=channel_dim)
    torch.testing.assert_close(norm(x), layer(x), rtol=0, atol=1e-10)
    y, mean, std = norm.with_moments(x)
    torch.testing.assert_close(mean, x.mean(channel_dim, keepdim=True))
    torch.testing.assert_close(std, (x.var(channel_dim, unbiased=False, keepdim=True) + 1e-5).sqrt())
    torch.testing.assert_close(moment_shortcut(y, mean, std), x, rtol=0, atol=1e-10)
    mask = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    hidden = torch.where(mask.unsqueeze(channel_dim), x, float("nan"))
    _, masked_mean, masked_std = norm.with_moments(hidden, mask)
    torch.testing.assert_close(masked_std.squeeze(channel_dim)[mask], std.squeeze(channel_dim)[mask])
    assert masked_mean.squeeze(channel_dim)[~mask].abs().max() == 0


def test_the_short_cut_passes_gradients():
    norm, x = make("positional_norm"), data().requires_grad_()
    y, mean, std = norm.with_moments(x)
    (gradient,) = torch.autograd.grad((moment_shortcut(y.square(), mean, std)).sum(), x)
    z = x.detach().clone().requires_grad_()
    mu, sd = z.mean(1, keepdim=True), (z.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    (expected,) = torch.autograd.grad((((z - mu) / sd) ** 2 * sd + mu).sum(), z)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


def layer(x, eps=1e-5):
    return (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + eps).sqrt()


def test_ada_norm():
    norm = make("ada_norm", scale=0.3, k=0.2)
    assert_formula(norm, lambda x: 0.3 * (1 - 0.2 * layer(x).detach()) * layer(x))
    torch.testing.assert_close(make("ada_norm", k=0.0)(data()), make("layer_norm")(data()), rtol=0, atol=1e-10)
    with pytest.raises(nz.NormzooError, match="at least 2"):
        make("ada_norm", channels=1)


def test_detach_norm():
    def formula(x):
        return (x - x.mean(1, keepdim=True).detach()) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt().detach()

    assert_formula(make("detach_norm"), formula)
    torch.testing.assert_close(make("detach_norm")(data()), make("layer_norm")(data()), rtol=0, atol=1e-10)
    assert_formula(make("detach_norm", detach_mean=False, detach_variance=False), layer)


def test_unit_norm():
    assert_formula(make("unit_norm"), lambda x: nn.functional.normalize(x, dim=1))
    torch.testing.assert_close(make("unit_norm", k=1)(data()), make("simple_rms_norm", eps=0.0)(data()))
    torch.testing.assert_close(make("unit_norm", k=0.5)(data()).norm(dim=1), torch.full((6, 7), 2.0).double())
    keras = torch.full((1, 16, 1), 1e-9, dtype=torch.float64)  # below the limit of Keras, 1e-12 under the root
    torch.testing.assert_close(make("unit_norm")(keras), keras / 1e-6)


# ---- neighbours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_local_response_norm_equals_torch(size):
    twin = nn.LocalResponseNorm(size, alpha=0.3, beta=0.6, k=1.5)
    assert_formula(make("local_response_norm", size=size, alpha=0.3, beta=0.6, k=1.5), twin)


def test_local_response_norm_has_the_constants_of_alexnet():
    x = 20 * data((1, 16, 1))
    y = make("local_response_norm")(x)
    for i in range(16):
        around = x[0, max(0, i - 2) : i + 3, 0]
        torch.testing.assert_close(y[0, i, 0], x[0, i, 0] / (2 + 1e-4 * around.square().sum()) ** 0.75)


def around(i: int, size: int, n: int) -> slice:
    return slice(max(0, i - size // 2), min(n, i + (size - 1) // 2 + 1))


@pytest.mark.parametrize(("window", "suppression"), [(3, 5), (2, 1), (1, 4)])
def test_divisive_norm_by_loops(window, suppression):
    norm = randomize(make("divisive_norm", window=window, suppression=suppression, sigma=0.7))

    def formula(x):
        v = torch.empty_like(x)
        y = torch.empty_like(x)
        for i in range(4):
            for j in range(5):
                part = x[:, :, around(i, window, 4), around(j, window, 5)]
                v = v.clone()
                v[:, :, i, j] = x[:, :, i, j] - part.mean((1, 2, 3))[:, None]
        for i in range(4):
            for j in range(5):
                part = v[:, :, around(i, suppression, 4), around(j, suppression, 5)]
                y = y.clone()
                y[:, :, i, j] = v[:, :, i, j] / (0.49 + part.square().mean((1, 2, 3)))[:, None].sqrt()
        return y * norm.weight[:, None, None] + norm.bias[:, None, None]

    assert_formula(norm, formula, data((2, 16, 4, 5)))


def test_wide_windows_are_layer_norm_and_group_norm():
    x = data((3, 16, 4, 5))
    divisive = make("divisive_norm", window=9, suppression=9, sigma=math.sqrt(1e-5))
    torch.testing.assert_close(divisive(x), make("layer_norm_joint")(x), rtol=0, atol=1e-10)
    context = randomize(make("local_context_norm"))
    expected = randomize(make("group_norm", group_size=2))
    for g, e in zip(*(gradients(n, x, list(n.parameters())) for n in (context, expected)), strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-10)
    for n in (1, 2):  # no positions, and a row of them
        x = data((3, 16, 7)[: n + 1])
        torch.testing.assert_close(make("local_context_norm")(x), make("group_norm", group_size=2)(x))


@pytest.mark.parametrize("group_size", [1, 4])
def test_local_context_norm_by_loops(group_size):
    norm = randomize(make("local_context_norm", window=3, group_size=group_size))

    def formula(x):
        z = x.view(2, 16 // group_size, group_size, 4, 5)
        rows = []
        for i in range(4):
            row = []
            for j in range(5):
                part = z[:, :, :, around(i, 3, 4), around(j, 3, 5)]
                var = part.var((2, 3, 4), unbiased=False)[:, :, None]
                row.append((z[..., i, j] - part.mean((2, 3, 4))[:, :, None]) / (var + 1e-5).sqrt())
            rows.append(torch.stack(row, -1))
        return torch.stack(rows, -2).flatten(1, 2) * norm.weight[:, None, None] + norm.bias[:, None, None]

    assert_formula(norm, formula, data((2, 16, 4, 5)))


def test_local_context_norm_with_a_large_mean():
    x = (300 + 0.01 * data((2, 16, 6, 6))).float()
    y = nz.create("local_context_norm", 16, window=3, eps=1e-12)(x)
    torch.testing.assert_close(
        y.double(), make("local_context_norm", window=3, eps=1e-12)(x.double()), rtol=0, atol=0.01
    )


# ---- regions and series ----------------------------------------------------------------------------------------------


def test_region_norm():
    norm, x = randomize(make("region_norm")), data((3, 16, 4, 5))
    whole = make("instance_norm")
    whole.load_state_dict(norm.inside.state_dict())
    torch.testing.assert_close(norm(x), whole(x), rtol=0, atol=1e-10)
    region = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    mask = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1)) > 0.2
    y = norm(x, region=region)
    masked = norm(torch.where(mask[:, None], x, float("nan")), mask, region)
    for part, affine in ((region, norm.inside), (~region, norm.outside)):
        for n in range(3):
            for result, inside in ((y, part[n]), (masked, part[n] & mask[n])):
                z = x[n, :, inside]
                z = (z - z.mean(1, keepdim=True)) / (z.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
                z = z * affine.weight[:, None] + affine.bias[:, None]
                torch.testing.assert_close(result[n, :, inside], z, rtol=0, atol=1e-10)
    assert masked.movedim(1, -1)[~mask].abs().max() == 0
    assert nz.parameter_roles(norm)["outside.weight"] == "gain"
    with pytest.raises(nz.NormzooError, match=r"\(3, 5\)"):
        norm(x, region=region[:, 0])


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_revin(variant, channel_dim):
    norm, x = randomize(make("revin", variant=variant, channel_dim=channel_dim)), data((3, 16, 9))
    x = x.movedim(1, channel_dim)
    time = 2 if channel_dim == 1 else 1
    twin = randomize(make("instance_norm", channel_dim=channel_dim))
    y, mean, std = norm.with_moments(x)
    torch.testing.assert_close(y, twin(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(mean, x.mean(time, keepdim=True))
    torch.testing.assert_close(norm.denormalize(y, mean, std), x, rtol=0, atol=1e-10)
    forecast = data((3, 16, 4), seed=1).movedim(1, channel_dim)
    shape = (16, 1) if channel_dim == 1 else (16,)
    expected = (forecast - norm.bias.view(shape)) / norm.weight.view(shape)
    expected = expected * (x.var(time, unbiased=False, keepdim=True) + 1e-5).sqrt() + x.mean(time, keepdim=True)
    torch.testing.assert_close(norm.denormalize(forecast, mean, std), expected, rtol=0, atol=1e-10)
    same = torch.allclose(gradients(norm, x)[1], gradients(twin, x)[1])
    assert same == (variant == "paper")
    mask = torch.arange(9) < torch.tensor([9, 4, 6])[:, None]
    _, mean, std = norm.with_moments(torch.where(mask.unsqueeze(channel_dim), x, float("nan")), mask)
    short = x[1:2].narrow(time, 0, 4)
    torch.testing.assert_close(mean[1:2], short.mean(time, keepdim=True))
    torch.testing.assert_close(std[1:2], (short.var(time, unbiased=False, keepdim=True) + 1e-5).sqrt())
    with pytest.raises(nz.NormzooError, match="one position"):
        norm(x.narrow(time, 0, 1))


# ---- what all of them keep -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ALL)
def test_both_layouts_and_any_number_of_dimensions(spec):
    x = data((3, 16, 4, 5))
    first, last = (randomize(make(spec, channel_dim=dim)) for dim in (1, -1))
    torch.testing.assert_close(last(x.movedim(1, -1)).movedim(-1, 1), first(x), rtol=0, atol=1e-10)
    if spec not in SPATIAL:
        torch.testing.assert_close(first(x.flatten(2)).view(x.shape), first(x), rtol=0, atol=1e-10)
    if first.traits.causal:
        torch.testing.assert_close(first(x[..., 0, 0]), first(x)[..., 0, 0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("padding", [0.0, 1e30, float("nan")])
@pytest.mark.parametrize("spec", ALL)
def test_padding_is_not_there(spec, padding):
    norm = randomize(make(spec, channel_dim=-1))
    x, lengths = data((4, 7, 16)), [7, 2, 4, 5]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    expected = torch.cat([norm(row[:n][None])[0] for row, n in zip(x, lengths, strict=True)])
    x[~mask] = padding
    x.requires_grad_()
    y = norm(x, mask)
    torch.testing.assert_close(y[mask], expected, rtol=0, atol=1e-10)
    assert (y[~mask] == 0).all()
    grads = torch.autograd.grad(y.sin().sum(), [x, *norm.parameters()], materialize_grads=True)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][~mask] == 0).all()
    assert norm(x, torch.zeros_like(mask)).abs().max() == 0


DETACHED = ["ada_norm", "detach_norm"]  # their gradients are not those of their output, by design


@pytest.mark.parametrize("spec", [spec for spec in ALL if spec not in DETACHED])
def test_gradients_of_first_and_second_order(spec):
    norm = randomize(make(spec, 8))
    x = data((2, 8, 3)).requires_grad_()
    assert gradcheck(norm, x, fast_mode=True)
    assert gradgradcheck(norm, x, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", ALL)
def test_half_precision_and_memory_format(spec, dtype):
    for scale in (1e-2, 1.0, 1e3):
        x = (scale * data((3, 16, 4, 5)) / 10).to(dtype).to(memory_format=torch.channels_last)
        y = nz.create(spec, 16)(x)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        expected = make(spec)(x.double())
        torch.testing.assert_close(y.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=scale * 1e-3)
        assert nz.create(spec, 16)(x.contiguous()).is_contiguous()


@pytest.mark.parametrize("spec", ALL)
def test_zeros_and_constants_and_nothing(spec):
    for x in (torch.zeros(3, 16, 4), torch.full((3, 16, 4), 7.0), torch.zeros(0, 16, 4)):
        norm, x = randomize(nz.create(spec, 16)), x.requires_grad_()
        y = norm(x)
        assert y.shape == x.shape
        grads = torch.autograd.grad(y.sum(), [x, *norm.parameters()], materialize_grads=True)
        assert all(t.isfinite().all() for t in (y, *grads))


@pytest.mark.parametrize("spec", ALL)
def test_copies_and_evaluation_are_the_same(spec):
    norm, x = randomize(make(spec)), data((3, 16, 4, 5))
    before, y = x.clone(), norm(x)
    assert torch.equal(x, before)
    assert torch.equal(norm.eval()(x), y)
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(twin(x), y)
        assert repr(twin) == repr(norm)
    fresh = make(spec)
    fresh.load_state_dict(norm.state_dict())
    assert torch.equal(fresh(x), y)


@pytest.mark.parametrize("spec", ALL)
def test_declared_invariances(spec):
    norm, x = randomize(make(spec)), data((3, 16, 4, 5))
    for part in norm.modules():
        if hasattr(part, "eps"):
            part.eps = 1e-20
    traits = norm.traits
    same = lambda a, b: torch.allclose(a, b, rtol=0, atol=1e-8)  # noqa: E731
    assert same(norm(5 * x), norm(x)) == traits.scale_invariant
    assert same(norm(x + 5), norm(x)) == traits.shift_invariant
    changed = x.clone()
    changed[..., -1, -1] += 1
    assert same(norm(changed).flatten(2)[..., :-1], norm(x).flatten(2)[..., :-1]) == traits.causal
    changed = x.clone()
    changed[-1] += 1
    assert same(norm(changed)[:-1], norm(x)[:-1])


@pytest.mark.parametrize("spec", ALL)
def test_papers_are_cited(spec):
    found = nz.info(spec.partition("(")[0])
    assert found.paper is not None
    assert str(found.paper.year) in (found.norm.__doc__ or "")
    assert (found.paper.arxiv or found.paper.venue or "?") in (found.norm.__doc__ or "")
    assert "y =" in found.formula
