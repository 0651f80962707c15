"""What a norm keeps: statistics, and whether they survive what is done to modules."""

from __future__ import annotations

import copy
import pickle

import torch
from torch.utils.checkpoint import checkpoint

from normzoo.checks.kit import check
from normzoo.checks.subject import (
    HALVES,
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
    through_file,
    twin,
)
from normzoo.layers.base import MomentNorm, Norm, hold_statistics


@check
def declared_state(subject: Subject) -> None:
    """A norm is stateful exactly when it says so: training changes what evaluation computes.

    Set traits.stateful, or stop keeping statistics.
    """
    declared = subject.declared().stateful
    found = subject.inferred.stateful
    if found is None:
        raise CheckFailed(f"it could not be told: {subject.inferred.untold}")
    require(
        declared == found,
        f"declared stateful={declared}, but training {'changes' if found else 'does not change'} evaluation",
    )


@check
def state_dict(subject: Subject) -> None:
    """What state_dict saves is all there is: a norm restored from a file evaluates and goes on training the same.

    Keep statistics and counters in register_buffer, not in plain attributes.
    """
    norm = _trained(subject)
    restored = subject.make(fresh=True)
    restored.load_state_dict(through_file(norm.state_dict()))
    _go_on_alike(subject, restored, norm, "restored from its state_dict")


@check
def copies(subject: Subject) -> None:
    """A deepcopy and a pickled norm evaluate and go on training like the original, and are independent of it.

    Keep nothing outside attributes that copy and pickle see, and no lambdas.
    """
    for what, copied in (("a deepcopy", copy.deepcopy), ("a pickled copy", _pickled)):
        norm = _trained(subject)
        before = state(norm)
        made = copied(norm)
        call(made, subject.data(seed=3))
        all_same(state(norm), before, f"after training {what}, the original")
        _go_on_alike(subject, copied(norm), norm, what)
        require(repr(made) == repr(norm), f"{what} has another repr: {made!r}")


def _pickled(norm: Norm) -> Norm:
    try:
        return pickle.loads(pickle.dumps(norm))
    except (AttributeError, pickle.PicklingError) as error:
        if "<locals>" in type(norm).__qualname__ or "<locals>" in str(error):
            return copy.deepcopy(norm)  # a class made inside a function cannot be pickled by anybody
        raise


def _trained(subject: Subject) -> Norm:
    norm = subject.make()
    for seed in range(3):
        call(norm, 2 * subject.data(seed=seed) + 1)
    return norm


def _go_on_alike(subject: Subject, other: Norm, norm: Norm, what: str) -> None:
    x = subject.data(seed=5)
    same(call(other.eval(), x), call(norm.eval(), x), f"{what}: the output in evaluation", 1e-12)
    norm.train()
    other.train()
    for seed in (6, 7):
        x = subject.data(seed=seed)
        same(call(other, x), call(norm, x), f"{what}: the output when training goes on", 1e-12)
    all_same(state(other), state(norm), f"{what} when training goes on", 1e-12)


@check
def statistics_stay_wide(subject: Subject) -> None:
    """Running statistics stay float32 when the model is cast to half precision or runs under autocast.

    Inherit from normzoo's Norm classes, or restore the dtype of floating buffers in _apply.
    """
    if subject.foreign:
        raise NotApplicable("undeclared")
    subject.need_state()
    for dtype in HALVES:
        norm = subject.make(dtype=torch.float32).to(dtype)
        call(norm, subject.data(dtype=dtype))
        for name, buffer in norm.named_buffers():
            require(buffer.dtype not in HALVES, f"{name} is {buffer.dtype} after .to({dtype})")
    norm = subject.make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        call(norm, subject.data(dtype=torch.bfloat16))
    for name, buffer in norm.named_buffers():
        require(buffer.dtype not in HALVES, f"{name} is {buffer.dtype} after autocast")


@check
def checkpointing(subject: Subject) -> None:
    """Activation checkpointing repeats the forward pass: gradients are the same, and the batch counts once.

    Do not update statistics inside a backward pass (normzoo.layers.base.in_backward tells).
    """
    for reentrant in (True, False):
        plain, repeated = subject.make(), subject.make()
        for seed in range(2):
            outputs = []
            for norm in (plain, repeated):
                x = subject.data(seed=seed).requires_grad_()
                torch.manual_seed(0)
                y = norm(x) if norm is plain else checkpoint(norm, x, use_reentrant=reentrant)
                require(isinstance(y, torch.Tensor) and y.requires_grad, "no gradient reaches the output")
                y.backward(outside(y))
                outputs.append({"the output": y, "the gradient of the input": x.grad})
            where = f"with checkpoint(use_reentrant={reentrant})"
            all_same(outputs[1], outputs[0], where)
            all_same(state(repeated), state(plain), where)


@check
def accumulation(subject: Subject) -> None:
    """Training goes on step after step, and gradients over micro-batches add up.

    Detach statistics before they are kept: a graph must not reach back into the step before.
    """
    norm = subject.make()
    total: dict[str, torch.Tensor] = {}
    for seed in range(3):
        x = subject.data(seed=seed).requires_grad_()
        for name, gradient in gradients(twin(norm), x).items():
            total[name] = total.get(name, torch.zeros_like(gradient)) + gradient
        y = call(norm, x)
        for name, buffer in norm.named_buffers():
            require(not buffer.requires_grad, f"{name} is part of the graph of the step")
        if not y.requires_grad:
            raise CheckFailed("no gradient reaches the output")
        y.backward(outside(y))
    for name, parameter in norm.named_parameters():
        if parameter.grad is not None:
            same(parameter.grad, total[f"the gradient of {name}"], f"over three micro-batches: the gradient of {name}")


@check
def two_forwards(subject: Subject) -> None:
    """Two forward passes in training, then one backward pass, with DDP's broadcast of buffers between them.

    Take a copy of the running statistics that the graph uses: writing to them in place breaks the first pass.
    """
    _two_forwards(subject, training=True)


@check
def two_forwards_frozen(subject: Subject) -> None:
    """Two forward passes in evaluation, then one backward pass, with DDP's broadcast between them: frozen statistics.

    Normalise by a copy of the running statistics (clone() of a vector costs nothing).
    """
    _two_forwards(subject, training=False)


def _two_forwards(subject: Subject, training: bool) -> None:
    norm = subject.make()
    call(norm, subject.data(seed=4))
    norm.train(training)
    apart = twin(norm)
    expected = [gradients(apart, subject.data(seed=seed)) for seed in (0, 1)]
    inputs = [subject.data(seed=seed).requires_grad_() for seed in (0, 1)]
    outputs = []
    for x in inputs:
        with torch.no_grad():
            for buffer in norm.buffers():
                buffer.copy_(buffer.clone())
        outputs.append(call(norm, x))
    if not all(y.requires_grad for y in outputs):
        raise CheckFailed("no gradient reaches the output")
    sum((y * outside(y)).sum() for y in outputs).backward()  # pyright: ignore[reportAttributeAccessIssue]
    for x, y, found in zip(inputs, outputs, expected, strict=True):
        assert x.grad is not None
        same(y, found["the output"], "the output")
        same(x.grad, found["the gradient of the input"], "the gradient of the input")


# ---- running statistics ----------------------------------------------------------------------------------------------


@check
def evaluation_is_pure(subject: Subject) -> None:
    """Evaluation changes nothing: the same input gives the same output, and statistics stay.

    Update statistics only when self.training.
    """
    norm = _trained(subject).eval()
    before = state(norm)
    x = subject.data()
    first = call(norm, x)
    for seed in (8, 9):
        call(norm, 3 * subject.data(seed=seed) - 2)
    all_same(state(norm), before, "after evaluation", 0)
    same(call(norm, x), first, "the same input after others: the output", 0)


@check
def training_and_evaluation_agree(subject: Subject) -> None:
    """Once its statistics have converged on a batch, evaluation computes what training does on that batch.

    Average the statistics that training normalises by, and use all of them in evaluation.
    """
    subject.need_state()
    if subject.virtual_batches:
        raise NotApplicable("training normalises parts of the batch, each by itself")
    norm, x = subject.make(), subject.data((12, 20))
    distance = float("inf")
    with torch.no_grad():
        for _ in range(40):
            trained = [call(norm.train(), x) for _ in range(50)][-1]
            distance = _distance(call(norm.eval(), x), trained)
            if distance < 0.02:
                return
    raise CheckFailed(f"after 2000 passes of one batch, evaluation of it is {distance:.2g} away from training")


@check
def first_step(subject: Subject) -> None:
    """The first training steps bring evaluation nearer to training, and never further away.

    Start running averages at 0 and 1 without a correction, or correct both the mean and the start value.
    """
    subject.need_state()
    whole = subject.data((12, 20))
    standard = (whole - whole.mean((0, 2), keepdim=True)) / whole.std((0, 2), keepdim=True)
    for x in (whole, standard):
        norm = subject.make()
        with torch.no_grad():
            before = _distance(call(twin(norm).eval(), x), call(twin(norm), x))
            for step in range(1, 4):
                call(norm, x)
                finite(state(norm), f"after step {step}")
                after = _distance(call(twin(norm).eval(), x), call(twin(norm), x))
                require(
                    after <= 1.05 * before + 0.02,
                    f"after step {step} evaluation is {after:.2g} away from training, and was {before:.2g} before",
                )
                before = after


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).square().mean().sqrt() / other.square().mean().sqrt().clamp(min=1e-12))


@check
def momentum(subject: Subject) -> None:
    """The option momentum is torch's: the weight of the new value; None is the cumulative average.

    Update by running += momentum * (new - running), and by 1 / num_batches_tracked when momentum is None.
    """
    subject.declared()
    subject.need("momentum")

    def after(momentum: float | None, *seeds: int) -> dict[str, torch.Tensor]:
        norm = subject.make({"momentum": momentum})
        for seed in seeds:
            call(norm, 2 * subject.data(seed=seed) + 1)
        return {name: b for name, b in state(norm).items() if name.rpartition(".")[2].startswith("running_")}

    start, first, second = after(0.3), after(1.0, 0), after(1.0, 1)
    if not start:
        raise NotApplicable("keeps no running statistics")
    try:
        cumulative = after(None, 0, 1)
    except ValueError:  # refused with the reason
        cumulative = None
    require(any(not torch.equal(first[n], start[n]) for n in start), "momentum=1: the running statistics do not move")
    for name in start:
        same(after(0.0, 0)[name], start[name], f"momentum=0: {name} after a batch", 1e-9)
        same(after(0.3, 0)[name], 0.7 * start[name] + 0.3 * first[name], f"momentum=0.3: {name} after a batch", 1e-9)
        mean = (first[name] + second[name]) / 2
        if cumulative is not None:
            same(cumulative[name], mean, f"momentum=None: {name} after two batches", 1e-9)


@check
def batches_are_counted(subject: Subject) -> None:
    """A training step counts as one batch, whatever parts the norm cuts it into, and evaluation does not count.

    Add 1 to num_batches_tracked once in a training forward pass.
    """
    subject.need_state()
    norm = subject.make()
    if "num_batches_tracked" not in dict(norm.named_buffers()):
        raise NotApplicable("has no num_batches_tracked")
    for number in range(1, 4):
        call(norm.train(), subject.data((40, 3)))
        call(norm.eval(), subject.data())
        counted = int(norm.get_buffer("num_batches_tracked"))
        require(counted == number, f"num_batches_tracked is {counted} after {number} batches")


@check
def frozen_statistics(subject: Subject) -> None:
    """Under normzoo.hold_statistics training leaves the statistics alone, even after .train(), and then goes on.

    Look at self.hold before an update; MomentNorm.update does.
    """
    norm = _trained(subject)
    if not isinstance(norm, MomentNorm):
        raise NotApplicable("is no MomentNorm")
    subject.need_state()
    before = state(norm)
    free = twin(norm)
    with hold_statistics(norm):
        for seed in (8, 9):
            x = 3 * subject.data(seed=seed)
            same(call(norm.train(), x), call(twin(free), x), "the output while statistics are held")
        all_same(state(norm), before, "while statistics are held", 0)
    call(norm, subject.data(seed=8))
    require(any(not torch.equal(b, before[n]) for n, b in state(norm).items()), "the statistics stay held afterwards")
