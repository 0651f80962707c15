"""Optimizers and schedules: torch's own, with groups that leave norms and biases undecayed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from normzoo.errors import NormzooError
from normzoo.layers.base import parameter_roles
from normzoo.tasks.setting import Setting


def configure(model: nn.Module, setting: Setting, steps: float) -> tuple[Optimizer, LambdaLR | None]:
    """The optimizer of a setting for a model, and its schedule by steps (none when the learning rate is constant).

    Args:
        model: The model; parameters that do not require a gradient are left out.
        setting: What to build.
        steps: Steps of the optimizer in the whole training.

    Raises:
        NormzooError: if the schedule needs to know the number of steps and it is not finite, or the model has nothing
            for the optimizer to train.
    """
    optimizer = create_optimizer(model, setting)
    if setting.schedule == "constant" and not setting.warmup:
        return optimizer, None
    if not math.isfinite(steps):
        raise NormzooError(
            f"schedule={setting.schedule!r} with warmup={setting.warmup} needs to know how long the training is; give "
            "the Trainer max_epochs or max_steps, or use schedule='constant' without warm-up"
        )
    return optimizer, LambdaLR(optimizer, partial(setting.factor, steps=int(steps)))


def create_optimizer(model: nn.Module, setting: Setting) -> Optimizer:
    """The optimizer alone; see :func:`configure`."""
    groups = parameter_groups(model, setting)
    if not groups:
        raise NormzooError("the model has no parameter that requires a gradient; there is nothing to train")
    adam = {"lr": setting.lr, "betas": (setting.momentum, setting.beta2), "fused": _fused(setting)}
    match setting.optimizer:
        case "sgd":
            return SGD(
                groups, lr=setting.lr, momentum=setting.momentum, nesterov=setting.nesterov, fused=_fused(setting)
            )
        case "adam":
            return Adam(groups, **adam)
        case "adamw":
            return AdamW(groups, **adam)
        case _:
            return _muon(model, groups, setting, adam)


def _fused(setting: Setting) -> bool:
    # Four times faster on a small model; under mixed precision Lightning refuses to clip for fused optimizers.
    return not setting.precision.endswith("mixed")


def parameter_groups(model: nn.Module, setting: Setting) -> list[dict[str, Any]]:
    """The trainable parameters of a model in at most two groups: with the weight decay, and without.

    Without are the parameters of norms, whatever their role (unless ``decay_norms``), and of the rest the biases and
    other vectors (unless ``decay_biases``).
    """
    roles = parameter_roles(model)
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        vector = parameter.ndim < 2 or name.rpartition(".")[2].startswith("bias")
        decays = setting.decay_norms if name in roles else setting.decay_biases or not vector
        (decayed if decays else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": setting.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class JointOptimizer(Optimizer):
    """Several optimizers over disjoint parameters that step, save, load and are scheduled as one.

    The parts keep their own rules; parameter groups and state are shared with this one, so that whatever looks at an
    optimizer (a schedule, a checkpoint, gradient clipping, a gradient scaler) sees a single ordinary one.

    Args:
        parts: The optimizers.

    Example:
        >>> a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
        >>> joint = JointOptimizer([SGD([a], lr=1.0), Adam([b], lr=0.1)])
        >>> (a.sum() + b.sum()).backward()
        >>> joint.step()
        >>> a.tolist(), [round(value, 3) for value in b.tolist()]
        ([0.0, 0.0], [0.9, 0.9])
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts: list[Optimizer] = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups: Iterator[dict[str, Any]] = iter(self.param_groups)
        for part in self.parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every part; the closure, if any, is called once before them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave; the parts see the loaded state."""
        super().load_state_dict(state_dict)  # makes new groups and a new state
        self._share()


def _muon(model: nn.Module, groups: list[dict[str, Any]], setting: Setting, adam: dict[str, Any]) -> Optimizer:
    """Muon for the matrices of hidden layers, AdamW for all other parameters.

    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that one learning rate and
    one weight decay serve both.
    """
    hidden = {id(parameter) for parameter in _hidden_matrices(model)}
    by_muon = [group | {"params": [p for p in group["params"] if id(p) in hidden]} for group in groups]
    by_adamw = [group | {"params": [p for p in group["params"] if id(p) not in hidden]} for group in groups]
    by_muon, by_adamw = ([group for group in part if group["params"]] for part in (by_muon, by_adamw))
    if not by_muon:
        raise NormzooError(
            f"optimizer='muon' is for the matrices of hidden layers, and {type(model).__name__} has none "
            "(the kernels of convolutions are not matrices); use optimizer='adamw'"
        )
    parts: list[Optimizer] = [
        Muon(
            by_muon,
            lr=setting.lr,
            momentum=setting.momentum,
            nesterov=setting.nesterov,
            adjust_lr_fn="match_rms_adamw",
        )
    ]
    if by_adamw:
        parts.append(AdamW(by_adamw, **adam))
    return JointOptimizer(parts)


def _hidden_matrices(model: nn.Module) -> list[Tensor]:
    """Two-dimensional weights, without those of norms, of embeddings and of the last layer."""
    roles = parameter_roles(model)
    outside = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    for last in [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]:
        outside |= {id(p) for p in last.parameters()}
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2
        and name.rpartition(".")[2].startswith("weight")  # learned positions are a table, not a matrix
        and name not in roles
        and id(parameter) not in outside
    ]
