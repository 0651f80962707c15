"""Batch norm with other statistics: without one of its two halves, by other deviations, over channel groups, frozen."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from normzoo import ops
from normzoo.errors import NormzooError, OptionError
from normzoo.layers.base import MomentNorm, Paper, Traits
from normzoo.layers.parts import BATCH, BatchCellNorm, BatchFormulaNorm, column, mean, total
from normzoo.ops import Moments
from normzoo.registry import register

# ---- one half of batch norm ------------------------------------------------------------------------------------------


@register("mean_only_batch_norm", aliases=("mean_only_bn", "mobn"))
class MeanOnlyBatchNorm(BatchCellNorm):
    r"""Subtract each channel's batch mean; do not divide.

    .. math:: y = x - \mu_c + \beta_c, \qquad \mu_c \text{ over samples and positions}

    Made to go with weight normalization, which takes care of the scale. There is no :math:`\gamma` and no
    :math:`\varepsilon`.

    Args:
        num_features: number of channels ``C``.
        affine: learn :math:`\beta` (``bias``).
        momentum: weight of the new value in the running mean; ``None`` is the cumulative average.
        track_running_stats: keep the running mean and use it in evaluation.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: in training, when a channel has a single value.

    Example:
        >>> norm = MeanOnlyBatchNorm(8)
        >>> norm(torch.randn(4, 8, 5) + 3).mean().abs() < 1e-6
        tensor(True)

    Deviations:
        The data-dependent initialisation of the paper's weight normalization is no part of this layer.

    Reference:
        Salimans and Kingma 2016, Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep
        Neural Networks, arXiv 1602.07868, section 4.
    """

    paper = Paper(
        "Salimans & Kingma", 2016,
        "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural Networks",
        "1602.07868",
    )  # fmt: skip

    def __init__(
        self,
        num_features: int,
        *,
        affine: bool = True,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=0.0, affine=affine, momentum=momentum, track_running_stats=track_running_stats,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        self.weight = None
        self.drop("running_var")
        del self._shown["eps"]

    @property
    def traits(self) -> Traits:
        """Those of batch norm, but the scale of the input stays."""
        return Traits(
            batch_dependent=True, causal=self.track_running_stats, causal_in_training=False,
            stateful=self.track_running_stats, shift_invariant=True,
        )  # fmt: skip

    def population(self) -> Moments:
        """The running mean, and a variance of one, which divides nothing."""
        centre = self.recall("running_mean")
        return Moments(centre, torch.ones_like(centre), 1.0)

    def update(self, moments: Moments) -> None:
        """Count a training batch into the running mean."""
        self.track(moments.number, {"running_mean": moments.mean})

    def coefficients(self, own: Moments, batch: Moments, *tensors: Tensor) -> tuple[Tensor, Tensor, float]:
        """Subtract the mean."""
        return batch.mean, torch.ones_like(batch.mean), 0.0


@register("variance_norm", aliases=("variance_only_batch_norm", "vn"))
class VarianceNorm(BatchCellNorm):
    r"""Divide each channel by its batch standard deviation; do not centre.

    .. math:: y = \gamma_c \frac{x}{\sqrt{\sigma_c^2 + \varepsilon}} + \beta_c, \qquad
              \sigma_c^2 \text{ over samples and positions}

    The variance is that about the mean, so a constant added to the input changes the output by the same constant,
    scaled; dividing by the root of the second moment instead would be the scaling half of power norm.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: in training, when a channel has a single value.

    Example:
        >>> norm = VarianceNorm(8)
        >>> norm(2 * torch.randn(64, 8, 5)).std().round(decimals=1)
        tensor(1., grad_fn=<RoundBackward1>)

    Deviations:
        The running variance is the unbiased one, as in torch's batch norm; the paper, which studies initialisation,
        does not say.

    Reference:
        Daneshmand, Kohler, Bach, Hofmann and Lucchi 2020, Batch Normalization Provably Avoids Rank Collapse for
        Randomly Initialised Deep Networks, arXiv 2003.01652.
    """

    paper = Paper(
        "Daneshmand et al.", 2020,
        "Batch Normalization Provably Avoids Rank Collapse for Randomly Initialised Deep Networks", "2003.01652",
    )  # fmt: skip

    unused = ("running_mean",)

    @property
    def traits(self) -> Traits:
        """Those of batch norm, but the mean of the input stays."""
        return Traits(
            batch_dependent=True, causal=self.track_running_stats, causal_in_training=False,
            stateful=self.track_running_stats, scale_invariant=True,
        )  # fmt: skip

    def coefficients(self, own: Moments, batch: Moments, *tensors: Tensor) -> tuple[Tensor, Tensor, float]:
        """Divide by the standard deviation."""
        return torch.zeros_like(batch.mean), torch.rsqrt(batch.var + self.eps), 0.0


# ---- other deviations ------------------------------------------------------------------------------------------------


class DeviationNorm(BatchFormulaNorm):
    r"""Batch norm by another measure of deviation: abstract; a subclass gives :meth:`deviation`.

    .. math:: y = \gamma_c \frac{x - \mu_c}{\sqrt{s_c^2 + \varepsilon}} + \beta_c
    """

    running_scale: Tensor | None

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum, track_running_stats=track_running_stats,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        if track_running_stats:
            self.buffer("running_scale", 1.0, num_features)
            self.drop("running_var")
        else:
            self.running_scale = None

    @abstractmethod
    def deviation(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The scale ``(1, c, 1)`` of a centred ``(b, c, s)`` whose masked positions are zero."""

    def measure(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mean and the squared deviation."""
        centre = mean(x, mask, BATCH)
        centred = x - centre
        return centre, self.deviation(centred if mask is None else torch.where(mask, centred, 0), mask).square()

    def population(self) -> Moments:
        """The running mean and the square of the running scale."""
        return Moments(self.recall("running_mean"), self.recall("running_scale").square(), 1.0)

    def update(self, moments: Moments) -> None:
        """Count a training batch into the running mean and scale."""
        self.track(moments.number, {"running_mean": moments.mean, "running_scale": moments.var.sqrt()})


@register("l1_batch_norm", aliases=("l1bn", "l1_norm_batch_norm"))
class L1BatchNorm(DeviationNorm):
    r"""Batch norm by the mean absolute deviation, which needs no square and no root.

    .. math:: y = \gamma_c \frac{x - \mu_c}{\sqrt{s_c^2 + \varepsilon}} + \beta_c, \qquad
              s_c = \sqrt{\tfrac{\pi}{2}}\; \tfrac1n \sum |x - \mu_c|

    The factor makes :math:`s` the standard deviation of a Gaussian; Wu et al. leave it to :math:`\gamma`
    (``matched=False``), Hoffer et al. write it. Statistics are over samples and positions; evaluation uses the running
    averages of :math:`\mu` and :math:`s`.

    Args:
        num_features: number of channels ``C``.
        matched: include the factor :math:`\sqrt{\pi/2}`.
        eps: :math:`\varepsilon`, added to the squared scale.
        affine: learn :math:`\gamma` and :math:`\beta`.
        momentum: weight of the new value in the running averages; ``None`` is the cumulative average.
        track_running_stats: keep running averages and use them in evaluation.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: in training, when a channel has a single value.

    Example:
        >>> norm = L1BatchNorm(1, affine=False, eps=0, matched=False)
        >>> norm(torch.tensor([[1.0], [2.0], [3.0], [6.0]])).T
        tensor([[-1.3333, -0.6667,  0.0000,  2.0000]])

    Deviations:
        :math:`\varepsilon` is added to :math:`s^2` under a root, as in every norm here; the papers add it to
        :math:`s`. The code of Hoffer et al. averages :math:`1/s` for evaluation, the papers :math:`s`, as here.

    Reference:
        Wu et al. 2018, L1-Norm Batch Normalization for Efficient Training of Deep Neural Networks, arXiv 1802.09769.
        Hoffer, Banner, Golan and Soudry 2018, Norm matters: efficient and accurate normalization schemes in deep
        networks, arXiv 1803.01814.
    """

    paper = Paper(
        "Wu et al.", 2018, "L1-Norm Batch Normalization for Efficient Training of Deep Neural Networks", "1802.09769"
    )

    def __init__(
        self,
        num_features: int,
        *,
        matched: bool = True,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum, track_running_stats=track_running_stats,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        self.factor = math.sqrt(math.pi / 2) if matched else 1.0
        if not matched:
            self._shown["matched"] = False

    def deviation(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The mean absolute value."""
        return self.factor * mean(x.abs(), mask, BATCH)


@register("lp_batch_norm", aliases=("lpbn",))
class LpBatchNorm(DeviationNorm):
    r"""Batch norm by the mean p-th power of the deviations.

    .. math:: y = \gamma_c \frac{x - \mu_c}{\sqrt{s_c^2 + \varepsilon}} + \beta_c, \qquad
              s_c = \Big(\frac{1}{n\,m_p} \sum |x - \mu_c|^p\Big)^{1/p}, \quad
              m_p = \frac{2^{p/2}}{\sqrt\pi}\, \Gamma\!\Big(\frac{p+1}{2}\Big)

    :math:`m_p`, the p-th absolute moment of a standard Gaussian, makes :math:`s` its standard deviation; so ``p=2`` is
    batch norm and ``p=1`` is ``l1_batch_norm``. For :math:`p = \infty` see ``top_k_batch_norm``.

    Args:
        num_features: number of channels ``C``.
        p: the power, at least 1.
        eps: :math:`\varepsilon`, added to the squared scale.
        affine: learn :math:`\gamma` and :math:`\beta`.
        momentum: weight of the new value in the running averages; ``None`` is the cumulative average.
        track_running_stats: keep running averages and use them in evaluation.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: for ``p`` below 1 or infinite; in training, when a channel has a single value.

    Example:
        >>> LpBatchNorm(8, p=4)(torch.randn(4, 8, 5)).shape
        torch.Size([4, 8, 5])

    Deviations:
        The paper gives no :math:`\varepsilon`; its code adds one to the mean p-th power, has no :math:`m_p` for
        ``p`` other than 1 and 2, and averages :math:`1/s` for evaluation; here the average is of :math:`s`.

    Reference:
        Hoffer, Banner, Golan and Soudry 2018, Norm matters: efficient and accurate normalization schemes in deep
        networks, arXiv 1803.01814.
    """

    paper = Paper(
        "Hoffer et al.", 2018, "Norm matters: efficient and accurate normalization schemes in deep networks",
        "1803.01814",
    )  # fmt: skip

    def __init__(
        self,
        num_features: int,
        *,
        p: float = 3.0,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 1 <= p < math.inf:
            raise OptionError(f"lp_batch_norm with p={p!r}; expected a number from 1 (top_k_batch_norm for infinity)")
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum, track_running_stats=track_running_stats,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        self.p = p
        self.factor = (2 ** (p / 2) * math.gamma((p + 1) / 2) / math.sqrt(math.pi)) ** (-1 / p)
        self._shown = {"p": p} | self._shown

    def deviation(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The root of the mean p-th power, in units of the largest deviation: no power over- or underflows."""
        if not x.numel():
            return mean(x, mask, BATCH)
        largest = x.detach().abs().amax(BATCH, keepdim=True)
        varies = largest > 0
        ratio = (x / torch.where(varies, largest, 1)).abs()
        some = ratio > 0  # a power of zero has no second derivative
        power = mean(torch.where(some, torch.where(some, ratio, 1) ** self.p, 0), mask, BATCH)
        return self.factor * largest * torch.where(varies, power, 1) ** (1 / self.p)


@register("top_k_batch_norm", aliases=("topk_batch_norm", "linf_batch_norm"))
class TopKBatchNorm(DeviationNorm):
    r"""Batch norm by the mean of the k largest deviations, a robust maximum.

    .. math:: y = \gamma_c \frac{x - \mu_c}{\sqrt{s_c^2 + \varepsilon}} + \beta_c, \qquad
              s_c = \frac{1 + \sqrt{\pi \ln 4}}{\sqrt{8 \ln n}}\; \tfrac1k \sum_{i \le k} |x - \mu_c|_{(i)}

    with the :math:`n` values of a channel in a batch ordered by their deviation. The factor brings the expected
    maximum of :math:`n` Gaussian values to their standard deviation; ``k=1`` is the paper's :math:`L_\infty` batch
    norm, ``k=10`` its Top(10).

    Args:
        num_features: number of channels ``C``.
        k: how many of the largest deviations are averaged; all, where a channel has fewer values.
        eps: :math:`\varepsilon`, added to the squared scale.
        affine: learn :math:`\gamma` and :math:`\beta`.
        momentum: weight of the new value in the running averages; ``None`` is the cumulative average.
        track_running_stats: keep running averages and use them in evaluation.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when ``k`` is not positive.
        NormzooError: in training, when a channel has a single value.

    Example:
        >>> TopKBatchNorm(8, k=4)(torch.randn(4, 8, 5)).shape
        torch.Size([4, 8, 5])

    Deviations:
        :math:`\varepsilon` is added to :math:`s^2` under a root; the authors' code adds it to :math:`s`, and averages
        :math:`1/s` for evaluation; here the average is of :math:`s`.

    Reference:
        Hoffer, Banner, Golan and Soudry 2018, Norm matters: efficient and accurate normalization schemes in deep
        networks, arXiv 1803.01814.
    """

    paper = LpBatchNorm.paper

    def __init__(
        self,
        num_features: int,
        *,
        k: int = 10,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(k, int) or k < 1:
            raise OptionError(f"top_k_batch_norm with k={k!r}; expected a positive number of deviations")
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum, track_running_stats=track_running_stats,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        self.k = k
        self._shown = {"k": k} | self._shown

    def deviation(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The mean of the largest absolute values, times the factor for their number."""
        values = x.abs().transpose(0, 1).flatten(1)
        largest = values.topk(min(self.k, values.shape[1]), dim=1, sorted=False).values.sum(1)
        count = torch.as_tensor(total(x, mask), dtype=x.dtype, device=x.device)
        factor = (1 + math.sqrt(math.pi * math.log(4))) / torch.sqrt(8 * torch.log(count.clamp(min=2)))
        return column(factor * largest / count.clamp(1, self.k))


# ---- over channel groups ---------------------------------------------------------------------------------------------


@register("batch_group_norm", aliases=("bgn",))
class BatchGroupNorm(MomentNorm):
    r"""Batch norm whose statistics are shared by groups of channels.

    .. math:: y = \gamma_c \frac{x - \mu_g}{\sqrt{\sigma_g^2 + \varepsilon}} + \beta_c, \qquad
              \mu_g, \sigma_g^2 \text{ over samples, positions and the channels of group } g

    Few groups for small batches, many for large ones: a group for each channel is ``batch_norm``.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when the groups do not divide the channels.
        NormzooError: in training, for groups of a single value.

    Example:
        >>> BatchGroupNorm(64, groups=8)(torch.randn(2, 64, 5, 5)).shape
        torch.Size([2, 64, 5, 5])

    Deviations:
        The paper cuts the flattened channels and positions into groups; here groups are whole channels, which is the
        same wherever the number of groups divides that of the channels, and allows maps of any size. It tunes the
        number of groups; ``"auto"`` is that of ``group_norm``.

    Reference:
        Zhou, Sun, Ye, Lan, Luo, Lai, Esperanca, Yang and Li 2020, Batch Group Normalization, arXiv 2012.02782.
    """

    moments = "b (g c) s -> g"
    paper = Paper("Zhou et al.", 2020, "Batch Group Normalization", "2012.02782")


# ---- frozen ----------------------------------------------------------------------------------------------------------


@register("frozen_batch_norm", aliases=("frozen_bn",))
class FrozenBatchNorm(MomentNorm):
    r"""Batch norm that has stopped: an affine map of stored numbers, in training too; nothing learns.

    .. math:: y = \gamma_c \frac{x - \mu_c}{\sqrt{\sigma_c^2 + \varepsilon}} + \beta_c

    All four are buffers, under the names of batch norm, so that its state dict loads; until one is loaded this is
    the identity up to :math:`\varepsilon`.

    Args:
        num_features: number of channels ``C``.
        eps: :math:`\varepsilon`, added to the variance.
        affine: have :math:`\gamma` and :math:`\beta`.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the buffers live.
        dtype: their dtype, float32 at least.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Example:
        >>> from normzoo import create
        >>> trained, frozen = create("batch_norm", 8), FrozenBatchNorm(8)
        >>> _ = trained(torch.randn(4, 8, 5))
        >>> frozen.load_state_dict(trained.state_dict())
        <All keys matched successfully>
        >>> x = torch.randn(2, 8, 5)
        >>> torch.allclose(frozen(x), trained.eval()(x))
        True

    Reference:
        Common practice in fine-tuning detectors on batches of one or two images: He, Zhang, Ren and Sun 2015, Deep
        Residual Learning for Image Recognition, arXiv 1512.03385, appendix A.
    """

    moments = "b c s -> c"
    paper = Paper("He et al.", 2015, "Deep Residual Learning for Image Recognition", "1512.03385")

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=False, momentum=0.0, channel_dim=channel_dim, device=device, dtype=dtype
        )
        assert self.running_mean is not None
        assert self.running_var is not None
        del self.weight, self.bias  # parameters of another norm, buffers here
        self.register_buffer("weight", self.running_var.clone() if affine else None)
        self.register_buffer("bias", self.running_mean.clone() if affine else None)
        self._shown = {"eps": self.eps} | ({} if affine else {"affine": False})

    @property
    def synchronizable(self) -> bool:
        """There is nothing to share."""
        return False

    @property
    def traits(self) -> Traits:
        """A fixed map of each value."""
        return Traits(batch_dependent=False, causal=True, causal_in_training=True)

    def normalize(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
        """Standardise by the stored statistics, whatever the mode."""
        # copies: a graph must survive that other numbers are loaded over them
        mean, var, weight, bias = (
            None if buffer is None else buffer.clone()
            for buffer in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        assert mean is not None
        assert var is not None
        given = Moments(mean, var, 1.0)
        y, _ = ops.standardize(
            x,
            self.pattern,
            {},
            channels_last=channels_last,
            eps=self.eps,
            weight=weight,
            bias=bias,
            mask=mask,
            given=given,
        )
        return y

    def reset_running_stats(self) -> None:
        """Refuse: frozen statistics are not forgotten."""
        raise NormzooError("frozen_batch_norm keeps its statistics; use batch_norm to gather new ones")
