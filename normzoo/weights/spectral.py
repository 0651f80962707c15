"""Weight norms that divide by the largest singular value."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from normzoo import registry
from normzoo.errors import OptionError
from normzoo.layers.base import Paper, in_backward
from normzoo.weights.base import Filters, Reparametrization, checked_iterations, checked_positive
from normzoo.weights.registry import register_weight_norm

START = 100  # power iterations when applied: the estimate is then good to about four digits


class Spectral(Reparametrization):
    """What the spectral norms share: the largest singular value, followed by power iteration.

    The two singular vectors are buffers. They take a step when the weights are read in training mode and have changed
    since: once for each step of an optimizer, however often the weights are read. In evaluation, under :attr:`hold`,
    and in a forward pass that is repeated inside the backward pass they stay.
    """

    per_output = False

    u: Tensor
    v: Tensor
    seen: Tensor

    hold: bool
    """Leave the singular vectors alone in training mode too."""

    def __init__(self, filters: Filters, *, iterations: int = 1, eps: float = 1e-12) -> None:
        super().__init__(filters)
        self.iterations = checked_iterations(iterations)
        self.eps = checked_positive("eps", eps)
        self.hold = False
        groups, outputs = filters.groups, filters.outputs // filters.groups
        self.register_buffer("u", self.buffer(groups, outputs))
        self.register_buffer("v", self.buffer(groups, filters.fan_in))
        self.register_buffer("seen", self.buffer(2, groups))  # what the weights were when the vectors last moved

    def start(self, rows: Tensor) -> None:
        """Iterate from the same random vectors always."""
        generator = torch.Generator().manual_seed(0)
        u, v = (torch.randn(b.shape, generator=generator).to(rows) for b in (self.u, self.v))
        self.u.copy_(u / u.norm(dim=-1, keepdim=True))
        self.v.copy_(v / v.norm(dim=-1, keepdim=True))
        u, v = self._iterate(rows, self.u.to(rows.dtype), self.v.to(rows.dtype), START)
        self.u.copy_(u)
        self.v.copy_(v)
        self.seen.zero_()

    def _iterate(self, rows: Tensor, u: Tensor, v: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        for _ in range(iterations):
            u = self._direction(_product(rows, v), u)
            v = self._direction(_product(rows.mT, u), v)
        return u, v

    def _direction(self, x: Tensor, before: Tensor) -> Tensor:
        length = x.norm(dim=-1, keepdim=True)
        return torch.where(length > 0, x / length.clamp(min=self.eps), before)

    def _mark(self, rows: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Two numbers a group that tell whether the weights are still the same, without a copy of them."""
        return torch.stack([(u * _product(rows, v)).sum(-1), rows.square().sum((1, 2))])

    @torch.no_grad()
    def _vectors(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        # Clones: the next step moves the buffers, and a backward pass may still need what they were.
        u, v = self.u.to(rows.dtype).clone(), self.v.to(rows.dtype).clone()
        if not self.training or self.hold or in_backward():
            return u, v
        changed = (self._mark(rows, u, v).to(self.seen.dtype) != self.seen).any()
        new_u, new_v = self._iterate(rows, u, v, self.iterations)
        u, v = torch.where(changed, new_u, u), torch.where(changed, new_v, v)
        self.u.copy_(u)
        self.v.copy_(v)
        self.seen.copy_(self._mark(rows, u, v))
        return u, v

    def sigma(self, rows: Tensor) -> Tensor:
        """The largest singular value, a scalar; with groups, that of the group where it is largest."""
        u, v = self._vectors(rows)
        return (u * _product(rows, v)).sum(-1).amax().clamp(min=self.eps)

    def formula(self, rows: Tensor) -> Tensor:
        """Divide by the largest singular value."""
        return rows / self.sigma(rows)

    def extra_repr(self) -> str:
        """Shape and iterations."""
        return f"{self.filters.outputs} x {self.filters.fan_in}, iterations={self.iterations}"


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


@register_weight_norm("spectral_norm", aliases=("sn", "spectral_normalization"))
class SpectralNorm(Spectral):
    r"""Divide the weights by their largest singular value.

    .. math:: \bar W = \frac{W}{\sigma(W)}, \qquad \sigma(W) \approx u^\top W v

    of the matrix of outputs by everything else, with :math:`u` and :math:`v` by power iteration. They count as
    constants in the gradient, which goes through :math:`u^\top W v`.

    Args:
        filters: the shape of the weights.
        iterations: power iterations for each step.
        eps: the smallest length or :math:`\sigma` to divide by.

    Shape:
        Weights of any layer to the same; buffers ``u`` of ``(groups, outputs / groups)`` and ``v`` of
        ``(groups, fan_in)``.

    Raises:
        NormzooError: when applied to weights of zeros.
        OptionError: for iterations that are not a positive whole number, or ``eps`` that is not positive.

    Example:
        >>> from normzoo.weights import apply_weight_norm
        >>> layer = apply_weight_norm(torch.nn.Conv2d(4, 8, 3), "spectral_norm")
        >>> torch.linalg.svdvals(layer.weight.flatten(1))[0].round(decimals=3).item()
        1.0

    Deviations:
        Iteration starts from vectors that have been iterated, not from random ones, and goes on once for each change of
        the weights, not for each forward pass: two forward passes of one step use the same weights. The paper is silent
        on grouped convolutions: here :math:`\sigma` is that of the block-diagonal matrix which they are.

    Reference:
        Miyato, Kataoka, Koyama, Yoshida 2018, Spectral Normalization for Generative Adversarial Networks,
        arXiv 1802.05957.
    """

    paper = Paper("Miyato et al.", 2018, "Spectral Normalization for Generative Adversarial Networks", "1802.05957")


@register_weight_norm("sigma_reparam", aliases=("sigma_reparametrization",))
class SigmaReparam(Spectral):
    r"""Divide the weights by their largest singular value, and learn one number in its place.

    .. math:: \hat W = \frac{\gamma}{\sigma(W)} W

    with :math:`\sigma` as in ``spectral_norm`` and one scalar :math:`\gamma` (``scale``) for the layer.

    Args:
        filters: the shape of the weights.
        iterations: power iterations for each step.
        eps: the smallest length or :math:`\sigma` to divide by.
        variant: :math:`\gamma` starts at 1; with ``"official"`` at :math:`\sigma(W)`, as in the authors' code, for
            which the layer does what it did.

    Shape:
        Weights of any layer to the same; ``scale`` is a scalar.

    Raises:
        NormzooError: when applied to weights of zeros.
        OptionError: for an unknown variant, iterations that are not a positive whole number, ``eps`` not positive.

    Example:
        >>> from normzoo.weights import apply_weight_norm
        >>> layer = apply_weight_norm(torch.nn.Linear(4, 8), "sigma_reparam")
        >>> layer.parametrizations.weight[0].scale.data.fill_(2.5)
        tensor(2.5000)
        >>> torch.linalg.svdvals(layer.weight)[0].round(decimals=3).item()
        2.5

    Deviations:
        Those of ``spectral_norm`` on the iteration; the authors' code starts it from a singular value decomposition.

    Reference:
        Zhai et al. 2023, Stabilizing Transformer Training by Preventing Attention Entropy Collapse, arXiv 2303.06296.
    """

    roles = {"scale": "scale"}
    paper = Paper(
        "Zhai et al.", 2023, "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", "2303.06296"
    )

    def __init__(
        self,
        filters: Filters,
        *,
        iterations: int = 1,
        eps: float = 1e-12,
        variant: Literal["paper", "official"] = "paper",
    ) -> None:
        super().__init__(filters, iterations=iterations, eps=eps)
        if variant not in ("paper", "official"):
            raise OptionError(f"variant={variant!r}; expected 'paper' or 'official'")
        self.variant = variant
        self.scale = nn.Parameter(torch.ones((), device=filters.device, dtype=filters.dtype))

    def start(self, rows: Tensor) -> None:
        """Iterate, and set the scale."""
        super().start(rows)
        if self.variant == "official":
            u, v = self.u.to(rows.dtype), self.v.to(rows.dtype)
            self.scale.copy_((u * _product(rows, v)).sum(-1).amax())
        else:
            self.scale.fill_(1)

    def formula(self, rows: Tensor) -> Tensor:
        """Divide and scale."""
        return rows * (self.scale.to(rows.dtype) / self.sigma(rows))


@register_weight_norm("mean_spectral_norm", aliases=("msn",), contrib=True)
class MeanSpectralNorm(Spectral):
    r"""Spectral norm of the weights, and mean-only batch norm of the output.

    .. math:: y = \frac{W}{\sigma(W)} * x + b - \mu_c + \beta_c, \qquad \mu_c \text{ over samples and positions}

    with :math:`\sigma` as in ``spectral_norm``. The mean of the batch is taken off in training, the running mean in
    evaluation; the layer's own bias :math:`b` drops out, and :math:`\beta` takes its place. The output depends on the
    batch in training, and masks do not reach it. Removing it leaves the running mean and :math:`\beta` in the bias.

    Args:
        filters: the shape of the weights.
        iterations: power iterations for each step.
        momentum: weight of the new value in the running mean; ``None`` is the cumulative average.
        eps: the smallest length or :math:`\sigma` to divide by.

    Shape:
        Weights of linear maps and convolutions to the same.

    Raises:
        NormzooError: when applied to weights of zeros or to a recurrent cell; in training, when a channel has a single
            value.
        OptionError: for iterations that are not a positive whole number, or ``eps`` that is not positive.

    Example:
        >>> from normzoo.weights import apply_weight_norm
        >>> layer = apply_weight_norm(torch.nn.Linear(4, 8), "mean_spectral_norm")
        >>> bool(layer(torch.randn(16, 4) + 5).mean(0).abs().max() < 1e-5)
        True

    Deviations:
        Those of ``spectral_norm`` on the iteration and groups. The authors' code writes the divided weights back
        in each forward pass, with :math:`\sigma` outside the gradient, by 100 iterations, and has a gain
        for each channel after the mean.

    Reference:
        Subramanian and Chong 2019, Mean Spectral Normalization of Deep Neural Networks for Embedded Automation,
        arXiv 1907.04003.
    """

    changes_output = True
    paper = Paper(
        "Subramanian & Chong", 2019, "Mean Spectral Normalization of Deep Neural Networks for Embedded Automation",
        "1907.04003",
    )  # fmt: skip

    def __init__(
        self, filters: Filters, *, iterations: int = 1, momentum: float | None = 0.1, eps: float = 1e-12
    ) -> None:
        super().__init__(filters, iterations=iterations, eps=eps)
        self.mean = registry.create(
            "mean_only_batch_norm", filters.outputs, momentum=momentum, device=filters.device, dtype=filters.dtype
        )

    def attach(self, layer: nn.Module) -> None:
        """Channels come last in the output of a linear map."""
        self.mean.channel_dim = -1 if isinstance(layer, nn.Linear) else 1

    def output(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Without its mean."""
        return self.mean(y)

    def bake(self, layer: nn.Module) -> None:
        """Leave running mean and shift in the bias."""
        assert isinstance(self.mean.running_mean, Tensor)
        assert self.mean.bias is not None
        shift = self.mean.bias - self.mean.running_mean
        if isinstance(layer.bias, nn.Parameter):
            layer.bias.data.add_(shift.detach())
        else:
            layer.bias = nn.Parameter(shift.detach().to(self.mean.bias.dtype))
