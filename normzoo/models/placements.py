"""Where the norms of a Transformer are: the schemes of the literature, each of which takes any norm.

A scheme says where norms are, how the residual is added and how weights start; which norm it is, ``norm`` says. So a
scheme whose paper uses layer norm runs with batch norm as well, and each of its sites can have another norm.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normzoo.errors import NormzooError
from normzoo.models.base import Sites
from normzoo.models.transformer import (
    Attention,
    Block,
    Branch,
    FeedForward,
    Placement,
    PostNorm,
    PreNorm,
    Site,
    register_placement,
)


def _scale_weights(body: Attention | FeedForward, gain: float) -> None:
    """Scale the weights that are linear in a branch: of values, of the output, and of both feed-forward layers."""
    with torch.no_grad():
        if isinstance(body, Attention):
            body.qkv.weight.chunk(3)[2].mul_(gain)
            body.out.weight.mul_(gain)
        else:
            for layer in body:
                if isinstance(layer, nn.Linear):
                    layer.weight.mul_(gain)


def _optional_number(name: str, value: float | None, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise NormzooError(f"{name}={value!r}; expected a finite number, or None for the paper's {default:.4g}")
    return float(value)


# ---- norms before and after ------------------------------------------------------------------------------------------


@register_placement("sandwich", aliases=("sandwich_ln", "sandwich_norm"))
class SandwichNorm(Placement):
    r"""A norm comes first in the branch, and another last.

    .. math:: y = x + \mathrm{norm_{after}}(f(\mathrm{norm_{before}}(x)))

    Sites: ``blocks.0.attention.before``, ``blocks.0.attention.after``, the same of ``mlp``, and ``final``.

    Deviations:
        Of the paper's two means against overflow, this is the norm; the relaxed softmax (PB-Relax) changes no value
        and is left to the attention kernel.

    Source:
        Ding et al. 2021, CogView: Mastering Text-to-Image Generation via Transformers, arXiv 2105.13290.
    """

    final = True

    def __init__(self, norm_at: Sites, site: Site, width: int) -> None:
        nn.Module.__init__(self)
        self.before = norm_at(f"{site}.before", width)
        self.after = norm_at(f"{site}.after", width)

    def forward(self, x: Tensor, branch: Branch, mask: Tensor | None) -> Tensor:
        """See the class."""
        return x + self.after(branch(self.before(x, mask)), mask)


@register_placement("peri_ln", aliases=("peri_norm",))
class PeriNorm(SandwichNorm):
    r"""Norms before and after every branch: the equation of :class:`SandwichNorm`, found anew for language models.

    .. math:: y = x + \mathrm{norm_{after}}(f(\mathrm{norm_{before}}(x)))

    The paper's norm of the embedding, which it calls optional, is ``embedding_norm=True`` of the Transformer.

    Sites: ``blocks.0.attention.before``, ``blocks.0.attention.after``, the same of ``mlp``, and ``final``.

    Source:
        Kim et al. 2025, Peri-LN: Revisiting Normalization Layer in the Transformer Architecture, arXiv 2502.02732.
    """


@register_placement("res_post", aliases=("res_post_norm", "reordered"))
class ResPostNorm(Placement):
    r"""The norm comes last in the branch.

    .. math:: y = x + \mathrm{norm}(f(x))

    Sites: ``blocks.0.attention``, ``blocks.0.mlp``, and ``final``.

    Deviations:
        In Swin v2's code the gain of these norms starts at 0, so that a block starts as the identity; here, as in
        OLMo 2, it starts where the norm says.

    Source:
        Liu et al. 2021, Swin Transformer V2: Scaling Up Capacity and Resolution, arXiv 2111.09883; OLMo team 2024,
        2 OLMo 2 Furious, arXiv 2501.00656.
    """

    final = True

    def forward(self, x: Tensor, branch: Branch, mask: Tensor | None) -> Tensor:
        """See the class."""
        return x + self.norm(branch(x), mask)


@register_placement("normformer")
class NormFormer(Placement):
    r"""Pre-norm with a norm after attention, another inside the two-layer network, and scaled heads.

    .. math::
        h &= x + \mathrm{norm_{after}}(W_O\,[\gamma_1 \mathrm{head}_1(u), \dots, \gamma_n \mathrm{head}_n(u)]),
        \qquad u = \mathrm{norm_{before}}(x) \\
        y &= h + W_2\,\mathrm{norm_{hidden}}(\phi(W_1\,\mathrm{norm}(h)))

    with :math:`\gamma = 1` at the start.

    Sites: ``blocks.0.attention.before``, ``blocks.0.attention.after``, ``blocks.0.mlp``, ``blocks.0.mlp.hidden``, and
    ``final``.

    Deviations:
        The scale of the second residual (ResScale), which the paper uses for its smallest models alone, is left out.

    Source:
        Shleifer, Weston, Ott 2021, NormFormer: Improved Transformer Pretraining with Extra Normalization,
        arXiv 2110.09456.
    """

    final = True
    inside = ("hidden",)
    scales_heads = True

    def __init__(self, norm_at: Sites, site: Site, width: int) -> None:
        nn.Module.__init__(self)
        attention = site.branch == "attention"
        self.norm = norm_at(f"{site}.before" if attention else site, width)
        self.after = norm_at(f"{site}.after", width) if attention else None

    def forward(self, x: Tensor, branch: Branch, mask: Tensor | None) -> Tensor:
        """See the class."""
        y = branch(self.norm(x, mask))
        return x + (y if self.after is None else self.after(y, mask))


# ---- scaled residuals and initial weights ----------------------------------------------------------------------------


@register_placement("deepnorm", aliases=("deep_net",))
class DeepNorm(Placement):
    r"""Post-norm with a residual scaled up and weights that start scaled down.

    .. math:: y = \mathrm{norm}(\alpha x + f(x)), \qquad \alpha = (2N)^{1/4}, \quad \beta = (8N)^{-1/4}

    for N blocks; weights of values, of attention's output and of the two-layer network start :math:`\beta` times as
    large.

    Sites: ``blocks.0.attention``, ``blocks.0.mlp``.

    Args:
        norm_at: which norm goes where.
        site: name of the branch.
        width: number of channels.
        alpha: scale of the residual; ``None`` is the paper's for a network of encoder or decoder alone.
        beta: scale of the initial weights; ``None`` is the paper's.

    The paper's bound on how far a step of SGD moves the answer is about these weights. Biases and the norms' own
    parameters are not in it: with them, a step moves the answer further in deeper networks.

    Deviations:
        Queries, keys and values start as one Xavier matrix, as in the authors' code, not as three.

    Source:
        Wang et al. 2022, DeepNet: Scaling Transformers to 1,000 Layers, arXiv 2203.00555.
    """

    final = False

    def __init__(
        self, norm_at: Sites, site: Site, width: int, *, alpha: float | None = None, beta: float | None = None
    ) -> None:
        super().__init__(norm_at, site, width)
        self.alpha = _optional_number("alpha", alpha, (2 * site.depth) ** 0.25)
        self.beta = _optional_number("beta", beta, (8 * site.depth) ** -0.25)

    def forward(self, x: Tensor, branch: Branch, mask: Tensor | None) -> Tensor:
        """See the class."""
        return self.norm(self.alpha * x + branch(x), mask)

    def start(self, body: Attention | FeedForward) -> None:
        """Scale the initial weights."""
        _scale_weights(body, self.beta)

    def extra_repr(self) -> str:
        """Both scales."""
        return f"alpha={self.alpha:.4g}, beta={self.beta:.4g}"


@register_placement("sub_ln", aliases=("magneto",))
class SubNorm(PreNorm):
    r"""Pre-norm with a second norm inside each branch, before its last linear map, and weights that start larger.

    .. math::
        h &= x + W_O\,\mathrm{norm_{out}}(\mathrm{attention}(\mathrm{norm}(x))) \\
        y &= h + W_2\,\mathrm{norm_{hidden}}(\phi(W_1\,\mathrm{norm}(h)))

    Weights of values, of attention's output and of the two-layer network start :math:`\sqrt{\ln 2N}` times as large,
    for N blocks.

    Sites: ``blocks.0.attention``, ``blocks.0.attention.out``, ``blocks.0.mlp``, ``blocks.0.mlp.hidden``, and
    ``final``.

    Deviations:
        Queries, keys and values start as one Xavier matrix, as in the authors' code, not as three.

    Source:
        Wang et al. 2022, Foundation Transformers, arXiv 2210.06423.
    """

    inside = ("out", "hidden")

    def __init__(self, norm_at: Sites, site: Site, width: int) -> None:
        super().__init__(norm_at, site, width)
        self.gain = math.sqrt(math.log(2 * site.depth))

    def start(self, body: Attention | FeedForward) -> None:
        """Scale the initial weights."""
        _scale_weights(body, self.gain)


@register_placement("layernorm_scaling", aliases=("lns", "layer_norm_scaling"))
class ScaledPreNorm(PreNorm):
    r"""Pre-norm whose norms are scaled down with depth.

    .. math:: y = x + f\left(\frac{\mathrm{norm}(x)}{\sqrt{l}}\right)

    in block l, counted from 1. The norm after the last block is not scaled.

    Sites: ``blocks.0.attention``, ``blocks.0.mlp``, and ``final``.

    Source:
        Sun et al. 2025, The Curse of Depth in Large Language Models, arXiv 2502.05795.
    """

    def __init__(self, norm_at: Sites, site: Site, width: int) -> None:
        super().__init__(norm_at, site, width)
        self.scale = (site.block + 1) ** -0.5

    def forward(self, x: Tensor, branch: Branch, mask: Tensor | None) -> Tensor:
        """See the class."""
        return x + branch(self.norm(x, mask) * self.scale)


@register_placement("keel")
class Keel(Placement):
    r"""Post-norm with a highway for the residual, and a norm at the entrance of the branch.

    .. math:: y = \mathrm{norm_{after}}(\alpha x + f(\mathrm{norm_{before}}(x))), \qquad \alpha = 2N

    for N blocks, of two branches each. In the first block :math:`\alpha = 1`, and its attention has no norm after.

    Sites: ``blocks.0.attention.before``, ``blocks.0.mlp.before``, ``blocks.0.mlp.after``,
    ``blocks.1.attention.before``, ``blocks.1.attention.after``, … .

    Args:
        norm_at: which norm goes where.
        site: name of the branch.
        width: number of channels.
        alpha: scale of the residual; ``None`` is the paper's, the number of branches in the network.

    Deviations:
        The paper's norm is an rms norm with a gain and no bias; here it is the norm that is asked for.

    Source:
        Chen, Wei 2026, Post-LayerNorm Is Back: Stable, ExpressivE, and Deep, arXiv 2601.19895.
    """

    final = False

    def __init__(self, norm_at: Sites, site: Site, width: int, *, alpha: float | None = None) -> None:
        nn.Module.__init__(self)
        alpha = _optional_number("alpha", alpha, 2 * site.depth)
        self.alpha = alpha if site.block else 1.0
        self.before = norm_at(f"{site}.before", width)
        first = site.block == 0 and site.branch == "attention"
        self.after = None if first else norm_at(f"{site}.after", width)

    def forward(self, x: Tensor, branch: Branch, mask: Tensor | None) -> Tensor:
        """See the class."""
        y = self.alpha * x + branch(self.before(x, mask))
        return y if self.after is None else self.after(y, mask)


# ---- other ways for the residual -------------------------------------------------------------------------------------


class BottomToTopBlock(Block):
    """A block whose input is added once more before its last norm."""

    def forward(self, x: Tensor, mask: Tensor | None, allowed: Tensor | None, causal: bool) -> Tensor:
        """``(N, T, width)`` to the same."""
        attend, transform = self.branches(mask, allowed, causal)
        h = self.attention_residual(x, attend, mask)
        return self.mlp_residual(h, lambda y: x + transform(y), mask)


@register_placement("b2t", aliases=("bottom_to_top",))
class BottomToTop(PostNorm):
    r"""Post-norm with a residual around all of a block but its last norm.

    .. math:: h = \mathrm{norm}(x + \mathrm{attention}(x)), \qquad y = \mathrm{norm}(x + h + \mathrm{mlp}(h))

    Sites: ``blocks.0.attention``, ``blocks.0.mlp``.

    Deviations:
        The authors' code rescales the initial weights of deep networks as well, which is not part of the scheme.

    Source:
        Takase, Kiyono, Kobayashi, Suzuki 2022, B2T Connection: Serving Stability and Performance in Deep
        Transformers, arXiv 2206.00330.
    """

    @staticmethod
    def block() -> type[Block]:
        """The class of the blocks."""
        return BottomToTopBlock


@register_placement("residual_dual", aliases=("residual", "residi_dual", "pre_post_ln"))
class DualResidual(PostNorm):
    r"""Two streams, one of post-norm and one of pre-norm, which are added at the end.

    .. math::
        a_{k+1} &= \mathrm{norm}(a_k + f_k(a_k)), \qquad d_{k+1} = d_k + f_k(a_k), \qquad a_0 = d_0 = x \\
        y &= a_K + \mathrm{norm_{final}}(d_K)

    Between blocks the streams travel side by side, as ``(N, T, 2 width)``.

    Sites: ``blocks.0.attention``, ``blocks.0.mlp``, and ``final``.

    Source:
        Xie et al. 2023, ResiDual: Transformer with Dual Residual Connections, arXiv 2304.14802.
    """

    final = True

    def forward(self, x: Tensor, branch: Branch, mask: Tensor | None) -> Tensor:
        """See the class."""
        a, d = x.chunk(2, -1)
        y = branch(a)
        return torch.cat([self.norm(a + y, mask), d + y], -1)

    @staticmethod
    def begin(x: Tensor) -> Tensor:
        """Both streams."""
        return torch.cat([x, x], -1)

    @staticmethod
    def end(x: Tensor, final_norm: nn.Module | None, mask: Tensor | None) -> Tensor:
        """Their sum."""
        assert final_norm is not None
        a, d = x.chunk(2, -1)
        return a + final_norm(d, mask)


@register_placement("mix_ln", aliases=("mix_norm",))
class MixNorm(Placement):
    r"""Post-norm in the first :math:`\lfloor \alpha N \rfloor` of N blocks, pre-norm in the others.

    .. math:: y = \begin{cases} \mathrm{norm}(x + f(x)) & l \le \alpha N \\ x + f(\mathrm{norm}(x)) & l > \alpha N
        \end{cases}

    Sites: ``blocks.0.attention``, ``blocks.0.mlp``, and ``final``.

    Args:
        norm_at: which norm goes where.
        site: name of the branch.
        width: number of channels.
        alpha: fraction of the blocks with post-norm. With the paper's 0.25, fewer than four blocks are all pre-norm.

    Source:
        Li, Yin, Liu 2024, Mix-LN: Unleashing the Power of Deeper Layers by Combining Pre-LN and Post-LN,
        arXiv 2412.13795.
    """

    final = True

    def __init__(self, norm_at: Sites, site: Site, width: int, *, alpha: float = 0.25) -> None:
        super().__init__(norm_at, site, width)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
            raise NormzooError(f"alpha={alpha!r}; expected the fraction of blocks with post-norm, from 0 to 1")
        # rounded first, lest 0.7 of ten blocks be six
        self.post = site.block < math.floor(round(alpha * site.depth, 9))

    def forward(self, x: Tensor, branch: Branch, mask: Tensor | None) -> Tensor:
        """See the class."""
        if self.post:
            return self.norm(x + branch(x), mask)
        return x + branch(self.norm(x, mask))


@register_placement("hybrid_norm")
class HybridNorm(Placement):
    r"""Norms of queries, keys and values in attention, and a norm before the two-layer network on its residual too.

    .. math::
        h &= x + W_O\,\mathrm{attention}(\mathrm{norm}_Q(W_Q x), \mathrm{norm}_K(W_K x), \mathrm{norm}_V(W_V x)) \\
        y &= \mathrm{norm}(h) + \mathrm{mlp}(\mathrm{norm}(h))

    which is post-norm of the two-layer network, with its norm moved to the next sum. The three norms are over the
    channels of each head, with parameters that the heads share.

    Sites: ``blocks.0.attention.query``, ``blocks.0.attention.key``, ``blocks.0.attention.value``, ``blocks.0.mlp``,
    and ``final``; with ``star``, ``blocks.0.attention``.

    Args:
        norm_at: which norm goes where.
        site: name of the branch.
        width: number of channels.
        star: HybridNorm*, whose first block is pre-norm as well: x + attention(norm(x)), h + mlp(norm(h)).

    Source:
        Zhuo et al. 2025, HybridNorm: Towards Stable and Efficient Transformer Training via Hybrid Normalization,
        arXiv 2503.04598.
    """

    final = True
    inside = ("query", "key", "value")

    def __init__(self, norm_at: Sites, site: Site, width: int, *, star: bool = False) -> None:
        nn.Module.__init__(self)
        self.pre = bool(star) and site.block == 0
        self.norm = norm_at(site, width) if self.pre or site.branch == "mlp" else None

    def forward(self, x: Tensor, branch: Branch, mask: Tensor | None) -> Tensor:
        """See the class."""
        y = x if self.norm is None else self.norm(x, mask)
        return (x if self.pre else y) + branch(y)


# ---- learned scales --------------------------------------------------------------------------------------------------


class ReZeroBlock(Block):
    """A block whose two branches share the scale of the first."""

    def forward(self, x: Tensor, mask: Tensor | None, allowed: Tensor | None, causal: bool) -> Tensor:
        """``(N, T, width)`` to the same."""
        attend, transform = self.branches(mask, allowed, causal)
        return self.attention_residual(self.attention_residual(x, attend, mask), transform, mask)


@register_placement("rezero")
class ReZero(Placement):
    r"""No norm: a learned scale of the branch, which starts at zero.

    .. math:: y = x + \alpha f(x), \qquad \alpha = 0 \text{ at the start}

    with one :math:`\alpha` for the two branches of a block. There are no sites, so the norm is ``"none"``.

    Source:
        Bachlechner et al. 2020, ReZero is All You Need: Fast Convergence at Large Depth, arXiv 2003.04887.
    """

    final = False

    def __init__(self, norm_at: Sites, site: Site, width: int) -> None:
        nn.Module.__init__(self)
        self.scale = nn.Parameter(torch.zeros(())) if site.branch == "attention" else None

    def forward(self, x: Tensor, branch: Branch, mask: Tensor | None) -> Tensor:
        """See the class."""
        assert self.scale is not None  # the block calls the placement of its first branch for both
        return x + self.scale * branch(x)

    @staticmethod
    def block() -> type[Block]:
        """The class of the blocks."""
        return ReZeroBlock


@register_placement("layer_scale")
class LayerScale(PreNorm):
    r"""Pre-norm with a learned scale for each channel of the branch, which starts small.

    .. math:: y = x + \lambda \odot f(\mathrm{norm}(x))

    Sites: ``blocks.0.attention``, ``blocks.0.mlp``, and ``final``.

    Args:
        norm_at: which norm goes where.
        site: name of the branch.
        width: number of channels.
        init: initial :math:`\lambda`; ``None`` is the paper's: 0.1 up to 18 blocks, 1e-5 up to 24, 1e-6 beyond.

    Source:
        Touvron et al. 2021, Going deeper with Image Transformers, arXiv 2103.17239.
    """

    def __init__(self, norm_at: Sites, site: Site, width: int, *, init: float | None = None) -> None:
        super().__init__(norm_at, site, width)
        paper = 0.1 if site.depth <= 18 else 1e-5 if site.depth <= 24 else 1e-6
        self.scale = nn.Parameter(torch.full((width,), _optional_number("init", init, paper)))

    def forward(self, x: Tensor, branch: Branch, mask: Tensor | None) -> Tensor:
        """See the class."""
        return x + self.scale * branch(self.norm(x, mask))


# ---- nGPT ------------------------------------------------------------------------------------------------------------


class LearnedScale(nn.Module):
    """A learned vector that starts at ``init`` and is stored as if it started at ``scale``.

    An optimizer whose steps have one size for all parameters changes it ``init / scale`` times as fast.
    """

    def __init__(self, size: int, init: float, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), scale))
        self.rate = init / scale

    @property
    def value(self) -> Tensor:
        """The vector."""
        return self.weight * self.rate

    def forward(self, x: Tensor) -> Tensor:
        """``(…, size)`` to the same."""
        return self.value * x


class UnitLinear(nn.Linear):
    """A linear map without bias whose rows (``dim=1``) or columns (``dim=0``) have length one, whatever is stored.

    Args:
        before: width of the input.
        after: width of the output.
        dim: the dimension of the weight along which its vectors lie.
    """

    def __init__(self, before: int, after: int, *, dim: int = 1) -> None:
        super().__init__(before, after, bias=False)
        self.dim = dim
        nn.init.normal_(self.weight)
        self.renormalize_()

    def forward(self, input: Tensor) -> Tensor:
        """As :class:`torch.nn.Linear`."""
        return F.linear(input, F.normalize(self.weight, dim=self.dim))

    @torch.no_grad()
    def renormalize_(self) -> None:
        """Store the vectors as they are used."""
        self.weight.copy_(F.normalize(self.weight, dim=self.dim))


def renormalize_(model: nn.Module) -> None:
    """Put the weights of a model with the placement ``"ngpt"`` back on the sphere; call it after each optimizer step.

    The network computes the same with and without it: what it changes is the length of the stored vectors, and so the
    size of the next steps relative to them.
    """
    for module in model.modules():
        if isinstance(module, UnitLinear):
            module.renormalize_()


class SphereAttention(Attention):
    """Attention whose matrices have rows or columns of length one, with learned scales of queries and keys."""

    def __init__(self, width: int, heads: int, norms: dict[str, nn.Module], scales_heads: bool = False) -> None:
        super().__init__(width, heads, norms, scales_heads)
        self.qkv = UnitLinear(width, 3 * width)
        self.out = UnitLinear(width, width, dim=0)
        self.query_key_scale = LearnedScale(width, 1.0, width**-0.5)

    def at(self, point: str, x: Tensor, mask: Tensor | None) -> Tensor:
        """What is done to ``x`` at a point inside."""
        x = super().at(point, x, mask)
        return x * self.query_key_scale.value.view(self.heads, -1) if point in ("query", "key") else x


class SphereFeedForward(FeedForward):
    """The two-layer network with weights of length one, and a learned scale before the activation."""

    def maps(self, width: int, hidden: int) -> tuple[list[nn.Module], nn.Module]:
        """What is before the activation, and what gives the output."""
        return [UnitLinear(width, hidden), LearnedScale(hidden, 1.0, 1.0)], UnitLinear(hidden, width, dim=0)


class SphereBlock(Block):
    """A block on the sphere."""

    attention_type: ClassVar[type[Attention]] = SphereAttention
    mlp_type: ClassVar[type[FeedForward]] = SphereFeedForward


class SphereHead(nn.Module):
    """Cosines with a vector for each answer, each with a learned scale."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.map = UnitLinear(width, outputs)
        self.scale = LearnedScale(outputs, 1.0, width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``(…, width)`` to ``(…, outputs)``."""
        return self.scale(self.map(x) * x.shape[-1] ** -0.5)


@register_placement("ngpt", aliases=("normalized_gpt",))
class NormalizedGPT(Placement):
    r"""Everything on a sphere: states and branches are normalised, weights have length one, each step is learned.

    .. math::
        y &= \mathrm{norm_{sum}}(x + |\alpha| \odot (\mathrm{norm_{branch}}(f(x)) - x)), \qquad \alpha = 0.05
        \text{ at the start} \\
        \mathrm{attention} &: q = s_{qk} \odot \mathrm{norm}_Q(W_Q x), \quad k = s_{qk} \odot \mathrm{norm}_K(W_K x) \\
        \mathrm{mlp}(x) &= W_2\,\phi(s_u \odot W_1 x), \qquad \mathrm{answer}(x) = s_z \odot W_z x / \sqrt{d}

    with rows of :math:`W_Q, W_K, W_V, W_1, W_z` and columns of :math:`W_O, W_2` of length one, no biases, and learned
    :math:`\alpha, s_{qk}, s_u, s_z`. The paper's states have length one; here, that any norm may take part, they have
    length :math:`\sqrt d`, which is the same network with the norm ``"rms_norm(affine=False)"``: that one is the
    paper's. The weights' length is part of the network; call :func:`renormalize_` after each step of the optimizer
    to have it in what is stored too, and train without weight decay.

    Sites: ``embedding``, ``blocks.0.attention.query``, ``blocks.0.attention.key``, ``blocks.0.attention.branch``,
    ``blocks.0.attention.sum``, ``blocks.0.mlp.branch``, ``blocks.0.mlp.sum``, … .

    Args:
        norm_at: which norm goes where.
        site: name of the branch.
        width: number of channels.
        rate: initial :math:`\alpha`.

    Deviations:
        Gradients are of the weights as used, so they have no part along the weights, where the paper normalises after
        the step alone. The two-layer network has no gate, and positions are learned rather than rotated; the sum
        of token and position is normalised, in place of the rows of the embedding. A ``"none"`` at a site leaves it
        unnormalised.

    Source:
        Loshchilov, Hsieh, Sun, Ginsburg 2024, nGPT: Normalized Transformer with Representation Learning on the
        Hypersphere, arXiv 2410.01131.
    """

    final = False
    embeds = True
    inside = ("query", "key")

    def __init__(self, norm_at: Sites, site: Site, width: int, *, rate: float = 0.05) -> None:
        nn.Module.__init__(self)
        self.branch = norm_at(f"{site}.branch", width)
        self.sum = norm_at(f"{site}.sum", width)
        self.rate = LearnedScale(width, _optional_number("rate", rate, 0.05), width**-0.5)

    def forward(self, x: Tensor, branch: Branch, mask: Tensor | None) -> Tensor:
        """See the class."""
        return self.sum(x + self.rate.value.abs() * (self.branch(branch(x), mask) - x), mask)

    @staticmethod
    def block() -> type[Block]:
        """The class of the blocks."""
        return SphereBlock

    @staticmethod
    def head(width: int, outputs: int) -> nn.Module:
        """The map to the answer."""
        return SphereHead(width, outputs)
