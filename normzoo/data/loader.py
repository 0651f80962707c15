"""Batches by indexing tensors: no workers, no per-sample Python, an order that only the seed and the epoch decide."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from normzoo.errors import NormzooError

_EPOCHS_PER_SEED = 1_000_003  # keeps the streams of neighbouring seeds apart for the first million epochs


class TensorLoader:
    """An iterable over batches of a dictionary of tensors.

    In training (``shuffle=True``) the order of epoch ``e`` is a permutation drawn from a generator of its own, seeded
    by ``(seed, e)``: the global random state neither decides it nor is touched by it. Incomplete batches are dropped in
    training, so that every step has the same size and a batch of one never reaches a batch norm. In evaluation every
    sample comes exactly once, in order, in batches of nearly equal size.

    With ``world > 1`` every rank takes its share of every batch: ``batch_size`` counts the samples of one rank, and all
    ranks have the same number of batches.

    Args:
        tensors: Tensors with the same first dimension, for example ``{"x": …, "y": …, "mask": …}``.
        batch_size: Samples in a batch of one rank.
        shuffle: Training: permute, and drop what does not fill a batch.
        seed: Decides the order, together with the epoch.
        samples: Samples drawn for one epoch, all of them by default. Only with ``shuffle``.
        rank: This process among the ``world``.
        world: Number of processes that share the data.
        device: Where the tensors live; batches are cut there.

    Raises:
        NormzooError: if the sizes do not agree, or there is not one full batch to train on.

    Example:
        >>> data = {"x": torch.arange(10), "y": torch.arange(10) ** 2}
        >>> loader = TensorLoader(data, batch_size=4, shuffle=True, seed=0)
        >>> len(loader), [tuple(batch["x"].shape) for batch in loader]
        (2, [(4,), (4,)])
        >>> [batch["x"].tolist() for batch in TensorLoader(data, batch_size=4)]
        [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        samples: int | None = None,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(sizes.values())) != 1:
            raise NormzooError(f"tensors of one loader need the same first dimension; got {sizes}")
        if batch_size < 1:
            raise NormzooError(f"batch_size must be at least 1; got {batch_size}")
        if not 0 <= rank < world:
            raise NormzooError(f"rank must be in 0 … {world - 1}; got {rank}")
        if samples is not None and not shuffle:
            raise NormzooError("samples= draws a part of the data in every epoch; it needs shuffle=True")
        self.tensors = {name: tensor if device is None else tensor.to(device) for name, tensor in tensors.items()}
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0
        self._stored = next(iter(sizes.values()))
        self.samples = self._stored if samples is None else min(samples, self._stored)
        if shuffle and self.samples < batch_size * world:
            raise NormzooError(
                f"batch_size={batch_size} on {world} process(es) needs {batch_size * world} training samples; "
                f"there are {self.samples}: choose a smaller batch_size"
            )
        if not shuffle and self.samples < world:
            raise NormzooError(f"{self.samples} samples cannot be shared by {world} processes")

    @property
    def sampler(self) -> TensorLoader:
        """The loader itself: Lightning calls ``loader.sampler.set_epoch`` before every epoch, also after a resume."""
        return self

    @property
    def batch_sampler(self) -> None:
        """There is none; Lightning asks."""
        return

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass; without a call, passes count up from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of batches of one pass, the same on every rank."""
        if self.shuffle:
            return self.samples // (self.batch_size * self.world)
        # No more batches than the smallest share has samples: an empty batch would be a special case for every norm.
        return min(math.ceil(self.samples / (self.batch_size * self.world)), self.samples // self.world)

    def order(self, epoch: int) -> Tensor:
        """The indices that all ranks together visit in an epoch, before they are cut into batches."""
        if not self.shuffle:
            return torch.arange(self.samples)
        generator = torch.Generator().manual_seed(self.seed * _EPOCHS_PER_SEED + epoch)
        return torch.randperm(self._stored, generator=generator)[: self.samples]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = self.order(self.epoch)
        self.epoch += 1
        count = len(self)
        if self.shuffle:
            kept = order[: count * self.batch_size * self.world]
            shares = kept.view(count, self.world, self.batch_size)[:, self.rank]
        else:
            # Two even cuts: no rank runs out of batches before another.
            shares = order.tensor_split(self.world)[self.rank].tensor_split(count)
        for share in shares:
            yield {
                name: tensor[share if tensor.device.type == "cpu" else share.to(tensor.device)]
                for name, tensor in self.tensors.items()
            }
