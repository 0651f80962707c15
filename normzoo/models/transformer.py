"""Transformers: an encoder that classifies, a decoder that predicts what comes next."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normzoo.errors import NormzooError, unknown, unknown_option
from normzoo.layers.base import Norm
from normzoo.models.base import Inputs, Network, NormChoice, Sites, one_of, refuse_norm, register_model, whole_number
from normzoo.models.dropout import Dropout
from normzoo.models.layer import activation_beside
from normzoo.registry import fold, parse_spec

# ---- placements: where the norms of a residual branch are ------------------------------------------------------------

Branch = Callable[[Tensor], Tensor]


class Site(str):
    """The name of a residual branch, ``"blocks.0.attention"`` say, that knows where in the network it is.

    Attributes:
        branch: ``"attention"`` or ``"mlp"``.
        block: number of its block, from 0.
        depth: how many blocks there are.
    """

    branch: Literal["attention", "mlp"]
    block: int
    depth: int

    def __new__(cls, branch: Literal["attention", "mlp"], block: int, depth: int) -> Self:
        """The site of a branch."""
        site = super().__new__(cls, f"blocks.{block}.{branch}")
        site.branch, site.block, site.depth = branch, block, depth
        return site


class Placement(nn.Module):
    """How a residual branch and its norms are put together: a subclass makes its norms, and says how.

    Options of a placement are keyword arguments of its constructor; a user gives them with the name, as in
    ``placement="mix_ln(alpha=0.5)"``.

    Args:
        norm_at: which norm goes where.
        site: name of the branch; ``site.branch``, ``site.block`` and ``site.depth`` tell where it is.
        width: number of channels.
    """

    final: ClassVar[bool]
    """Whether a norm follows the last block."""

    embeds: ClassVar[bool] = False
    """Whether a norm follows the embedding, asked for or not."""

    inside: ClassVar[tuple[str, ...]] = ()
    """Norms inside the branches: ``"query"``, ``"key"`` and ``"value"`` over each head's channels, ``"out"`` before
    attention's output map, ``"hidden"`` before the second map of the two-layer network."""

    scales_heads: ClassVar[bool] = False
    """Whether each head of attention has a learned scale."""

    def __init__(self, norm_at: Sites, site: Site, width: int) -> None:
        super().__init__()
        self.norm = norm_at(site, width)

    def forward(self, x: Tensor, branch: Branch, mask: Tensor | None) -> Tensor:
        """``(N, T, width)`` to the same."""
        raise NotImplementedError

    def start(self, body: Attention | FeedForward) -> None:
        """Change the initial weights of what is in the branch."""

    @staticmethod
    def block() -> type[Block]:
        """The class of the blocks."""
        return Block

    @staticmethod
    def begin(x: Tensor) -> Tensor:
        """What the first block gets, from the embedding."""
        return x

    @staticmethod
    def end(x: Tensor, final_norm: nn.Module | None, mask: Tensor | None) -> Tensor:
        """What the answer is read from, from what the last block gives."""
        return x if final_norm is None else final_norm(x, mask)

    @staticmethod
    def head(width: int, outputs: int) -> nn.Module:
        """The map to the answer."""
        return linear_map(width, outputs)


PLACEMENTS: dict[str, type[Placement]] = {}
_aliases: dict[str, str] = {}
_Placement = TypeVar("_Placement", bound=type[Placement])


def register_placement(name: str, *, aliases: tuple[str, ...] = ()) -> Callable[[_Placement], _Placement]:
    """Give a placement a name.

    Args:
        name: snake_case; look-up ignores case, ``-`` and ``_``.
        aliases: other names people use.

    Raises:
        NormzooError: for a name that is taken.
    """

    def add(cls: _Placement) -> _Placement:
        for alias in (name, *aliases):
            if (taken := _canonical(alias)) is not None:
                known = PLACEMENTS[taken].__qualname__
                raise NormzooError(f"the placement {alias!r} is registered already, as {known}")
        PLACEMENTS[name] = cls
        _aliases.update({fold(alias): name for alias in aliases})
        return cls

    return add


def list_placements() -> list[str]:
    """The names of all placements of norms in a Transformer, sorted.

    >>> list_placements()[:3]
    ['b2t', 'deepnorm', 'hybrid_norm']
    """
    return sorted(PLACEMENTS)


def _canonical(name: str) -> str | None:
    known = _aliases | {fold(key): key for key in PLACEMENTS}
    return known.get(fold(name))


def find_placement(spec: str) -> partial[Placement]:
    """The placement that ``"name"`` or ``"name(option=literal, …)"`` names, with its options.

    Raises:
        NormzooError: for an unknown name or option, with the closest ones, and for options that are no literals.
    """
    target, options = parse_spec(str(spec), "placement", "mix_ln(alpha=0.5)")
    name = _canonical(target)
    if name is None:
        raise unknown("placement", target, PLACEMENTS)
    cls = PLACEMENTS[name]
    parameters = inspect.signature(cls).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if extra := [option for option in options if option not in known]:
        raise unknown_option(f"the placement {name!r}", extra[0], known)
    return partial(cls, **options)


@register_placement("pre")
class PreNorm(Placement):
    r"""The norm comes first in the branch.

    .. math:: y = x + f(\mathrm{norm}(x))

    Sites: ``blocks.0.attention``, ``blocks.0.mlp``, and ``final``.

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

    Sites: ``blocks.0.attention``, ``blocks.0.mlp``.

    Source:
        Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762.
    """

    final = False

    def forward(self, x: Tensor, branch: Branch, mask: Tensor | None) -> Tensor:
        """See the class."""
        return self.norm(x + branch(x), mask)


# ---- the network -----------------------------------------------------------------------------------------------------


def linear_map(before: int, after: int) -> nn.Linear:
    """A linear map that starts as Xavier's, with a bias of zero."""
    linear = nn.Linear(before, after)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Attention(nn.Module):
    """Scaled dot-product attention with several heads.

    Dropout of attention weights is left out: torch's fast kernels draw it from the global random numbers, which
    would differ from norm to norm.

    Args:
        width: number of channels.
        heads: number of heads.
        norms: norms inside, by the names of :attr:`Placement.inside`.
        scales_heads: each head has a learned scale.
    """

    def __init__(self, width: int, heads: int, norms: Mapping[str, nn.Module], scales_heads: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = linear_map(width, 3 * width)
        self.out = linear_map(width, width)
        self.norms = nn.ModuleDict(norms)
        self.head_scale = nn.Parameter(torch.ones(heads)) if scales_heads else None

    def forward(self, x: Tensor, mask: Tensor | None, allowed: Tensor | None, causal: bool) -> Tensor:
        """``(N, T, width)`` to the same; ``allowed`` is ``(N, 1, T, T)``, true where a query may see a key."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        heads = None if mask is None or not self.norms else mask.unsqueeze(-1).expand(-1, -1, self.heads)
        q, k, v = (self.at(p, y, heads).transpose(1, 2) for p, y in (("query", q), ("key", k), ("value", v)))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal and allowed is None)
        y = y.transpose(1, 2)
        if self.head_scale is not None:
            y = y * self.head_scale.unsqueeze(-1)
        return self.out(self.at("out", y.flatten(2), mask))

    def at(self, point: str, x: Tensor, mask: Tensor | None) -> Tensor:
        """What is done to ``x`` at a point inside."""
        return self.norms[point](x, mask) if point in self.norms else x


class FeedForward(nn.Sequential):
    """The network of two layers at every position, with a norm before the second where the placement has one."""

    def __init__(self, width: int, hidden: int, activation: str, dropout: float, norm: nn.Module | None) -> None:
        first, second = self.maps(width, hidden)
        between = [activation_beside(norm, activation), Dropout(dropout)]
        super().__init__(*first, *between, *([] if norm is None else [norm]), second)

    def maps(self, width: int, hidden: int) -> tuple[list[nn.Module], nn.Module]:
        """What is before the activation, and what gives the output."""
        return [linear_map(width, hidden)], linear_map(hidden, width)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(N, T, width)`` to the same."""
        for layer in self:
            input = layer(input, mask) if isinstance(layer, Norm) else layer(input)
        return input


class Block(nn.Module):
    """Attention and a network of two layers at every position, each in a residual branch."""

    attention_type: ClassVar[type[Attention]] = Attention
    mlp_type: ClassVar[type[FeedForward]] = FeedForward

    def __init__(
        self, width: int, heads: int, hidden: int, activation: str, dropout: float, place: partial[Placement],
        norm_at: Sites, index: int, depth: int,
    ) -> None:  # fmt: skip
        super().__init__()
        here: dict[str, Site] = {"attention": Site("attention", index, depth), "mlp": Site("mlp", index, depth)}
        parts: type[Placement] = place.func  # pyright: ignore[reportAssignmentType]  (a class is called)
        inside = {p: norm_at(f"{here['attention']}.{p}", width if p == "out" else width // heads)
                  for p in parts.inside if p != "hidden"}  # fmt: skip
        hidden_norm = norm_at(f"{here['mlp']}.hidden", hidden) if "hidden" in parts.inside else None
        self.attention = self.attention_type(width, heads, inside, parts.scales_heads)
        self.mlp = self.mlp_type(width, hidden, activation, dropout, hidden_norm)
        self.attention_residual = place(norm_at, here["attention"], width)
        self.mlp_residual = place(norm_at, here["mlp"], width)
        self.attention_residual.start(self.attention)
        self.mlp_residual.start(self.mlp)
        self.attention_dropout = Dropout(dropout)
        self.mlp_dropout = Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None, allowed: Tensor | None, causal: bool) -> Tensor:
        """``(N, T, width)`` to the same."""
        attend, transform = self.branches(mask, allowed, causal)
        return self.mlp_residual(self.attention_residual(x, attend, mask), transform, mask)

    def branches(self, mask: Tensor | None, allowed: Tensor | None, causal: bool) -> tuple[Branch, Branch]:
        """Attention and the two-layer network, as functions."""
        return (
            lambda y: self.attention_dropout(self.attention(y, mask, allowed, causal)),
            lambda y: self.mlp_dropout(self.mlp(y, mask)),
        )


@register_model("transformer")
class Transformer(Network):
    r"""A Transformer: an encoder where it answers once per sample, a causal decoder where it answers at every position.

    Tokens (or linear maps of patches) plus learned positions, blocks of attention and a two-layer network with the
    norms as ``placement`` says, a norm after the last block where the placement has one, and a linear map to the
    answer. One answer per sample is read from a token of its own that is put first, or from the mean over real
    positions; that mean says nothing after a norm which centres each channel over the positions (instance norm).

    Linear maps start as Xavier's; embeddings of tokens and of positions with variance 1/2 each, so that their sum has
    variance one.

    Sites with placement ``"pre"``: ``blocks.0.attention``, ``blocks.0.mlp``, …, ``final``, and ``embedding`` with
    ``embedding_norm`` (patterns ``"attention"``, ``"blocks.0.*"``); each other placement names its own.

    Args:
        norm: a norm, or a mapping from sites to norms.
        inputs: ``(T, F)``, or ``(T,)`` with a vocabulary; sequences may be shorter.
        outputs: width of the answer.
        width: number of channels.
        depth: number of blocks.
        heads: number of attention heads; divides ``width``.
        mlp_ratio: width of the hidden layer of a block, in units of ``width``.
        placement: one of :func:`list_placements`, with its options if any: ``"pre"``, ``"mix_ln(alpha=0.5)"``.
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
        place = find_placement(placement)
        parts: type[Placement] = place.func  # pyright: ignore[reportAssignmentType]  (a class is called)
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
            self.embedding = linear_map(inputs.shape[1], width)
        self.positions = nn.Parameter(torch.randn(inputs.shape[0], width) * 0.5**0.5)
        self.cls = nn.Parameter(torch.randn(width)) if pool == "cls" else None
        self.embedding_dropout = Dropout(dropout)
        self.blocks = nn.ModuleList()
        with Sites(norm, channel_dim=-1) as norm_at:
            self.embedding_norm = norm_at("embedding", width) if embedding_norm or parts.embeds else None
            for i in range(whole_number("depth", depth)):
                block = parts.block()
                self.blocks.append(block(width, heads, hidden, activation, dropout, place, norm_at, i, depth))
            self.final_norm = norm_at("final", width) if parts.final else None
            if not norm_at.known:
                refuse_norm(f"a Transformer with placement={placement!r}", norm)
        self.placement = parts
        self.head = parts.head(width, outputs)

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
        x = self.placement.begin(self.embedding_dropout(x))
        allowed = None if mask is None else _allowed(mask, self.causal)
        for block in self.blocks:
            x = block(x, mask, allowed, self.causal)
        x = self.placement.end(x, self.final_norm, mask)
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
