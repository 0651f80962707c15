"""Who may depend on whom: samples, later positions, padding."""

from __future__ import annotations

import torch
from torch import Tensor

from normzoo.checks.kit import check
from normzoo.checks.subject import (
    NotApplicable,
    Subject,
    all_same,
    call,
    finite,
    outside,
    require,
    same,
    state,
    twin,
)
from normzoo.layers.base import MomentNorm, Norm

PADDING = (0.0, 1e30, float("inf"), float("nan"))


@check
def batch_independence_in_evaluation(subject: Subject) -> None:
    """In evaluation a sample's output does not depend on the rest of the batch, if statistics are kept or not shared.

    Use the running statistics whenever self.training is False.
    """
    if subject.traits is None:
        if not subject.stateful:
            raise NotApplicable("undeclared")
    elif subject.traits.batch_dependent and not subject.traits.stateful:
        raise NotApplicable("declared to use the statistics of the batch in evaluation as well")
    norm = subject.make()
    call(norm, subject.data(seed=3))
    norm.eval()
    _each_alone(subject, norm)


@check
def batch_independence(subject: Subject) -> str | None:
    """In training a sample's output depends on the other samples only if batch_dependent is declared.

    Reduce over the axes of one sample, or declare batch_dependent.
    """
    if subject.declared().batch_dependent:
        return None if subject.inferred.batch_dependent else "declared batch-dependent, though no dependence was seen"
    _each_alone(subject, subject.make())
    return None


def _each_alone(subject: Subject, norm: Norm) -> None:
    x = subject.data()
    whole = call(twin(norm), x)
    for i in (0, 3):
        other = 5 * subject.data(seed=11) - 4
        other[i] = x[i]
        same(call(twin(norm), other)[i], whole[i], f"sample {i} among other samples: the output")
        same(call(twin(norm), x[i : i + 1])[0], whole[i], f"sample {i} alone: the output")


@check
def causality(subject: Subject) -> None:
    """In evaluation the output at a position does not depend on later positions, if causal is declared.

    Reduce over channels only, or declare causal=False: language models then refuse the norm.
    """
    if not subject.declared().causal:
        raise NotApplicable("not declared causal")
    _no_look_ahead(subject, training=False)


@check
def causality_in_training(subject: Subject) -> None:
    """In training the output at a position does not depend on later positions, if causal_in_training is declared.

    Declare causal_in_training=False when positions share a statistic in training.
    """
    if not subject.declared().causal_in_training:
        raise NotApplicable("not declared causal in training")
    _no_look_ahead(subject, training=True)


def _no_look_ahead(subject: Subject, training: bool) -> None:
    norm = subject.make(channel_dim=-1)
    call(norm, subject.data(channel_dim=-1, seed=3))
    norm.train(training)
    x = subject.data(channel_dim=-1)
    whole = call(twin(norm), x)
    for t in (1, 4, 9):
        later = x.clone()
        later[:, t:] = 50 * subject.data(channel_dim=-1, seed=12)[:, t:] + 100
        same(call(twin(norm), later)[:, :t], whole[:, :t], f"other positions from {t} on: the output before")


@check
def permutation(subject: Subject) -> None:
    """Permuting the samples permutes the outputs and leaves the statistics as they are.

    Keep the batch axis first in every reshape.
    """
    norm = subject.make()
    plain = isinstance(norm, MomentNorm) and type(norm).normalize is MomentNorm.normalize
    ordered = not plain or subject.virtual_batches  # queues follow the order, too
    if subject.declared().batch_dependent and ordered and not subject.stateful:
        raise NotApplicable("its batch statistics may follow the order of the samples")
    x, order = subject.data(), torch.tensor([3, 0, 5, 1, 4, 2])
    for training in (False,) if subject.declared().batch_dependent and ordered else (True, False):
        one, other = twin(norm).train(training), twin(norm).train(training)
        same(call(other, x[order]), call(one, x)[order], "permuted samples: the output")
        all_same(state(other), state(one), "permuted samples")


# ---- masks -----------------------------------------------------------------------------------------------------------


def _ragged(subject: Subject, lengths: tuple[int, ...] = (7, 2, 4, 5)) -> tuple[Tensor, Tensor]:
    x = subject.data((len(lengths), max(lengths)), channel_dim=-1)
    return x, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def _padded(x: Tensor, mask: Tensor, value: float) -> Tensor:
    return torch.where(mask[..., None], x, value)


@check
def padding_is_inert(subject: Subject) -> None:
    """Whatever stands in the padding, even NaN, changes no output, gradient or statistic, and comes out as 0.

    Begin with torch.where(mask, x, 0), count real elements only, and end with torch.where(mask, y, 0).
    """
    subject.need_mask()
    x, mask = _ragged(subject)
    for training in (True, False):
        found = []
        for value in PADDING:
            norm = subject.make(channel_dim=-1, training=training)
            shown = _padded(x, mask, value).requires_grad_()
            y = call(norm, shown, mask)
            require(y.shape == x.shape, f"the output has the shape {tuple(y.shape)}, the input {tuple(x.shape)}")
            require(not y[~mask].any(), "padded positions come out non-zero")
            wanted = [shown, *norm.parameters()]
            got = torch.autograd.grad(y, wanted, outside(y), allow_unused=True)
            grads = {f"gradient {i}": g for i, g in enumerate(got) if g is not None}
            if got[0] is not None:
                require(not got[0][~mask].any(), "a gradient reaches the padding")
            found.append({"the output": y.detach()} | grads | state(norm))
            all_same(found[-1], found[0], f"padding with {value:g}")


@check
def mask_against_unpadded(subject: Subject) -> None:
    """Padded sequences give what the sequences give without padding, statistics included.

    Weigh statistics by the number of real elements.
    """
    subject.need_mask()
    x, mask = _ragged(subject, (5, 5, 5, 5))
    longer = torch.cat([x, torch.full_like(x[:, :3], 9e3)], 1)
    mask = torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], 1)
    for training in (True, False):
        one, other = (subject.make(channel_dim=-1, training=training) for _ in range(2))
        same(call(one, longer, mask)[:, :5], call(other, x), "three padded positions at the end: the output")
        all_same(state(one), state(other), "three padded positions at the end")
    x, mask = _ragged(subject)
    norm = subject.make(channel_dim=-1)
    call(norm, subject.data((6, 7), channel_dim=-1, seed=3))
    traits = subject.traits if subject.traits is not None else subject.inferred
    for training in (True, False):
        if traits.batch_dependent and (training or not traits.stateful):
            continue
        y = call(twin(norm).train(training), _padded(x, mask, 5e3), mask)
        for i, length in enumerate(mask.sum(1).tolist()):
            alone = call(twin(norm).train(training), x[i : i + 1, :length])[0]
            same(y[i, :length], alone, f"a sequence of {length} padded to 7 against itself alone: the output")


@check
def mask_weights(subject: Subject) -> None:
    """Where samples and positions share a statistic, every real element counts the same, in whichever sequence.

    Sum over all real elements and divide by their number; a mean of the sequences' means is another thing.
    """
    subject.need_mask()
    norm = subject.make(channel_dim=-1)
    x = subject.data((4, 7), channel_dim=-1)
    in_a_row = call(twin(norm), x.flatten(0, 1)[None]).view(x.shape)
    if not torch.allclose(in_a_row, call(twin(norm), x), rtol=0, atol=1e-9):
        raise NotApplicable("samples and positions are not interchangeable")
    lengths = torch.arange(7) < torch.tensor([7, 2, 4, 5])[:, None]
    holes = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0, 0], [1] * 7, [0, 1, 1, 0, 1, 1, 0]]).bool()
    for real in (lengths, holes):
        row, padded = twin(norm), twin(norm)
        expected = call(row, x[real][None])[0]
        where = "against all real elements in one row"
        same(call(padded, _padded(x, real, 7e3), real)[real], expected, f"{where}: the output")
        all_same(_running(padded), _running(row), where)


def _running(norm: Norm) -> dict[str, Tensor]:
    return {name: b for name, b in state(norm).items() if name.rpartition(".")[2].startswith("running_")}


@check
def mask_edges(subject: Subject) -> None:
    """A mask without padding changes nothing; a sequence without a real position changes nothing and comes out 0.

    Clamp counts at 1, and give no weight to what has no elements.
    """
    subject.need_mask()
    x = subject.data(channel_dim=-1)
    full = torch.ones(x.shape[:2], dtype=torch.bool)
    for training in (True, False):
        one, other = (subject.make(channel_dim=-1, training=training) for _ in range(2))
        same(call(one, x, full), call(other, x), "a mask without padding: the output")
        all_same(state(one), state(other), "a mask without padding")
        if training and subject.virtual_batches:
            continue  # one more sample cuts the batch elsewhere
        one, other = (subject.make(channel_dim=-1, training=training) for _ in range(2))
        with_empty = torch.cat([x, torch.full_like(x[:1], 3e3)])
        mask = torch.cat([full, ~full[:1]])
        y = call(one, with_empty, mask)
        same(y[:-1], call(other, x), "beside a sequence without a real position: the output")
        require(not y[-1].any(), "a sequence without a real position comes out non-zero")
        all_same(state(one), state(other), "beside a sequence without a real position")
        before = call(twin(one).eval(), x)
        y = call(one, x, ~full)
        require(bool(y.isfinite().all()) and not y.any(), "a batch without a real position comes out non-zero")
        finite(state(one), "after a batch without a real position")
        same(call(one.eval(), x), before, "after a batch without a real position: the output in evaluation", 0)
