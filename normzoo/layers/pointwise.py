"""Instead of norms: functions of each element alone, without statistics."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from normzoo.errors import OptionError
from normzoo.layers.base import FormulaNorm, Paper, Traits
from normzoo.layers.parts import PER_POSITION, wide
from normzoo.registry import register


class PointwiseNorm(FormulaNorm):
    """A function of each element with scalar parameters, then gain and shift: abstract. It has no eps.

    The scalars are given by their names and starting values, which are options of the constructor.
    """

    def __init__(
        self,
        num_features: int,
        *,
        affine: bool,
        channel_dim: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        scalars: dict[str, float],
    ) -> None:
        super().__init__(num_features, eps=0.0, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        self._start = scalars
        for name, value in scalars.items():
            self.register_parameter(name, nn.Parameter(torch.full((1,), float(value), device=device, dtype=dtype)))

    @property
    def traits(self) -> Traits:
        """Each element by itself, nothing invariant."""
        return PER_POSITION

    def extra_repr(self) -> str:
        """The number of channels, where the scalars started, and the layout."""
        layout = [] if self.channel_dim == 1 else ["channel_dim=-1"]
        return ", ".join([str(self.num_features), *(f"{k}={v}" for k, v in self._start.items()), *layout])


@register("dyt", aliases=("dynamic_tanh",))
class DyT(PointwiseNorm):
    r"""Squash each element by a tanh of learned steepness.

    .. math:: y = \gamma_c \tanh(\alpha x) + \beta_c

    with one scalar :math:`\alpha` (``alpha``). It takes the place of layer norm in Transformers; the activations of
    the network stay where they are.

    Args:
        num_features: number of channels ``C``.
        alpha: where :math:`\alpha` starts: 0.5 in the paper but for language models, where wider ones want less and
            attention more (0.2 to 1).
        affine: learn :math:`\gamma` (``weight``) and :math:`\beta` (``bias``).
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Example:
        >>> DyT(8)(torch.full((1, 8), 2.0))[0, 0].round(decimals=4)
        tensor(0.7616, grad_fn=<RoundBackward1>)

    Deviations:
        None; the state dict is that of the authors' code.

    Reference:
        Zhu et al. 2025, Transformers without Normalization, arXiv 2503.10622.
    """

    roles = {"weight": "gain", "bias": "shift", "alpha": "alpha"}
    paper = Paper("Zhu et al.", 2025, "Transformers without Normalization", "2503.10622")
    alpha: nn.Parameter

    def __init__(
        self,
        num_features: int,
        *,
        alpha: float = 0.5,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype, scalars={"alpha": alpha}
        )

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The tanh."""
        return (wide(self.alpha) * x).tanh()


@register("derf", aliases=("dynamic_erf",))
class Derf(PointwiseNorm):
    r"""Squash each element by the error function, with learned steepness and position.

    .. math:: y = \gamma_c \operatorname{erf}(\alpha x + s) + \beta_c

    with scalars :math:`\alpha` (``alpha``) and :math:`s` (``shift``).

    Args:
        num_features: number of channels ``C``.
        alpha: where :math:`\alpha` starts.
        shift: where :math:`s` starts.
        affine: learn :math:`\gamma` (``weight``) and :math:`\beta` (``bias``).
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Example:
        >>> Derf(8)(torch.full((1, 8), 2.0))[0, 0].round(decimals=4)
        tensor(0.8427, grad_fn=<RoundBackward1>)

    Deviations:
        None; the state dict is that of the authors' code.

    Reference:
        Chen et al. 2025, Stronger Normalization-Free Transformers, arXiv 2512.10938.
    """

    roles = {"weight": "gain", "bias": "shift", "alpha": "alpha", "shift": "offset"}
    paper = Paper("Chen et al.", 2025, "Stronger Normalization-Free Transformers", "2512.10938")
    alpha: nn.Parameter
    shift: nn.Parameter

    def __init__(
        self,
        num_features: int,
        *,
        alpha: float = 0.5,
        shift: float = 0.0,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype,
            scalars={"alpha": alpha, "shift": shift},
        )  # fmt: skip

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The error function."""
        return torch.erf(wide(self.alpha) * x + wide(self.shift))


@register("dyisru", aliases=("dynamic_isru",))
class DyISRU(PointwiseNorm):
    r"""Root mean square norm in which the other channels of a position are replaced by one learned number.

    .. math:: y = \gamma_c \sqrt{C}\, \frac{x}{\sqrt{b + x^2}} + \beta_c

    ``rms_norm`` is this with :math:`b_c = \sum_{c' \ne c} x_{c'}^2`; here :math:`b = e^{\lambda}` with a scalar
    :math:`\lambda` (``log_b``) stays positive.

    Args:
        num_features: number of channels ``C``.
        b: where :math:`b` starts; ``None`` is ``C``, which passes small input of unit size unchanged.
        affine: learn :math:`\gamma` (``weight``) and :math:`\beta` (``bias``).
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when ``b`` is not positive.

    Example:
        >>> DyISRU(8)(torch.full((1, 8), 1e9))[0, 0].round(decimals=4)
        tensor(2.8284, grad_fn=<RoundBackward1>)

    Deviations:
        The paper derives the function and does not train it: the parameter behind :math:`b`, its start, and
        :math:`\gamma` and :math:`\beta` (as in DyT) are choices made here.

    Reference:
        Stollenwerk 2025, On the Mathematical Relationship Between Layer Normalization and Dynamic Activation
        Functions, arXiv 2503.21708.
    """

    roles = {"weight": "gain", "bias": "shift", "log_b": "alpha"}
    paper = Paper("Stollenwerk", 2025, "Layer Normalization and Dynamic Activation Functions", "2503.21708")
    log_b: nn.Parameter

    def __init__(
        self,
        num_features: int,
        *,
        b: float | None = None,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        b = num_features if b is None and isinstance(num_features, int) else b
        if b is None or not b > 0:
            raise OptionError(f"b={b!r}; expected a positive number, or None for the number of channels")
        super().__init__(
            num_features, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype,
            scalars={"log_b": math.log(b)},
        )  # fmt: skip

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The inverse square root unit."""
        return x * (self.num_features / (x.square() + wide(self.log_b).exp())).sqrt()


class Gate(PointwiseNorm):
    """A learned factor and nothing else: abstract."""

    has_bias = False
    scalar: ClassVar[bool] = True
    """Whether one factor serves all channels."""

    def __init__(
        self,
        num_features: int,
        *,
        init: float,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, affine=False, channel_dim=channel_dim, device=device, dtype=dtype, scalars={})
        self.init = init
        shape = (1,) if self.scalar else (num_features,)
        self.weight = nn.Parameter(torch.full(shape, float(init), device=device, dtype=dtype))

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The input, which the gain scales."""
        return x

    def extra_repr(self) -> str:
        """With the start."""
        return f"{super().extra_repr()}, init={self.init}"


@register("layer_scale")
class LayerScale(Gate):
    r"""Scale each channel by a learned factor that starts small.

    .. math:: y = \lambda_c x

    It belongs at the end of a residual branch, ``x + LayerScale(f(x))``, where it lets deep Transformers start near
    the identity. In the place of a norm elsewhere it only makes the signal small.

    Args:
        num_features: number of channels ``C``.
        init: where :math:`\lambda` (``weight``) starts; the paper takes 0.1 up to 18 layers, 1e-5 up to 24, then 1e-6.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameter lives.
        dtype: its dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Example:
        >>> LayerScale(8, init=0.1)(torch.ones(1, 8)).sum()
        tensor(0.8000, grad_fn=<SumBackward0>)

    Reference:
        Touvron et al. 2021, Going deeper with Image Transformers, arXiv 2103.17239.
    """

    scalar = False
    paper = Paper("Touvron et al.", 2021, "Going deeper with Image Transformers", "2103.17239")

    def __init__(
        self,
        num_features: int,
        *,
        init: float = 1e-5,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, init=init, channel_dim=channel_dim, device=device, dtype=dtype)


@register("rezero")
class ReZero(Gate):
    r"""Scale by one learned number that starts at zero.

    .. math:: y = \alpha x, \qquad \alpha_0 = 0

    It belongs at the end of a residual branch, ``x + ReZero(f(x))``, which then starts as the identity. Without a
    residual path around it the output starts at zero and a network learns from :math:`\alpha` alone.

    Args:
        num_features: number of channels ``C``.
        init: where :math:`\alpha` (``weight``) starts.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameter lives.
        dtype: its dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Example:
        >>> ReZero(8)(torch.ones(1, 8)).sum()
        tensor(0., grad_fn=<SumBackward0>)

    Reference:
        Bachlechner et al. 2020, ReZero is All You Need: Fast Convergence at Large Depth, arXiv 2003.04887.
    """

    roles = {"weight": "alpha"}
    paper = Paper("Bachlechner et al.", 2020, "ReZero is All You Need", "2003.04887")

    def __init__(
        self,
        num_features: int,
        *,
        init: float = 0.0,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, init=init, channel_dim=channel_dim, device=device, dtype=dtype)


@register("skip_init")
class SkipInit(Gate):
    r"""Scale by one learned number that starts at zero: what batch norm does to residual branches, without it.

    .. math:: y = \alpha x, \qquad \alpha_0 = 0

    The same function as ``rezero``, proposed in the same month for convolutional residual networks, where it stands at
    the end of each branch and all norms are left out. The paper recommends zero, or one over the root of the number
    of branches (``init``); it also wants biases in the convolutions and more regularisation.

    Args:
        num_features: number of channels ``C``.
        init: where :math:`\alpha` (``weight``) starts.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameter lives.
        dtype: its dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Example:
        >>> SkipInit(8, init=0.5)(torch.ones(1, 8)).sum()
        tensor(4., grad_fn=<SumBackward0>)

    Reference:
        De and Smith 2020, Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep Networks,
        arXiv 2002.10444.
    """

    roles = {"weight": "alpha"}
    paper = Paper("De & Smith", 2020, "Batch Normalization Biases Residual Blocks Towards the Identity", "2002.10444")

    def __init__(
        self,
        num_features: int,
        *,
        init: float = 0.0,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, init=init, channel_dim=channel_dim, device=device, dtype=dtype)
