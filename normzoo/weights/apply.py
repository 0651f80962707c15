"""Weight norms on the layers of a model, and off again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normzoo.errors import NormzooError, unknown
from normzoo.weights.base import Filters, Reparametrization
from normzoo.weights.copying import make_copyable
from normzoo.weights.registry import Spec, create_weight_norm

Model = TypeVar("Model", bound=nn.Module)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Site:
    """Weights of a model that can be normalised, or are."""

    name: str
    layer: nn.Module
    parameter: str

    @property
    def path(self) -> str:
        """The name of the weights in the model."""
        return f"{self.name}.{self.parameter}" if self.name else self.parameter

    @property
    def norm(self) -> Reparametrization | None:
        """The weight norm that is applied here."""
        if not parametrize.is_parametrized(self.layer, self.parameter):
            return None
        listed = self.layer.get_submodule(f"parametrizations.{self.parameter}").children()
        return next((p for p in listed if isinstance(p, Reparametrization)), None)


def weight_norms(model: nn.Module) -> dict[str, Reparametrization]:
    """The weight norms that are applied in a model, by the names of the weights.

    >>> weight_norms(apply_weight_norm(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), "weight_norm"))
    {'0.weight': WeightNorm(2 x 4)}
    """
    return {site.path: site.norm for site in _sites(model) if site.norm is not None}


def apply_weight_norm(model: Model, spec: Spec, *, only: str | Iterable[str] | None = None) -> Model:
    """Normalise the weights of linear maps, convolutions and recurrent cells, by parametrizations of torch.

    ``layer.weight`` is then computed from ``layer.parametrizations.weight.original``, which is the parameter that was
    there: an optimizer made before keeps it, but does not know the gain of norms that have one. Filters are the rows of
    a matrix, one for each output and group; of transposed convolutions too. Recurrent cells are modules with parameters
    ``weight_ih`` and ``weight_hh``, as :class:`torch.nn.LSTMCell`; they read their weights at each step, which
    ``torch.nn.utils.parametrize.cached()`` around the forward pass makes one computation. Embeddings, attention's
    ``in_proj_weight`` and :class:`torch.nn.LSTM` and its sisters, which hand all weights to one kernel, are left alone.

    The layers can be copied by ``copy.deepcopy``, and pickled.

    Args:
        model: a model or a single layer, changed in place.
        spec: a name (``"weight_norm"``), with options (``"spectral_norm(iterations=3)"``), ``"module:Name"``,
            ``"path/file.py:Name"``, or a class of weight norms.
        only: wildcard patterns of the names of layers or of their weights, as in ``"encoder.*"``; ``None`` is all.

    Returns:
        The model.

    Raises:
        NormzooError: for an unknown weight norm, a pattern that fits nothing, a model without such layers, weights that
            are shared, normalised already, or would come out as zero. The model is as it was.
        OptionError: for an option that the weight norm does not have.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
        >>> _ = apply_weight_norm(model, "weight_norm", only="0")
        >>> sorted(model.state_dict())[:3]
        ['0.bias', '0.parametrizations.weight.0.gain', '0.parametrizations.weight.original']
    """
    sites = _chosen(list(_sites(model)), only)
    if not sites:
        raise NormzooError(
            f"{type(model).__name__} has no linear map, convolution or recurrent cell whose weights could be normalised"
        )
    held = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    made = [(site, _make(site, spec, held)) for site in sites]  # all or none
    for site, norm in made:
        norm.requires_grad_(getattr(site.layer, site.parameter).requires_grad)
        parametrize.register_parametrization(site.layer, site.parameter, norm, unsafe=True)
        norm.train(site.layer.training)
        norm.attach(site.layer)
        if norm.changes_output:
            site.layer.register_forward_hook(_output)
        make_copyable(site.layer)
    return model


def remove_weight_norm(model: Model, *, only: str | Iterable[str] | None = None) -> Model:
    """Bake weight norms into the weights: the same function as in evaluation, with plain parameters again.

    Args:
        model: a model or a single layer, changed in place.
        only: wildcard patterns as for :func:`apply_weight_norm`.

    Returns:
        The model.

    Raises:
        NormzooError: when there is none to remove, or one that depends on the input and cannot be baked in. The model
            is as it was.

    Example:
        >>> layer = apply_weight_norm(nn.Linear(4, 2), "spectral_norm")
        >>> remove_weight_norm(layer)
        Linear(in_features=4, out_features=2, bias=True)
        >>> torch.linalg.matrix_norm(layer.weight, 2).round(decimals=3)
        tensor(1., grad_fn=<RoundBackward1>)
    """
    applied = [(site, site.norm) for site in _sites(model) if site.norm is not None]
    chosen = {site.path for site in _chosen([site for site, _ in applied], only)}
    applied = [(site, norm) for site, norm in applied if site.path in chosen]
    if not applied:
        raise NormzooError(f"{type(model).__name__} has no weight norm to remove")
    for site, norm in applied:
        if not norm.removable:
            raise NormzooError(
                f"{type(norm).__name__} of {site.path!r} depends on the layer's input and cannot be baked into its "
                "weights; keep it, or leave it out with only="
            )
    for site, norm in applied:
        norm.eval()  # reading the weights must not change them once more
        parametrize.remove_parametrizations(site.layer, site.parameter, leave_parametrized=True)
        norm.bake(site.layer)
        for key in [key for key, hook in site.layer._forward_hooks.items() if hook is _output]:
            del site.layer._forward_hooks[key]
    return model


@contextmanager
def data_dependent_init(model: nn.Module) -> Iterator[None]:
    r"""Let the first batch set gains and biases: each output starts with mean zero and variance one.

    .. math:: g \leftarrow \frac{g}{\sigma[t]}, \qquad b \leftarrow \frac{b - \mu[t]}{\sigma[t]}

    where :math:`t` are the outputs of a layer for that batch, after the layers before it have been set. Layers without
    a bias keep their mean. For weight norms with a gain for each output. Draw the weights from
    :math:`\mathcal N(0, 0.05^2)` before, and this is the initialisation of the paper.

    Args:
        model: with weight norms applied. Run the batch inside the context; layers that are called twice take the first.

    Raises:
        NormzooError: when no layer with such a weight norm was called.

    Example:
        >>> model = apply_weight_norm(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), "weight_norm")
        >>> x = torch.randn(64, 4)
        >>> with data_dependent_init(model):
        ...     _ = model(x)
        >>> model(x).std(0, correction=0).round(decimals=3).tolist()
        [1.0, 1.0]

    Reference:
        Salimans and Kingma 2016, Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep
        Neural Networks, arXiv 1602.07868, section 3.
    """
    seen: set[nn.Module] = set()

    @torch.no_grad()
    def set_from(layer: nn.Module, args: Any, y: Tensor) -> Tensor:
        norm = Site("", layer, "weight").norm
        if layer in seen or norm is None:
            return y
        seen.add(layer)
        channels = _channel_dim(layer, y)
        std, mean = torch.std_mean(y.float(), [d for d in range(y.ndim) if d != channels], correction=0, keepdim=True)
        std = torch.where(std > 0, std, 1)
        gain, bias = norm.get_parameter("gain"), getattr(layer, "bias", None)
        gain.div_(std.flatten())
        if bias is None:
            return y / std.to(y.dtype)
        bias.sub_(mean.flatten()).div_(std.flatten())
        return ((y - mean) / std).to(y.dtype)

    handles = [
        site.layer.register_forward_hook(set_from)
        for site in _sites(model)
        if site.parameter == "weight" and site.norm is not None and "gain" in dict(site.norm.named_parameters())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise NormzooError(
            f"no layer with a gain for each output was called; apply weight_norm to {type(model).__name__} first, and "
            "run a batch inside the context"
        )


# ---- where -----------------------------------------------------------------------------------------------------------


def _sites(model: nn.Module) -> Iterator[Site]:
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
            yield Site(name, layer, "weight")
        elif _is_cell(layer):
            yield Site(name, layer, "weight_ih")
            yield Site(name, layer, "weight_hh")


def _is_cell(layer: nn.Module) -> bool:
    names = ("weight_ih", "weight_hh")
    owns = {*layer._parameters, *(n for n in names if parametrize.is_parametrized(layer, n))}
    return owns.issuperset(names)


def _chosen(sites: list[Site], only: str | Iterable[str] | None) -> list[Site]:
    """The sites that a pattern names by layer or weights; each pattern must name one."""
    if only is None:
        return sites
    patterns = [only] if isinstance(only, str) else list(only)
    for pattern in patterns:
        if not any(_fits(site, pattern) for site in sites):
            raise unknown("layer", pattern, [site.name or site.path for site in sites])
    return [site for site in sites if any(_fits(site, pattern) for pattern in patterns)]


def _fits(site: Site, pattern: str) -> bool:
    return fnmatchcase(site.name, pattern) or fnmatchcase(site.path, pattern)


def _channel_dim(layer: nn.Module, y: Tensor) -> int:
    return y.ndim - 1 if isinstance(layer, nn.Linear) else y.ndim - len(layer.kernel_size) - 1  # pyright: ignore[reportArgumentType]


def _make(site: Site, spec: Spec, held: Counter[int]) -> Reparametrization:
    """The weight norm for a site, tried on its weights."""
    layer = site.layer
    if parametrize.is_parametrized(layer, site.parameter):
        name = type(next(layer.get_submodule(f"parametrizations.{site.parameter}").children())).__name__
        raise NormzooError(f"{site.path!r} has {name} already; remove that first, or leave it out with only=")
    weight = layer._parameters[site.parameter]
    if weight is None or isinstance(weight, nn.parameter.UninitializedParameter) or not weight.is_floating_point():
        raise NormzooError(f"{site.path!r} has no floating-point weights yet; run a batch through a lazy layer first")
    if held[id(weight)] > 1:
        raise NormzooError(
            f"the weights {site.path!r} are shared with another module, which would not be normalised with them; leave "
            "them out with only="
        )
    norm = create_weight_norm(spec, _filters(layer, weight))
    if norm.changes_output and site.parameter != "weight":
        raise NormzooError(
            f"{type(norm).__name__} changes the output of a layer, and {site.path!r} has none of its own"
        )
    with torch.no_grad():
        norm.right_inverse(weight)
        _refuse_zeros(site, norm, norm.eval()(weight))
    return norm


def _filters(layer: nn.Module, weight: Tensor) -> Filters:
    groups = layer.groups if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) else 1
    return Filters(tuple(weight.shape), groups, isinstance(layer, TRANSPOSED), weight.device, weight.dtype)


def _refuse_zeros(site: Site, norm: Reparametrization, weight: Tensor) -> None:
    if weight.is_meta:
        return
    rows = norm.filters.rows(weight)
    zero = (rows == 0).all(-1)
    if bool(zero.any() if norm.per_output else zero.all()):
        raise NormzooError(
            f"{type(norm).__name__} makes weights of {site.path!r} zero, and they would never learn: they start at "
            "zero or, where a mean is subtracted, as a constant or a single number for each output. Initialise them "
            "otherwise, or leave the layer out with only="
        )


def _output(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    """The forward hook of weight norms that change the output; a plain function, so that layers can be pickled."""
    norm = Site("", layer, "weight").norm
    return y if norm is None else norm.output(layer, args[0], y)
