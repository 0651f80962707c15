"""Somebody else's module as a norm: any ``nn.Module`` made from a width."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from normzoo.errors import NormzooError
from normzoo.layers.base import Norm

# how a tensor of the model may be shown to a module that knows only one layout: there and back, on (N, *S, C)
_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last (N, *S, C)": lambda x: x,
    "channels first (N, C, *S)": lambda x: x.movedim(-1, 1),
    "channels first (N, C, S)": lambda x: x.flatten(1, -2).movedim(-1, 1) if x.ndim > 2 else x.unsqueeze(-1),
    "channels first (N, C, S, 1)": lambda x: (
        x.flatten(1, -2).movedim(-1, 1) if x.ndim > 2 else x.unsqueeze(-1)
    ).unsqueeze(-1),
}


class ForeignNorm(Norm):
    """A plain module behind the contract: any layout in, any layout out, padding zeroed.

    A module that takes ``channel_dim`` or has an attribute of that name says which layout it wants. Any other is shown
    the model's own layout first, as every ``norm_layer=`` argument would do, and if it refuses that, the others in
    turn. What it accepts is found once for each number of dimensions, on a copy and on small data.

    Args:
        module: what a user's callable made for ``num_features`` channels.
        num_features: number of channels ``C``.
        channel_dim: the layout of the model.
        takes_layout: the module was built for this ``channel_dim`` and needs no moving.

    Raises:
        NormzooError: in ``forward``, when the module accepts no layout or returns another shape.
    """

    def __init__(
        self, module: nn.Module, num_features: int, *, channel_dim: int = 1, takes_layout: bool = False
    ) -> None:
        super().__init__(num_features, channel_dim=channel_dim)
        self.module = module
        self.takes_layout = takes_layout
        self._views: dict[int, str] = {}
        self.takes_mask = "mask" in inspect.signature(module.forward).parameters

    @property
    def traits(self) -> None:
        """Nothing is known of a stranger; the checks can find out."""
        return

    @property
    def roles(self) -> dict[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """By the names that torch uses."""
        by_leaf = Norm.roles
        return {name: by_leaf.get(name.rpartition(".")[2], "other") for name, _ in self.named_parameters()}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Show ``x`` to the module in the layout that it takes."""
        self.check_input(x, mask)
        if mask is not None:
            x = torch.where(mask.unsqueeze(1 if self.channel_dim == 1 else -1), x, 0)
            if not self.takes_mask:
                warnings.warn(
                    f"{type(self.module).__name__}.forward takes no mask: padded positions are zero and count in "
                    "whatever statistics it takes",
                    stacklevel=2,
                )
        y = self._call(x, mask)
        if mask is not None:
            y = torch.where(mask.unsqueeze(1 if self.channel_dim == 1 else -1), y, 0)
        return y

    def _call(self, x: Tensor, mask: Tensor | None) -> Tensor:
        arguments = {"mask": mask} if self.takes_mask else {}
        if self.takes_layout:
            return self._checked(self.module(x, **arguments), x)
        last = x if self.channel_dim == -1 else x.movedim(1, -1)
        if x.ndim not in self._views:
            self._views[x.ndim] = self._probe(x.ndim)
        shown = _VIEWS[self._views[x.ndim]](last)
        y = self._checked(self.module(shown, **arguments), shown)
        if self._views[x.ndim].startswith("channels first") and x.ndim > 2:
            y = y.flatten(2).movedim(1, -1)
        y = y.reshape(last.shape)
        return y if self.channel_dim == -1 else y.movedim(-1, 1)

    def _probe(self, ndim: int) -> str:
        """The first view that the module accepts, tried on a copy in evaluation mode."""
        order = list(_VIEWS)
        wanted = getattr(self.module, "channel_dim", self.channel_dim)
        if wanted == 1:
            order[0], order[1] = order[1], order[0]
        if isinstance(getattr(self.module, "channel_dim", None), int):
            order = order[:1]
        parameter = next(iter(self.module.parameters()), None)
        device, dtype = (None, None) if parameter is None else (parameter.device, parameter.dtype)
        extent = [s + (s == self.num_features) for s in range(3, 1 + ndim)]  # unlike C, so that a wrong axis shows
        probe = torch.linspace(
            -1, 1, 2 * self.num_features * int(torch.tensor(extent).prod()), device=device, dtype=dtype
        )
        probe = probe.view(2, *extent, self.num_features)
        refusals = []
        with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")  # torch's InstanceNorm only warns when the channels do not fit
            for name in order:
                shown = _VIEWS[name](probe)
                try:
                    y = copy.deepcopy(self.module).eval()(shown)
                except Exception as refusal:  # any error is a refusal; all are reported when every view was refused
                    refusals.append(f"{name}: {type(refusal).__name__}: {refusal}")
                    continue
                if isinstance(y, Tensor) and y.shape == shown.shape:
                    return name
                refusals.append(f"{name}: returned {tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__}")
        raise NormzooError(
            f"{type(self.module).__name__} made for {self.num_features} channels takes no {ndim}-dimensional input of "
            "this model: " + "; ".join(refusals) + ". Give its constructor a channel_dim argument "
            "(1 for (N, C, *S), -1 for (N, *S, C)), or its class a channel_dim attribute"
        )

    def _checked(self, y: Tensor, shown: Tensor) -> Tensor:
        if not isinstance(y, Tensor) or y.shape != shown.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise NormzooError(
                f"{type(self.module).__name__} returned {got} for input of shape {tuple(shown.shape)}; "
                "a norm keeps the shape"
            )
        return y
