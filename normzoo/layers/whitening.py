"""Norms that remove the correlation of channels as well as their scale: the covariance becomes the identity."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from normzoo import ops
from normzoo.errors import NormzooError, OptionError, unknown
from normzoo.layers.base import (
    FormulaNorm,
    MomentNorm,
    Paper,
    Traits,
    choose_groups,
    through_formula,
    world_size,
)
from normzoo.layers.parts import at_least_one, mean, moments, number
from normzoo.ops import wide
from normzoo.ops.pattern import divisors
from normzoo.ops.sync import merge
from normzoo.registry import register

# ---- products of matrices --------------------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    """``a @ b`` whose gradient is no less precise than it is, where a backward pass runs under autocast."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        with ops.full_precision(a):
            return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b = ctx.saved_tensors
        with ops.full_precision(grad):
            return grad @ b.mT, a.mT @ grad


def product(*matrices: Tensor) -> Tensor:
    """The product of matrices that have the same leading sizes, from left to right."""
    a, *rest = matrices
    for b in rest:
        a = cast(Tensor, _Product.apply(a, b))
    return a


def apart(x: Tensor, groups: int) -> Tensor:
    """``(b, c, s)`` as one matrix ``(d, b s)`` for each group of channels."""
    return rearrange(x, "b (g d) s -> g d (b s)", g=groups)


def together(parts: Tensor, like: Tensor) -> Tensor:
    """Back to ``(b, c, s)``, in the memory order of ``like``."""
    b, _, s = like.shape
    if not like.is_contiguous() and like.mT.is_contiguous():
        return rearrange(parts, "g d (b s) -> b s (g d)", b=b, s=s).contiguous().mT
    return rearrange(parts, "g d (b s) -> b (g d) s", b=b, s=s).contiguous()


def identity(like: Tensor) -> Tensor:
    """The identity of the size of square matrices."""
    return torch.eye(like.shape[-1], device=like.device, dtype=like.dtype)


# ---- whitening matrices: from a covariance (…, d, d) to W with W (cov + eps I) W' = I --------------------------------


def zca(cov: Tensor, eps: float) -> Tensor:
    r"""The inverse square root of ``cov + eps I``: of all whitening matrices the one that moves the data least.

    The gradient of the eigenvectors divides by differences of eigenvalues, that of the inverse square root does not:
    it is well defined when eigenvalues are equal. So eigenvectors and eigenvalues are constants here, and two Newton
    steps for :math:`W S W = I`, which leave the value where it is, carry the first and second derivative.

    >>> zca(torch.diag(torch.tensor([4.0, 4.0, 0.25])), 0.0)
    tensor([[0.5000, 0.0000, 0.0000],
            [0.0000, 0.5000, 0.0000],
            [0.0000, 0.0000, 2.0000]])
    """
    with torch.no_grad():
        values, axes = torch.linalg.eigh(cov)
        root = (values.clamp(min=0) + eps).sqrt()  # rounding makes the smallest negative
        pairs = root.unsqueeze(-1) + root.unsqueeze(-2)
        products = root.unsqueeze(-1) * root.unsqueeze(-2)
    # in the basis of the eigenvectors; the difference is zero, and has the gradient of the covariance
    change = product(axes.mT, cov - cov.detach(), axes)
    w = torch.diag_embed(1 / root) - change / (products * pairs)
    w = w - (product(w, torch.diag_embed(root.square()) + change, w) - identity(cov)) / pairs
    return product(axes, w, axes.mT)


def pca(cov: Tensor, eps: float) -> Tensor:
    r"""Eigenvectors as rows, largest eigenvalue first, over the roots of the eigenvalues plus ``eps``.

    An eigenvector has its largest entry positive. Where eigenvalues are equal their eigenvectors are any basis of a
    subspace and have no gradient; the part of it that would turn this basis is left out. As in :func:`zca` the
    derivatives come from two steps of a refinement (Ogita and Aishima 2018) that start where they end.

    >>> pca(torch.diag(torch.tensor([1.0, 4.0])), 0.0)
    tensor([[0.0000, 0.5000],
            [1.0000, 0.0000]])
    """
    with torch.no_grad():
        values, axes = torch.linalg.eigh(cov)
        values, axes = values.flip(-1).clamp(min=0), axes.flip(-1)
        axes = axes * axes.gather(-2, axes.abs().argmax(-2, keepdim=True)).sign()
        noise = cov.shape[-1] * torch.finfo(cov.dtype).eps * values[..., :1, None]
        distinct = (values.unsqueeze(-2) - values.unsqueeze(-1)).abs() > noise
    one = identity(cov)
    exact = torch.diag_embed(values) + product(axes.mT, cov - cov.detach(), axes)
    turn = one.expand_as(cov)
    for _ in range(2):
        rest, turned = one - product(turn.mT, turn), product(turn.mT, exact, turn)
        found = turned.diagonal(dim1=-2, dim2=-1) / (1 - rest.diagonal(dim1=-2, dim2=-1))
        gap = torch.where(distinct, found.unsqueeze(-2) - found.unsqueeze(-1), 1)
        step = torch.where(distinct, (turned + found.unsqueeze(-2) * rest) / gap, rest / 2)
        turn = turn + product(turn, step)
    found = product(turn.mT, exact, turn).diagonal(dim1=-2, dim2=-1)
    return (product(axes, turn) * torch.rsqrt(found + eps).unsqueeze(-2)).mT


def cholesky(cov: Tensor, eps: float) -> Tensor:
    """The inverse of the lower triangular root of ``cov + eps I``: a channel is freed of those before it.

    As in :func:`zca` the derivatives come from two Newton steps that start where they end.

    >>> cholesky(torch.tensor([[4.0, 2.0], [2.0, 2.0]]), 0.0).round(decimals=4)
    tensor([[ 0.5000,  0.0000],
            [-0.5000,  1.0000]])
    """
    one = identity(cov)
    with torch.no_grad():
        # too few samples leave eigenvalues that are zero up to rounding, of which a root needs to be none negative
        rounding = 4 * torch.finfo(cov.dtype).eps * trace(cov)
        root, _ = torch.linalg.cholesky_ex(cov + (eps + rounding) * one)
        w = torch.linalg.solve_triangular(root, one.expand_as(root), upper=False)
    change = product(w, cov - cov.detach(), w.mT)
    inverse = one - half(change)
    again = product(inverse, one + change, inverse.mT) - one
    return product(one - half(again), inverse, w)


def half(matrix: Tensor) -> Tensor:
    """The lower triangle with half of the diagonal."""
    return matrix.tril() - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1)) / 2


def newton_schulz(cov: Tensor, eps: float, iterations: int) -> Tensor:
    """So many steps towards the inverse square root of ``cov + eps I``, by products of matrices alone.

    Dividing by the trace brings all eigenvalues between 0 and 1, where the iteration converges; slowly for small ones.

    >>> newton_schulz(torch.diag(torch.tensor([1.0, 4.0])), 0.0, 20).round(decimals=4)
    tensor([[1.0000, 0.0000],
            [0.0000, 0.5000]])
    """
    one = identity(cov)
    cov = cov + eps * one
    size = trace(cov)
    # w is the paper's P, and root is P cov / size: by the two of them rounding errors die out, by P alone they grow
    w, root = one.expand_as(cov), cov / size
    for step in range(iterations):
        factor = 1.5 * one - 0.5 * product(w, root)
        w = product(factor, w)
        if step < iterations - 1:
            root = product(root, factor)
    return w * torch.rsqrt(size)


def trace(matrix: Tensor) -> Tensor:
    """The trace of each matrix, as ``(…, 1, 1)``."""
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


# ---- shared parts ----------------------------------------------------------------------------------------------------


def group_count(channels: int, groups: int | Literal["auto"], group_size: int | None, largest: int) -> int:
    """The number of groups; ``"auto"`` makes the largest groups that have at most ``largest`` channels.

    >>> group_count(64, "auto", None, 16), group_count(64, 2, None, 16), group_count(12, "auto", None, 16)
    (4, 2, 1)
    """
    if groups == "auto" and group_size is None:
        group_size = max(d for d in divisors(channels) if d <= largest)
    return choose_groups(channels, groups, group_size)


def checked_iterations(name: str, iterations: int) -> int:
    """``iterations``, if it is a number of steps.

    Raises:
        OptionError: when it is none.
    """
    if not isinstance(iterations, int) or iterations < 1:
        raise OptionError(f"{name} with iterations={iterations!r}; expected a positive whole number of steps")
    return iterations


class WhiteningNorm(MomentNorm):
    r"""A norm that whitens groups of channels by the covariance of the batch: abstract.

    .. math:: y = \gamma_c\, [W(x - \mu)]_c + \beta_c, \qquad W(\Sigma + \varepsilon I)W^\top = I

    In training with :math:`\mu` and :math:`\Sigma` of the batch, over all real positions; in evaluation with the
    running mean and either the running average of :math:`W` (``average="matrix"``) or the :math:`W` of the running
    average of :math:`\Sigma` (``"covariance"``, the unbiased one, as batch norm's). A subclass says how to find
    :math:`W`. Fewer real positions than channels in a group make :math:`\Sigma` singular: the answer stays finite
    because of :math:`\varepsilon`, but is then more about :math:`\varepsilon` and chance than about the data.
    """

    moments = "b (g c) s -> g"

    needs: str = ""
    """What the matrix takes that ONNX has not."""

    instead: str = "; average='matrix' does without"
    """What exports."""

    running_matrix: Tensor | None
    running_cov: Tensor | None

    def __init__(
        self,
        num_features: int,
        *,
        eps: float,
        affine: bool,
        groups: int,
        momentum: float | None,
        track_running_stats: bool,
        average: str,
        sync: bool,
        channel_dim: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, groups=groups, momentum=momentum,
            track_running_stats=track_running_stats, sync=sync, channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        if average not in ("matrix", "covariance"):
            raise unknown("average", average, ("matrix", "covariance"))
        self.groups, self.average = self.sizes["g"], average
        self._shown["average"] = average
        self.running_var = self.running_matrix = self.running_cov = None
        if self.running_mean is not None:
            size = num_features // self.groups
            one = torch.eye(size, device=device, dtype=self.running_mean.dtype).repeat(self.groups, 1, 1)
            name = "running_matrix" if average == "matrix" else "running_cov"
            delattr(self, name)
            self.register_buffer(name, one)

    def _population_shape(self) -> tuple[int, ...]:
        return (self.num_features,)

    @property
    def expected_failures(self) -> Mapping[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]  by option
        """Evaluation by a covariance has to decompose it."""
        if self.average == "matrix" or not self.track_running_stats or not self.needs:
            return {}
        return {"onnx": f"ONNX has no {self.needs}, which evaluation takes of the running covariance{self.instead}"}

    @abstractmethod
    def whitening(self, cov: Tensor) -> Tensor:
        """The matrices ``(…, d, d)`` that whiten channels with these covariances."""

    def check_count(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> None:
        """Refuse a batch with a single value for each channel, which is its own mean."""
        if mask is None and not self.sync and x.numel() == self.num_features:
            raise NormzooError(
                f"{type(self).__name__} got one value per channel, from a batch of one sample with one position: its "
                "covariance is zero whatever the input. Use larger batches or feature maps (drop_last=True for a last "
                "batch of one), or a norm without batch statistics (layer_norm, group_whitening)"
            )

    def normalize(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
        """Whiten, then scale and shift."""
        if not self.evaluates:
            self.check_count(x, mask, channels_last)
        return through_formula(x, mask, channels_last, self.whiten)

    def whiten(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """All of it on ``(b, c, s)``."""
        mu, w = self.statistics(x, mask)
        return self.color(together(product(w, apart(x - mu, self.groups)), x))

    def color(self, x: Tensor) -> Tensor:
        """What follows the whitening."""
        return ops.affine(x, self.weight, self.bias, channels_last=False)

    def statistics(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mean ``(1, c, 1)`` and the whitening matrices ``(g, d, d)``."""
        if self.evaluates and self.average == "matrix":
            return self.kept("running_mean", x).view(1, -1, 1), self.kept("running_matrix", x)
        mu, cov, count = self.batch(x, mask)
        w = self.whitening(cov)
        if self.average == "matrix":
            self.track(count, {"running_mean": mu.detach().flatten(), "running_matrix": w.detach()})
        else:
            self.count_covariance(mu, cov, count)
        return mu, w

    def kept(self, name: str, x: Tensor) -> Tensor:
        """A copy of a buffer, which a backward pass may need after a later step has written to it."""
        return self.get_buffer(name).clone().to(x.dtype)

    def batch(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | float]:
        """Mean, covariance and number of elements of the batch; the running ones in evaluation."""
        if self.evaluates:
            return self.kept("running_mean", x).view(1, -1, 1), self.kept("running_cov", x), 0.0
        here = number(x[:, :1], mask, (0, 2))
        mu, count = x.sum((0, 2), keepdim=True) / at_least_one(here), here
        spread = self.sync and self.training and world_size(self.process_group) > 1
        if spread:
            mu, _, count = merge(mu, torch.zeros_like(mu), here, self.process_group)
        centred = x - mu if mask is None else torch.where(mask, x - mu, 0)
        parts = apart(centred, self.groups)
        cov = product(parts, parts.mT) / at_least_one(here)
        if spread:  # about the common mean, the covariance of all is a mean of covariances
            cov, _, _ = merge(cov, torch.zeros_like(cov), here, self.process_group)
        return mu, cov, count.flatten()[0] if isinstance(count, Tensor) else count

    def count_covariance(self, mu: Tensor, cov: Tensor, count: Tensor | float) -> None:
        """Count a batch's mean and covariance, unbiased, into the running averages."""
        if not self.evaluates:
            less = (count - 1).clamp(min=1) if isinstance(count, Tensor) else max(count - 1, 1.0)
            self.track(count, {"running_mean": mu.detach().flatten(), "running_cov": (cov * (count / less)).detach()})

    def reset_running_stats(self) -> None:
        """Forget the running statistics."""
        if self.running_mean is None or self.num_batches_tracked is None:
            return
        self.running_mean.zero_()
        self.num_batches_tracked.zero_()
        matrix = self.get_buffer("running_matrix" if self.average == "matrix" else "running_cov")
        matrix.copy_(torch.eye(matrix.shape[-1], device=matrix.device).expand_as(matrix))


# ---- members ---------------------------------------------------------------------------------------------------------


@register("zca_norm", aliases=("decorrelated_batch_norm", "dbn"))
class ZCANorm(WhiteningNorm):
    r"""Whiten groups of channels over the batch, moving the data as little as whitening can.

    .. math:: y = \gamma_c\, \big[(\Sigma_g + \varepsilon I)^{-\frac12}(x - \mu)\big]_c + \beta_c, \qquad
              \mu, \Sigma_g \text{ over samples and positions}

    for each group :math:`g` of channels. Kept are the running mean and the running average of the whitening matrix.
    One channel a group is batch norm, in evaluation too with ``average="covariance"``. The gradient is that of the
    matrix function, finite and right where eigenvalues are equal; a batch with fewer positions than a group has
    channels is answered, by means of :math:`\varepsilon`.

    Args:
        num_features: number of channels ``C``.
        groups: number of groups, or ``"auto"``: the largest groups of at most 16 channels.
        group_size: channels a group, in place of ``groups``.
        eps: :math:`\varepsilon`, added to the diagonal of the covariance.
        affine: learn :math:`\gamma` and :math:`\beta`.
        momentum: weight of the new value in the running averages; ``None`` is the cumulative average.
        track_running_stats: keep running averages and use them in evaluation.
        average: ``"matrix"`` averages the whitening matrix, ``"covariance"`` the covariance.
        sync: take mean and covariance over all processes of ``torch.distributed``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when the groups do not divide the channels.
        NormzooError: in training, for one sample with one position.

    Example:
        >>> ZCANorm(32, group_size=8)(torch.randn(4, 32, 5, 5)).shape
        torch.Size([4, 32, 5, 5])

    Deviations:
        None. Group size and :math:`\varepsilon` are those of the authors' PyTorch code.

    Reference:
        Huang, Yang, Lang and Deng 2018, Decorrelated Batch Normalization, arXiv 1804.08450.
    """

    paper = Paper("Huang et al.", 2018, "Decorrelated Batch Normalization", "1804.08450")
    needs = "eigendecomposition"

    def __init__(
        self,
        num_features: int,
        *,
        groups: int | Literal["auto"] = "auto",
        group_size: int | None = None,
        eps: float = 1e-3,
        affine: bool = True,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        average: Literal["matrix", "covariance"] = "matrix",
        sync: bool = False,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, groups=group_count(num_features, groups, group_size, 16),
            momentum=momentum, track_running_stats=track_running_stats, average=average, sync=sync,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip

    def whitening(self, cov: Tensor) -> Tensor:
        """The inverse square root."""
        return zca(cov, self.eps)


@register("pca_norm", aliases=("pca_whitening",))
class PCANorm(WhiteningNorm):
    r"""Whiten groups of channels over the batch by projecting them on their principal components.

    .. math:: y = \gamma_c\, \big[(\Lambda_g + \varepsilon I)^{-\frac12} U_g^\top (x - \mu)\big]_c + \beta_c, \qquad
              \Sigma_g = U_g \Lambda_g U_g^\top \text{ over samples and positions}

    with the largest component first in each group :math:`g`. Two components that change places, or one that changes
    its sign, change the output from one batch to the next: the paper shows by this norm that such swapping of axes
    keeps a net from training, and that ZCA avoids it. Kept are the running mean and the running covariance. One
    channel a group is batch norm. Where eigenvalues are equal, the gradient leaves out what would turn their basis.

    Args:
        num_features: number of channels ``C``.
        groups: number of groups, or ``"auto"``: the largest groups of at most 16 channels.
        group_size: channels a group, in place of ``groups``.
        eps: :math:`\varepsilon`, added to the diagonal of the covariance.
        affine: learn :math:`\gamma` and :math:`\beta`.
        momentum: weight of the new value in the running averages; ``None`` is the cumulative average.
        track_running_stats: keep running averages and use them in evaluation.
        sync: take mean and covariance over all processes of ``torch.distributed``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when the groups do not divide the channels.
        NormzooError: in training, for one sample with one position.

    Example:
        >>> PCANorm(32, group_size=8)(torch.randn(4, 32, 5, 5)).shape
        torch.Size([4, 32, 5, 5])

    Deviations:
        The authors average the matrix from batch to batch, though its rows change places and sign and cancel out; here
        it is the covariance. An eigenvector has its largest entry positive, theirs the sign that the solver gave it.

    Reference:
        Huang, Yang, Lang and Deng 2018, Decorrelated Batch Normalization, arXiv 1804.08450, section 3.1.
    """

    paper = Paper("Huang et al.", 2018, "Decorrelated Batch Normalization", "1804.08450")
    needs = "eigendecomposition"
    instead = ""

    def __init__(
        self,
        num_features: int,
        *,
        groups: int | Literal["auto"] = "auto",
        group_size: int | None = None,
        eps: float = 1e-3,
        affine: bool = True,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        sync: bool = False,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, groups=group_count(num_features, groups, group_size, 16),
            momentum=momentum, track_running_stats=track_running_stats, average="covariance", sync=sync,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip

    def whitening(self, cov: Tensor) -> Tensor:
        """Scaled eigenvectors."""
        return pca(cov, self.eps)


@register("cholesky_norm", aliases=("cholesky_whitening", "cd_whitening"))
class CholeskyNorm(WhiteningNorm):
    r"""Whiten groups of channels over the batch, each channel by what it does not share with those before it.

    .. math:: y = \gamma_c\, \big[L_g^{-1}(x - \mu)\big]_c + \beta_c, \qquad
              L_g L_g^\top = \Sigma_g + \varepsilon I, \quad L_g \text{ lower triangular}

    for each group :math:`g` of channels, over samples and positions. Cheaper than an eigendecomposition, and with a
    gradient that is always defined. Kept are the running mean and the running covariance. One channel a group is batch
    norm.

    Args:
        num_features: number of channels ``C``.
        groups: number of groups, or ``"auto"``: the largest groups of at most 16 channels.
        group_size: channels a group, in place of ``groups``.
        eps: :math:`\varepsilon`, added to the diagonal of the covariance.
        affine: learn :math:`\gamma` and :math:`\beta`.
        momentum: weight of the new value in the running averages; ``None`` is the cumulative average.
        track_running_stats: keep running averages and use them in evaluation.
        average: ``"covariance"`` averages the covariance, ``"matrix"`` the whitening matrix.
        sync: take mean and covariance over all processes of ``torch.distributed``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when the groups do not divide the channels.
        NormzooError: in training, for one sample with one position.

    Example:
        >>> CholeskyNorm(32, group_size=8)(torch.randn(4, 32, 5, 5)).shape
        torch.Size([4, 32, 5, 5])

    Deviations:
        The authors whiten all channels together (``groups=1``), shrink the covariance to
        :math:`(1-\varepsilon)\Sigma + \varepsilon I`, and average it as it is, biased. A few units of rounding, in
        proportion to the trace, are added to the diagonal, so that a singular covariance has a root.

    Reference:
        Siarohin, Sangineto and Sebe 2018, Whitening and Coloring Batch Transform for GANs, arXiv 1806.00420.
        Huang et al. 2020, An Investigation into the Stochasticity of Batch Whitening, arXiv 2003.12327.
    """

    paper = Paper("Siarohin et al.", 2018, "Whitening and Coloring Batch Transform for GANs", "1806.00420")
    needs = "Cholesky decomposition"

    def __init__(
        self,
        num_features: int,
        *,
        groups: int | Literal["auto"] = "auto",
        group_size: int | None = None,
        eps: float = 1e-3,
        affine: bool = True,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        average: Literal["matrix", "covariance"] = "covariance",
        sync: bool = False,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, groups=group_count(num_features, groups, group_size, 16),
            momentum=momentum, track_running_stats=track_running_stats, average=average, sync=sync,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip

    def whitening(self, cov: Tensor) -> Tensor:
        """The inverse of the triangular root."""
        return cholesky(cov, self.eps)


@register("whitening_coloring", aliases=("whitening_and_coloring", "wc_norm"))
class WhiteningColoring(WhiteningNorm):
    r"""Whiten all channels over the batch, then give them a covariance that is learned.

    .. math:: y = \Gamma\, L^{-1}(x - \mu) + \beta, \qquad L L^\top = \Sigma + \varepsilon I
              \text{ over samples and positions}

    with a full ``C x C`` matrix :math:`\Gamma` (``coloring``) and a vector :math:`\beta` (``bias``); both begin as
    batch norm's do, with the identity and zero. Kept are the running mean and the running covariance.

    Args:
        num_features: number of channels ``C``.
        groups: number of groups of channels that are whitened, each by itself; the colouring is of all channels.
        group_size: channels a group, in place of ``groups``.
        eps: :math:`\varepsilon`, added to the diagonal of the covariance.
        affine: learn :math:`\Gamma` and :math:`\beta`.
        momentum: weight of the new value in the running averages; ``None`` is the cumulative average.
        track_running_stats: keep running averages and use them in evaluation.
        average: ``"covariance"`` averages the covariance, ``"matrix"`` the whitening matrix.
        sync: take mean and covariance over all processes of ``torch.distributed``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when the groups do not divide the channels.
        NormzooError: in training, for one sample with one position.

    Example:
        >>> WhiteningColoring(8)(torch.randn(16, 8, 5, 5)).shape
        torch.Size([16, 8, 5, 5])

    Deviations:
        The authors' code initialises :math:`\Gamma` at random, shrinks the covariance to
        :math:`(1-\varepsilon)\Sigma + \varepsilon I`, and averages it as it is, biased. A few units of rounding, in
        proportion to the trace, are added to the diagonal, so that a singular covariance has a root.

    Reference:
        Siarohin, Sangineto and Sebe 2018, Whitening and Coloring Batch Transform for GANs, arXiv 1806.00420.
    """

    paper = Paper("Siarohin et al.", 2018, "Whitening and Coloring Batch Transform for GANs", "1806.00420")
    needs = "Cholesky decomposition"
    roles = {"coloring": "mixing", "bias": "shift"}

    coloring: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        *,
        groups: int = 1,
        group_size: int | None = None,
        eps: float = 1e-3,
        affine: bool = True,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        average: Literal["matrix", "covariance"] = "covariance",
        sync: bool = False,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        chosen = choose_groups(num_features, groups if group_size is None or groups != 1 else "auto", group_size)
        super().__init__(
            num_features, eps=eps, affine=False, groups=chosen,
            momentum=momentum, track_running_stats=track_running_stats, average=average, sync=sync,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        coloring = bias = None
        if affine:
            coloring = nn.Parameter(torch.eye(num_features, device=device, dtype=dtype))
            bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        self.register_parameter("coloring", coloring)
        self.register_parameter("bias", bias)
        self._shown["affine"] = affine

    def whitening(self, cov: Tensor) -> Tensor:
        """The inverse of the triangular root."""
        return cholesky(cov, self.eps)

    def color(self, x: Tensor) -> Tensor:
        """Mix all channels, then shift."""
        if self.coloring is not None:
            dtype = torch.promote_types(x.dtype, self.coloring.dtype)
            x = together(product(self.coloring.to(dtype)[None], apart(x.to(dtype), 1)), x)
        return ops.affine(x, None, self.bias, channels_last=False)


@register("iter_norm", aliases=("iterative_normalization",))
class IterNorm(WhiteningNorm):
    r"""Whiten groups of channels over the batch by a few Newton-Schulz steps, which need no decomposition.

    .. math:: y = \gamma_c\, \Big[\tfrac{1}{\sqrt{\operatorname{tr}\Sigma_g}} P_T (x - \mu)\Big]_c + \beta_c, \qquad
              P_0 = I,\; P_k = \tfrac12\Big(3P_{k-1} - P_{k-1}^3\,\tfrac{\Sigma_g}{\operatorname{tr}\Sigma_g}\Big)

    where :math:`\Sigma_g` is the covariance of group :math:`g` over samples and positions plus
    :math:`\varepsilon I`. As :math:`T` grows this becomes ``zca_norm``; a small :math:`T` leaves the directions of
    little variance less than white, which the paper finds to help. Kept are the running mean and the running average
    of the whitening matrix.

    Args:
        num_features: number of channels ``C``.
        iterations: :math:`T`, the number of steps.
        groups: number of groups, or ``"auto"``: the largest groups of at most 64 channels.
        group_size: channels a group, in place of ``groups``.
        eps: :math:`\varepsilon`, added to the diagonal of the covariance.
        affine: learn :math:`\gamma` and :math:`\beta`.
        momentum: weight of the new value in the running averages; ``None`` is the cumulative average.
        track_running_stats: keep running averages and use them in evaluation.
        average: ``"matrix"`` averages the whitening matrix, ``"covariance"`` the covariance.
        sync: take mean and covariance over all processes of ``torch.distributed``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when the groups do not divide the channels, or there are no iterations.
        NormzooError: in training, for one sample with one position.

    Example:
        >>> IterNorm(32, iterations=7)(torch.randn(4, 32, 5, 5)).shape
        torch.Size([4, 32, 5, 5])

    Deviations:
        None in what is computed. The authors' code iterates :math:`P` alone, so that rounding errors grow (in float32
        from some nine steps on); here :math:`P` and :math:`P\Sigma` are iterated together. The gradient is taken
        through the steps, so a graph can be used twice and differentiated twice; theirs overwrites what it saved.

    Reference:
        Huang, Zhou, Zhu, Liu and Shao 2019, Iterative Normalization: Beyond Standardization towards Efficient
        Whitening, arXiv 1904.03441.
    """

    paper = Paper(
        "Huang et al.", 2019, "Iterative Normalization: Beyond Standardization towards Efficient Whitening",
        "1904.03441",
    )  # fmt: skip

    def __init__(
        self,
        num_features: int,
        *,
        iterations: int = 5,
        groups: int | Literal["auto"] = "auto",
        group_size: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        average: Literal["matrix", "covariance"] = "matrix",
        sync: bool = False,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, groups=group_count(num_features, groups, group_size, 64),
            momentum=momentum, track_running_stats=track_running_stats, average=average, sync=sync,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        self.iterations = checked_iterations("iter_norm", iterations)
        self._shown["iterations"] = iterations

    def whitening(self, cov: Tensor) -> Tensor:
        """Newton-Schulz steps."""
        return newton_schulz(cov, self.eps, self.iterations)


COMPONENTS = ("bw", "iw", "bn", "in", "ln")


@register("switchable_whitening", aliases=("sw",))
class SwitchableWhitening(WhiteningNorm):
    r"""Whiten by learned mixtures of the means and covariances of the batch and of each sample.

    .. math:: y = \gamma_c\, \Big[\Big(\sum_k q_k\Sigma_k + \varepsilon I\Big)^{-\frac12}
              \Big(x - \sum_k p_k\mu_k\Big)\Big]_c + \beta_c, \qquad
              p = \operatorname{softmax}(\lambda), \quad q = \operatorname{softmax}(\lambda')

    over the components :math:`k`, in groups of channels: ``"bw"``, batch whitening, has the covariance of the batch;
    ``"iw"``, instance whitening, that of each sample over its positions; ``"bn"`` and ``"in"`` only their diagonals;
    ``"ln"`` the variance of all units of a sample times the identity. The root is found by Newton-Schulz steps, as in
    ``iter_norm``. Kept are the running mean and the running covariance, for the components of the batch; with none of
    these there is no state.

    Args:
        num_features: number of channels ``C``.
        components: the norms that are mixed, in the order of their shares.
        iterations: Newton-Schulz steps.
        groups: number of groups, or ``"auto"``: the largest groups of at most 16 channels.
        group_size: channels a group, in place of ``groups``.
        tied: one mixture for means and covariances.
        eps: :math:`\varepsilon`, added to the diagonal of the mixed covariance.
        affine: learn :math:`\gamma` and :math:`\beta`; :math:`\lambda` (``mean_weight``) and :math:`\lambda'`
            (``cov_weight``) are learned in any case.
        momentum: weight of the new value in the running averages; ``None`` is the cumulative average.
        sync: take the batch's part over all processes of ``torch.distributed``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when the groups do not divide the channels, or there are no iterations or components.
        NormzooError: for an unknown component; in training, for one sample with one position.

    Example:
        >>> norm = SwitchableWhitening(32, components=("bw", "iw", "bn", "in", "ln"))
        >>> norm(torch.randn(4, 32, 5, 5)).shape
        torch.Size([4, 32, 5, 5])

    Deviations:
        The authors' code gives ``"bn"`` and ``"in"`` the shares of ``"bw"`` and ``"iw"`` in the covariance, takes the
        unbiased variance for ``"ln"``, averages the biased covariance from zero on, and has ``momentum=0.01`` (in
        torch's sense).

    Reference:
        Pan, Zhan, Shi, Tang and Luo 2019, Switchable Whitening for Deep Representation Learning, arXiv 1904.09739.
    """

    paper = Paper("Pan et al.", 2019, "Switchable Whitening for Deep Representation Learning", "1904.09739")
    roles = {"weight": "gain", "bias": "shift", "mean_weight": "logit", "cov_weight": "logit"}

    cov_weight: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        *,
        components: tuple[str, ...] = ("bw", "iw"),
        iterations: int = 5,
        groups: int | Literal["auto"] = "auto",
        group_size: int | None = None,
        tied: bool = False,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.1,
        sync: bool = False,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for component in components:
            if component not in COMPONENTS:
                raise unknown("component", component, COMPONENTS)
        if not components or len(set(components)) < len(components):
            raise OptionError(f"switchable_whitening with components={components!r}; expected some of {COMPONENTS}")
        super().__init__(
            num_features, eps=eps, affine=affine, groups=group_count(num_features, groups, group_size, 16),
            momentum=momentum, track_running_stats=not {"bw", "bn"}.isdisjoint(components), average="covariance",
            sync=sync, channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        self.components = tuple(components)
        self.iterations = checked_iterations("switchable_whitening", iterations)
        self.mean_weight = nn.Parameter(torch.ones(len(components), device=device, dtype=dtype))
        cov_weight = None if tied else nn.Parameter(torch.ones(len(components), device=device, dtype=dtype))
        self.register_parameter("cov_weight", cov_weight)
        self._shown |= {"components": self.components, "iterations": iterations}

    @property
    def traits(self) -> Traits:
        """Everything that one of the components shares."""
        batch = not {"bw", "bn"}.isdisjoint(self.components)
        sample = not {"iw", "in", "ln"}.isdisjoint(self.components)
        return Traits(
            batch_dependent=batch, causal=not sample, causal_in_training=False, stateful=batch, scale_invariant=True,
            shift_invariant=True,
        )  # fmt: skip

    def whitening(self, cov: Tensor) -> Tensor:
        """Newton-Schulz steps."""
        return newton_schulz(cov, self.eps, self.iterations)

    def whiten(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Whiten each sample by a matrix of its own, if it has one."""
        mu, w = self.statistics(x, mask)
        if w.ndim == 3:
            return self.color(together(product(w, apart(x - mu, self.groups)), x))
        y = product(w, (x - mu).unflatten(1, (self.groups, -1))).flatten(1, 2)
        return self.color(y if x.is_contiguous() or not x.mT.is_contiguous() else y.mT.contiguous().mT)

    def statistics(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mixed."""
        parts = self.parts(x, mask)
        p = wide(self.mean_weight).softmax(0)
        q = p if self.cov_weight is None else wide(self.cov_weight).softmax(0)
        mu, cov = p[0] * parts[0][0], q[0] * parts[0][1]
        for i in range(1, len(parts)):
            mu, cov = mu + p[i] * parts[i][0], cov + q[i] * parts[i][1]
        return mu, self.whitening(cov.to(x.dtype))

    def parts(self, x: Tensor, mask: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Mean and covariance of each component."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        if self.track_running_stats:
            mu, cov, count = self.batch(x, mask)
            self.count_covariance(mu, cov, count)
            found |= {"bw": (mu, cov), "bn": (mu, diagonal(cov))}
        if not {"iw", "in"}.isdisjoint(self.components):
            mu = mean(x, mask, (2,))
            centred = x - mu if mask is None else torch.where(mask, x - mu, 0)
            count = at_least_one(number(x[:, :1], mask, (2,)))
            values = centred.unflatten(1, (self.groups, -1))
            cov = product(values, values.mT) / (count.unsqueeze(-1) if isinstance(count, Tensor) else count)
            found |= {"iw": (mu, cov), "in": (mu, diagonal(cov))}
        if "ln" in self.components:
            mu, var = moments(x, mask, (1, 2))
            one = torch.eye(self.num_features // self.groups, device=x.device, dtype=x.dtype)
            found["ln"] = mu, (var.unsqueeze(-1) * one).expand(-1, self.groups, -1, -1)
        return [found[component] for component in self.components]


def diagonal(matrix: Tensor) -> Tensor:
    """The diagonal alone, still as a matrix."""
    return torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))


@register("group_whitening", aliases=("gw",))
class GroupWhitening(FormulaNorm):
    r"""Group norm whose groups are freed of their correlation as well, within each sample.

    .. math:: y = \gamma_c\, \big[(\Sigma_b + \varepsilon I)^{-\frac12}(x_b - \mu_b)\big] + \beta_c, \qquad
              x_b \in \mathbb{R}^{g \times (C/g)S}

    A sample is read as :math:`g` variables, its groups of channels, each with the values of its channels and positions;
    :math:`\mu_b` (:math:`g` numbers) and :math:`\Sigma_b` (:math:`g \times g`) are taken over these. Nothing is shared
    between samples: there is no state. One group is ``layer_norm_joint``; with the covariance's diagonal alone it would
    be group norm.

    Args:
        num_features: number of channels ``C``.
        groups: number of groups :math:`g`, or ``"auto"``: the largest divisor of ``C`` up to its root, for then a
            group has at least as many values as there are groups, which the paper asks for.
        group_size: channels a group, in place of ``groups``.
        iterations: Newton-Schulz steps in place of the exact root; ``None`` is exact.
        eps: :math:`\varepsilon`, added to the diagonal of the covariance.
        affine: learn :math:`\gamma` and :math:`\beta`.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when the groups do not divide the channels.
        NormzooError: for groups of a single value.

    Example:
        >>> GroupWhitening(64)
        GroupWhitening(64, eps=1e-05, groups=8)
        >>> GroupWhitening(64, groups=4)(torch.randn(2, 64, 5, 5)).shape
        torch.Size([2, 64, 5, 5])

    Deviations:
        The authors' code leaves :math:`\varepsilon` out where it uses Newton-Schulz steps, and takes 32 groups.

    Reference:
        Huang, Zhou, Liu, Zhu and Shao 2020, Group Whitening: Balancing Learning Efficiency and Representational
        Capacity, arXiv 2009.13333.
    """

    paper = Paper(
        "Huang et al.", 2020, "Group Whitening: Balancing Learning Efficiency and Representational Capacity",
        "2009.13333",
    )  # fmt: skip

    def __init__(
        self,
        num_features: int,
        *,
        groups: int | Literal["auto"] = "auto",
        group_size: int | None = None,
        iterations: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        if groups == "auto" and group_size is None:
            groups = max(d for d in divisors(num_features) if d * d <= num_features)
        self.groups = choose_groups(num_features, groups, group_size)
        self.iterations = None if iterations is None else checked_iterations("group_whitening", iterations)

    @property
    def traits(self) -> Traits:
        """Those of joint layer norm."""
        return Traits(
            batch_dependent=False, causal=False, causal_in_training=False, scale_invariant=True, shift_invariant=True
        )

    @property
    def expected_failures(self) -> Mapping[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]  by option
        """The exact root has to decompose the covariance of every sample."""
        return {} if self.iterations else {"onnx": "ONNX has no eigendecomposition; iterations=5 does without"}

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Whiten the groups of each sample."""
        size = self.num_features // self.groups
        if mask is None and size * x.shape[2] == 1:
            raise NormzooError(
                f"group_whitening with {self.groups} groups got one value for each group: centred, it is zero whatever "
                "the input. Use fewer groups or larger feature maps"
            )
        values = x.unflatten(1, (self.groups, size))
        real = None if mask is None else mask.unsqueeze(1)
        mu = mean(values, real, (2, 3))
        centred = (values - mu if real is None else torch.where(real, values - mu, 0)).flatten(2)
        count = at_least_one(number(values[:, :1], real, (2, 3)))
        cov = product(centred, centred.mT) / (count.squeeze(-1) if isinstance(count, Tensor) else count)
        w = zca(cov, self.eps) if self.iterations is None else newton_schulz(cov, self.eps, self.iterations)
        y = product(w, centred).view(x.shape)
        return y if x.is_contiguous() or not x.mT.is_contiguous() else y.mT.contiguous().mT

    def extra_repr(self) -> str:
        """The number of channels, eps, the groups and the layout."""
        steps = "" if self.iterations is None else f", iterations={self.iterations}"
        layout = "" if self.channel_dim == 1 else ", channel_dim=-1"
        return f"{self.num_features}, eps={self.eps}, groups={self.groups}{steps}{layout}"
