"""Batch norms that keep the statistics of different kinds of samples apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from normzoo.errors import NormzooError, OptionError
from normzoo.layers.base import CanonicalNorm, MomentNorm, Paper, Traits
from normzoo.layers.batch import BatchNorm
from normzoo.registry import register


@register("domain_batch_norm", aliases=("domain_specific_batch_norm", "dsbn"))
class DomainBatchNorm(CanonicalNorm):
    r"""A batch norm for each domain: statistics, gain and shift of its own; everything else in a net is shared.

    .. math:: y = \gamma_{d,c} \frac{x - \mu_{d,c}}{\sqrt{\sigma_{d,c}^2 + \varepsilon}} + \beta_{d,c}, \qquad
              \mu_{d,c}, \sigma_{d,c}^2 \text{ over the samples of domain } d \text{ and positions}

    Which domain a forward pass belongs to is said by ``norm.domain``, or for a whole model by :func:`use_domain`:
    a number for all samples, as in the paper, or a tensor with a number for each.

    Args:
        num_features: number of channels ``C``.
        num_domains: number of domains.
        eps: :math:`\varepsilon`, added to the variance.
        affine: learn :math:`\gamma` and :math:`\beta`.
        momentum: weight of the new value in the running averages; ``None`` is the cumulative average.
        sync: take the statistics over all processes of ``torch.distributed``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: for a domain that does not exist; in training, when a channel has a single value.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), DomainBatchNorm(8))
        >>> with use_domain(model, 1):
        ...     y = model(torch.randn(4, 3))
        >>> [int(norm.num_batches_tracked) for norm in model[1].domains]
        [0, 1]

    Deviations:
        Samples of several domains in one batch are an addition.

    Reference:
        Chang, You, Seo, Kwak and Han 2019, Domain-Specific Batch Normalization for Unsupervised Domain Adaptation,
        arXiv 1906.03950.
    """

    paper = Paper(
        "Chang et al.", 2019, "Domain-Specific Batch Normalization for Unsupervised Domain Adaptation", "1906.03950"
    )

    expected_failures = {
        "gradients_reach": "a forward pass uses the parameters of its own domain only",
        "distributed_data_parallel": "a forward pass uses the parameters of its own domain only",
    }

    def __init__(
        self,
        num_features: int,
        *,
        num_domains: int = 2,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.1,
        sync: bool = False,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, channel_dim=channel_dim)
        if not isinstance(num_domains, int) or num_domains < 1:
            raise OptionError(f"domain_batch_norm with num_domains={num_domains!r}; expected a positive number")
        self.weight = self.bias = None  # they belong to the domains
        self.domains = nn.ModuleList(
            BatchNorm(
                num_features, eps=eps, affine=affine, momentum=momentum, sync=sync,
                channel_dim=channel_dim, device=device, dtype=dtype,
            )
            for _ in range(num_domains)
        )  # fmt: skip
        self._domain: int | Tensor = 0

    @property
    def domain(self) -> int | Tensor:
        """The domain of the samples to come: a number, or a tensor ``(N,)`` with one for each sample."""
        return self._domain

    @domain.setter
    def domain(self, domain: int | Tensor) -> None:
        if isinstance(domain, Tensor):
            if domain.ndim != 1 or domain.is_floating_point():
                raise NormzooError(
                    f"got domains of shape {tuple(domain.shape)} and dtype {domain.dtype}; expected whole numbers of "
                    "shape (N,), one for each sample"
                )
        elif isinstance(domain, bool) or not isinstance(domain, int) or not 0 <= domain < len(self.domains):
            raise NormzooError(f"there is no domain {domain!r}; expected one of 0 to {len(self.domains) - 1}")
        self._domain = domain

    @property
    def traits(self) -> Traits:
        """Those of batch norm."""
        return self._norm(0).traits

    def _norm(self, domain: int) -> MomentNorm:
        norm = self.domains[domain]
        assert isinstance(norm, MomentNorm)
        return norm

    def normalize(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
        """The batch norm of the domain; of each domain its samples, where they are mixed."""
        if not isinstance(self._domain, Tensor):
            return self._norm(self._domain).normalize(x, mask, channels_last)
        if self._domain.shape != x.shape[:1]:
            raise NormzooError(
                f"got {len(self._domain)} domains for a batch of {len(x)} samples; set the domain for each batch"
            )
        positions = x.shape[1 if channels_last else 2]
        y = torch.zeros_like(x)
        for domain in range(len(self.domains)):
            here = (self._domain == domain)[:, None].expand(-1, positions)
            y = y + self._norm(domain).normalize(x, here if mask is None else here & mask, channels_last)
        return y

    def extra_repr(self) -> str:
        """The number of channels and the layout; the domains are listed below it."""
        return f"{self.num_features}{'' if self.channel_dim == 1 else ', channel_dim=-1'}"


@contextmanager
def use_domain(model: nn.Module, domain: int | Tensor) -> Iterator[None]:
    """Let all of a model's domain batch norms take their input for samples of this domain.

    Args:
        model: the model.
        domain: a number, or a tensor ``(N,)`` with one for each sample.

    Raises:
        NormzooError: for a domain that does not exist.
    """
    norms = [module for module in model.modules() if isinstance(module, DomainBatchNorm)]
    before = [norm.domain for norm in norms]
    try:
        for norm in norms:
            norm.domain = domain
        yield
    finally:
        for norm, old in zip(norms, before, strict=True):
            norm.domain = old


@register("split_batch_norm", aliases=("auxiliary_batch_norm", "aux_bn"))
class SplitBatchNorm(MomentNorm):
    r"""Batch norm with a norm of its own for each part of the training batch; evaluation uses the first.

    .. math:: y = \gamma_{n,c} \frac{x - \mu_{n,c}}{\sqrt{\sigma_{n,c}^2 + \varepsilon}} + \beta_{n,c}, \qquad
              \mu_{n,c}, \sigma_{n,c}^2 \text{ over part } n \text{ of the batch and positions}

    For batches whose first part are clean samples and whose other parts come from another distribution, adversarial or
    strongly augmented, from which evaluation wants no statistics. Statistics, gain and shift are separate: this layer
    itself is the main norm, so that a batch norm's state dict loads into it (``strict=False``), ``auxiliary`` are the
    others.

    Args:
        num_features: number of channels ``C``.
        splits: number of parts; the batch is cut in order, into parts whose sizes differ by at most one.
        eps: :math:`\varepsilon`, added to the variance.
        affine: learn :math:`\gamma` and :math:`\beta`.
        momentum: weight of the new value in the running averages; ``None`` is the cumulative average.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: in training, when a channel of a part has a single value.

    Example:
        >>> norm = SplitBatchNorm(8)
        >>> clean, attacked = torch.randn(4, 8), 5 + torch.randn(4, 8)
        >>> _ = norm(torch.cat([clean, attacked]))
        >>> (norm.running_mean > 0.3).any().item(), (norm.auxiliary[0].running_mean > 0.3).all().item()
        (False, True)

    Deviations:
        There is no ``sync``: each process cuts its own batch. timm's layer of this name refuses a batch that does not
        divide; here the first parts are larger by one.

    Reference:
        Xie, Tan, Gong, Wang, Yuille and Le 2019, Adversarial Examples Improve Image Recognition, arXiv 1911.09665.
    """

    moments = "b c s -> c"
    paper = Paper("Xie et al.", 2019, "Adversarial Examples Improve Image Recognition", "1911.09665")

    expected_failures = {
        "training_and_evaluation_agree": "evaluation standardises all samples by the statistics of the first part",
        "mask_edges": "which part a sample belongs to depends on its place in the batch",
    }

    def __init__(
        self,
        num_features: int,
        *,
        splits: int = 2,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.1,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        if not isinstance(splits, int) or splits < 1:
            raise OptionError(f"split_batch_norm with splits={splits!r}; expected a positive number of parts")
        self.splits = splits
        self._shown = {"splits": splits} | self._shown
        self.auxiliary = nn.ModuleList(
            BatchNorm(
                num_features, eps=eps, affine=affine, momentum=momentum,
                channel_dim=channel_dim, device=device, dtype=dtype,
            )
            for _ in range(splits - 1)
        )  # fmt: skip

    @property
    def synchronizable(self) -> bool:
        """Each process cuts its own batch."""
        return False

    def normalize(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
        """Each part by its norm in training, all by the main one in evaluation."""
        if not self.training or self.splits == 1:
            return super().normalize(x, mask, channels_last)
        if not x.is_contiguous() and x.mT.is_contiguous():  # joining the parts would lose the memory format
            return self.normalize(x.mT, mask, not channels_last).mT
        parts = x.tensor_split(self.splits)
        masks = [None] * self.splits if mask is None else mask.tensor_split(self.splits)
        done = [super().normalize(parts[0], masks[0], channels_last)]
        for norm, part, real in zip(self.auxiliary, parts[1:], masks[1:], strict=True):
            assert isinstance(norm, MomentNorm)
            done.append(norm.normalize(part, real, channels_last))
        return torch.cat(done)
