"""Every choice of a training, concrete: what a result is filed under."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from normzoo.errors import NormzooError, unknown

OPTIMIZERS = ("adam", "adamw", "muon", "sgd")
SCHEDULES = ("constant", "cosine", "linear", "step")
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True)
class Setting:
    r"""How a model is trained.

    Args:
        epochs: Passes over the training data.
        batch_size: Samples in a batch, on each process.
        optimizer: ``"sgd"``, ``"adamw"``, ``"adam"`` or ``"muon"`` (matrices of hidden layers by Muon, the
            rest by AdamW).
        lr: Largest learning rate.
        momentum: Of SGD and Muon; for Adam and AdamW, also beside Muon, the decay of the
            first moment, :math:`\beta_1`.
        nesterov: Nesterov's momentum, for SGD and Muon.
        beta2: Decay of the second moment, for Adam, AdamW and what Muon leaves to AdamW.
        weight_decay: Decoupled for AdamW and Muon, added to the gradient for SGD and Adam, as in torch.
        decay_norms: Apply the weight decay to the parameters of norms too.
        decay_biases: Apply the weight decay to biases and other vectors too.
        schedule: Of the learning rate after the warm-up: ``"constant"``, ``"cosine"`` to zero, ``"linear"`` to zero, or
            ``"step"``: multiplied by ``drop`` at each of the ``milestones``.
        warmup: Share of all steps in which the learning rate rises linearly, from 0 (none) to below 1.
        milestones: When ``"step"`` drops the learning rate, as shares of all steps.
        drop: Factor of each drop.
        clip: Largest norm of the gradient; 0 does not clip.
        accumulate: Batches whose gradients are averaged for one step of the optimizer.
        precision: ``"32-true"``, ``"64-true"``, ``"bf16-mixed"`` or ``"16-mixed"``.
        log_every: Steps whose mean is one value of the training loss.
        model: Options of the model.
        data: Options of the data.

    Raises:
        NormzooError: for a value that cannot be meant, naming it and what is expected.

    Example:
        >>> Setting(lr=0.1, optimizer="sgd", epochs=2).schedule
        'cosine'
    """

    epochs: int = 10
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float = 3e-3
    momentum: float = 0.9
    nesterov: bool = False
    beta2: float = 0.999
    weight_decay: float = 0.01
    decay_norms: bool = False
    decay_biases: bool = False
    schedule: str = "cosine"
    warmup: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    drop: float = 0.1
    clip: float = 0.0
    accumulate: int = 1
    precision: str = "32-true"
    log_every: int = 10
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), known)
        for name in ("epochs", "batch_size", "accumulate", "log_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise NormzooError(f"{name} must be a whole number of at least 1; got {value!r}")
        for name in ("nesterov", "decay_norms", "decay_biases"):
            if not isinstance(getattr(self, name), bool):
                raise NormzooError(f"{name} must be True or False; got {getattr(self, name)!r}")
        self._number("lr", low=0.0, open_low=True)
        self._number("weight_decay", low=0.0)
        self._number("clip", low=0.0)
        for name in ("momentum", "beta2", "warmup"):
            self._number(name, low=0.0, below=1.0)
        self._number("drop", low=0.0, below=1.0, open_low=True)
        self._check_milestones()
        if self.nesterov and (self.optimizer not in ("sgd", "muon") or not self.momentum):
            raise NormzooError(
                f"nesterov=True is for optimizer='sgd' or 'muon' with momentum > 0; got optimizer={self.optimizer!r}, "
                f"momentum={self.momentum}"
            )
        for name in ("model", "data"):
            options = getattr(self, name)
            if not isinstance(options, Mapping):
                raise NormzooError(f"{name} must be a mapping of options; got {options!r}")
            object.__setattr__(self, name, dict(options))

    def _number(self, name: str, *, low: float, below: float = math.inf, open_low: bool = False) -> None:
        value = getattr(self, name)
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not (low < value if open_low else low <= value) or not value < below:
            least = f"above {low:g}" if open_low else f"at least {low:g}"
            most = f" and below {below:g}" if math.isfinite(below) else " and finite"
            raise NormzooError(f"{name} must be a number {least}{most}; got {value!r}")
        object.__setattr__(self, name, float(value))  # 1 and 1.0 are one setting

    def _check_milestones(self) -> None:
        given = self.milestones
        if isinstance(given, str) or not isinstance(given, list | tuple):
            raise NormzooError(f"milestones must be shares of the training such as (0.5, 0.75); got {given!r}")
        real = all(isinstance(share, int | float) and 0 < share < 1 for share in given)
        if not real or list(given) != sorted(set(given)):
            raise NormzooError(f"milestones must rise from above 0 to below 1, such as (0.5, 0.75); got {given!r}")
        object.__setattr__(self, "milestones", tuple(float(share) for share in given))

    def trainer_arguments(self, *, lean: bool = False) -> dict[str, Any]:
        """What a ``pytorch_lightning.Trainer`` needs to train by this setting.

        Args:
            lean: Also switch off the progress bar, checkpoints, the model summary and the trial validation: for a
                training that nobody watches.

        Example:
            >>> Setting(epochs=3, clip=1.0).trainer_arguments()["gradient_clip_val"]
            1.0
        """
        arguments: dict[str, Any] = {
            "max_epochs": self.epochs,
            "gradient_clip_val": self.clip or None,
            "accumulate_grad_batches": self.accumulate,
            "precision": self.precision,
            "log_every_n_steps": self.log_every,
        }
        if lean:
            arguments |= {
                "enable_progress_bar": False,
                "enable_checkpointing": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
            }
        return arguments

    def factor(self, step: int, steps: int) -> float:
        r"""The learning rate of a step, as a share of ``lr``.

        With :math:`w` warm-up steps and :math:`p = (t - w) / (T - w)` the progress of the rest,

        .. math::

            f(t) = \begin{cases} (t + 1) / w & t < w \\ 1,\ \tfrac12 (1 + \cos \pi p),\ 1 - p,\
            \text{or } \mathrm{drop}^{\#\{m \le t / T\}} & t \ge w \end{cases}

        Args:
            step: Steps of the optimizer already made, from 0.
            steps: All steps of the training.

        Example:
            >>> setting = Setting(schedule="linear", warmup=0.2)
            >>> [round(setting.factor(step, 10), 3) for step in (0, 1, 2, 6, 9)]
            [0.5, 1.0, 1.0, 0.5, 0.125]
        """
        warm = round(self.warmup * steps)
        if step < warm:
            return (step + 1) / warm
        progress = min((step - warm) / max(steps - warm, 1), 1.0)
        match self.schedule:
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * progress))
            case "linear":
                return 1 - progress
            case "step":
                return self.drop ** sum(milestone * steps <= step for milestone in self.milestones)
            case _:
                return 1.0


FIELDS = tuple(option.name for option in fields(Setting))
