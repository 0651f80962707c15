"""Handwritten digits, as images, as rows and as patches."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from normzoo.data.base import DataInputs, DataSet, Family, Kind, Parts
from normzoo.errors import NormzooError


@dataclass(frozen=True)
class Digits(DataSet):
    """1797 handwritten digits, 8x8 pixels in 17 grey levels; one of ten classes.

    The parts are fixed: of every five digits of a class, in the order of the file, three are for training, one for
    validation and one for testing. Values are standardised by the mean and the standard deviation over all pixels of
    the training part: one number each, so that nothing is normalised per pixel, per channel or per sample beforehand.

    Views: ``mlp`` the flat pixels ``(size * size,)``, ``cnn`` one channel ``(1, size, size)``, ``rnn`` the rows from
    top to bottom ``(size, size)``, ``transformer`` square patches in reading order ``((size / patch)^2, patch^2)``.

    Args:
        size: Side of the image. Other than 8, the image is resized bilinearly (for networks made for 28 or 32 pixels).
        patch: Side of a patch of the ``transformer`` view.
        train_samples: How many of the training samples to use, all by default. Classes stay balanced.

    Raises:
        NormzooError: if ``size`` is not a multiple of ``patch``, or there are fewer training samples than asked for.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998,
    as shipped with scikit-learn.

    Example:
        >>> parts = Digits().parts("transformer")
        >>> parts.inputs.shape, [len(part["y"]) for part in (parts.train, parts.val, parts.test)]
        ((16, 4), [1085, 357, 355])
    """

    name: ClassVar[str] = "digits"
    kind: ClassVar[Kind] = "classification"
    families: ClassVar[tuple[Family, ...]] = ("mlp", "cnn", "rnn", "transformer")
    source: ClassVar[str] = "UCI Optical Recognition of Handwritten Digits (1998), shipped with scikit-learn"

    size: int = 8
    patch: int = 2
    train_samples: int | None = None

    def __post_init__(self) -> None:
        self.at_least(size=4, patch=1)
        if self.train_samples is not None:
            self.at_least(train_samples=1)

    def parts(self, family: Family) -> Parts:
        """The three parts in the layout of a family."""
        if family == "transformer" and self.size % self.patch:
            raise NormzooError(
                f"data 'digits': size={self.size} cannot be cut into patches of {self.patch}; "
                "choose a patch that divides the size"
            )
        image, label = _load()
        image = image.unsqueeze(1)
        if self.size != 8:
            image = F.interpolate(image, size=(self.size, self.size), mode="bilinear", antialias=self.size < 8)
        train, val, test = split(label)
        if self.train_samples is not None:
            if self.train_samples > len(train):
                raise NormzooError(f"data 'digits': train_samples={self.train_samples}; there are only {len(train)}")
            train = train[_rank_in_class(label[train]).argsort(stable=True)[: self.train_samples].sort().values]
        image = (image - image[train].mean()) / image[train].std()
        x = _view(image, family, self.patch)
        return Parts(
            *({"x": x[index], "y": label[index]} for index in (train, val, test)),
            inputs=DataInputs(tuple(x.shape[1:])),
            outputs=10,
        )


def split(label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of train, validation and test: by turns of 3, 1 and 1 within each class, without any random number."""
    turn = _rank_in_class(label) % 5
    train, val, test = (chosen.nonzero().squeeze(1) for chosen in (turn < 3, turn == 3, turn == 4))
    return train, val, test


def _rank_in_class(label: Tensor) -> Tensor:
    """For each sample, how many of its class came before it."""
    one_hot = F.one_hot(label)
    return (one_hot.cumsum(0) * one_hot).sum(1) - 1


def _view(image: Tensor, family: Family, patch: int) -> Tensor:
    match family:
        case "mlp":
            return rearrange(image, "n 1 h w -> n (h w)").contiguous()
        case "cnn":
            return image.contiguous()
        case "rnn":
            return rearrange(image, "n 1 h w -> n h w").contiguous()
        case "transformer":
            return rearrange(image, "n 1 (h p) (w q) -> n (h w) (p q)", p=patch, q=patch).contiguous()


def _load() -> tuple[Tensor, Tensor]:
    """Images (1797, 8, 8) and labels (1797,)."""
    table = _table()
    pixels = torch.from_numpy(table[:, :-1].astype(np.float32))
    return rearrange(pixels, "n (h w) -> n h w", h=8), torch.from_numpy(table[:, -1].astype(np.int64))


def _table() -> np.ndarray:
    # Importing scikit-learn for one small file would cost over a second in every process that trains.
    try:
        path = Path(str(distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")))
    except PackageNotFoundError:
        path = None
    if path is not None and path.is_file():
        with gzip.open(path, "rt") as file:
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits  # an installation that keeps its data elsewhere

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])  # pyright: ignore[reportAttributeAccessIssue]
