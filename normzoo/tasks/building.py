"""From names to a LightningModule and its data, paired by the seed."""

from __future__ import annotations

from normzoo.data import create_data
from normzoo.data.module import TensorDataModule
from normzoo.tasks.catalogue import find_task, resolve
from normzoo.tasks.compatibility import NormChoice, look_at, make_model
from normzoo.tasks.modules import ClassificationTask, LanguageModelTask, RegressionTask, TrainingTask
from normzoo.tasks.setting import Setting


def build(
    task: str, norm: NormChoice, setting: Setting | None = None, seed: int = 0
) -> tuple[TrainingTask, TensorDataModule]:
    """A LightningModule and its LightningDataModule.

    For one seed, every norm meets the same initial weights of all that is not a norm, the same batches in the same
    order, and the same dropout masks. torch's global random state is neither used nor changed.

    Args:
        task: Name of the task.
        norm: What the model takes: a spec, or a mapping from sites to specs.
        setting: How it is trained; the task's defaults when left out.
        seed: Decides initial weights, order of the data and dropout.

    Raises:
        NormzooError: for unknown names, and for a language model whose norm sees later symbols.

    Example:
        >>> module, data = build("digits/cnn", "group_norm(groups=2)", seed=1)
        >>> batch = next(iter(data.train_dataloader()))
        >>> module(batch["x"]).shape
        torch.Size([64, 10])
    """
    found = find_task(task)
    setting = setting or resolve(task)
    data = create_data(found.data, family=found.family, batch_size=setting.batch_size, seed=seed, **setting.data)
    model = make_model(found, norm, setting, data.inputs, data.outputs, seed)
    notes = look_at(found, norm, model)
    module: TrainingTask
    match data.kind:
        case "classification":
            module = ClassificationTask(model, setting, classes=data.outputs)
        case "language_modelling":
            module = LanguageModelTask(model, setting, classes=data.outputs)
        case _:
            module = RegressionTask(model, setting)
    module.notes += notes
    return module, data
