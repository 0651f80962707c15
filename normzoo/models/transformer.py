"""Transformers: an encoder that classifies, a decoder that predicts what comes next."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normzoo.errors import NormzooError
from normzoo.models.base import Inputs, Network, NormChoice, Sites, one_of, register_model, whole_number
from normzoo.models.dropout import Dropout
from normzoo.models.layer import activation_beside

# ---- placements: where the norms of a residual branch are ------------------------------------------------------------

Branch = Callable[[Tensor], Tensor]


class Placement(nn.Module):
    """How a residual branch and its norms are put together: a subclass makes its norms, and says how.

    Args:
        norm_at: which norm goes where.
        site: name of the branch: ``"blocks.0.attention"`` or ``"blocks.0.mlp"``.
        width: number of channels.
    """

    final: ClassVar[bool]
    """Whether a norm follows the last block."""

    def __init__(self, norm_at: Sites, site: str, width: int) -> None:
        super().__init__()
        self.norm = norm_at(site, width)

    def forward(self, x: Tensor, branch: Branch, mask: Tensor | None) -> Tensor:
        """``(N, T, width)`` to the same."""
        raise NotImplementedError


PLACEMENTS: dict[str, type[Placement]] = {}
_Placement = TypeVar("_Placement", bound=type[Placement])


def register_placement(name: str) -> Callable[[_Placement], _Placement]:
    """Give a placement a name.

    Raises:
        NormzooError: for a name that is taken.
    """

    def add(cls: _Placement) -> _Placement:
        if name in PLACEMENTS:
            raise NormzooError(f"the placement {name!r} is registered already, as {PLACEMENTS[name].__qualname__}")
        PLACEMENTS[name] = cls
        return cls

    return add


@register_placement("pre")
class PreNorm(Placement):
    r"""The norm comes first in the branch.

    .. math:: y = x + f(\mathrm{norm}(x))

    Source:
        Xiong et al. 2020, On Layer Normalization in the Transformer Architecture, arXiv 2002.04745.
    """

    final = True

    def forward(self, x: Tensor, branch: Branch, mask: Tensor | None) -> Tensor:
        """See the class."""
        return x + branch(self.norm(x, mask))


@register_placement("post")
class PostNorm(Placement):
    r"""The norm follows the sum.

    .. math:: y = \mathrm{norm}(x + f(x))

    Source:
        Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762.
    """

    final = False

    def forward(self, x: Tensor, branch: Branch, mask: Tensor | None) -> Tensor:
        """See the class."""
        return self.norm(x + branch(x), mask)


# ---- the network -----------------------------------------------------------------------------------------------------


def _linear(before: int, after: int) -> nn.Linear:
    linear = nn.Linear(before, after)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Attention(nn.Module):
    """Scaled dot-product attention with several heads.

    Dropout of attention weights is left out: torch's fast kernels draw it from the global random numbers, which
    would differ from norm to norm.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = _linear(width, 3 * width)
        self.out = _linear(width, width)

    def forward(self, x: Tensor, allowed: Tensor | None, causal: bool) -> Tensor:
        """``(N, T, width)`` to the same; ``allowed`` is ``(N, 1, T, T)``, true where a query may see a key."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal and allowed is None)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a network of two layers at every position, each in a residual branch."""

    def __init__(
        self, width: int, heads: int, hidden: int, activation: str, dropout: float, place: type[Placement],
        norm_at: Sites, site: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            _linear(width, hidden), activation_beside(None, activation), Dropout(dropout), _linear(hidden, width)
        )
        self.attention_residual = place(norm_at, f"{site}.attention", width)
        self.mlp_residual = place(norm_at, f"{site}.mlp", width)
        self.attention_dropout = Dropout(dropout)
        self.mlp_dropout = Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None, allowed: Tensor | None, causal: bool) -> Tensor:
        """``(N, T, width)`` to the same."""
        x = self.attention_residual(x, lambda y: self.attention_dropout(self.attention(y, allowed, causal)), mask)
        return self.mlp_residual(x, lambda y: self.mlp_dropout(self.mlp(y)), mask)


@register_model("transformer")
class Transformer(Network):
    r"""A Transformer: an encoder where it answers once per sample, a causal decoder where it answers at every position.

    Tokens (or linear maps of patches) plus learned positions, blocks of attention and a two-layer network with the
    norms as ``placement`` says, a norm after the last block where the placement has one, and a linear map to the
    answer. One answer per sample is read from a token of its own that is put first, or from the mean over real
    positions; that mean says nothing after a norm which centres each channel over the positions (instance norm).

    Linear maps start as Xavier's; embeddings of tokens and of positions with variance 1/2 each, so that their sum has
    variance one.

    Sites: ``blocks.0.attention``, ``blocks.0.mlp``, …, ``final`` with placement ``"pre"``, and ``embedding`` with
    ``embedding_norm`` (patterns ``"attention"``, ``"blocks.0.*"``).

    Args:
        norm: a norm, or a mapping from sites to norms.
        inputs: ``(T, F)``, or ``(T,)`` with a vocabulary; sequences may be shorter.
        outputs: width of the answer.
        width: number of channels.
        depth: number of blocks.
        heads: number of attention heads; divides ``width``.
        mlp_ratio: width of the hidden layer of a block, in units of ``width``.
        placement: a name in :data:`PLACEMENTS`: ``"pre"``, ``"post"``, or one of your own.
        activation: a name in :data:`normzoo.models.layer.ACTIVATIONS`.
        dropout: probability of zero, on embeddings, hidden layers and the ends of branches.
        causal: a position sees earlier ones alone; ``None`` is true for answers per position, false otherwise.
        pool: for one answer per sample, ``"cls"`` or ``"mean"``; ``None`` is ``"cls"``, or ``"mean"`` when causal.
        embedding_norm: a norm after the embedding.

    Shape:
        ``(N, T, F)`` or ``(N, T)`` to ``(N, outputs)``, or ``(N, T, outputs)`` per position.

    Source:
        Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762.
    """

    family = "transformer"

    def __init__(
        self,
        *,
        norm: NormChoice,
        inputs: Inputs,
        outputs: int,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        mlp_ratio: int = 4,
        placement: str = "pre",
        activation: str = "gelu",
        dropout: float = 0.0,
        causal: bool | None = None,
        pool: Literal["cls", "mean"] | None = None,
        embedding_norm: bool = False,
    ) -> None:
        super().__init__(inputs, outputs)
        place = PLACEMENTS[one_of("placement", placement, PLACEMENTS)]
        if whole_number("width", width) % whole_number("heads", heads):
            raise NormzooError(f"heads={heads} does not divide width={width}")
        hidden = width * whole_number("mlp_ratio", mlp_ratio)
        self.causal = inputs.per_position if causal is None else causal
        if pool is None:
            pool = "mean" if self.causal or inputs.per_position else "cls"
        elif inputs.per_position:
            raise NormzooError(f"pool={pool!r} with answers per position; leave it out")
        one_of("pool", pool, ("cls", "mean"))
        if pool == "cls" and self.causal:
            raise NormzooError("pool='cls' and causal=True: the first token would see itself alone; give pool='mean'")

        if inputs.vocabulary:
            self.embedding = nn.Embedding(inputs.vocabulary, width)
            nn.init.normal_(self.embedding.weight, std=0.5**0.5)
        else:
            self.embedding = _linear(inputs.shape[1], width)
        self.positions = nn.Parameter(torch.randn(inputs.shape[0], width) * 0.5**0.5)
        self.cls = nn.Parameter(torch.randn(width)) if pool == "cls" else None
        self.embedding_dropout = Dropout(dropout)
        self.blocks = nn.ModuleList()
        with Sites(norm, channel_dim=-1) as norm_at:
            self.embedding_norm = norm_at("embedding", width) if embedding_norm else None
            for i in range(whole_number("depth", depth)):
                self.blocks.append(Block(width, heads, hidden, activation, dropout, place, norm_at, f"blocks.{i}"))
            self.final_norm = norm_at("final", width) if place.final else None
        self.head = _linear(width, outputs)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class."""
        x = self.admit(x, mask)
        if x.shape[1] > len(self.positions):
            raise NormzooError(
                f"Transformer got sequences of {x.shape[1]} positions; it has learned positions for "
                f"{len(self.positions)}, the T of its inputs"
            )
        x = self.embedding(x) + self.positions[: x.shape[1]]
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)
            mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x, mask)
        x = self.embedding_dropout(x)
        allowed = None if mask is None else _allowed(mask, self.causal)
        for block in self.blocks:
            x = block(x, mask, allowed, self.causal)
        if self.final_norm is not None:
            x = self.final_norm(x, mask)
        return self.head(x if self.inputs.per_position else self._pooled(x, mask))

    def _pooled(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.cls is not None:
            return x[:, 0]
        if mask is None:
            return x.mean(1)
        return torch.where(mask.unsqueeze(-1), x, 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _allowed(mask: Tensor, causal: bool) -> Tensor:
    """Which query sees which key: real ones, earlier ones when causal, and always itself, lest a row be empty."""
    steps = mask.shape[1]
    allowed = mask[:, None, None, :].expand(-1, 1, steps, -1)
    if causal:
        allowed = allowed & torch.ones(steps, steps, dtype=torch.bool, device=mask.device).tril()
    return allowed | torch.eye(steps, dtype=torch.bool, device=mask.device)
