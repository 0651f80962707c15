"""One LightningDataModule for all embedded data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from normzoo.data.base import DataSet, Family
from normzoo.data.loader import TensorLoader
from normzoo.errors import NormzooError


class TensorDataModule(pl.LightningDataModule):
    """A data set in the layout of one family, cut into batches by indexing.

    Training batches come in an order that the seed and the epoch decide, and nothing else does. On an accelerator the
    tensors are moved there once; in a distributed run every process takes its share of each batch.

    Args:
        data: The data set with its options.
        family: Family of the model: it decides the view.
        batch_size: Training samples in a batch of one process.
        seed: Decides the order of the training samples.
        eval_batch_size: Samples in a validation or test batch.

    Attributes:
        inputs: What one sample looks like (:class:`~normzoo.data.base.DataInputs`).
        outputs: Width of the model's answer.
        kind: ``"classification"``, ``"regression"`` or ``"language_modelling"``.
        facts: What a result should say about the data: sizes of the parts, hashes, versions.

    Raises:
        NormzooError: if the data has no view for the family.
    """

    def __init__(
        self, data: DataSet, *, family: Family, batch_size: int, seed: int = 0, eval_batch_size: int = 256
    ) -> None:
        super().__init__()
        if family not in data.families:
            raise NormzooError(
                f"data {data.name!r} has no view for models of family {family!r}; it serves {', '.join(data.families)}"
            )
        self.data = data
        self.family = family
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.parts = data.parts(family)
        self.inputs = self.parts.inputs
        self.outputs = self.parts.outputs
        self.kind = data.kind
        self.facts: dict[str, Any] = {
            **{f"{name}_samples": len(part["y"]) for name, part in self._parts().items()},
            **self.parts.facts,
        }
        if self.parts.train_samples is not None:
            self.facts["train_samples"] = min(self.parts.train_samples, self.facts["train_samples"])

    def train_dataloader(self) -> TensorLoader:
        """Shuffled, complete batches."""
        return self._loader(
            self.parts.train, self.batch_size, shuffle=True, seed=self.seed, samples=self.parts.train_samples
        )

    def val_dataloader(self) -> TensorLoader:
        """Every validation sample once."""
        return self._loader(self.parts.val, self.eval_batch_size)

    def test_dataloader(self) -> TensorLoader:
        """Every test sample once."""
        return self._loader(self.parts.test, self.eval_batch_size)

    def _parts(self) -> dict[str, Mapping[str, Tensor]]:
        return {"train": self.parts.train, "val": self.parts.val, "test": self.parts.test}

    def _loader(self, tensors: Mapping[str, Tensor], batch_size: int, **options: Any) -> TensorLoader:
        if self.trainer is None:
            return TensorLoader(tensors, batch_size, **options)
        device: torch.device = self.trainer.strategy.root_device
        return TensorLoader(
            tensors,
            batch_size,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            device=None if device.type == "cpu" else device,
            **options,
        )
