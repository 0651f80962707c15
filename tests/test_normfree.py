"""Networks without norms: their blocks against the formulas, and what the papers say of their start."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from normzoo.errors import NormzooError
from normzoo.layers.base import Norm
from normzoo.models import (
    AlphaDropout,
    Inputs,
    Network,
    clip_adaptively_,
    create_model,
    list_models,
    model_info,
    seed_dropout,
)
from normzoo.models.layer import ACTIVATIONS
from normzoo.models.normfree import FixupBlock, NFBlock, ScaledStandardConv2d, SkipInitBlock, variance_gain
from normzoo.registry import create

INPUTS = {"cnn": Inputs((3, 8, 8)), "mlp": Inputs((12,))}
RESNETS = ["fixup_resnet", "nf_resnet", "skipinit_resnet"]


def build(name: str, seed: int = 0, inputs: Inputs | None = None, outputs: int = 4, **options) -> Network:
    torch.manual_seed(seed)
    inputs = inputs or INPUTS[model_info(name).family]
    return create_model(name, norm="none", inputs=inputs, outputs=outputs, **options)


def values(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shuffled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, dtype=torch.float64, generator=generator), alpha=0.3)
    return module


def conv(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """A convolution as a sum over the places of its kernel."""
    size = weight.shape[-1]
    x = F.pad(x, (size // 2,) * 4)
    height, width = ((side - size) // stride + 1 for side in x.shape[2:])
    out = torch.zeros(x.shape[0], weight.shape[0], height, width, dtype=x.dtype)
    for i in range(size):
        for j in range(size):
            part = x[:, :, i : i + stride * height : stride, j : j + stride * width : stride]
            out += torch.einsum("nchw,oc->nohw", part[:, :, :height, :width], weight[:, :, i, j])
    return out


# ---- all of them -----------------------------------------------------------------------------------------------------


def test_they_are_listed_apart():
    names = list_models(norm_free=True)
    assert {*RESNETS, "selu_mlp", "fixup_resnet110", "nf_resnet56", "skipinit_resnet20"} <= set(names)
    assert not set(names) & set(list_models())
    assert all(model_info(name).summary for name in names)
    with pytest.raises(NormzooError, match=r"unknown model 'fixup_resnet2O'; did you mean .*'fixup_resnet20'"):
        build("fixup_resnet2O", inputs=INPUTS["cnn"])


@pytest.mark.parametrize("name", [*RESNETS, "selu_mlp", "fixup_resnet32"])
def test_they_train_without_a_norm_and_refuse_one(name):
    small = {"depth": 8} if name in RESNETS else {}
    model = build(name, dropout=0.1, **small)
    assert not any(isinstance(m, Norm) for m in model.modules())
    x = values(5, *model.inputs.shape).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    target = torch.arange(5) % 4
    losses = []
    for _ in range(8):
        seed_dropout(model, 0)
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    fresh = build(name, seed=3, dropout=0.1, **small)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), fresh.eval()(x))
    assert torch.equal(model(x), copy.deepcopy(model)(x))
    assert model.bfloat16()(x.bfloat16()).isfinite().all()
    for norm in ("batch_norm", {"*": "rms_norm"}, nn.BatchNorm2d):
        with pytest.raises(NormzooError, match=r"has no norms, and got norm='(batch_norm|rms_norm|BatchNorm2d)'; give"):
            create_model(name, norm=norm, inputs=model.inputs, outputs=4)
    create_model(name, norm={"*": "none"}, inputs=model.inputs, outputs=4)


@pytest.mark.parametrize("name", RESNETS)
def test_options_that_do_not_fit(name):
    with pytest.raises(NormzooError, match=r"expected 6 n \+ 2"):
        build(name, depth=21)
    with pytest.raises(NormzooError, match="4x4 or more"):
        build(name, inputs=Inputs((3, 3, 8)))
    with pytest.raises(NormzooError, match="whole number"):
        build(name, width=0)
    model = build(name, inputs=Inputs((3, 32, 32)), outputs=10, depth=20)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convs) == 19
    if name == "nf_resnet":
        with pytest.raises(NormzooError, match="alpha=0"):
            build(name, alpha=0)


# ---- Fixup -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after", "stride"), [(4, 4, 1), (4, 8, 2)])
def test_the_fixup_block(before, after, stride):
    b = shuffled(FixupBlock(before, after, stride, blocks=9, activation=nn.ReLU()))
    x = values(2, before, 6, 6)
    y = conv((conv(x + b.bias1a, b.conv1.weight, stride) + b.bias1b).clamp(min=0) + b.bias2a, b.conv2.weight)
    shortcut = torch.zeros_like(y)
    shortcut[:, :before] = x[:, :, ::stride, ::stride]
    expected = (shortcut + b.scale * y + b.bias2b).clamp(min=0)
    torch.testing.assert_close(b(x), expected, rtol=1e-10, atol=1e-10)


def test_fixup_starts_as_the_identity():
    model = build("fixup_resnet", depth=56).double()
    x = values(2, 3, 8, 8)
    h = model.stem(x)
    assert torch.equal(model.stages[0](h), h)  # h is not negative, so that the last activation passes it
    assert torch.equal(model(x), torch.zeros(2, 4, dtype=torch.float64))
    scalars = [p for p in model.parameters() if p.ndim == 0]
    assert len(scalars) == 5 * 27 + 2  # four biases and a scale a block, one bias after the stem, one before the head


def test_how_fixup_scales_its_weights():
    """He's standard deviation, times (number of blocks) ** -1/2 in the first convolution of each branch."""
    model = build("fixup_resnet", depth=20, width=64, seed=1)
    for stage in model.stages:
        for block in stage:
            fan_in = block.conv1.weight[0].numel()
            assert block.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in / 9), rel=0.03)
            assert not block.conv2.weight.any()
    assert model.conv.weight.std().item() == pytest.approx(math.sqrt(2 / 27), rel=0.1)


def test_a_step_of_fixup_does_not_grow_with_depth():
    """Zhang et al. 2019: one step of SGD moves the answer by as much whatever the depth; He's start does not."""

    def moved(name: str, depth: int) -> float:
        total = 0.0
        for seed in range(2):
            torch.manual_seed(seed)
            model = create_model(name, norm="none", inputs=Inputs((3, 8, 8)), outputs=4, depth=depth, width=8).double()
            x = values(8, 3, 8, 8, seed=seed)
            with torch.no_grad():
                nn.init.normal_(model.head.weight, std=0.1)  # at zero, its own first step would be all there is
                model.head.requires_grad_(False)
            before = model(x)
            F.cross_entropy(before, torch.arange(8) % 4).backward()
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=1e-4)
                total += (model(x) - before).norm().item() / 1e-4
        return total

    assert moved("fixup_resnet", 56) < 2 * moved("fixup_resnet", 14)
    assert moved("resnet", 56) > 10 * moved("resnet", 14)


# ---- SkipInit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after", "stride"), [(4, 4, 1), (4, 8, 2)])
def test_the_skipinit_block(before, after, stride):
    b = shuffled(SkipInitBlock(before, after, stride, start=0.0, activation=nn.ReLU()))
    x = values(2, before, 6, 6)
    u = x.clamp(min=0)
    y = conv(u, b.conv1.weight, stride) + b.conv1.bias.view(-1, 1, 1)
    y = conv(y.clamp(min=0), b.conv2.weight) + b.conv2.bias.view(-1, 1, 1)
    shortcut = x if stride == 1 else conv(u, b.shortcut.weight, stride) + b.shortcut.bias.view(-1, 1, 1)
    torch.testing.assert_close(b(x), shortcut + b.scale * y, rtol=1e-10, atol=1e-10)


def test_skipinit_starts_as_the_identity_within_a_stage():
    model = build("skipinit_resnet", depth=56).double()
    h = model.stem(values(2, 3, 8, 8))
    assert torch.equal(model.stages[0](h), h)
    assert build("skipinit_resnet", start=0.5).stages[1][0].scale.item() == 0.5


def test_batch_norm_scales_branches_down_where_skipinit_need_not():
    """De and Smith 2020: of the variance after block l, the branch has 1 / (l + 1) with batch norm, 1 / 2 without."""

    def shares(norm: str) -> list[float]:
        torch.manual_seed(0)
        x, found = torch.randn(512, 256), []
        for _ in range(32):
            y = create(norm, 256)(x).relu()
            y = F.linear(y, torch.randn(256, 256) * math.sqrt(2 / 256))
            x = x + y
            found.append((y.var() / x.var()).item())
        return found

    for i, share in enumerate(shares("batch_norm"), 1):
        assert share * (i + 1) == pytest.approx(1, abs=0.15)
    assert 0.4 < sum(shares("none")) / 32 < 0.6

    def growth(name: str, **options) -> float:
        model = build(name, depth=56, **options)
        h = model.stem(values(8, 3, 8, 8).float())
        return (model.stages[0](h).var() / h.var()).item()

    assert growth("skipinit_resnet", start=1.0) > 100
    assert growth("skipinit_resnet", start=9**-0.5) < 5  # the paper's other start, one over the root of the blocks
    assert growth("skipinit_resnet") == pytest.approx(1)


# ---- NF-ResNet -------------------------------------------------------------------------------------------------------


def test_variance_gains_are_the_published_ones():
    published = {"relu": 1.7139588594436646, "elu": 1.2716004848480225, "gelu": 1.7015043497085571,
                 "silu": 1.7881293296813965, "tanh": 1.5939117670059204, "sigmoid": 4.803835391998291,
                 "leaky_relu": 1.70590341091156, "identity": 1.0}  # fmt: skip
    for name, gain in published.items():  # sampled by their authors
        assert variance_gain(name) == pytest.approx(gain, rel=2e-3)
    assert variance_gain("relu") == pytest.approx(math.sqrt(2 / (1 - 1 / math.pi)), rel=1e-8)
    assert set(published) <= set(ACTIVATIONS)


def standardized(c: ScaledStandardConv2d) -> Tensor:
    rows = []
    for gain, w in zip(c.gain, c.weight, strict=True):
        centred = w - w.mean()
        rows.append(gain * centred / (centred * centred).sum().sqrt())
    return torch.stack(rows)


def test_scaled_weight_standardization():
    layer = shuffled(ScaledStandardConv2d(3, 5, 3, 2))
    x = values(2, 3, 7, 7)
    expected = conv(x, standardized(layer), 2) + layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        layer.weight.mul_(3).add_(1.5)  # neither the scale nor the mean of the weights matters
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        layer.weight.fill_(0.3)
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("skip_init", [False, True])
@pytest.mark.parametrize(("before", "after", "stride"), [(4, 4, 1), (4, 8, 2)])
def test_the_nf_block(before, after, stride, skip_init):
    act = build("nf_resnet").activation
    b = shuffled(NFBlock(before, after, stride, alpha=0.2, beta=0.9, skip_init=skip_init, activation=act))
    x = values(2, before, 6, 6)
    gain = math.sqrt(2 / (1 - 1 / math.pi))
    u = gain * (0.9 * x).clamp(min=0)
    y = conv(u, standardized(b.conv1), stride) + b.conv1.bias.view(-1, 1, 1)
    y = conv(gain * y.clamp(min=0), standardized(b.conv2)) + b.conv2.bias.view(-1, 1, 1)
    shortcut = x if stride == 1 else conv(u, standardized(b.shortcut), stride) + b.shortcut.bias.view(-1, 1, 1)
    expected = shortcut + 0.2 * y * (b.scale if skip_init else 1)
    torch.testing.assert_close(b(x), expected, rtol=1e-8, atol=1e-8)  # the gain is a quadrature


def test_the_variances_that_nf_resnet_expects():
    model = build("nf_resnet", depth=20)
    betas = [[block.beta for block in stage] for stage in model.stages]
    grown = [(1 + k * 0.04) ** -0.5 for k in range(4)]
    assert betas[0] == pytest.approx(grown[:3])
    assert betas[1] == pytest.approx([grown[3], *grown[1:3]])  # its first block sees the end of the stage before
    assert betas[2] == pytest.approx([grown[3], *grown[1:3]])


def test_scaled_weight_standardization_keeps_the_variance():
    """Brock et al. 2021: one, layer after layer, with the gain of the activation; without the gain it is lost."""
    torch.manual_seed(0)
    with torch.no_grad():
        layers = [ScaledStandardConv2d(256, 256, 1) for _ in range(20)]
        for gain, check in ((variance_gain("relu"), lambda v: abs(v - 1) < 0.1), (1.0, lambda v: v < 1e-6)):
            x = torch.randn(16, 256, 8, 8)
            for layer in layers:
                x = layer(gain * x.relu())
            assert check(x.var((0, 2, 3)).mean().item())


def test_nf_resnet_has_the_variances_it_expects():
    with torch.no_grad():
        found = []
        for seed in range(3):
            model = build("nf_resnet", depth=32, width=48, seed=seed, inputs=Inputs((3, 16, 16)))
            # convolutions pad with zeros, which have no variance: wrap around, as the theory has no borders
            for m in model.modules():
                if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3):
                    m.forward = partial(_circular, m)
            x = model.stem(torch.randn(32, 3, 16, 16))
            seen = [x.var((0, 2, 3)).mean()]
            for block in model.stages[0]:
                x = block(x)
                seen.append(x.var((0, 2, 3)).mean())
            found.append(torch.stack(seen))
        variances = torch.stack(found).mean(0)
    expected = 1 + 0.04 * torch.arange(6)
    torch.testing.assert_close(variances, expected, rtol=0.1, atol=0)


def _circular(layer: ScaledStandardConv2d, x: Tensor) -> Tensor:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), layer.standardized(), layer.bias, layer.stride)


# ---- adaptive gradient clipping --------------------------------------------------------------------------------------


def test_adaptive_clipping_is_unit_by_unit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        model[0].weight[1] = 0  # a unit that is zero can move by clipping * eps
    model(values(4, 2, 4, 4)).square().sum().mul(10).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    frozen = nn.Parameter(torch.ones(2))
    model.register_parameter("unused", frozen)
    clip_adaptively_(model, clipping=0.05, leave=("4",))
    assert frozen.grad is None
    clipped = 0
    for name, p in model.named_parameters():
        if name == "unused":
            continue
        if name.startswith("4."):
            assert torch.equal(p.grad, before[name])
            continue
        units = [(p, before[name], p.grad)] if p.ndim == 1 else zip(p, before[name], p.grad, strict=True)
        for w, old, new in units:
            size = (w * w).sum().sqrt().clamp(min=1e-3)
            factor = min(1.0, (0.05 * size / (old * old).sum().sqrt()).item()) if old.any() else 1.0
            torch.testing.assert_close(new, old * factor, rtol=1e-10, atol=1e-12)
            clipped += factor < 1
    assert clipped >= 5
    with pytest.raises(NormzooError, match="no module 'head'"):
        clip_adaptively_(model)


def test_adaptive_clipping_leaves_small_gradients_and_the_head_alone():
    model = build("nf_resnet", depth=8)
    model(values(2, 3, 8, 8).float()).sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.grad.mul_(1e-7)
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    clip_adaptively_(model)
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())
    for p in model.parameters():
        p.grad.mul_(1e12)
    clip_adaptively_(model)
    torch.testing.assert_close(model.head.weight.grad, before["head.weight"] * 1e12)
    ratio = model.conv.weight.grad.flatten(1).norm(dim=1) / model.conv.weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.01))


# ---- SELU ------------------------------------------------------------------------------------------------------------


def test_the_selu_mlp():
    model = shuffled(build("selu_mlp", widths=(6, 5)))
    x = values(3, 12)
    h = x
    for layer in (model.body[0], model.body[3]):
        h = h @ layer.weight.T + layer.bias
        h = 1.0507009873554805 * torch.where(h > 0, h, 1.6732632423543772 * (h.exp() - 1))
    torch.testing.assert_close(model(x), h @ model.head.weight.T + model.head.bias, rtol=1e-10, atol=1e-10)


def test_selu_keeps_mean_zero_and_variance_one():
    """Klambauer et al. 2017: a stable fixed point, reached from elsewhere too."""
    for mean, std, dropout in ((0.0, 1.0, 0.0), (0.2, 1.3, 0.0), (0.0, 1.0, 0.1)):
        model = build("selu_mlp", widths=(512,) * 24, dropout=dropout, inputs=Inputs((512,)))
        with torch.no_grad():
            h = model.body(torch.randn(256, 512) * std + mean)
        assert h.mean().item() == pytest.approx(0, abs=0.1)
        assert h.var().item() == pytest.approx(1, abs=0.25)
    linear = model.body[0]
    assert linear.weight.std().item() == pytest.approx(512**-0.5, rel=0.02)
    assert not linear.bias.any()


def test_alpha_dropout_keeps_mean_and_variance():
    layer = AlphaDropout(0.3)
    layer.seed(5)
    x = values(400, 500)
    x[0, :5] = 0
    y = layer(x)
    assert y.mean().item() == pytest.approx(0, abs=0.01)
    assert y.var().item() == pytest.approx(1, abs=0.02)
    q, low = 0.7, -1.7580993408473766
    a = (q + low**2 * q * (1 - q)) ** -0.5
    b = -a * (1 - q) * low
    dropped = (y - (a * low + b)).abs() < 1e-9
    assert dropped.double().mean().item() == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(y[~dropped], a * x[~dropped] + b)
    assert torch.equal(layer.eval()(x), x)
    layer.train().seed(5)
    assert torch.equal(layer(x), y)
    assert AlphaDropout(0.0)(x) is x


@pytest.mark.parametrize("reentrant", [True, False])
def test_alpha_dropout_repeats_its_mask_under_checkpointing(reentrant):
    def gradients(run) -> list[Tensor]:
        model = build("selu_mlp", dropout=0.4, widths=(16, 16)).double()
        seed_dropout(model, 1)
        x = values(4, 12).requires_grad_()
        y = run(model, x) * run(model, 2 * x).exp()
        run(model, 3 * x)  # a later pass whose result is not used: its mask is not the one to repeat
        y.sum().backward()
        return [p.grad for p in (x, *model.parameters()) if p.grad is not None]

    plain = gradients(lambda model, x: model(x))
    repeated = gradients(lambda model, x: checkpoint(model, x, use_reentrant=reentrant))
    for a, b in zip(plain, repeated, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
