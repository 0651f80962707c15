"""Norms in somebody else's model."""

from __future__ import annotations

from torch import nn
from torch.distributed import ProcessGroup

from normzoo.layers.base import MomentNorm


def synchronize(model: nn.Module, on: bool = True, process_group: ProcessGroup | None = None) -> int:
    """Take the batch statistics of every norm in ``model`` over all processes, or stop doing so.

    Norms whose statistics are local by definition (per sample, or over virtual batches) are left alone, and so are
    torch's own, for which ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` exists.

    Args:
        model: changed in place.
        on: whether to synchronise.
        process_group: the processes that share statistics; ``None`` is all of them.

    Returns:
        How many norms were set.

    Example:
        >>> from normzoo import create
        >>> synchronize(nn.Sequential(create("batch_renorm", 8), create("layer_norm", 8)))
        1
    """
    changed = 0
    for module in model.modules():
        if isinstance(module, MomentNorm) and module.synchronizable:
            module.sync, module.process_group = on, process_group if on else None
            changed += 1
    return changed
