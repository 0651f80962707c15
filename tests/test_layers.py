"""The core norms against torch.nn, closed forms and their own definition."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import normzoo as nz
from normzoo import ops
from normzoo.layers.base import MomentNorm, Norm, choose_groups
from normzoo.layers.batch import BatchNorm, BatchRenorm, GhostBatchNorm
from normzoo.layers.parts import BatchFormulaNorm
from normzoo.layers.sample import GroupNorm, InstanceNorm, LayerNorm, LayerNormJoint, RMSNorm

CORE = [
    "batch_norm", "batch_renorm", "ghost_batch_norm", "group_norm", "instance_norm", "layer_norm", "layer_norm_joint",
    "none", "rms_norm", "sync_batch_norm",
]  # fmt: skip
MOMENT = [name for name in CORE if name != "none"]
SHAPES = {"tokens": (6, 16, 7), "image": (6, 16, 4, 5), "volume": (6, 16, 2, 3, 2)}


def make(name: str, channels: int = 16, **options) -> Norm:
    return nz.create(name, channels, **({} if name == "none" else {"dtype": torch.float64}), **options)


def randomize(norm: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5, generator=generator)
    return norm


def data(shape=(6, 16, 4, 5), seed=0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator, dtype=torch.float64) + 1.5).to(dtype)


def gradients(norm: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Output, and the gradients of a fixed functional of it, for input (channels first) and parameters."""
    x = x.clone().requires_grad_()
    y = norm(x.movedim(1, -1)).movedim(-1, 1) if getattr(norm, "channel_dim", 1) == -1 else norm(x)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).sin()
    return (y, *torch.autograd.grad((y * dy).sum(), [x, *norm.parameters()]))


# ---- against torch.nn ------------------------------------------------------------------------------------------------


def torch_twin(name: str, ndim: int) -> nn.Module:
    kind = {3: 1, 4: 2, 5: 3}[ndim]
    if name in ("batch_norm", "sync_batch_norm"):
        return {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[kind](16, dtype=torch.float64)
    if name == "instance_norm":
        return {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[kind](16, affine=True).double()
    if name == "group_norm":
        return nn.GroupNorm(4, 16, dtype=torch.float64)
    if name == "layer_norm_joint":
        return nn.GroupNorm(1, 16, dtype=torch.float64)
    twin = nn.LayerNorm(16, dtype=torch.float64) if name == "layer_norm" else nn.RMSNorm(16, 1e-6, dtype=torch.float64)

    class ChannelsFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.twin = twin

        def forward(self, x):
            return self.twin(x.movedim(1, -1)).movedim(-1, 1)

    return ChannelsFirst()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", [n for n in MOMENT if n not in ("batch_renorm", "ghost_batch_norm")])
def test_equals_torch(name, shape, channel_dim, backend):
    twin = randomize(torch_twin(name, len(shape)))
    norm = randomize(make(name, channel_dim=channel_dim))
    x = data(shape)
    for training in (True, False):
        norm.train(training)
        twin.train(training)
        expected = gradients(twin, x)
        with ops.backend(backend):
            got = gradients(norm, x)
        for e, g in zip(expected, got, strict=True):
            torch.testing.assert_close(g, e, rtol=0, atol=1e-10)
    for key, buffer in twin.named_buffers():
        torch.testing.assert_close(norm.get_buffer(key), buffer, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["batch_norm", "group_norm", "layer_norm", "rms_norm"])
def test_two_dimensional_input_equals_torch(name):
    twin = {"batch_norm": nn.BatchNorm1d(16), "group_norm": nn.GroupNorm(4, 16), "layer_norm": nn.LayerNorm(16),
            "rms_norm": nn.RMSNorm(16, 1e-6)}[name].double()  # fmt: skip
    x = data((6, 16))
    for e, g in zip(gradients(randomize(twin), x), gradients(randomize(make(name)), x), strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "twin"),
    [("batch_norm", nn.BatchNorm1d(16)), ("batch_norm", nn.BatchNorm2d(16)), ("batch_norm", nn.BatchNorm3d(16)),
     ("sync_batch_norm", nn.SyncBatchNorm(16)), ("group_norm", nn.GroupNorm(4, 16)), ("layer_norm", nn.LayerNorm(16)),
     ("instance_norm", nn.InstanceNorm1d(16, affine=True)), ("instance_norm", nn.InstanceNorm2d(16, affine=True)),
     ("instance_norm", nn.InstanceNorm3d(16, affine=True)), ("rms_norm", nn.RMSNorm(16)),
     ("batch_norm(affine=False)", nn.BatchNorm2d(16, affine=False)),
     ("layer_norm(bias=False)", nn.LayerNorm(16, bias=False)),
     ("batch_norm(track_running_stats=False)", nn.BatchNorm2d(16, track_running_stats=False))],
)  # fmt: skip
def test_loads_state_dict_of_torch(name, twin):
    randomize(twin)
    norm = nz.create(name, 16)
    norm.load_state_dict(twin.state_dict())
    assert norm.state_dict().keys() == twin.state_dict().keys()
    for key, value in twin.state_dict().items():
        assert torch.equal(norm.state_dict()[key], value), key


def test_cumulative_average_equals_torch():
    norm, twin = make("batch_norm", momentum=None), nn.BatchNorm2d(16, momentum=None, dtype=torch.float64)
    for seed in range(4):
        norm(data(seed=seed))
        twin(data(seed=seed))
    torch.testing.assert_close(norm.running_var, twin.running_var, rtol=0, atol=1e-12)
    torch.testing.assert_close(norm.running_mean, twin.running_mean, rtol=0, atol=1e-12)


# ---- any pattern, against NumPy --------------------------------------------------------------------------------------


def closed_form(x: np.ndarray, pattern: str, groups: int, parts: int, eps: float, centred: bool) -> np.ndarray:
    """Loop over the statistics: two elements share one where their kept coordinates agree."""
    b, c, s = x.shape
    coordinate = {
        "b": np.arange(b) % (b // parts) if "(n b)" in pattern else np.arange(b),
        "n": np.arange(b) // (b // parts),
        "g": np.arange(c) // (c // groups),
        "c": np.arange(c) % (c // groups) if "(g c)" in pattern else np.arange(c),
        "s": np.arange(s),
    }
    axis = {"b": 0, "n": 0, "g": 1, "c": 1, "s": 2}
    label = np.zeros(x.shape, dtype=np.int64)
    for name in pattern.split("->")[1].split():
        shape = [1, 1, 1]
        shape[axis[name]] = -1
        label = label * 100 + coordinate[name].reshape(shape)
    y = np.empty_like(x)
    for value in np.unique(label):
        chosen = x[label == value]
        mean = chosen.mean() if centred else 0.0
        y[label == value] = (chosen - mean) / np.sqrt(((chosen - mean) ** 2).mean() + eps)
    return y


PATTERNS = [
    "b c s -> c", "b c s -> b s", "b c s -> b", "b c s -> b c", "b (g c) s -> b g", "b (g c) s -> g", "b c s ->",
    "b c s -> s", "b (g c) s -> b c", "(n b) c s -> n c", "(n b) (g c) s -> n g", "b c s -> c s", "b (g c) s -> c s",
]  # fmt: skip


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_equals_the_closed_form(pattern, centred, channels_last):
    x = data((4, 6, 5))
    shown = x.mT.contiguous() if channels_last else x
    y, _ = ops.standardize(
        shown, ops.Pattern.parse(pattern), {"g": 2, "n": 2}, channels_last=channels_last, eps=1e-3, centred=centred
    )
    expected = torch.from_numpy(closed_form(x.numpy(), pattern, 2, 2, 1e-3, centred))
    torch.testing.assert_close(y.mT if channels_last else y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MOMENT)
def test_gradcheck(name):
    norm = randomize(make(name, 4, **({"ghost_batch_size": 2} if name == "ghost_batch_norm" else {})))
    norm.eps = 0.1
    x = data((4, 4, 3)).requires_grad_()
    for backend in ("auto", "reference"):
        with ops.backend(backend), nz.hold_statistics(norm):
            assert gradcheck(norm, x)


# ---- the equivalences ------------------------------------------------------------------------------------------------


def assert_same(one: nn.Module, other: nn.Module, x: torch.Tensor) -> None:
    for a, b in zip(gradients(randomize(one), x), gradients(randomize(other), x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_lattice():
    double = {"dtype": torch.float64}
    assert_same(GroupNorm(16, groups=1, **double), LayerNormJoint(16, **double), data())
    assert_same(GroupNorm(16, groups=16, **double), InstanceNorm(16, **double), data())
    assert_same(GhostBatchNorm(16, ghost_batch_size=6, **double), BatchNorm(16, **double), data())
    assert_same(make("sync_batch_norm"), make("batch_norm"), data())
    centred = data() - data().mean(1, keepdim=True)
    rms, layer = RMSNorm(16, eps=1e-5, **double), LayerNorm(16, bias=False, **double)
    torch.testing.assert_close(rms(centred), layer(data()), rtol=0, atol=1e-10)


def test_batch_norm_in_evaluation_is_affine():
    norm = randomize(make("batch_norm"))
    norm(data())
    norm.eval()
    x, y = data(seed=1), data(seed=2)
    torch.testing.assert_close(norm(0.3 * x + 0.7 * y), 0.3 * norm(x) + 0.7 * norm(y), rtol=0, atol=1e-10)


# ---- batch renorm ----------------------------------------------------------------------------------------------------


def test_renorm_without_correction_is_batch_norm():
    renorm = BatchRenorm(16, r_max=1, d_max=0, momentum=0.1, warmup=0, r_ramp=0, d_ramp=0, dtype=torch.float64)
    batch = make("batch_norm")
    assert_same(renorm, batch, data())
    torch.testing.assert_close(renorm.running_var, batch.running_var, rtol=1e-12, atol=0)
    assert_same(BatchRenorm(16, dtype=torch.float64), make("batch_norm"), data())  # the warm-up of the paper


def test_renorm_with_wide_limits_computes_in_training_what_evaluation_does():
    norm = randomize(BatchRenorm(16, r_max=1e6, d_max=1e6, warmup=0, r_ramp=0, d_ramp=0, dtype=torch.float64))
    for seed in range(3):
        norm(data(seed=seed))
    with nz.hold_statistics(norm):
        trained = norm(data(seed=9))
    torch.testing.assert_close(trained, norm.eval()(data(seed=9)), rtol=0, atol=1e-10)


def test_renorm_takes_r_and_d_as_constants():
    norm = BatchRenorm(2, r_max=3, d_max=5, warmup=0, r_ramp=0, d_ramp=0, affine=False, dtype=torch.float64)
    x = data((5, 2)).requires_grad_()
    with torch.no_grad():
        std, mean = torch.sqrt(x.var(0, correction=0) + 1e-5), x.mean(0)
        r = std.clamp(1 / 3, 3) / np.sqrt(1 + 1e-5)
        d = (mean / np.sqrt(1 + 1e-5)).clamp(-5, 5)
        r = (std / np.sqrt(1 + 1e-5)).clamp(1 / 3, 3)
    expected = (x - x.mean(0)) / torch.sqrt(x.var(0, correction=0) + 1e-5) * r + d
    dy = data((5, 2), seed=3)
    (wanted,) = torch.autograd.grad((expected * dy).sum(), x)
    y = norm(x)
    (got,) = torch.autograd.grad((y * dy).sum(), x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_renorm_limits_follow_the_schedule_and_are_saved():
    norm = BatchRenorm(2)
    limits = []
    for seen in (0, 5_000, 15_000, 25_000, 40_000, 100_000):
        norm.num_batches_tracked.fill_(seen)
        limits.append(tuple(float(limit) for limit in norm.limits()))
    assert limits == [
        (1, 0),
        (1, 0),
        (pytest.approx(1 + 2 * 10 / 35), 2.5),
        (pytest.approx(1 + 2 * 20 / 35), 5),
        (3, 5),
        (3, 5),
    ]
    other = BatchRenorm(2)
    other.load_state_dict(norm.state_dict())
    assert tuple(map(float, other.limits())) == (3, 5)


def test_renorm_accepts_a_batch_of_one():
    norm = BatchRenorm(3, warmup=0, r_ramp=0, d_ramp=0, affine=False)
    y = norm(torch.tensor([[1.0, -2.0, 50.0]]))
    torch.testing.assert_close(y, torch.tensor([[1.0, -2.0, 5.0]]), atol=1e-4, rtol=0)  # d alone, clipped to 5


# ---- ghost batch norm ------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(2, 13), size=st.integers(2, 8))
def test_ghost_equals_batch_norm_of_each_part(batch, size):
    x = data((batch, 4, 3))
    norm = randomize(GhostBatchNorm(4, ghost_batch_size=size, dtype=torch.float64))
    plain = randomize(BatchNorm(4, dtype=torch.float64))
    parts = x.tensor_split(max(1, batch // size))
    expected = torch.cat([plain(part) for part in parts])
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-10)
    mean = 0.1 * torch.stack([part.mean((0, 2)) for part in parts]).mean(0)
    var = 0.9 + 0.1 * torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in parts]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(norm.running_var, var, rtol=0, atol=1e-10)
    assert norm.num_batches_tracked == 1


def test_ghost_evaluates_any_batch():
    norm = GhostBatchNorm(4, ghost_batch_size=4)
    norm(data((8, 4, 3), dtype=torch.float32))
    x = data((5, 4, 3), seed=1, dtype=torch.float32)
    norm.eval()
    torch.testing.assert_close(norm(x), torch.cat([norm(sample[None]) for sample in x]))


# ---- masks -----------------------------------------------------------------------------------------------------------


def ragged(lengths=(7, 1, 4, 5), channels=16) -> tuple[torch.Tensor, torch.Tensor]:
    x = data((len(lengths), max(lengths), channels))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return x, mask


@pytest.mark.parametrize("padding", [0.0, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("name", CORE)
def test_padding_is_not_there(name, channel_dim, padding):
    """Per sample: the same as each sequence alone. Over the batch: the same as all real tokens in one long row."""
    norm = randomize(make(name, channel_dim=channel_dim))
    x, mask = ragged((7, 2, 4, 5))
    clean = x.clone()
    x[~mask] = padding
    x.requires_grad_()
    y = norm(x if channel_dim == -1 else x.mT, mask)
    y = y if channel_dim == -1 else y.mT
    assert (y[~mask] == 0).all()
    grad_x, *grads = torch.autograd.grad(y.sin().sum(), [x, *norm.parameters()])
    assert all(g.isfinite().all() for g in (grad_x, *grads))
    assert (grad_x[~mask] == 0).all()

    alone = randomize(make(name, channel_dim=-1))
    if alone.traits.batch_dependent:
        expected = alone(clean[mask][None])[0]
        torch.testing.assert_close(norm.running_var, alone.running_var, rtol=0, atol=1e-10)
        torch.testing.assert_close(norm.running_mean, alone.running_mean, rtol=0, atol=1e-10)
    else:
        expected = torch.cat([alone(row[real][None])[0] for row, real in zip(clean, mask, strict=True)])
    torch.testing.assert_close(y[mask], expected, rtol=0, atol=1e-10)


def test_a_mask_of_images():
    norm, x = make("batch_norm"), data((3, 16, 4, 5))
    mask = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.4
    rows = x.movedim(1, -1)[mask]
    torch.testing.assert_close(norm(x, mask).movedim(1, -1)[mask], make("batch_norm")(rows), rtol=0, atol=1e-10)


def test_a_batch_without_a_real_token_leaves_the_statistics_alone():
    norm = make("batch_norm", channel_dim=-1)
    x, _ = ragged()
    y = norm(x, torch.zeros(x.shape[:2], dtype=torch.bool))
    assert (y == 0).all()
    assert torch.equal(norm.running_mean, torch.zeros(16, dtype=torch.float64))
    assert torch.equal(norm.running_var, torch.ones(16, dtype=torch.float64))


# ---- layouts, dtypes, extremes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORE)
def test_memory_format_and_dtype_are_kept(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = data(dtype=dtype).to(memory_format=torch.channels_last)
        norm = nz.create(name, 16)
        y = norm(x)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, norm(x.contiguous()), rtol=2e-2, atol=2e-2)
        assert nz.create(name, 16)(data(dtype=dtype)).is_contiguous()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MOMENT)
def test_half_precision_is_as_good_as_its_input(name, dtype, scale):
    x = (scale * data() / 5).to(dtype)
    y = nz.create(name, 16, eps=1e-12)(x).double()
    expected = make(name, eps=1e-12)(x.double())
    torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", [n for n in MOMENT if n != "rms_norm"])
def test_large_mean_with_small_variance(name, backend):
    x = (300 + 0.01 * data()).float()
    with ops.backend(backend):
        y = nz.create(name, 16, eps=1e-12)(x)
    torch.testing.assert_close(y.double(), make(name, eps=1e-12)(x.double()), rtol=0, atol=5e-3)


@pytest.mark.parametrize("name", CORE)
def test_constant_and_zero_input_stay_finite(name):
    for x in (torch.zeros(4, 16, 3), torch.full((4, 16, 3), 7.0)):
        x = x.requires_grad_()
        norm = nz.create(name, 16)
        y = norm(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert y.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", CORE)
def test_input_is_not_changed_and_strides_do_not_matter(name):
    x = data((6, 32, 8))[:, ::2, ::2]
    before = x.clone()
    torch.testing.assert_close(make(name)(x), make(name)(x.contiguous()), rtol=0, atol=1e-12)
    assert torch.equal(x, before)


def test_one_value_for_a_statistic_is_refused_with_the_way_out():
    for name, shape in [("batch_norm", (1, 16)), ("instance_norm", (4, 16, 1, 1)), ("group_norm(groups=16)", (4, 16))]:
        with pytest.raises(nz.NormzooError, match="one value per statistic") as error:
            nz.create(name, 16)(torch.randn(shape))
        assert "layer_norm" in str(error.value)
    nz.create("batch_norm", 16).eval()(torch.randn(1, 16))  # evaluation needs no batch


@pytest.mark.parametrize("name", CORE)
def test_an_empty_batch_gives_an_empty_batch(name):
    norm = nz.create(name, 16)
    x = torch.zeros(0, 16, 3, requires_grad=True)
    norm(x).sum().backward()
    assert norm(x).shape == (0, 16, 3)
    assert all(torch.isfinite(b).all() for b in norm.buffers())


# ---- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORE)
def test_deepcopy_pickle_and_repr(name):
    norm = randomize(nz.create(name, 16, channel_dim=-1))
    x = data((4, 5, 16), dtype=torch.float32)
    norm(x)
    norm.eval()
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(twin(x), norm(x))
        assert repr(twin) == repr(norm)
    assert "16" in repr(norm)


def test_running_statistics_stay_float32():
    norm = nz.create("batch_norm", 4).half()
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert norm.weight.dtype == torch.float16
    assert nz.create("batch_norm", 4).bfloat16().running_var.dtype == torch.float32
    assert nz.create("batch_norm", 4).double().running_var.dtype == torch.float64


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["batch_norm", "ghost_batch_norm", "batch_renorm", "sync_batch_norm"])
def test_checkpointing_counts_a_batch_once(name, reentrant):
    plain, twice = make(name), make(name)
    for norm, call in ((plain, lambda n, x: n(x)), (twice, lambda n, x: checkpoint(n, x, use_reentrant=reentrant))):
        for seed in range(3):
            x = data(seed=seed).requires_grad_()
            call(norm, x).sin().sum().backward()
    for key, buffer in plain.named_buffers():
        assert torch.equal(twice.get_buffer(key), buffer), key
    for a, b in zip(plain.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


def test_accumulation_counts_each_micro_batch_once():
    norm = make("batch_norm", momentum=None)
    micro = [data(seed=seed) for seed in range(4)]
    for x in micro:  # one optimizer step
        norm(x).sin().sum().backward()
    assert norm.num_batches_tracked == 4
    expected = torch.stack([x.mean((0, 2, 3)) for x in micro]).mean(0)
    torch.testing.assert_close(norm.running_mean, expected, rtol=0, atol=1e-12)


def test_hold_statistics():
    norm = make("batch_norm")
    with nz.hold_statistics(nn.Sequential(norm)):
        norm(data())
    assert norm.num_batches_tracked == 0
    norm(data())
    assert norm.num_batches_tracked == 1


def cumulates(name: str) -> bool:
    """Whether the norm offers the plain average of all batches."""
    try:
        make(name, momentum=None)
    except (TypeError, nz.NormzooError):
        return False
    return True


def shared(name: str) -> bool:
    """Whether the norm leaves its running statistics to the shared parts."""
    cls = nz.info(name).norm
    return isinstance(cls, type) and (name in CORE or issubclass(cls, BatchFormulaNorm)) and make(name).traits.stateful


STATEFUL = [name for name in nz.list_norms() if shared(name)]
EARLY = {"warmup": 0, "r_ramp": 2, "d_ramp": 2}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo, of any Function
def test_a_compiled_renorm_corrects_by_the_averages_its_forward_pass_saw():
    eager, norm = make("batch_renorm", **EARLY), make("batch_renorm", **EARLY)
    torch._dynamo.reset()
    fast = torch.compile(norm, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        expected = gradients(eager, data(seed=seed))
        for got, wanted in zip(gradients(fast, data(seed=seed)), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_renorm_corrects_by_the_averages_its_forward_pass_saw(reentrant):
    plain, twice = make("batch_renorm", **EARLY), make("batch_renorm", **EARLY)
    for seed in range(3):
        x, z = data(seed=seed).requires_grad_(), data(seed=seed).requires_grad_()
        plain(x).sin().sum().backward()
        checkpoint(twice, z, use_reentrant=reentrant).sin().sum().backward()
        torch.testing.assert_close(z.grad, x.grad, rtol=0, atol=1e-12)
    for (key, a), b in zip(plain.named_parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=1e-12, msg=key)
    for key, buffer in plain.named_buffers():
        assert torch.equal(twice.get_buffer(key), buffer), key


@pytest.mark.parametrize(
    ("name", "compiled"),
    [(name, False) for name in STATEFUL] + [(name, True) for name in ("batch_norm", "batch_renorm", "eval_norm")],
)
def test_an_evaluation_survives_the_training_step_before_its_backward_pass(name, compiled):
    norm = make(name)
    norm(data(seed=1))
    torch._dynamo.reset()
    call = torch.compile(norm, backend="aot_eager", fullgraph=True) if compiled else norm
    x, z = data().requires_grad_(), data().requires_grad_()
    call.eval()
    (wanted,) = torch.autograd.grad(call(x).sin().sum(), x)
    late = call(z).sin().sum()
    norm.train()(10 * data(seed=2))
    (got,) = torch.autograd.grad(late, z)
    assert torch.equal(got, wanted)


def test_evaluation_without_gradients_copies_nothing():
    norm = make("batch_norm").eval()
    with torch.no_grad():
        assert norm.population().var is norm.running_var
    assert norm.population().var is not norm.running_var


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in STATEFUL] + [(name, {"momentum": None}) for name in STATEFUL if cumulates(name)],
)
def test_a_batch_of_nothing_is_no_batch(name, options):
    norm, twin = make(name, **options), make(name, **options)
    nothing = [(data((0, 16, 5)), None), (data((0, 16, 5)), torch.ones(0, 5, dtype=torch.bool)),
               (data((4, 16, 5)), torch.zeros(4, 5, dtype=torch.bool))]  # fmt: skip
    for seed in range(2):
        for x, mask in nothing:
            norm(x, mask)
        norm(data((4, 16, 5), seed=seed))
        twin(data((4, 16, 5), seed=seed))
    assert norm.num_batches_tracked == 2
    for key, buffer in twin.named_buffers():
        assert torch.equal(norm.get_buffer(key), buffer), key


def test_autocast_keeps_the_dtype_of_the_input():
    for name in CORE:
        x = data(dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert nz.create(name, 16)(x).dtype == torch.bfloat16
            assert nz.create(name, 16)(x.float()).dtype == torch.float32


# ---- a norm of one's own ---------------------------------------------------------------------------------------------


class HaloNorm(MomentNorm):
    """Groups of channels share a statistic over the whole batch."""

    moments = "b (g c) s -> g"


def test_three_lines_get_everything():
    norm = randomize(HaloNorm(16, groups=4, dtype=torch.float64))
    assert norm.running_var.shape == (4,)
    x = data()
    groups = x.view(6, 4, 4, 20)
    expected = (groups - groups.mean((0, 2, 3), keepdim=True)) / torch.sqrt(
        groups.var((0, 2, 3), correction=0, keepdim=True) + 1e-5
    )
    expected = expected.view(x.shape) * norm.weight.view(16, 1, 1) + norm.bias.view(16, 1, 1)
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)
    mask = torch.ones(6, 4, 5, dtype=torch.bool)
    torch.testing.assert_close(norm(x, mask), expected, rtol=0, atol=1e-12)
    norm.eval()
    torch.testing.assert_close(norm(x.to(memory_format=torch.channels_last)), norm(x), rtol=0, atol=1e-12)
    assert norm.traits.batch_dependent
    assert norm.traits.stateful
    assert norm.traits.causal
    assert not norm.traits.causal_in_training


def test_a_free_axis_is_an_option_of_its_own_name():
    class Windowed(MomentNorm):
        moments = "b (k c) s -> b k"

    torch.testing.assert_close(Windowed(16, k=4)(data().float()), GroupNorm(16, groups=4)(data().float()))
    with pytest.raises(TypeError, match="needs the option 'k'"):
        Windowed(16)


def test_patterns_are_values():
    for pattern in map(ops.Pattern.parse, (*PATTERNS, "b c s -> c")):
        for again in (copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
            assert again == pattern
            assert hash(again) == hash(pattern)
            assert again.population == pattern.population
        assert pattern.population.population is pattern.population


@pytest.mark.parametrize(
    ("pattern", "why"),
    [("b c s", "no '->'"), ("b c -> c", "not b c s"), ("c b s -> c", "not b c s"), ("b c s -> g", "'g' on the right"),
     ("b (c c) s -> c", "twice on the left"), ("b c s -> c c", "twice on the right"), ("b c s -> 2", "no axis name")],
)  # fmt: skip
def test_a_wrong_pattern_says_what_is_wrong(pattern, why):
    with pytest.raises(nz.NormzooError, match=why):
        type("Wrong", (MomentNorm,), {"moments": pattern})


def test_running_statistics_over_positions_are_refused():
    class PerPosition(MomentNorm):
        moments = "b c s -> c s"

    with pytest.raises(TypeError, match="track_running_stats=False"):
        PerPosition(4)
    x = data((6, 4, 3))
    expected = (x - x.mean(0)) / torch.sqrt(x.var(0, correction=0) + 1e-5)
    torch.testing.assert_close(PerPosition(4, track_running_stats=False, dtype=torch.float64)(x), expected)


# ---- options and mistakes --------------------------------------------------------------------------------------------


def test_groups():
    assert choose_groups(128, "auto", None) == 32
    assert choose_groups(6, "auto", None) == 1
    assert repr(GroupNorm(64)) == "GroupNorm(64, eps=1e-05, groups=16)"
    assert GroupNorm(64, group_size=4).sizes == {"g": 16}
    for options in ({"groups": 7}, {"group_size": 5}, {"groups": 2, "group_size": 4}, {"groups": 0}, {"groups": "all"}):
        with pytest.raises(TypeError, match=r"divide|both"):
            GroupNorm(64, **options)


def test_mistakes_are_answered():
    with pytest.raises(TypeError, match="did you mean 'momentum'"):
        BatchNorm(4, momentun=0.1)
    with pytest.raises(TypeError, match="no option 'groups'"):
        BatchNorm(4, groups=2)
    nan = float("nan")
    for options in ({"eps": -1}, {"eps": nan}, {"momentum": 2}, {"momentum": nan}, {"channel_dim": 2}):
        (message,) = options
        with pytest.raises(nz.NormzooError, match=message):
            BatchNorm(4, **options)
    with pytest.raises(nz.NormzooError, match="num_features"):
        BatchNorm(0)
    with pytest.raises(nz.NormzooError, match="expected \\(N, 4, \\*S\\)"):
        BatchNorm(4)(torch.zeros(2, 3, 4))
    with pytest.raises(nz.NormzooError, match="floating-point"):
        BatchNorm(4)(torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(nz.NormzooError, match="mask"):
        BatchNorm(4)(torch.zeros(2, 4, 3), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(nz.NormzooError, match="mask"):
        BatchNorm(4)(torch.zeros(2, 4, 3), torch.ones(2, 3))


def test_roles_survive_a_copy():
    model = nn.Sequential(nn.Linear(3, 16), nz.create("batch_norm", 16), nz.create(nn.LayerNorm, 16))
    expected = {"1.weight": "gain", "1.bias": "shift", "2.module.weight": "gain", "2.module.bias": "shift"}
    assert nz.parameter_roles(copy.deepcopy(model)) == expected


def test_import_is_light():
    code = (
        "import sys, normzoo; assert 'torch' not in sys.modules; normzoo.create('batch_norm', 4);"
        "heavy = {'pytorch_lightning', 'wandb', 'matplotlib', 'pandas', 'torchmetrics', 'sklearn'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("name", ["layer_norm", "batch_norm", "group_norm"])
def test_parameters_that_something_has_replaced(name):
    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w

    x = torch.randn(6, 8, 5)
    expected = 2 * nz.create(name, 8)(x)
    parametrized = nz.create(name, 8)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", Twice())
    torch.testing.assert_close(parametrized(x), expected)
    replaced = nz.create(name, 8)
    del replaced.weight
    replaced.weight = torch.full((8,), 2.0)
    torch.testing.assert_close(replaced(x), expected)
    called = torch.func.functional_call(nz.create(name, 8), {"weight": torch.full((8,), 2.0)}, (x,))
    torch.testing.assert_close(called, expected)
