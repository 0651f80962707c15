"""Norms whose gain and shift follow a condition: any norm without its own, and an affine part that is predicted."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normzoo import ops
from normzoo.errors import NormzooError, OptionError
from normzoo.layers.base import Norm, Paper, Traits, add_affine, in_backward
from normzoo.layers.parts import gate_weights, moments
from normzoo.layers.whitening import product
from normzoo.ops import wide
from normzoo.registry import Spec, create, register, resolve

# ---- the condition ---------------------------------------------------------------------------------------------------


@contextmanager
def condition(model: nn.Module, given: Tensor) -> Iterator[None]:
    """Give all norms of ``model`` that take a condition this one, in all forward passes inside the block.

    Norms that are made without a condition take none and are left alone; for different conditions in different parts
    of a model, nest blocks around the parts. Activation checkpointing repeats forward passes inside the backward pass:
    it has to happen inside the block as well, or the block inside the function that is checkpointed.

    Args:
        model: the model, or a single norm.
        given: what the norms were made for: numbers of classes ``(N,)``, vectors ``(N, K)``, one for each position
            ``(N, *S, K)``, or a map. It may require a gradient.

    Raises:
        NormzooError: when no norm of the model takes a condition.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), ConditionalBatchNorm(8, classes=10))
        >>> with condition(model, torch.tensor([0, 7, 7, 2])):
        ...     model(torch.randn(4, 3)).shape
        torch.Size([4, 8])
    """
    norms = [module for module in model.modules() if isinstance(module, ConditionalNorm) and module.conditioned]
    if not norms:
        raise NormzooError(
            f"no norm of this {type(model).__name__} takes a condition; make one for it, as in "
            "'conditional_batch_norm(classes=10)' or 'film(condition_features=64)'"
        )
    before = [norm.given for norm in norms]
    for norm in norms:
        norm.given = given
    try:
        yield
    finally:
        for norm, kept in zip(norms, before, strict=True):
            norm.given = kept


class Predictor(nn.Module):
    """From vectors to changes of gain and shift, through a hidden layer if there is one; zero at the start.

    Args:
        features: size ``K`` of the vectors.
        outputs: numbers to predict.
        hidden: units of a hidden layer with ReLU, or ``None``.
        silu: pass the vectors through SiLU first, as diffusion models do with the embedding of the time.
        device: where the parameters live.
        dtype: their dtype.
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        *,
        hidden: int | None,
        silu: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.silu = silu
        self.hidden_weight = self.hidden_bias = None
        if hidden is not None:
            self.hidden_weight = gate_weights(hidden, features, device=device, dtype=dtype)
            self.hidden_bias = nn.Parameter(torch.zeros(hidden, device=device, dtype=dtype))
        size = features if hidden is None else hidden
        self.weight = nn.Parameter(torch.zeros(outputs, size, device=device, dtype=dtype))

    def forward(self, z: Tensor) -> Tensor:
        """``(…, K)`` to ``(…, outputs)``."""
        rows = z.reshape(-1, z.shape[-1])
        rows = F.silu(rows) if self.silu else rows
        if self.hidden_weight is not None and self.hidden_bias is not None:
            rows = (product(rows, self.hidden_weight.to(z.dtype).mT) + self.hidden_bias.to(z.dtype)).relu()
        return product(rows, self.weight.to(z.dtype).mT).view(*z.shape[:-1], len(self.weight))


class ConditionalNorm(Norm):
    r"""A norm without an affine part, followed by one that a condition :math:`z` changes: abstract.

    .. math:: y = (\gamma + \Delta\gamma(z))\,\operatorname{norm}(x) + \beta + \Delta\beta(z)

    :math:`\gamma` and :math:`\beta` are learned for each channel as in any norm; the changes are linear in a vector of
    ``condition_features``, or by a hidden layer of so many units, or a table with a row for each of ``classes``; a
    float vector of as many weights mixes the rows. They are zero at the start. The condition is given by
    :func:`condition`. Made for no condition, the norm is ``norm`` with its affine part and takes none.

    Args:
        num_features: number of channels ``C``.
        norm: the norm that is conditioned, by name or as a class; options in the name.
        eps: its :math:`\varepsilon`; ``None`` is its default.
        affine: learn :math:`\gamma` and :math:`\beta`.
        classes: number of classes of the condition.
        condition_features: size of the condition, a vector.
        hidden: units of a hidden layer; ``None`` is none.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        OptionError: for both kinds of condition, or sizes that are not positive.
        NormzooError: in ``forward``, for a condition that is missing or does not fit.
    """

    has_bias: bool = True
    """Whether there is a shift."""

    silu: bool = False
    """Whether a vector passes through SiLU first."""

    outputs: int = 2
    """Numbers that are predicted for each channel."""

    def __init__(
        self,
        num_features: int,
        *,
        norm: Spec,
        eps: float | None,
        affine: bool,
        classes: int | None,
        condition_features: int | None,
        hidden: int | None,
        channel_dim: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(num_features, channel_dim=channel_dim)
        for name, size in {"classes": classes, "condition_features": condition_features, "hidden": hidden}.items():
            if size is not None and (not isinstance(size, int) or size < 1):
                raise OptionError(f"{type(self).__name__} with {name}={size!r}; expected a positive number, or None")
        if classes is not None and condition_features is not None:
            raise OptionError(
                f"{type(self).__name__} with classes={classes} and condition_features={condition_features}; expected "
                "one of them"
            )
        self.norm = plain(norm, num_features, channel_dim, eps, device, dtype)
        add_affine(self, affine, affine and self.has_bias, device, dtype)
        self.classes, self.condition_features = classes, condition_features
        self.given: Tensor | None = None
        self.table: nn.Parameter | None = None
        self.predictor: nn.Module | None = None
        if classes is not None:
            self.table = nn.Parameter(torch.zeros(classes, self.outputs * num_features, device=device, dtype=dtype))
        if condition_features is not None:
            self.predictor = self.make_predictor(condition_features, hidden, device, dtype)

    def make_predictor(
        self, features: int, hidden: int | None, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> nn.Module:
        """What turns a condition into ``outputs`` numbers for each channel."""
        return Predictor(
            features, self.outputs * self.num_features, hidden=hidden, silu=self.silu, device=device, dtype=dtype
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "given":  # a condition that is a parameter of something else is not a parameter of this
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def conditioned(self) -> bool:
        """Whether the norm was made for a condition."""
        return self.classes is not None or self.condition_features is not None

    @property
    def expected_failures(self) -> Mapping[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]  by option
        """Those of the norm that is conditioned."""
        return self.norm.expected_failures

    @property
    def traits(self) -> Traits | None:
        """Those of the norm that is conditioned."""
        return self.norm.traits

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise, then scale and shift by the condition."""
        self.check_input(x, mask)
        y = wide(self.norm(x, mask))
        with ops.full_precision(x):
            y = self.modulate(y, x, mask)
        if mask is not None:
            y = torch.where(mask.unsqueeze(self.channel_dim), y, 0)
        return y.to(x.dtype)

    def modulate(self, y: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Scale and shift a normalised input."""
        gain = None if self.weight is None else self.spread(self.weight, y)
        shift = None if self.bias is None else self.spread(self.bias, y)
        if self.conditioned:
            changes = self.changes(x)
            gain = changes[0] + (1 if gain is None else gain)
            if self.has_bias:
                shift = changes[1] if shift is None else shift + changes[1]
        y = y if gain is None else y * gain
        return y if shift is None else y + shift

    def spread(self, values: Tensor, y: Tensor) -> Tensor:
        """A number for each channel, ``(C,)``, or for each sample and channel, ``(N, C)``, in the layout of ``y``."""
        values = values.to(torch.promote_types(values.dtype, y.dtype))
        if self.channel_dim == -1:
            return values if values.ndim == 1 else values.view(-1, *[1] * (y.ndim - 2), self.num_features)
        return values.view(-1, self.num_features, *[1] * (y.ndim - 2))

    def changes(self, x: Tensor) -> tuple[Tensor, ...]:
        """What is predicted for this input, as tensors that broadcast with it."""
        given = self.demand(x)
        if self.table is not None:
            table = wide(self.table)
            if given.is_floating_point():
                if given.ndim != 2 or given.shape[1] != self.classes:
                    raise self.misfit(given, f"numbers of classes, or {self.classes} weights for each sample")
                return self.fitted(product(wide(given).to(table.dtype), table), x, "weights")
            return self.fitted(F.embedding(given, table), x, "the number of a class")
        assert self.predictor is not None
        if given.shape[-1] != self.condition_features or not given.is_floating_point():
            raise self.misfit(given, f"vectors of {self.condition_features} features")
        return self.fitted(self.predictor(wide(given).to(torch.promote_types(x.dtype, torch.float32))), x, "a vector")

    def fitted(self, predicted: Tensor, x: Tensor, what: str) -> tuple[Tensor, ...]:
        """Predictions ``(N, outputs C)`` or ``(N, *S, outputs C)`` in parts that broadcast with ``x``."""
        positions = x.shape[:1] + (x.shape[2:] if self.channel_dim == 1 else x.shape[1:-1])
        if predicted.shape[:-1] not in (x.shape[:1], positions):
            raise self.misfit(predicted[..., 0], f"{what} for each of {x.shape[0]} samples, or for each position")
        if predicted.ndim == 2:
            return tuple(self.spread(part, x) for part in predicted.chunk(self.outputs, -1))
        return tuple(part.movedim(-1, self.channel_dim) for part in predicted.chunk(self.outputs, -1))

    def misfit(self, given: Tensor, expected: str) -> NormzooError:
        """An error for a condition that does not fit."""
        return NormzooError(
            f"{type(self).__name__} got a condition of shape {tuple(given.shape)} and dtype {given.dtype}; expected "
            f"{expected}"
        )

    def demand(self, x: Tensor) -> Tensor:
        """The condition.

        Raises:
            NormzooError: when there is none.
        """
        if self.given is not None:
            return self.given
        if in_backward():
            raise NormzooError(
                f"{type(self).__name__} has no condition in a forward pass that is repeated inside the backward pass; "
                "call backward inside the block of condition(), or open the block inside the checkpointed function"
            )
        raise NormzooError(
            f"{type(self).__name__} was made for a condition and was given none; call the model inside "
            "'with normzoo.condition(model, z):'"
        )

    def extra_repr(self) -> str:
        """The number of channels, the condition and the layout."""
        shown = [str(self.num_features)]
        shown += [] if self.classes is None else [f"classes={self.classes}"]
        shown += [] if self.condition_features is None else [f"condition_features={self.condition_features}"]
        shown += [] if self.channel_dim == 1 else ["channel_dim=-1"]
        return ", ".join(shown)


def plain(
    norm: Spec,
    num_features: int,
    channel_dim: int,
    eps: float | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Norm:
    """A norm without an affine part.

    >>> plain("group_norm(groups=2)", 8, 1, 0.1, None, None)
    GroupNorm(8, eps=0.1, groups=2, affine=False)

    Raises:
        OptionError: when it takes no ``eps``, or has it in its name already.
        NormzooError: when it has a gain or shift nevertheless.
    """
    factory, given = resolve(norm)
    known = inspect.signature(factory).parameters
    if eps is not None and ("eps" not in known or "eps" in given):
        why = "has it in its name" if "eps" in given else "takes none"
        raise OptionError(f"eps={eps} is given for the norm {norm!r}, which {why}; leave it out")
    options = {"affine": False, "eps": eps, "device": device, "dtype": dtype}
    options = {k: v for k, v in options.items() if k in known and k not in given and v is not None}
    made = create(norm, num_features, channel_dim, **options)
    if left := [name for name, _ in made.named_parameters() if made.roles.get(name) in ("gain", "shift")]:
        raise NormzooError(f"{made!r} has {left[0]!r} of its own; expected a norm that takes affine=False")
    return made


# ---- members ---------------------------------------------------------------------------------------------------------


@register("conditional_batch_norm", aliases=("class_conditional_batch_norm",))
class ConditionalBatchNorm(ConditionalNorm):
    r"""Batch norm whose gain and shift follow a condition :math:`z`.

    .. math:: y = (\gamma_c + \Delta\gamma_c(z)) \frac{x - \mu_c}{\sqrt{\sigma_c^2 + \varepsilon}}
              + \beta_c + \Delta\beta_c(z)

    for a class, ``classes=10``, by a table, as in class-conditional generators; or for a vector,
    ``condition_features=512``, by a net with one hidden layer, as in the paper. The changes are zero at the start. Give
    the condition by :func:`condition`; made for none, this is ``batch_norm``.

    Args:
        num_features: number of channels ``C``.
        norm: the norm that is conditioned, by name or as a class; options in the name.
        eps: its :math:`\varepsilon`; ``None`` is its default.
        affine: learn :math:`\gamma` and :math:`\beta`.
        classes: number of classes of the condition: numbers ``(N,)``, or weights ``(N, classes)`` that mix them.
        condition_features: size ``K`` of the condition, vectors ``(N, K)``, or ``(N, *S, K)``.
        hidden: units of the hidden layer between a vector and the changes; ``None`` is none. A table has none.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: for both kinds of condition, or sizes that are not positive.
        NormzooError: for a condition that is missing or does not fit; in training, when a channel has a single value.

    Example:
        >>> norm = ConditionalBatchNorm(8, classes=10)
        >>> with condition(norm, torch.tensor([3, 1, 4, 1])):
        ...     norm(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Deviations:
        One hidden layer serves gain and shift, where the paper has one for each. Its weights start the same in any
        process.

    Reference:
        de Vries, Strub, Mary, Larochelle, Pietquin and Courville 2017, Modulating early visual processing by language,
        arXiv 1707.00683.
    """

    paper = Paper("de Vries et al.", 2017, "Modulating early visual processing by language", "1707.00683")

    def __init__(
        self,
        num_features: int,
        *,
        norm: Spec = "batch_norm",
        eps: float | None = None,
        affine: bool = True,
        classes: int | None = None,
        condition_features: int | None = None,
        hidden: int | None = 128,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, norm=norm, eps=eps, affine=affine, classes=classes, condition_features=condition_features,
            hidden=hidden, channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip


@register("conditional_instance_norm", aliases=("cin",))
class ConditionalInstanceNorm(ConditionalNorm):
    r"""Instance norm with a gain and a shift for each style.

    .. math:: y = (\gamma_c + \Delta\gamma_c(z)) \frac{x - \mu_{b,c}}{\sqrt{\sigma_{b,c}^2 + \varepsilon}}
              + \beta_c + \Delta\beta_c(z)

    with a row of a table for each of ``classes`` styles; a vector of weights mixes styles. The changes are zero at the
    start. Give the style by :func:`condition`; made for none, this is ``instance_norm``.

    Args:
        num_features: number of channels ``C``.
        norm: the norm that is conditioned, by name or as a class; options in the name.
        eps: its :math:`\varepsilon`; ``None`` is its default.
        affine: learn :math:`\gamma` and :math:`\beta`.
        classes: number of styles: numbers ``(N,)``, or weights ``(N, classes)`` that mix them.
        condition_features: size ``K`` of the condition, vectors ``(N, K)``, or ``(N, *S, K)``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C, *S)`` or ``(N, *S, C)`` to the same, with more than one position.

    Raises:
        OptionError: for both kinds of condition, or sizes that are not positive.
        NormzooError: for a condition that is missing or does not fit; for a single position.

    Example:
        >>> norm = ConditionalInstanceNorm(8, classes=3)
        >>> with condition(norm, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])):
        ...     norm(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])

    Deviations:
        The table holds differences from a common gain and shift; ``affine=False`` leaves the table alone, with
        differences from 1 and 0.

    Reference:
        Dumoulin, Shlens and Kudlur 2016, A Learned Representation For Artistic Style, arXiv 1610.07629.
    """

    paper = Paper("Dumoulin, Shlens & Kudlur", 2016, "A Learned Representation For Artistic Style", "1610.07629")

    def __init__(
        self,
        num_features: int,
        *,
        norm: Spec = "instance_norm",
        eps: float | None = None,
        affine: bool = True,
        classes: int | None = None,
        condition_features: int | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, norm=norm, eps=eps, affine=affine, classes=classes, condition_features=condition_features,
            hidden=None, channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip


@register("film", aliases=("feature_wise_linear_modulation",))
class FiLM(ConditionalNorm):
    r"""Feature-wise linear modulation: a gain and a shift for each channel, linear in a vector.

    .. math:: y = \gamma_c(z)\, \hat x + \beta_c(z), \qquad \gamma(z) = \gamma + W_\gamma z, \quad
              \beta(z) = \beta + W_\beta z

    where :math:`\hat x` is ``norm(x)`` without its affine part: batch norm as in the paper's net, or ``norm="none"``
    for the modulation alone. It begins as the identity of :math:`\hat x`. Give the vector by :func:`condition`; made
    for none, this is ``norm``.

    Args:
        num_features: number of channels ``C``.
        norm: the norm that is conditioned, by name or as a class; options in the name.
        eps: its :math:`\varepsilon`; ``None`` is its default.
        affine: learn :math:`\gamma` and :math:`\beta`.
        classes: number of classes of the condition: numbers ``(N,)``, or weights ``(N, classes)`` that mix them.
        condition_features: size ``K`` of the condition, vectors ``(N, K)``, or ``(N, *S, K)``.
        hidden: units of a hidden layer; ``None`` is none.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: for both kinds of condition, or sizes that are not positive.
        NormzooError: for a condition that is missing or does not fit; what ``norm`` raises.

    Example:
        >>> norm = FiLM(8, norm="none", condition_features=3)
        >>> with condition(norm, torch.randn(4, 3)):
        ...     norm(torch.ones(4, 8, 5)).sum().item()
        160.0

    Deviations:
        The predictor starts at zero.

    Reference:
        Perez, Strub, de Vries, Dumoulin and Courville 2017, FiLM: Visual Reasoning with a General Conditioning Layer,
        arXiv 1709.07871.
    """

    paper = Paper("Perez et al.", 2017, "FiLM: Visual Reasoning with a General Conditioning Layer", "1709.07871")

    def __init__(
        self,
        num_features: int,
        *,
        norm: Spec = "batch_norm",
        eps: float | None = None,
        affine: bool = True,
        classes: int | None = None,
        condition_features: int | None = None,
        hidden: int | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if hidden is not None and condition_features is None:
            raise OptionError(f"film with hidden={hidden!r}; a hidden layer needs a vector: give condition_features")
        super().__init__(
            num_features, norm=norm, eps=eps, affine=affine, classes=classes, condition_features=condition_features,
            hidden=hidden, channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip


@register("ada_layer_norm", aliases=("adaln", "adaptive_layer_norm"))
class AdaLayerNorm(ConditionalNorm):
    r"""Layer norm over the channels of each position, scaled and shifted by a condition.

    .. math:: y = (\gamma_c + \Delta\gamma_c(z)) \frac{x - \mu_{b,s}}{\sqrt{\sigma_{b,s}^2 + \varepsilon}}
              + \beta_c + \Delta\beta_c(z), \qquad \Delta(z) = W \operatorname{SiLU}(z)

    for a vector, as an embedding of time and class; or by a table for ``classes``. The changes are zero at the start.
    Give the condition by :func:`condition`; made for none, this is ``layer_norm``.

    Args:
        num_features: number of channels ``C``.
        norm: the norm that is conditioned, by name or as a class; options in the name.
        eps: its :math:`\varepsilon`; ``None`` is its default.
        affine: learn :math:`\gamma` and :math:`\beta`: the bias of the linear layer.
        classes: number of classes of the condition: numbers ``(N,)``, or weights ``(N, classes)`` that mix them.
        condition_features: size ``K`` of the condition, vectors ``(N, K)``, or ``(N, *S, K)``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: for both kinds of condition, or sizes that are not positive.
        NormzooError: for a condition that is missing or does not fit; for a single channel.

    Example:
        >>> norm = AdaLayerNorm(8, condition_features=3, channel_dim=-1)
        >>> with condition(norm, torch.randn(4, 3)):
        ...     norm(torch.randn(4, 10, 8)).shape
        torch.Size([4, 10, 8])

    Deviations:
        The predictor starts at zero, so that the norm starts as layer norm; the paper's plain variant draws it at
        random.

    Reference:
        Peebles and Xie 2022, Scalable Diffusion Models with Transformers, arXiv 2212.09748.
    """

    paper = Paper("Peebles & Xie", 2022, "Scalable Diffusion Models with Transformers", "2212.09748")
    silu = True

    def __init__(
        self,
        num_features: int,
        *,
        norm: Spec = "layer_norm",
        eps: float | None = None,
        affine: bool = True,
        classes: int | None = None,
        condition_features: int | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, norm=norm, eps=eps, affine=affine, classes=classes, condition_features=condition_features,
            hidden=None, channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip


@register("ada_layer_norm_zero", aliases=("adaln_zero",))
class AdaLayerNormZero(AdaLayerNorm):
    r"""Adaptive layer norm with a gate for the branch that follows it, which is zero at the start.

    .. math:: y = (\gamma_c + \Delta\gamma_c(z)) \frac{x - \mu_{b,s}}{\sqrt{\sigma_{b,s}^2 + \varepsilon}}
              + \beta_c + \Delta\beta_c(z), \qquad \operatorname{gate}(h) = \alpha_c(z)\, h

    Inside a block, ``x + norm.gate(branch(norm(x)))``: as :math:`\alpha` (``gate_bias`` and its predicted change) is
    zero at the start, the block is the identity. Give the condition by :func:`condition`; made for none, this is
    ``layer_norm``, and the gate is open.

    Args:
        num_features: number of channels ``C``.
        norm: the norm that is conditioned, by name or as a class; options in the name.
        eps: its :math:`\varepsilon`; ``None`` is its default.
        affine: learn :math:`\gamma` and :math:`\beta`: the bias of the linear layer.
        classes: number of classes of the condition: numbers ``(N,)``, or weights ``(N, classes)`` that mix them.
        condition_features: size ``K`` of the condition, vectors ``(N, K)``, or ``(N, *S, K)``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: for both kinds of condition, or sizes that are not positive.
        NormzooError: for a condition that is missing or does not fit; for a single channel.

    Example:
        >>> norm, x = AdaLayerNormZero(8, condition_features=3, channel_dim=-1), torch.randn(4, 10, 8)
        >>> with condition(norm, torch.randn(4, 3)):
        ...     torch.equal(x + norm.gate(norm(x).tanh()), x)
        True

    Deviations:
        Every norm predicts from the condition by itself, where a block of the paper has one linear layer for both of
        its norms and gates; that is the same.

    Reference:
        Peebles and Xie 2022, Scalable Diffusion Models with Transformers, arXiv 2212.09748.
    """

    outputs = 3

    def __init__(
        self,
        num_features: int,
        *,
        norm: Spec = "layer_norm",
        eps: float | None = None,
        affine: bool = True,
        classes: int | None = None,
        condition_features: int | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, norm=norm, eps=eps, affine=affine, classes=classes, condition_features=condition_features,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        gate = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if self.conditioned else None
        self.gate_bias = gate

    def gate(self, h: Tensor) -> Tensor:
        """The output of a branch, ``h``, times the gate; of the shape and layout of the norm's input."""
        if self.gate_bias is None:
            return h
        self.check_input(h, None)
        with ops.full_precision(h):
            alpha = self.changes(h)[2]
            alpha = alpha + self.spread(self.gate_bias, wide(h))
            return (wide(h) * alpha).to(h.dtype)


@register("ada_rms_norm", aliases=("adarms", "adaptive_rms_norm"))
class AdaRMSNorm(ConditionalNorm):
    r"""RMS norm over the channels of each position, scaled by a condition.

    .. math:: y = (\gamma_c + \Delta\gamma_c(z)) \frac{x}{\sqrt{\tfrac1C\sum_c x_c^2 + \varepsilon}}

    linear in a vector, or by a table for ``classes``; there is no shift. The changes are zero at the start. Give the
    condition by :func:`condition`; made for none, this is ``rms_norm``.

    Args:
        num_features: number of channels ``C``.
        norm: the norm that is conditioned, by name or as a class; options in the name.
        eps: its :math:`\varepsilon`; ``None`` is its default.
        affine: learn :math:`\gamma`.
        classes: number of classes of the condition: numbers ``(N,)``, or weights ``(N, classes)`` that mix them.
        condition_features: size ``K`` of the condition, vectors ``(N, K)``, or ``(N, *S, K)``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: for both kinds of condition, or sizes that are not positive.
        NormzooError: for a condition that is missing or does not fit.

    Example:
        >>> norm = AdaRMSNorm(8, condition_features=3, channel_dim=-1)
        >>> with condition(norm, torch.randn(4, 3)):
        ...     norm(torch.randn(4, 10, 8)).shape
        torch.Size([4, 10, 8])

    Deviations:
        The authors' code has the gain :math:`1 + \Delta\gamma(z)`; ``affine=False`` is that.

    Reference:
        Crowson et al. 2024, Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers,
        arXiv 2401.11605.
    """

    paper = Paper(
        "Crowson et al.", 2024, "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion "
        "Transformers", "2401.11605",
    )  # fmt: skip
    has_bias = False
    outputs = 1

    def __init__(
        self,
        num_features: int,
        *,
        norm: Spec = "rms_norm",
        eps: float | None = None,
        affine: bool = True,
        classes: int | None = None,
        condition_features: int | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, norm=norm, eps=eps, affine=affine, classes=classes, condition_features=condition_features,
            hidden=None, channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip


@register("ada_group_norm", aliases=("adagn", "adaptive_group_norm"))
class AdaGroupNorm(ConditionalNorm):
    r"""Group norm, scaled and shifted by a condition.

    .. math:: y = (\gamma_c + \Delta\gamma_c(z)) \frac{x - \mu_{b,g}}{\sqrt{\sigma_{b,g}^2 + \varepsilon}}
              + \beta_c + \Delta\beta_c(z), \qquad \Delta(z) = W \operatorname{SiLU}(z)

    for a vector, as an embedding of time and class; or by a table for ``classes``. The changes are zero at the start.
    Give the condition by :func:`condition`; made for none, this is ``group_norm``.

    Args:
        num_features: number of channels ``C``.
        norm: the norm that is conditioned; ``"group_norm(groups=8)"`` for another number of groups.
        eps: its :math:`\varepsilon`; ``None`` is its default.
        affine: learn :math:`\gamma` and :math:`\beta`.
        classes: number of classes of the condition: numbers ``(N,)``, or weights ``(N, classes)`` that mix them.
        condition_features: size ``K`` of the condition, vectors ``(N, K)``, or ``(N, *S, K)``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: for both kinds of condition, or sizes that are not positive.
        NormzooError: for a condition that is missing or does not fit; for groups of a single value.

    Example:
        >>> norm = AdaGroupNorm(8, norm="group_norm(groups=2)", condition_features=3)
        >>> with condition(norm, torch.randn(4, 3)):
        ...     norm(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Deviations:
        The paper writes :math:`y_s \operatorname{GroupNorm}(h) + y_b`; as in the authors' code, the group norm's own
        gain and shift are kept, but before the condition's: :math:`(1+s)(\gamma\hat x+\beta)+b` there, which the same
        functions of :math:`z` can express, sums of gains and shifts here. The predictor starts at zero.

    Reference:
        Dhariwal and Nichol 2021, Diffusion Models Beat GANs on Image Synthesis, arXiv 2105.05233.
    """

    paper = Paper("Dhariwal & Nichol", 2021, "Diffusion Models Beat GANs on Image Synthesis", "2105.05233")
    silu = True

    def __init__(
        self,
        num_features: int,
        *,
        norm: Spec = "group_norm",
        eps: float | None = None,
        affine: bool = True,
        classes: int | None = None,
        condition_features: int | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, norm=norm, eps=eps, affine=affine, classes=classes, condition_features=condition_features,
            hidden=None, channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip


@register("sandwich_batch_norm", aliases=("sabn",))
class SandwichBatchNorm(ConditionalNorm):
    r"""Batch norm with an affine part that all classes share, then one for each class.

    .. math:: y = \gamma_c(z)\Big(\gamma_c \frac{x - \mu_c}{\sqrt{\sigma_c^2 + \varepsilon}} + \beta_c\Big)
              + \beta_c(z), \qquad \gamma_c(z) = 1 + \Delta\gamma_c(z)

    The changes are zero at the start. Give the class by :func:`condition`; made for none, this is ``batch_norm``.

    Args:
        num_features: number of channels ``C``.
        norm: the norm that is conditioned, by name or as a class; options in the name.
        eps: its :math:`\varepsilon`; ``None`` is its default.
        affine: learn the shared :math:`\gamma` and :math:`\beta`.
        classes: number of classes of the condition: numbers ``(N,)``, or weights ``(N, classes)`` that mix them.
        condition_features: size ``K`` of the condition, vectors ``(N, K)``, or ``(N, *S, K)``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: for both kinds of condition, or sizes that are not positive.
        NormzooError: for a condition that is missing or does not fit; in training, when a channel has a single value.

    Example:
        >>> norm = SandwichBatchNorm(8, classes=10)
        >>> with condition(norm, torch.tensor([3, 1, 4, 1])):
        ...     norm(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Deviations:
        The gains of the classes start at 1, those of the authors near it.

    Reference:
        Gong, Chen, Chen and Wang 2021, Sandwich Batch Normalization: A Drop-In Replacement for Feature Distribution
        Heterogeneity, arXiv 2102.11382.
    """

    paper = Paper(
        "Gong et al.", 2021, "Sandwich Batch Normalization: A Drop-In Replacement for Feature Distribution "
        "Heterogeneity", "2102.11382",
    )  # fmt: skip

    def __init__(
        self,
        num_features: int,
        *,
        norm: Spec = "batch_norm",
        eps: float | None = None,
        affine: bool = True,
        classes: int | None = None,
        condition_features: int | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, norm=norm, eps=eps, affine=affine, classes=classes, condition_features=condition_features,
            hidden=None, channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip

    def modulate(self, y: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """The shared part, then that of the condition."""
        if self.weight is not None and self.bias is not None:
            y = y * self.spread(self.weight, y) + self.spread(self.bias, y)
        if self.conditioned:
            gain, shift = self.changes(x)
            y = y * (1 + gain) + shift
        return y


class LayerInstanceNorm(Norm):
    r"""A mixture of instance norm and joint layer norm, in a share that is learned for each channel.

    .. math:: y = \rho_c \operatorname{IN}(x) + (1 - \rho_c) \operatorname{LN}(x)

    Args:
        num_features: number of channels ``C``.
        eps: :math:`\varepsilon` of both.
        share: :math:`\rho` at the start; it is cut off at 0 and 1.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        share: float = 0.9,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, channel_dim=channel_dim)
        if not 0 <= share <= 1:
            raise OptionError(f"the share of instance norm is {share!r}; expected a number from 0 to 1")
        self.instance = plain("instance_norm", num_features, channel_dim, eps, device, dtype)
        self.layer = plain("layer_norm_joint", num_features, channel_dim, eps, device, dtype)
        self.rho = nn.Parameter(torch.full((num_features,), share, device=device, dtype=dtype))

    @property
    def traits(self) -> Traits:
        """Those of both."""
        return Traits(
            batch_dependent=False, causal=False, causal_in_training=False, scale_invariant=True, shift_invariant=True
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix the two."""
        rho = wide(self.rho).clamp(0, 1)
        rho = rho if self.channel_dim == -1 else rho.view(-1, *[1] * (x.ndim - 2))
        layer, instance = wide(self.layer(x, mask)), wide(self.instance(x, mask))
        return (layer + rho * (instance - layer)).to(x.dtype)


@register("ada_lin", aliases=("adalin", "adaptive_layer_instance_norm"))
class AdaLIN(ConditionalNorm):
    r"""A learned mixture of instance norm and joint layer norm, scaled and shifted by a condition.

    .. math:: y = (\gamma_c + \Delta\gamma_c(z))\big(\rho_c \operatorname{IN}(x) + (1 - \rho_c)
              \operatorname{LN}(x)\big) + \beta_c + \Delta\beta_c(z), \qquad \rho_c \in [0, 1]

    with :math:`\operatorname{IN}` over the positions of a channel and :math:`\operatorname{LN}` over those of all
    channels of a sample. The changes are zero at the start. Give the condition by :func:`condition`; made for none,
    this is the layer-instance norm of the same paper.

    Args:
        num_features: number of channels ``C``.
        share: :math:`\rho` at the start, the share of instance norm; 0 in the paper's layers that enlarge the image.
        eps: :math:`\varepsilon` of both norms.
        affine: learn :math:`\gamma` and :math:`\beta`; :math:`\rho` is learned in any case.
        classes: number of classes of the condition: numbers ``(N,)``, or weights ``(N, classes)`` that mix them.
        condition_features: size ``K`` of the condition, vectors ``(N, K)``, or ``(N, *S, K)``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C, *S)`` or ``(N, *S, C)`` to the same, with more than one position.

    Raises:
        OptionError: for both kinds of condition, sizes that are not positive, or a share that is none.
        NormzooError: for a condition that is missing or does not fit; for a single position.

    Example:
        >>> norm = AdaLIN(8, condition_features=3)
        >>> with condition(norm, torch.randn(4, 3)):
        ...     norm(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Deviations:
        :math:`\rho` is cut off where it is used, the paper's optimizer does it after a step. The variances are biased,
        those of the authors' code are not.

    Reference:
        Kim, Kim, Kang and Lee 2019, U-GAT-IT: Unsupervised Generative Attentional Networks with Adaptive Layer-Instance
        Normalization for Image-to-Image Translation, arXiv 1907.10830.
    """

    paper = Paper(
        "Kim et al.", 2019, "U-GAT-IT: Unsupervised Generative Attentional Networks with Adaptive Layer-Instance "
        "Normalization for Image-to-Image Translation", "1907.10830",
    )  # fmt: skip

    def __init__(
        self,
        num_features: int,
        *,
        share: float = 0.9,
        eps: float = 1e-5,
        affine: bool = True,
        classes: int | None = None,
        condition_features: int | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, norm="none", eps=None, affine=affine, classes=classes,
            condition_features=condition_features, hidden=None, channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        self.norm = LayerInstanceNorm(
            num_features, eps=eps, share=share, channel_dim=channel_dim, device=device, dtype=dtype
        )


@register("ada_in", aliases=("adain", "adaptive_instance_norm"))
class AdaIN(ConditionalNorm):
    r"""Instance norm that takes on the mean and standard deviation of a style's feature map.

    .. math:: y = \sigma_{b,c}(z) \frac{x - \mu_{b,c}(x)}{\sigma_{b,c}(x)} + \mu_{b,c}(z), \qquad
              \sigma = \sqrt{\operatorname{var} + \varepsilon}

    Nothing is learned. With ``style=True`` the condition :math:`z` is a feature map ``(N, C, *S')``, or
    ``(N, *S', C)``, of any size; give it by :func:`condition`. Made without, this is ``instance_norm`` without an
    affine part. For a gain and shift from a vector see ``conditional_instance_norm``.

    Args:
        num_features: number of channels ``C``.
        style: whether there is a condition.
        eps: :math:`\varepsilon`, added to both variances.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: taken for the sake of the others; there is nothing to place.
        dtype: as ``device``.

    Shape:
        ``(N, C, *S)`` or ``(N, *S, C)`` to the same, with more than one position.

    Raises:
        NormzooError: for a style that is missing or does not fit; for a single position.

    Example:
        >>> norm, style = AdaIN(8, style=True), 3 * torch.randn(4, 8, 6, 6) - 2
        >>> with condition(norm, style):
        ...     y = norm(torch.randn(4, 8, 9, 9))
        >>> torch.allclose(y.mean((2, 3)), style.mean((2, 3)), atol=1e-4)
        True

    Deviations:
        The variances are biased; those of the common PyTorch versions are not.

    Reference:
        Huang and Belongie 2017, Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization, arXiv
        1703.06868.
    """

    paper = Paper(
        "Huang & Belongie", 2017, "Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization",
        "1703.06868",
    )  # fmt: skip

    def __init__(
        self,
        num_features: int,
        *,
        style: bool = False,
        eps: float = 1e-5,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, norm="instance_norm", eps=eps, affine=False, classes=None, condition_features=None,
            hidden=None, channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        self.style, self.eps = style, eps

    @property
    def conditioned(self) -> bool:
        """Whether the norm was made for a style."""
        return self.style

    def changes(self, x: Tensor) -> tuple[Tensor, ...]:
        """Standard deviation, less the one that is there already, and mean of the style."""
        given = self.demand(x)
        if given.ndim < 3 or given.shape[0] != x.shape[0] or given.shape[self.channel_dim] != self.num_features:
            raise self.misfit(given, f"a feature map of {self.num_features} channels for {x.shape[0]} samples")
        z = wide(given).movedim(self.channel_dim, 1).flatten(2)
        mu, var = moments(z, None, (2,))
        return self.spread((var + self.eps).sqrt().squeeze(-1) - 1, x), self.spread(mu.squeeze(-1), x)


class MapPredictor(nn.Module):
    """From a map ``(N, K, *S)`` to changes at each position: a convolution with ReLU, then one that starts at zero."""

    def __init__(
        self,
        features: int,
        outputs: int,
        *,
        hidden: int,
        kernel_size: int,
        dims: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        kernel = (kernel_size,) * dims
        first = gate_weights(hidden, features * kernel_size**dims, device=device, dtype=dtype)
        self.hidden_weight = nn.Parameter(first.detach().view(hidden, features, *kernel))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.zeros(outputs, hidden, *kernel, device=device, dtype=dtype))

    def forward(self, z: Tensor) -> Tensor:
        """``(N, K, *S)`` to ``(N, outputs, *S)``."""
        z = self.convolve(z, self.hidden_weight.to(z.dtype), self.hidden_bias.to(z.dtype), padding="same").relu()
        return self.convolve(z, self.weight.to(z.dtype), padding="same")


@register("spade", aliases=("spatially_adaptive_norm",))
class SPADE(ConditionalNorm):
    r"""Batch norm whose gain and shift follow a map, position by position.

    .. math:: y = (\gamma_c + \Delta\gamma_{c,s}(z)) \frac{x - \mu_c}{\sqrt{\sigma_c^2 + \varepsilon}}
              + \beta_c + \Delta\beta_{c,s}(z)

    The condition is a map ``(N, K, *S')``, or ``(N, *S', K)``, of any size, as a segmentation in one-hot form. It is
    brought to the size of the input (nearest neighbour), then :math:`\Delta\gamma` and :math:`\Delta\beta` are a
    convolution of a common hidden layer, which is a convolution of the map with ReLU. The changes are zero at the
    start. Give the map by :func:`condition`; made for none, this is ``norm``.

    Args:
        num_features: number of channels ``C``.
        norm: the norm that is conditioned, by name or as a class; options in the name.
        eps: its :math:`\varepsilon`; ``None`` is its default.
        affine: learn :math:`\gamma` and :math:`\beta`.
        condition_features: channels ``K`` of the map.
        hidden: channels of the hidden layer.
        kernel_size: width of the convolutions, odd.
        dims: number of position axes: 1 for sequences, 2 for images, 3 for volumes.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C, *S)`` or ``(N, *S, C)`` to the same; without a condition ``(N, C)``, too.

    Raises:
        OptionError: for sizes that are not positive, or an even kernel.
        NormzooError: for a map that is missing or does not fit; in training, when a channel has a single value.

    Example:
        >>> norm = SPADE(8, condition_features=3)
        >>> with condition(norm, torch.randn(4, 3, 32, 32)):
        ...     norm(torch.randn(4, 8, 16, 16)).shape
        torch.Size([4, 8, 16, 16])

    Deviations:
        The gain's constant part is learned, :math:`\gamma` instead of 1, which the bias of the paper's last convolution
        does as well. That convolution starts at zero. Masked positions have no say in the statistics, but the map is
        convolved there, too.

    Reference:
        Park, Liu, Wang and Zhu 2019, Semantic Image Synthesis with Spatially-Adaptive Normalization, arXiv 1903.07291.
    """

    paper = Paper("Park et al.", 2019, "Semantic Image Synthesis with Spatially-Adaptive Normalization", "1903.07291")

    def __init__(
        self,
        num_features: int,
        *,
        norm: Spec = "batch_norm",
        eps: float | None = None,
        affine: bool = True,
        condition_features: int | None = None,
        hidden: int = 128,
        kernel_size: int = 3,
        dims: int = 2,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0 or dims not in (1, 2, 3):
            raise OptionError(
                f"spade with kernel_size={kernel_size} and dims={dims}; expected an odd size, 1 to 3 axes"
            )
        self.kernel_size, self.dims = kernel_size, dims
        super().__init__(
            num_features, norm=norm, eps=eps, affine=affine, classes=None, condition_features=condition_features,
            hidden=hidden, channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip

    def make_predictor(
        self, features: int, hidden: int | None, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> nn.Module:
        """Two convolutions."""
        return MapPredictor(
            features, self.outputs * self.num_features, hidden=hidden or features, kernel_size=self.kernel_size,
            dims=self.dims, device=device, dtype=dtype,
        )  # fmt: skip

    def changes(self, x: Tensor) -> tuple[Tensor, ...]:
        """Predicted at each position."""
        given = self.demand(x)
        fits = given.ndim == x.ndim == self.dims + 2 and given.shape[0] == x.shape[0] and given.is_floating_point()
        if not fits or given.shape[self.channel_dim] != self.condition_features:
            raise self.misfit(
                given,
                f"a map of {self.condition_features} channels, {self.dims} axes of positions and {x.shape[0]} samples",
            )
        assert self.predictor is not None
        z = wide(given).to(torch.promote_types(x.dtype, torch.float32)).movedim(self.channel_dim, 1)
        size = x.shape[2:] if self.channel_dim == 1 else x.shape[1:-1]
        if z.shape[2:] != size:
            z = F.interpolate(z, size=list(size), mode="nearest")
        return tuple(part.movedim(1, self.channel_dim) for part in self.predictor(z).chunk(self.outputs, 1))


@register("attentive_norm", contrib=True)
class AttentiveNorm(ConditionalNorm):
    r"""Batch norm whose gain and shift are a mixture of several, weighed by the sample itself.

    .. math:: y = \sum_k \lambda_{b,k} \big(\gamma_{k,c}\, \hat x + \beta_{k,c}\big), \qquad
              \lambda_{b} = h\Big(W \frac{\mu_b}{\sqrt{\sigma_b^2 + \varepsilon_\lambda}} + w\Big), \quad
              h(t) = \tfrac16 \min(\max(t + 3, 0), 6)

    where :math:`\hat x` is ``norm(x)`` without its affine part and :math:`\mu_b, \sigma_b^2` (:math:`C` numbers each)
    are over the positions of the sample. The condition is the input itself: none is given.

    Args:
        num_features: number of channels ``C``.
        mixtures: how many gains and shifts are mixed.
        norm: the norm that is conditioned, by name or as a class; options in the name.
        eps: its :math:`\varepsilon`; ``None`` is its default.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when ``mixtures`` is no positive number.
        NormzooError: what ``norm`` raises.

    Example:
        >>> AttentiveNorm(8, mixtures=3)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Deviations:
        The authors' code normalises the logits over the batch before :math:`h`; here there is a bias :math:`w` instead,
        so that a norm of the sample stays one. Gains start at 1 and shifts at 0 plus numbers of a tenth that are the
        same in any process; mixed by weights of about one half each, they begin as a gain of about ``mixtures / 2``.

    Reference:
        Li, Sun and Wu 2019, Attentive Normalization, arXiv 1908.01259.
    """

    paper = Paper("Li, Sun & Wu", 2019, "Attentive Normalization", "1908.01259")

    def __init__(
        self,
        num_features: int,
        *,
        mixtures: int = 10,
        norm: Spec = "batch_norm",
        eps: float | None = None,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, norm=norm, eps=eps, affine=False, classes=None, condition_features=None, hidden=None,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        if not isinstance(mixtures, int) or mixtures < 1:
            raise OptionError(f"attentive_norm with mixtures={mixtures!r}; expected a positive number")
        spread = gate_weights(2, mixtures, num_features, device=device, dtype=dtype).detach()
        spread = spread * (0.1 * num_features**0.5)
        self.gains, self.shifts = nn.Parameter(1 + spread[0]), nn.Parameter(spread[1].clone())
        self.attention_weight = gate_weights(mixtures, num_features, device=device, dtype=dtype)
        self.attention_bias = nn.Parameter(torch.zeros(mixtures, device=device, dtype=dtype))

    @property
    def traits(self) -> Traits | None:
        """Those of the norm, and that positions of a sample share its weights, which grow with its mean."""
        inner = self.norm.traits
        if inner is None:
            return None
        return Traits(
            batch_dependent=inner.batch_dependent, causal=False, causal_in_training=False, stateful=inner.stateful,
            scale_invariant=inner.scale_invariant,
        )  # fmt: skip

    def shares(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The weights ``(N, k)`` of a sample."""
        z = wide(x).movedim(self.channel_dim, 1).unsqueeze(-1).flatten(2)
        real = None if mask is None else mask.unsqueeze(-1).flatten(1).unsqueeze(1)
        z = z if real is None else torch.where(real, z, 0)
        mu, var = moments(z, real, (2,))
        relative = (mu * torch.rsqrt(var + 1e-3)).squeeze(-1)
        logits = (relative.unsqueeze(-2) * wide(self.attention_weight)).sum(-1) + wide(self.attention_bias)
        return F.relu6(logits + 3) / 6

    def modulate(self, y: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Scale and shift by the mixture."""
        shares = self.shares(x, mask).unsqueeze(-1)
        gain, shift = (shares * wide(self.gains)).sum(1), (shares * wide(self.shifts)).sum(1)
        return y * self.spread(gain, y) + self.spread(shift, y)
