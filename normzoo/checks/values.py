"""Whether a norm computes what it says, in every precision and at the edges."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.autograd import gradcheck as torch_gradcheck
from torch.autograd import gradgradcheck as torch_gradgradcheck
from torch.func import functional_call

from normzoo import ops
from normzoo.checks.inference import members
from normzoo.checks.kit import check
from normzoo.checks.subject import (
    HALVES,
    IMAGES,
    CheckFailed,
    NotApplicable,
    Subject,
    all_same,
    call,
    finite,
    gradients,
    outside,
    require,
    same,
    state,
    twin,
)
from normzoo.layers.base import MomentNorm, Norm

MODES = {True: "in training", False: "in evaluation"}


# ---- the definition --------------------------------------------------------------------------------------------------


@check
def pattern(subject: Subject) -> None:
    """A norm that states a moments pattern computes it: output and running statistics equal the closed form.

    Compare with y = gain (x - mean) / sqrt(var + eps) + shift, var biased; the running variance is the unbiased one.
    """
    norm = subject.make()
    if not isinstance(norm, MomentNorm):
        raise NotApplicable("states no pattern")
    if type(norm).normalize is not MomentNorm.normalize:
        raise NotApplicable("normalizes in a way of its own")
    x = subject.data()
    number = members(norm.pattern, (x.shape[0], x.shape[1], x.shape[2]), norm.sizes).numpy()
    with torch.no_grad():
        y = call(norm, x)
    mean, var, count = _closed_form(x.numpy(), number, norm.centred)
    same(y, _scaled(norm, (x.numpy() - mean) / np.sqrt(var + norm.eps)), "the output in training")
    if not norm.track_running_stats:
        return
    if norm.momentum is not None:
        new = {"running_var": var * count / np.maximum(count - 1, 1) if norm.centred else var}
        new |= {"running_mean": mean} if norm.centred else {}
        first = _one_of_each(number)
        for name, value in new.items():
            old = 1.0 if name == "running_var" else 0.0
            expected = old + norm.momentum * (value.reshape(-1)[first] - old)
            same(norm.get_buffer(name).flatten(), torch.from_numpy(expected), f"{name} after one batch")
    running_var = norm.get_buffer("running_var").flatten().numpy()[number]
    running_mean = norm.get_buffer("running_mean").flatten().numpy()[number] if norm.centred else 0.0
    with torch.no_grad():
        y = call(norm.eval(), x)
    same(y, _scaled(norm, (x.numpy() - running_mean) / np.sqrt(running_var + norm.eps)), "the output in evaluation")


def _closed_form(x: np.ndarray, number: np.ndarray, centred: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, biased variance and count of the elements with the same number, at each element."""
    count = np.bincount(number.reshape(-1)).astype(float)
    over = lambda values: np.bincount(number.reshape(-1), values.reshape(-1)) / count  # noqa: E731
    mean = over(x)[number] if centred else np.zeros_like(x)
    return mean, over((x - mean) ** 2)[number], count[number]


def _one_of_each(number: np.ndarray) -> np.ndarray:
    return np.unique(number.reshape(-1), return_index=True)[1]


def _scaled(norm: MomentNorm, standardized: np.ndarray) -> Tensor:
    y = torch.from_numpy(standardized)
    y = y if norm.weight is None else y * norm.weight.detach()[:, None]
    return y if norm.bias is None else y + norm.bias.detach()[:, None]


@check
def fast_path(subject: Subject) -> None:
    """The fast path answers what the reference answers: output, gradients, statistics, in both layouts and formats.

    Let the fast path fall back for what it cannot serve, and compare it with ops.reference on this input.
    """
    subject.declared()
    for channel_dim in (1, -1):
        for training in (True, False):
            for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
                made = subject.make(channel_dim=channel_dim, dtype=dtype, training=training)
                x = subject.data(IMAGES, dtype=dtype, channel_dim=channel_dim)
                for memory, shown in (("contiguous", x), ("transposed", _transposed(x))):
                    fast, slow = twin(made), twin(made)
                    with ops.backend("reference"):
                        expected = gradients(slow, shown)
                    where = f"{dtype}, channel_dim={channel_dim}, {memory} memory, {MODES[training]}"
                    all_same(gradients(fast, shown), expected, f"fast against reference, {where}", tolerance)
                    all_same(state(fast), state(slow), f"fast against reference, {where}", tolerance)


def _transposed(x: Tensor) -> Tensor:
    """The same values with the channel axis elsewhere in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@check
def gain_and_shift(subject: Subject) -> None:
    """The gain multiplies the normalised input once, and the shift is added once.

    Look for a fused path that falls through, or applies the affine part a second time.
    """
    norm, x = subject.make(), subject.data()
    roles = {name: norm.roles.get(name, "other") for name, _ in norm.named_parameters()}
    linear = []
    for name in (name for name, role in roles.items() if role in ("gain", "shift")):
        outputs = []
        for factor in range(5):
            changed = twin(norm)
            with torch.no_grad():
                changed.get_parameter(name).mul_(factor)
                outputs.append(call(changed, x))
        differences = torch.stack(outputs)
        size, bends = differences.abs().max(), []
        for _ in range(4):
            differences = differences.diff(dim=0)
            bends.append(float(differences.abs().max() / size))
        # linear: the second differences vanish; a square or a cube: the third or fourth do. Anything else, as a gain
        # before an activation or before a second normalisation, is the norm's own affair.
        if bends[1] <= 1e-9:
            linear.append(name)
        elif bends[2] <= 1e-9 or bends[3] <= 1e-9:
            raise CheckFailed(f"the output is a polynomial of {name}, a {roles[name]}: it is applied more than once")
    if not linear:
        raise NotApplicable("scales and shifts nothing at its end")


# ---- gradients -------------------------------------------------------------------------------------------------------


@check
def gradients_reach(subject: Subject) -> None:
    """In training the input and every parameter get a finite gradient.

    Use every parameter in forward, and take nothing out of the graph (.data, .detach(), torch.no_grad()).
    """
    norm = subject.make()
    found = gradients(norm, subject.data())
    for name in ["the input", *(n for n, p in norm.named_parameters() if p.requires_grad)]:
        require(f"the gradient of {name}" in found, f"no gradient reaches {name}")
    finite(found, "in training")


@check
def gradcheck(subject: Subject) -> None:
    """The gradients for input and parameters are those of finite differences, in training and in evaluation.

    Let gradients flow through the statistics, and in a custom backward differentiate what forward computed.
    """
    for training in (True, False):
        function, inputs = _functional(subject, training)
        try:
            torch_gradcheck(function, inputs, fast_mode=inputs[0].numel() > 200)
        except RuntimeError as error:
            raise CheckFailed(f"{MODES[training]}: {_first_lines(error)}") from error


@check
def gradgradcheck(subject: Subject) -> None:
    """The second derivatives are right, for gradient penalties and second-order methods.

    Build the backward pass from differentiable operations, or drop the custom autograd.Function.
    """
    for training in (True, False):
        function, inputs = _functional(subject, training)
        try:
            torch_gradgradcheck(function, inputs, fast_mode=True)
        except RuntimeError as error:
            raise CheckFailed(f"{MODES[training]}: {_first_lines(error)}") from error


def _functional(subject: Subject, training: bool) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The norm as a function of input and parameters that leaves no trace."""
    norm = subject.make()
    call(norm, subject.data())
    norm.train(training)
    names = [name for name, _ in norm.named_parameters()]
    buffers = state(norm)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        torch.manual_seed(0)
        y = functional_call(norm, dict(zip(names, parameters, strict=True)) | copies, (x,))
        return y if y.requires_grad else y + 0 * x  # a constant has the gradient zero

    x = subject.data((3, 3)).requires_grad_()
    return function, (x, *(p.detach().clone().requires_grad_() for p in norm.parameters()))


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).strip().splitlines()[:2])


@check
def backward_twice(subject: Subject) -> None:
    """A second backward pass through the same graph gives the same gradients.

    In a custom backward, do not write into saved tensors or into the incoming gradient.
    """
    norm, x = subject.make(), subject.data().requires_grad_()
    y = call(norm, x)
    inputs = [x, *(p for p in norm.parameters() if p.requires_grad)]
    dy = outside(y)
    kept = dy.clone()
    if not y.requires_grad:
        raise CheckFailed("no gradient reaches the output")
    grads = [torch.autograd.grad(y, inputs, dy, retain_graph=True, allow_unused=True) for _ in range(2)]
    for first, second in zip(*grads, strict=True):
        if first is not None and second is not None:
            same(second, first, "the gradient of the second backward pass", 1e-12)
    require(torch.equal(dy, kept), "the backward pass wrote into the gradient that came in")


# ---- precision -------------------------------------------------------------------------------------------------------


@check
def large_mean(subject: Subject) -> None:
    """A mean far from zero does not drown a small variance: float32 agrees with float64 on 300 ± 0.01.

    Subtract the mean before squaring; never compute the variance as E[x²] - E[x]².
    """
    x = (300 + 0.01 * subject.data(IMAGES)).float()
    single, double = subject.make(dtype=torch.float32), subject.make()
    same(call(single, x), call(double, x.double()), "float32 against float64 on 300 ± 0.01", 2e-2)


@check
def half_precision(subject: Subject) -> None:
    """Half-precision input of magnitude 1e-6 to 1e4 gives what float32 arithmetic gives on it, gradients included.

    Take statistics in float32: squares overflow in float16 from 256 on, and the output is silently zero.
    """
    for dtype in HALVES:
        tolerance = 8 * torch.finfo(dtype).eps
        for cast in (True,) if subject.foreign else (True, False):
            for peak in (1.0, 1e2, 1e3, 1e4, 1e-3, 1e-6):
                made = subject.make(dtype=torch.float32)
                _without_shift(made)
                half = made.to(dtype) if cast else made
                x = subject.data(dtype=dtype, peak=peak)
                where = f"{str(dtype)[6:]} input of magnitude {peak:g}"
                oracle = twin(half).float()
                expected, got = gradients(oracle, x.float()), gradients(half, x)
                for name in ("the output", *(["the gradient of the input"] if peak >= 1 else [])):
                    if name in expected:
                        same(got[name], expected[name], f"{where}: {name}", tolerance)
                large = torch.finfo(dtype).max / 4  # beyond it half precision cannot say it
                finite({name: got[name] for name, g in expected.items() if g.abs().max() < large}, where)
                if not subject.foreign:
                    same(call(half.eval(), x), call(oracle.eval(), x.float()), f"{where}: in evaluation", tolerance)


def _without_shift(norm: Norm) -> None:
    """A shift would hide an output that is too small."""
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            if norm.roles.get(name) == "shift":
                parameter.zero_()


@check
def extreme_scales(subject: Subject) -> None:
    """Float32 input of magnitude 1e10 and 1e-10 gives what float64 gives, and finite gradients.

    Keep intermediate powers small, add eps inside the root, and clamp before dividing.
    """
    for peak in (1e10, 1e-10):
        for training in (True, False):
            single, double = subject.make(dtype=torch.float32), subject.make()
            for norm in (single, double):
                _without_shift(norm)
                norm.train(training)
            x = subject.data(dtype=torch.float32, peak=peak)
            where = f"float32 input of magnitude {peak:g} {MODES[training]}"
            got = gradients(single, x)
            finite(got, where)
            if peak > 1 or not subject.foreign:  # an eps that follows the dtype is another one in float64
                same(got["the output"], gradients(double, x.double())["the output"], f"{where}: the output", 1e-3)


# ---- edges -----------------------------------------------------------------------------------------------------------


@check
def constant_input(subject: Subject) -> None:
    """Constant, zero and partly dead input gives finite outputs and gradients.

    Add eps to the variance inside the root, sqrt(var + eps): both 1 / std and the slope of sqrt are infinite at 0.
    """
    dead = subject.data(dtype=torch.float32)
    dead[:, 1] = 0
    inputs = {
        "zero input": torch.zeros_like(dead),
        "constant input": torch.full_like(dead, 7.0),
        "input with a dead channel": dead,
        "input with a dead sample": torch.cat([torch.zeros_like(dead[:1]), dead[1:]]),
    }
    for where, x in inputs.items():
        for training in (True, False):
            norm = subject.make(dtype=torch.float32)
            for _ in range(2):  # statistics of the first may spoil the second
                norm.train()
                call(norm, x)
            norm.train(training)
            finite(gradients(norm, x) | state(norm), f"{where} {MODES[training]}")


@check
def strides(subject: Subject) -> None:
    """Input that is not contiguous gives what a contiguous copy gives.

    Use reshape instead of view, and no raw storage.
    """
    whole = subject.data((12, 20), channels=2 * subject.channels)
    views = {
        "a slice": whole[::2, ::2, ::2],
        "a transposed tensor": subject.data().transpose(0, 2).contiguous().transpose(0, 2),
        "an expanded tensor": subject.data((1, 10)).expand(6, -1, -1),
        "a tensor with an offset": whole[3:9, 1 : 1 + subject.channels, 5:15],
    }
    for what, x in views.items():
        for training in (True, False):
            one, other = (subject.make(training=training) for _ in range(2))
            where = f"{what} against its contiguous copy {MODES[training]}"
            all_same(gradients(one, x), gradients(other, x.contiguous()), where)


@check
def any_batch_size(subject: Subject) -> None:
    """Every batch size serves: in evaluation always, in training from two samples on, and the last batch is smaller.

    Do not reshape by a fixed batch size, and in evaluation take no notice of it.
    """
    samples = subject.data((65, 4))
    norm = subject.make()
    call(norm, subject.data())
    for size in (*range(1, 10), 33, 65):
        for training in (True, False):
            if training and size == 1:
                continue
            where = f"a batch of {size} {MODES[training]}"
            made = twin(norm).train(training)
            try:
                y = call(made, samples[:size])
            except Exception as error:  # whatever the norm raises is the finding
                raise CheckFailed(f"{where}: {type(error).__name__}: {error}") from error
            require(y.shape == samples[:size].shape, f"{where}: the output has the shape {tuple(y.shape)}")
            finite({"the output": y} | state(made), where)


@check
def one_sample(subject: Subject) -> None:
    """A batch of one with several positions has a finite output, in training and in evaluation.

    Divide by the number of elements, not by one less, and do not take statistics over the batch axis alone.
    """
    for training in (True, False):
        norm = subject.make()
        call(norm, subject.data())
        norm.train(training)
        where = f"one sample with ten positions {MODES[training]}"
        try:
            found = gradients(norm, subject.data((1, 10)))
        except ValueError as refusal:
            if training and (subject.traits is None or subject.traits.batch_dependent):
                continue  # samples share a statistic, and there is one
            raise CheckFailed(f"{where}: {refusal}") from refusal
        finite(found | state(norm), where)


@check
def one_position(subject: Subject) -> None:
    """A single position, as after global pooling, or a single value has a finite output or is refused with the reason.

    Raise a ValueError that says what to use instead, or make sure that nothing divides by the count less one.
    """
    refused = False
    for shape in ((6, 1), (6, 1, 1), (1, 1), (1,)):
        for training in (True, False):
            norm = subject.make()
            call(norm, subject.data())
            norm.train(training)
            where = (
                f"{shape[0]} samples with {'one position' if len(shape) > 1 else 'no position axis'} {MODES[training]}"
            )
            try:
                found = gradients(norm, subject.data(shape))
            except ValueError as refusal:
                refused = refused or (training and shape[0] > 1)  # a position is too little, however many samples
                if subject.stateful and not training and not refused:
                    raise CheckFailed(f"{where}: {refusal}") from refusal
                continue
            finite(found | state(norm), where)


@check
def empty_batch(subject: Subject) -> None:
    """An empty batch gives an empty batch and leaves the statistics alone.

    Skip the update when x.numel() is 0: a mean over nothing is NaN, and running statistics keep it.
    """
    for training in (True, False):
        norm = subject.make()
        call(norm, subject.data())
        norm.train(training)
        before = state(norm)
        x = subject.data()[:0]
        try:
            found = gradients(norm, x)
        except (ValueError, RuntimeError) as refusal:
            if not subject.foreign:
                raise CheckFailed(f"{MODES[training]}: {type(refusal).__name__}: {refusal}") from refusal
            all_same(state(norm), before, "after an empty batch")
            continue
        require(found["the output"].shape == x.shape, f"the output has the shape {tuple(found['the output'].shape)}")
        finite(found | state(norm), f"an empty batch {MODES[training]}")
