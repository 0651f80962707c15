"""Which norm may serve which task: a language model must not see what it predicts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normzoo.data import configure_data
from normzoo.data.base import DataInputs, DataSet, Family
from normzoo.errors import NormzooError
from normzoo.layers.base import Norm
from normzoo.models import Inputs, create_model, seed_dropout
from normzoo.registry import label
from normzoo.tasks.catalogue import Task, find_task, resolve
from normzoo.tasks.setting import Setting

NormChoice = str | Callable[[int], nn.Module] | Mapping[str, Any]


class Unbuildable(NormzooError):
    """A task's model cannot be built with a norm; the message says which, and why."""


def check_compatible(task: str, norm: NormChoice, setting: Setting | None = None) -> None:
    """Refuse a norm with which a task's model cannot be built, or that would make the results meaningless.

    A model that predicts the next symbol must not see it. In evaluation, changing later symbols must therefore not
    change earlier answers; this is tried out on the model with the norm in it, so it holds for norms of any origin.

    Args:
        task: Name of the task.
        norm: What the model takes: a spec, or a mapping from sites to specs.
        setting: How it would be trained; the task's defaults when left out.

    Raises:
        Unbuildable: when the model cannot be built.
        NormzooError: when it sees what it predicts, with what to do instead.

    Example:
        >>> check_compatible("text/transformer", "layer_norm")
        >>> check_compatible("text/transformer", "instance_norm")
        Traceback (most recent call last):
        ...
        normzoo.errors.NormzooError: ...
        >>> check_compatible("digits/cnn", "group_norm(groups=7)")
        Traceback (most recent call last):
        ...
        normzoo.tasks.compatibility.Unbuildable: digits/cnn with group_norm(groups=7): groups=7 does not divide 32 ...
    """
    found = find_task(task)
    setting = setting or resolve(task)
    inputs, outputs = _ends(configure_data(found.data, **setting.data), found.family)  # pyright: ignore[reportArgumentType]
    try:
        model = make_model(found, norm, setting, inputs, outputs, seed=0)
    except (Exception, SystemExit) as error:  # a norm may be anybody's code, and raise anything
        reason = str(error) if isinstance(error, NormzooError) else f"{type(error).__name__}: {error}"
        name = norm if isinstance(norm, Mapping) else label(norm)
        raise Unbuildable(f"{found.name} with {name}: {reason}") from error
    look_at(found, norm, model)


@functools.lru_cache
def _ends(data: DataSet, family: Family) -> tuple[DataInputs, int]:
    """What a model for these data takes and gives; kept, as a study asks for each of its norms."""
    parts = data.parts(family)
    return parts.inputs, parts.outputs


def make_model(
    found: Task, norm: NormChoice, setting: Setting, inputs: DataInputs, outputs: int, seed: int
) -> nn.Module:
    """A task's model; every weight that is not a norm's, and every mask of dropout, depends on the seed alone."""
    shape = Inputs(inputs.shape, vocabulary=inputs.vocabulary, per_position=inputs.per_position)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model(found.model, norm=norm, inputs=shape, outputs=outputs, **setting.model)
    seed_dropout(model, seed)
    return model


def look_at(found: Task, norm: NormChoice, model: nn.Module) -> list[str]:
    """What should be noted of a model; refuses one that looks ahead."""
    if found.kind != "language_modelling":
        return []
    norms = {name: module for name, module in model.named_modules() if isinstance(module, Norm)}
    if looks_ahead(model):
        guilty = sorted({type(m).__name__ for m in norms.values() if m.traits is None or not m.traits.causal})
        raise NormzooError(
            f"task {found.name!r} predicts the next symbol, but with norm {norm!r} the model sees later symbols in "
            f"evaluation ({', '.join(guilty) or 'its own layers'}: statistics span positions), so its results would be "
            "too good to be true; use a norm that treats each position by itself (layer_norm, rms_norm), one "
            "with running statistics (batch_norm), or a task that reads the whole sequence (digits/transformer)"
        )
    if any(
        m.traits is not None and not m.traits.causal_in_training and m.traits.batch_dependent for m in norms.values()
    ):
        return [
            "in training, the batch statistics of the norm span later positions; in evaluation they do not "
            "(causal_in_training is false)"
        ]
    return []


@torch.no_grad()
def looks_ahead(model: nn.Module) -> bool:
    """Whether, in evaluation, the answer of a model over symbols at some position depends on later symbols.

    Half of the symbols are exchanged, and the answers before them compared. The parameters are shaken meanwhile, since
    a branch that starts at zero hides what it will do.
    """
    inputs: Inputs = model.inputs  # pyright: ignore[reportAssignmentType]
    length, half = inputs.shape[0], inputs.shape[0] // 2
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(inputs.vocabulary, (4, length), generator=generator)
    second = first.clone()
    second[:, half:] = (
        first[:, half:] + 1 + torch.randint(inputs.vocabulary - 1, (4, length - half), generator=generator)
    ) % inputs.vocabulary
    training = model.training
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    try:
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.05)
        model.eval()
        with torch.random.fork_rng(devices=[]):
            one, other = (model(symbols)[:, :half] for symbols in (first, second))
    finally:
        model.train(training)
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    return not _same(one, other)


def _same(one: Tensor, other: Tensor) -> bool:
    # Rounding differs by about 1e-6 of the largest answer; a statistic that sees a changed symbol, by far more.
    return torch.allclose(one, other, rtol=0, atol=1e-4 * float(one.nan_to_num().abs().max()), equal_nan=True)
