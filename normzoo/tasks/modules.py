"""LightningModules: a model, a loss, torchmetrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAccuracy

from normzoo.data.base import IGNORED
from normzoo.errors import NormzooError
from normzoo.tasks.layer_sync import guard_layer_sync
from normzoo.tasks.metrics import BitsPerSymbol, CountedMean
from normzoo.tasks.optim import configure
from normzoo.tasks.setting import Setting

Batch = Mapping[str, Tensor]


class TrainingTask(pl.LightningModule, ABC):
    """A model that is trained by a setting: abstract; a subclass says what the loss is and what is measured.

    Batches are mappings with ``x``, ``y`` and, for sequences of different lengths, ``mask``, true where a token is
    real; or tuples of these in this order.

    It runs in any ``pytorch_lightning.Trainer``. Clipping and accumulation are the Trainer's business
    (``setting.trainer_arguments()``); where the Trainer was not told, the task tells it. The training loss is logged as
    the mean of all steps since it was last logged, every ``log_every_n_steps`` of the Trainer.

    Args:
        model: Called as ``model(x)``, or ``model(x, mask)`` when there is a mask.
        setting: How it is trained.

    Attributes:
        notes: What a reader of the results should know about this pair of task and norm.
    """

    kind: ClassVar[str]

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        super().__init__()
        self.model = model
        self.setting = setting
        self.notes: list[str] = []
        self.metrics = nn.ModuleDict(
            {"on_val": nn.ModuleDict(self.measures()), "on_test": nn.ModuleDict(self.measures())}
        )
        self._block: Tensor | None = None
        self._block_steps = 0
        self._logged_at = 0

    def __setattr__(self, name: str, value: Any) -> None:
        # The Trainer notes the running hook on the module some fifty times a step, and torch's own way of setting an
        # attribute, which looks for parameters and modules, would make that a tenth of a small step.
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @abstractmethod
    def measures(self) -> dict[str, Metric]:
        """Fresh metrics by the name under which they are logged."""

    @abstractmethod
    def loss(self, answer: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean loss over what counts in a batch, and how much counts."""

    @abstractmethod
    def measure(self, metrics: Mapping[str, Metric], answer: Tensor, batch: Batch, loss: Tensor, count: Tensor) -> None:
        """Update the metrics with a batch."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The model's answer."""
        return self.model(x) if mask is None else self.model(x, mask)

    # ---- training ------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch | Sequence[Tensor], batch_idx: int) -> Tensor:
        """The mean loss of a batch."""
        batch = _named(batch)
        loss, _ = self.loss(self(batch["x"], batch.get("mask")), batch)
        # Metrics and self.log in every step would cost as much as a small model: one addition does not.
        self._block = loss.detach() if self._block is None else self._block + loss.detach()
        self._block_steps += 1
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the mean loss of a finished block of steps."""
        step = self.trainer.global_step
        every: int = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]  (set without declaration)
        if every and step % every == 0 and step != self._logged_at:  # batches that only accumulate do not step
            self._logged_at = step
            self._log_block()

    def on_train_epoch_end(self) -> None:
        """Log what is left when the training ends."""
        trainer = self.trainer
        if (
            trainer.should_stop
            or trainer.current_epoch + 1 == trainer.max_epochs
            or trainer.global_step == trainer.max_steps
        ):
            self._log_block()

    def _log_block(self) -> None:
        if self._block is not None:
            self.log("train/loss", self._block / self._block_steps, sync_dist=True)
            self._block, self._block_steps = None, 0

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and the schedule of the setting."""
        optimizer, schedule = configure(self.model, self.setting, self.trainer.estimated_stepping_batches)
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer says, or as the setting says where the Trainer says nothing."""
        value = gradient_clip_val if gradient_clip_val is not None else self.setting.clip or None
        self.clip_gradients(optimizer, gradient_clip_val=value, gradient_clip_algorithm=gradient_clip_algorithm)

    def setup(self, stage: str) -> None:
        """Take the Trainer's word and the setting's together.

        Raises:
            NormzooError: if they contradict each other.
        """
        if stage != "fit":
            return
        trainer, setting = self.trainer, self.setting
        if trainer.gradient_clip_val and setting.clip and trainer.gradient_clip_val != setting.clip:
            raise _contradiction("gradient_clip_val", trainer.gradient_clip_val, "clip", setting.clip)
        if setting.accumulate > 1:
            if trainer.accumulate_grad_batches not in (1, setting.accumulate):
                raise _contradiction(
                    "accumulate_grad_batches", trainer.accumulate_grad_batches, "accumulate", setting.accumulate
                )
            trainer.accumulate_grad_batches = setting.accumulate
        guard_layer_sync(trainer)

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch | Sequence[Tensor], batch_idx: int) -> None:
        """Measure a batch."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch | Sequence[Tensor], batch_idx: int) -> None:
        """Measure a batch."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Batch | Sequence[Tensor]) -> None:
        batch = _named(batch)
        answer = self(batch["x"], batch.get("mask"))
        loss, count = self.loss(answer, batch)
        metrics: Any = self.metrics[f"on_{stage}"]
        metrics["loss"].update(loss, count)
        self.measure(metrics, answer, batch, loss, count)
        for name, metric in metrics.items():
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, batch_size=len(batch["x"]))


class ClassificationTask(TrainingTask):
    """One of several classes, for a sample or at every position.

    Logs ``train/loss``, ``val/loss``, ``val/accuracy``, ``test/loss``, ``test/accuracy``; the loss is the cross entropy
    in nats. Positions that are masked, or whose target is -100, do not count.

    Args:
        model: Answers ``(N, classes)``, or ``(N, T, classes)`` for targets ``(N, T)``.
        setting: How it is trained.
        classes: Number of classes.

    Example:
        >>> task = ClassificationTask(nn.Linear(2, 3), Setting(), classes=3)
        >>> batch = {"x": torch.zeros(4, 2), "y": torch.tensor([0, 1, 2, -100])}
        >>> loss, count = task.loss(task(batch["x"]), batch)
        >>> int(count)
        3
    """

    kind: ClassVar[str] = "classification"

    def __init__(self, model: nn.Module, setting: Setting, *, classes: int) -> None:
        self.classes = classes
        super().__init__(model, setting)

    def measures(self) -> dict[str, Metric]:
        """Loss and accuracy."""
        accuracy = MulticlassAccuracy(self.classes, average="micro", ignore_index=IGNORED, validate_args=False)
        return {"loss": CountedMean(), "accuracy": accuracy}

    def loss(self, answer: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross entropy over real, asked positions."""
        target = _target(batch)
        loss = F.cross_entropy(answer.flatten(0, -2), target.flatten(), ignore_index=IGNORED)
        return loss, (target != IGNORED).sum()

    def measure(self, metrics: Mapping[str, Metric], answer: Tensor, batch: Batch, loss: Tensor, count: Tensor) -> None:
        """Count what is right."""
        metrics["accuracy"].update(answer.argmax(-1).flatten(), _target(batch).flatten())


class LanguageModelTask(ClassificationTask):
    """The next symbol at every position.

    Logs ``train/loss``, ``val/loss``, ``val/bits_per_char``, ``test/loss``, ``test/bits_per_char``.

    Args:
        model: Answers ``(N, T, classes)``; it must not look ahead.
        setting: How it is trained.
        classes: Number of symbols.
    """

    kind: ClassVar[str] = "language_modelling"

    def measures(self) -> dict[str, Metric]:
        """Loss in nats and in bits."""
        return {"loss": CountedMean(), "bits_per_char": BitsPerSymbol()}

    def measure(self, metrics: Mapping[str, Metric], answer: Tensor, batch: Batch, loss: Tensor, count: Tensor) -> None:
        """Count the loss in bits."""
        metrics["bits_per_char"].update(loss, count)


class RegressionTask(TrainingTask):
    """Numbers, for a sample or at every position; masked positions do not count.

    Logs ``train/loss``, ``val/loss``, ``val/mse``, ``test/loss``, ``test/mse``; the loss is the mean squared error.

    Args:
        model: Answers in the shape of the targets ``(N, D)`` or ``(N, T, D)``.
        setting: How it is trained.
    """

    kind: ClassVar[str] = "regression"

    def measures(self) -> dict[str, Metric]:
        """Loss and mean squared error."""
        return {"loss": CountedMean(), "mse": MeanSquaredError()}

    def loss(self, answer: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean squared error over real positions."""
        answer, target = _real(answer, batch)
        return F.mse_loss(answer, target), torch.tensor(target.numel(), device=target.device)

    def measure(self, metrics: Mapping[str, Metric], answer: Tensor, batch: Batch, loss: Tensor, count: Tensor) -> None:
        """Count squared errors."""
        answer, target = _real(answer, batch)
        metrics["mse"].update(answer.contiguous(), target.contiguous())


def _named(batch: Batch | Sequence[Tensor]) -> Batch:
    """What a loader gives, by name."""
    if isinstance(batch, Mapping):
        return batch
    if not isinstance(batch, list | tuple) or len(batch) not in (2, 3):
        raise NormzooError(f"a batch is a mapping with x, y and perhaps mask, or a tuple of them; got {type(batch)}")
    return dict(zip(("x", "y", "mask"), batch, strict=False))


def _target(batch: Batch) -> Tensor:
    """Targets with the positions that the mask calls padding ignored."""
    target, mask = batch["y"], batch.get("mask")
    return target if mask is None or mask.shape != target.shape else target.masked_fill(~mask, IGNORED)


def _real(answer: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    target, mask = batch["y"], batch.get("mask")
    if answer.shape != target.shape:
        raise NormzooError(
            f"the model answers {tuple(answer.shape)} and the targets are {tuple(target.shape)}; they must agree, "
            "since broadcasting would compare every answer with every target"
        )
    if mask is None or mask.ndim >= target.ndim:
        return answer, target
    return answer[mask], target[mask]


def _contradiction(argument: str, theirs: object, name: str, ours: object) -> NormzooError:
    return NormzooError(
        f"Trainer({argument}={theirs!r}) contradicts {name}={ours!r} of the setting; give the Trainer "
        "**setting.trainer_arguments(), or leave one of the two out"
    )
