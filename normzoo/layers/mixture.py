"""Norms that mix the statistics of other norms, in shares that are learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from normzoo.errors import OptionError
from normzoo.layers.base import Norm, Paper, Traits
from normzoo.layers.batch import BatchNorm
from normzoo.layers.parts import BatchCellNorm, column, gate_weights, wide
from normzoo.layers.sample import InstanceNorm
from normzoo.ops import Moments, affine
from normzoo.ops.cells import mixed, mixture, pool
from normzoo.registry import register


class MixingNorm(BatchCellNorm):
    """Batch norm mixed with norms of each sample: abstract."""

    @property
    def traits(self) -> Traits:
        """Everything that one of the parts shares."""
        return Traits(
            batch_dependent=True, causal=False, causal_in_training=False, stateful=self.track_running_stats,
            scale_invariant=True, shift_invariant=True,
        )  # fmt: skip


class MixedMomentsNorm(MixingNorm):
    """Standardise by shares of the moments of instance norm, layer norm and batch norm: abstract."""

    roles = {"weight": "gain", "bias": "shift", "mean_weight": "logit", "var_weight": "logit"}

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.1,
        sync: bool = False,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum, sync=sync,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        self.mean_weight = nn.Parameter(torch.ones(3, device=device, dtype=dtype))
        self.var_weight = nn.Parameter(torch.ones(3, device=device, dtype=dtype))

    def shares(self, weights: Tensor) -> Tensor:
        """Three shares that sum to one, for instance, layer and batch norm."""
        return wide(weights).softmax(0)

    def tensors(self) -> tuple[Tensor, ...]:
        """The shares of the means and of the variances."""
        return self.shares(self.mean_weight), self.shares(self.var_weight)

    def coefficients(self, own: Moments, batch: Moments, *tensors: Tensor) -> tuple[Tensor, Tensor, float]:
        """Standardise by the mixed moments."""
        means, variances = tensors
        return *mixed(own, batch, means, variances, self.eps), 0.0

    def measured(
        self, x: Tensor, mask: Tensor | None, channels_last: bool, weight: Tensor | None, bias: Tensor | None,
        running: Moments | None,
    ) -> tuple[Tensor, Moments]:  # fmt: skip
        """By one compiled operator where there is one."""
        done = None
        if not self.sync:
            means, variances = self.tensors()
            done = mixture(x, mask, channels_last, means, variances, running, eps=self.eps, weight=weight, bias=bias)
        return done or super().measured(x, mask, channels_last, weight, bias, running)


@register("switchable_norm", aliases=("sn",))
class SwitchableNorm(MixedMomentsNorm):
    r"""Standardise by learned mixtures of the moments of instance norm, layer norm and batch norm.

    .. math:: y = \gamma_c \frac{x - \sum_k p_k \mu_k}{\sqrt{\sum_k q_k \sigma_k^2 + \varepsilon}} + \beta_c, \qquad
              p = \operatorname{softmax}(\lambda), \quad q = \operatorname{softmax}(\lambda')

    over :math:`k` = instance (positions), layer (channels and positions) and batch (samples and positions), in this
    order; all variances are biased. With all of the share on one it is ``instance_norm``, ``layer_norm_joint`` or
    ``batch_norm``.

    Args:
        num_features: number of channels ``C``.
        eps: :math:`\varepsilon`, added to the mixed variance.
        affine: learn :math:`\gamma` (``weight``) and :math:`\beta` (``bias``); :math:`\lambda` (``mean_weight``) and
            :math:`\lambda'` (``var_weight``) are learned in any case.
        momentum: weight of the new value in the running averages of the batch's part; ``None`` is the cumulative
            average.
        sync: take the batch's moments over all processes of ``torch.distributed``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: in training, for one sample with one position.

    Example:
        >>> SwitchableNorm(8)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Deviations:
        In evaluation the paper averages the moments of batches of a trained network, this the running ones
        (``momentum=None`` is nearer to it). The authors' code divides by ``S - 1``, so that it equals none of the
        three, and is undefined on one position.

    Reference:
        Luo et al. 2018, Differentiable Learning-to-Normalize via Switchable Normalization, arXiv 1806.10779.
    """

    paper = Paper("Luo et al.", 2018, "Learning-to-Normalize via Switchable Normalization", "1806.10779")


def sparsemax(z: Tensor) -> Tensor:
    """The nearest point of the simplex, which may lie on its border (Martins and Astudillo 2016).

    >>> sparsemax(torch.tensor([0.9, 0.6, -1.0]))
    tensor([0.6500, 0.3500, 0.0000])
    """
    ordered = z.sort(descending=True).values
    place = torch.arange(1, len(z) + 1, device=z.device, dtype=z.dtype)
    kept = ordered * place > ordered.cumsum(0) - 1
    threshold = (torch.where(kept, ordered, 0).sum() - 1) / kept.sum()
    return (z - threshold).clamp(min=0)


def sparsestmax(z: Tensor, radius: Tensor) -> Tensor:
    r"""The nearest point of the simplex that is at least ``radius`` from its middle: sparser as the radius grows.

    .. math:: y = \arg\min_p \lVert p - z \rVert^2, \qquad
              p \ge 0,\ \textstyle\sum p = 1,\ \lVert p - \tfrac1K \rVert \ge r

    Radius 0 is sparsemax; :math:`\sqrt{1 - 1/K}`, the distance of the corners, leaves the largest alone.

    >>> sparsestmax(torch.tensor([0.9, 0.6, -1.0]), torch.tensor((2 / 3) ** 0.5)).round(decimals=3)
    tensor([1., 0., 0.])
    """
    p, middle, square = sparsemax(z), torch.full_like(z, 1 / len(z)), radius.square()
    for _ in range(len(z) - 1):
        away = p - middle
        distance = away.square().sum()
        near = (distance < square) & (distance > 1e-8)  # from the middle itself there is no way to go
        pushed = middle + away * square.clamp(min=0).sqrt() * torch.rsqrt(torch.where(near, distance, 1))
        p = sparsemax(torch.where(near, pushed, p))
        # pushed out of the simplex, it came back to a face: the circle that the sphere leaves on that face is next
        face = (p > 0).to(z.dtype)
        center = face / face.sum()
        middle, square = center, square - (center - middle).square().sum()
    return p


@register("sparse_switchable_norm", aliases=("ssn",))
class SparseSwitchableNorm(MixedMomentsNorm):
    r"""Switchable norm whose shares become sparse while it trains, until one norm is left.

    .. math:: y = \gamma_c \frac{x - \sum_k p_k \mu_k}{\sqrt{\sum_k q_k \sigma_k^2 + \varepsilon}} + \beta_c, \qquad
              p = \operatorname{sparsestmax}_r(\lambda), \quad q = \operatorname{sparsestmax}_r(\lambda')

    over instance, layer and batch moments, as in ``switchable_norm``. The radius :math:`r` grows from 0 to
    :math:`\sqrt{2/3}`, where a single norm is chosen, over the first ``ramp`` batches, which are counted in a buffer
    that is saved with the model.

    Args:
        num_features: number of channels ``C``.
        ramp: batches until a single norm is left; the paper's schedule ends with the training.
        eps: :math:`\varepsilon`, added to the mixed variance.
        affine: learn :math:`\gamma` (``weight``) and :math:`\beta` (``bias``); :math:`\lambda` (``mean_weight``) and
            :math:`\lambda'` (``var_weight``) are learned in any case.
        momentum: weight of the new value in the running averages of the batch's part; ``None`` is the cumulative
            average.
        sync: take the batch's moments over all processes of ``torch.distributed``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when ``ramp`` is no positive whole number.
        NormzooError: in training, for one sample with one position.

    Example:
        >>> SparseSwitchableNorm(8, ramp=1000)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Deviations:
        The radius is counted here, where the authors' training loop sets it. Logits that are exactly equal, as at the
        start, have no nearest corner and keep equal shares. The authors' code takes the unbiased variance over
        positions, and overwrites logits that have reached a corner.

    Reference:
        Shao et al. 2019, SSN: Learning Sparse Switchable Normalization via SparsestMax, arXiv 1903.03793.
    """

    paper = Paper("Shao et al.", 2019, "SSN: Learning Sparse Switchable Normalization via SparsestMax", "1903.03793")

    def __init__(
        self,
        num_features: int,
        *,
        ramp: int = 100_000,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.1,
        sync: bool = False,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum, sync=sync,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        if not isinstance(ramp, int) or ramp < 1:
            raise OptionError(f"ramp={ramp!r}; expected a positive number of batches")
        self.ramp = ramp
        self._shown |= {"ramp": ramp}
        self.remember("num_batches_tracked")

    def radius(self) -> Tensor:
        """The radius for the number of batches seen, that at hand not among them."""
        assert self.running_var is not None
        seen = self.recall("num_batches_tracked").to(self.running_var.dtype)
        return (seen / self.ramp).clamp(0, 1) * math.sqrt(2 / 3)

    def shares(self, weights: Tensor) -> Tensor:
        """Three shares, sparser with every batch."""
        return sparsestmax(wide(weights), self.radius().to(wide(weights).dtype))


@register("batch_instance_norm", aliases=("bin",))
class BatchInstanceNorm(MixingNorm):
    r"""Mix batch norm and instance norm, with a share for each channel.

    .. math:: y = \gamma_c \big(\rho_c\, \hat x^{B} + (1 - \rho_c)\, \hat x^{I}\big) + \beta_c, \qquad
              0 \le \rho_c \le 1

    with :math:`\hat x^B` standardised over samples and positions, :math:`\hat x^I` over positions. :math:`\rho`
    (``gate``) starts at one: batch norm.

    Args:
        num_features: number of channels ``C``.
        eps: :math:`\varepsilon`, added to both variances.
        affine: learn :math:`\gamma` (``weight``) and :math:`\beta` (``bias``); :math:`\rho` is learned in any case.
        momentum: weight of the new value in the running averages of the batch's part; ``None`` is the cumulative
            average.
        track_running_stats: keep running averages and use them in evaluation.
        sync: take the batch's moments over all processes of ``torch.distributed``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: in training, for one sample with one position.

    Example:
        >>> BatchInstanceNorm(8)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Deviations:
        The paper clips :math:`\rho` after each step of the optimizer; this clips where it is used and passes the
        gradient on, so that no training loop has to know. It also wants a larger learning rate for :math:`\rho`, for
        which its role is ``"share"``.

    Reference:
        Nam and Kim 2018, Batch-Instance Normalization for Adaptively Style-Invariant Neural Networks,
        arXiv 1805.07925.
    """

    roles = {"weight": "gain", "bias": "shift", "gate": "share"}
    expected_failures = {
        name: "a share beyond 0 or 1 is clipped, and its gradient passed on so that it can come back"
        for name in ("gradcheck", "gradgradcheck")
    }
    paper = Paper("Nam & Kim", 2018, "Batch-Instance Normalization", "1805.07925")

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        sync: bool = False,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum, track_running_stats=track_running_stats,
            sync=sync, channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        self.gate = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))

    def tensors(self) -> tuple[Tensor, ...]:
        """The share of batch norm."""
        gate = column(self.gate)
        return (gate + (gate.clamp(0, 1) - gate).detach(),)

    def coefficients(self, own: Moments, batch: Moments, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both, in the shares of the gate."""
        (share,) = tensors
        by_batch = share * torch.rsqrt(batch.var + self.eps)
        by_itself = (1 - share) * torch.rsqrt(own.var + self.eps)
        return own.mean, by_batch + by_itself, by_batch * (own.mean - batch.mean)


class _InstanceHalf(InstanceNorm):
    """Instance norm that answers a single position with its shift, since the other half can do more with it."""

    def normalize(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
        """Instance norm; of one position only the shift is left."""
        if x.shape[1 if channels_last else 2] != 1:
            return super().normalize(x, mask, channels_last)
        y = affine(torch.zeros_like(x), self.weight, self.bias, channels_last).to(x.dtype)
        return y if mask is None else torch.where(mask.unsqueeze(-1 if channels_last else 1), y, 0)


@register("ibn", aliases=("ibn_a", "instance_batch_norm"))
class IBN(Norm):
    r"""Instance norm for the first half of the channels, batch norm for the others.

    .. math:: y = \begin{cases} \operatorname{IN}(x) & c < \lfloor rC \rfloor \\
              \operatorname{BN}(x) & \text{otherwise} \end{cases}

    The paper's IBN-a, for the first norm of residual blocks in shallow layers.

    Args:
        num_features: number of channels ``C``.
        ratio: :math:`r`, the part of the channels with instance norm.
        eps: :math:`\varepsilon` of both.
        affine: learn gains and shifts (``instance.weight``, ``batch.weight``, …).
        momentum: weight of the new value in the running averages of batch norm.
        track_running_stats: keep running averages and use them in evaluation.
        sync: take the moments of batch norm over all processes of ``torch.distributed``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same. On a single position the first half is its shift.

    Raises:
        OptionError: when one of the halves would be empty.
        NormzooError: in training, for one sample with one position.

    Example:
        >>> IBN(8)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Deviations:
        None; the authors' code calls the halves ``IN`` and ``BN``.

    Reference:
        Pan et al. 2018, Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net, arXiv 1807.09441.
    """

    paper = Paper("Pan et al.", 2018, "Two at Once: Enhancing Learning and Generalization via IBN-Net", "1807.09441")

    def __init__(
        self,
        num_features: int,
        *,
        ratio: float = 0.5,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        sync: bool = False,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, channel_dim=channel_dim)
        half = int(round(ratio * num_features, 9))
        if not 0 < half < num_features:
            raise OptionError(
                f"ratio={ratio!r} of {num_features} channels gives {half} to instance norm and {num_features - half} "
                "to batch norm; expected at least one for each"
            )
        self.halves = [half, num_features - half]
        self.instance = _InstanceHalf(half, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        self.batch = BatchNorm(
            num_features - half, eps=eps, affine=affine, momentum=momentum, track_running_stats=track_running_stats,
            sync=sync, channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip

    @property
    def traits(self) -> Traits:
        """Everything that one of the two shares."""
        return Traits(
            batch_dependent=True,
            causal=False,
            causal_in_training=False,
            stateful=self.batch.track_running_stats,
            scale_invariant=True,
            shift_invariant=True,
        )

    def extra_repr(self) -> str:
        """The number of channels, of which the halves are named beside their norms."""
        return str(self.num_features)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise the halves apart."""
        self.check_input(x, mask)
        # copies lie densely, in the order of the whole: with that a norm keeps the layout of what it gets
        first, second = (half.clone() for half in x.split(self.halves, self.channel_dim))
        return torch.cat([self.instance(first, mask), self.batch(second, mask)], self.channel_dim)


@register("exemplar_norm", contrib=True)
class ExemplarNorm(MixingNorm):
    r"""Mix instance norm, layer norm and batch norm in shares that each sample chooses for itself.

    .. math:: y = \gamma_c \sum_k \lambda_{b,k} \frac{x - \mu_k}{\sqrt{\sigma_k^2 + \varepsilon}} + \beta_c, \qquad
              \lambda_b = \operatorname{softmax}\big(F(Z_b Z_b^\top)\big), \quad
              Z_{b,k} = V\, \frac{\operatorname{mean}_s x - \mu_k}{\sqrt{\sigma_k^2 + \varepsilon}}

    over :math:`k` = instance, layer (channels and positions) and batch, with one linear map :math:`V` to
    ``C / reduction`` numbers for all three, and :math:`F` two linear maps with a tanh between.

    Args:
        num_features: number of channels ``C``.
        reduction: by how much :math:`V` narrows the channels.
        hidden: width between the two maps of :math:`F`.
        eps: :math:`\varepsilon`, added to the variances.
        affine: learn :math:`\gamma` (``weight``) and :math:`\beta` (``bias``); the shares are learned in any case.
        momentum: weight of the new value in the running averages of the batch's part; ``None`` is the cumulative
            average.
        sync: take the batch's moments over all processes of ``torch.distributed``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when a width is no positive whole number.
        NormzooError: in training, for one sample with one position.

    Example:
        >>> ExemplarNorm(8)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Deviations:
        There is no public code to compare with; the gate follows the paper's description, with one gain and shift for
        all three norms, and starts with equal shares.

    Reference:
        Zhang et al. 2020, Exemplar Normalization for Learning Deep Representation, arXiv 2003.08761.
    """

    roles = {"weight": "gain", "bias": "shift", "narrow": "gate", "first": "gate", "second": "gate"}
    paper = Paper("Zhang et al.", 2020, "Exemplar Normalization for Learning Deep Representation", "2003.08761")

    def __init__(
        self,
        num_features: int,
        *,
        reduction: int = 32,
        hidden: int = 50,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.1,
        sync: bool = False,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum, sync=sync,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        for name, value in {"reduction": reduction, "hidden": hidden}.items():
            if not isinstance(value, int) or value < 1:
                raise OptionError(f"{name}={value!r}; expected a positive whole number")
        factory = {"device": device, "dtype": dtype}
        self.narrow = gate_weights(max(num_features // reduction, 1), num_features, **factory)
        self.first = gate_weights(hidden, 9, **factory)
        self.second = nn.Parameter(torch.zeros(3, hidden, **factory))

    def tensors(self) -> tuple[Tensor, ...]:
        """The weights of the gate."""
        return self.narrow, self.first, self.second

    def coefficients(self, own: Moments, batch: Moments, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Standardise three times, in the shares of the sample."""
        narrow, first, second = tensors
        # how far the mean of a cell is from each of the three, and what this is divided by
        scaled = [(own.mean - m, torch.rsqrt(v + self.eps)) for m, v, _ in (own, pool(own, 1), batch)]
        z = torch.stack([_times((off * inverse).squeeze(2), narrow) for off, inverse in scaled], 1)
        gram = (z.unsqueeze(1) * z.unsqueeze(2)).sum(3)
        shares = _times(_times(gram.flatten(1), first).tanh(), second).softmax(1)
        scales = [shares[:, k, None, None] * inverse for k, (_, inverse) in enumerate(scaled)]
        shifts = [scale * off for scale, (off, _) in zip(scales, scaled, strict=True)]
        return own.mean, scales[0] + scales[1] + scales[2], shifts[0] + shifts[1] + shifts[2]


def _times(x: Tensor, weights: Tensor) -> Tensor:
    """A linear map as products and sums: autocast would round a matrix product, in the backward pass too."""
    return (x.unsqueeze(1) * wide(weights).to(x.dtype)).sum(2)
