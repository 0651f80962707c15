"""Synchronised batch statistics under Lightning."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from torch import nn

from normzoo.errors import NormzooError
from normzoo.layers.base import MomentNorm
from normzoo.surgery import synchronize


class NormSync(TorchSyncBatchNorm):
    """Take batch statistics over all processes of a distributed training, for every norm that has any.

    Lightning's own plugin knows torch's batch norm alone. This one switches on the synchronisation of normzoo's norms,
    which works on any device, and has torch convert its own where that works, on CUDA.

    ``Trainer(sync_batchnorm=True)`` is enough for the tasks of this package, which put this plugin in the place of
    Lightning's. For other modules: ``Trainer(plugins=[NormSync()])``.

    Example:
        >>> from normzoo import create
        >>> model = nn.Sequential(create("batch_norm", 8), create("layer_norm", 8))
        >>> NormSync().apply(model)[0].sync
        True
    """

    def __init__(self) -> None:
        self._before: dict[MomentNorm, bool] = {}
        self._converted = False

    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronise the norms of a model.

        Raises:
            NormzooError: for a batch norm of torch on the CPU, which torch cannot synchronise.
        """
        self._before = {module: module.sync for module in model.modules() if isinstance(module, MomentNorm)}
        synchronize(model)
        stock = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        }
        self._converted = bool(stock)
        if not stock:
            return model
        for name, module in stock.items():
            if not all(tensor.is_cuda for tensor in (*module.parameters(), *module.buffers())):
                raise NormzooError(
                    f"{name!r} is torch's {type(module).__name__}, which torch synchronises on CUDA alone; use "
                    "normzoo's batch_norm, which does so on any device, or sync_batchnorm=False"
                )
        return super().apply(model)

    def revert(self, model: nn.Module) -> nn.Module:
        """Leave every norm as it was before."""
        for module, sync in self._before.items():
            module.sync = sync
        self._before = {}
        return super().revert(model) if self._converted else model


def guard_layer_sync(trainer: pl.Trainer) -> None:
    """Put :class:`NormSync` in the place of Lightning's plugin, which would pass our norms by without a word."""
    strategy = trainer.strategy
    # Lightning keeps the plugin in a private attribute and offers no other way to change it after construction.
    if type(getattr(strategy, "_layer_sync", None)) is TorchSyncBatchNorm:
        strategy._layer_sync = NormSync()  # pyright: ignore[reportAttributeAccessIssue]
