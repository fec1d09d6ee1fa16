"""Sources of data: scikit-learn's digits, files under C2M3_DATA, or torchvision's downloads.

A source holds all labels and decodes images on request, so that a client of a large data set decodes only its own
share.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as parquet
from PIL import Image

from c2m3_fl.errors import DataError
from simulations.text import ALPHABET, read_text

Indices = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]  # images, height, width, channels
Raw = Pixels | Indices  # images, or characters of shape (windows, length)

ENVIRONMENT = "C2M3_DATA"

_DIGITS_TEST = 360  # of 1,797 scans; the split is fixed, whatever the seed of a run


@dataclass(frozen=True)
class DataSetKind:
    """Constants of a data set.

    Attributes
    ----------
    classes : int
        Number of labels.
    mean, std : tuple of float
        Mean and standard deviation of each channel on the training images, pixels between 0 and 1; empty for text.
    torchvision : str
        Class in ``torchvision.datasets``; empty for the embedded digits and for text.
    options : mapping
        Further arguments of that class.
    """

    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    torchvision: str = ""
    options: Mapping[str, str] = field(default_factory=dict)


KINDS = {
    "digits": DataSetKind(10, (0.3053,), (0.3760,)),
    "mnist": DataSetKind(10, (0.1307,), (0.3081,), "MNIST"),
    "fashion-mnist": DataSetKind(10, (0.2860,), (0.3530,), "FashionMNIST"),
    "emnist": DataSetKind(47, (0.1751,), (0.3332,), "EMNIST", {"split": "balanced"}),
    "cifar10": DataSetKind(10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "CIFAR10"),
    "cifar100": DataSetKind(100, (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762), "CIFAR100"),
    "shakespeare": DataSetKind(len(ALPHABET), (), ()),
}


@dataclass(frozen=True)
class Source:
    """One split of a data set.

    Attributes
    ----------
    labels : ndarray of int64, shape (images,)
        All labels.
    raw : callable
        Function from indices to images, shape (len(indices), height, width, channels), or to text, characters of shape
        (len(indices), length).
    owners : ndarray of int64, shape (images,), or None
        Who each window of a text belongs to.
    """

    labels: Indices
    raw: Callable[[Indices], Raw]
    owners: Indices | None = None


@lru_cache(maxsize=4)
def open_source(name: str, split: str) -> Source:
    """The ``"train"`` or ``"test"`` split of a data set of `KINDS`.

    Raises
    ------
    DataError
        When it is neither found nor downloaded; the message names the folders that were searched.
    """
    if name == "digits":
        return _digits(split)
    root = os.environ.get(ENVIRONMENT)
    file = Path(root) / name / f"{split}.parquet" if root else None
    if name == "shakespeare":
        text = read_text(Path(root) / name / "input.txt" if root else None, split, ENVIRONMENT)
        return Source(text.following, lambda indices: text.windows[indices], text.speakers)
    if file is not None and file.is_file():
        return _parquet(file)
    return _torchvision(name, split, file)


def _digits(split: str) -> Source:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    rows = order[:_DIGITS_TEST] if split == "test" else order[_DIGITS_TEST:]
    return _in_memory(np.rint(bunch.images[rows] * (255 / 16)), bunch.target[rows])


def _in_memory(images: npt.ArrayLike, labels: npt.ArrayLike) -> Source:
    pixels = np.asarray(images).astype(np.uint8)
    pixels = pixels if pixels.ndim == 4 else pixels[..., None]
    return Source(np.asarray(labels, dtype=np.int64), lambda indices: pixels[indices])


def _parquet(file: Path) -> Source:
    """A file in the hub's layout: one column of encoded images, one of labels."""
    table = parquet.read_table(file)
    image = next((column for column in ("image", "img") if column in table.column_names), None)
    label = next((column for column in ("label", "fine_label") if column in table.column_names), None)
    if image is None or label is None:
        raise DataError(f"{file} has columns {table.column_names}, expected 'image' or 'img' and 'label'")
    encoded = table.column(image)

    def pixels(indices: Indices) -> Pixels:
        decoded = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in encoded.take(indices).to_pylist()]
        stacked: Pixels = np.stack(decoded)
        return stacked if stacked.ndim == 4 else stacked[..., None]

    return Source(table.column(label).to_numpy().astype(np.int64), pixels)


def _torchvision(name: str, split: str, file: Path | None) -> Source:
    import torchvision

    kind = KINDS[name]
    root = Path(os.environ.get(ENVIRONMENT) or Path.home() / ".cache" / "c2m3-fl")
    options: dict[str, Any] = {**kind.options, "root": str(root), "train": split == "train"}
    try:
        loaded = getattr(torchvision.datasets, kind.torchvision)(**options, download=True)
    except (RuntimeError, OSError) as error:
        looked = f"in {file}" if file else f"nowhere for parquet files ({ENVIRONMENT} is not set)"
        raise DataError(
            f"data set {name!r} was not found: looked {looked} and in {root} for torchvision's files, and the download "
            f"failed ({error}); set {ENVIRONMENT} to a folder that holds {name}/train.parquet and {name}/test.parquet"
        ) from error
    images = np.asarray(loaded.data)
    if name == "emnist":  # stored with rows and columns exchanged
        images = images.swapaxes(1, 2)
    return _in_memory(images, loaded.targets)
