"""The data of one federation: every client's share of the training images (or text), and the server's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from c2m3_fl.errors import ConfigError
from simulations.partition import Indices, partition
from simulations.settings import Settings
from simulations.sources import KINDS, DataSetKind, Source, open_source
from simulations.text import Division, divide

_CALIBRATION_BATCH = 250  # images; any size gives the same statistics


@dataclass(frozen=True)
class Images:
    """Inputs (n, channels, height, width), or text (n, length), and labels (n,)."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> Images:
        return Images(self.inputs[rows], self.labels[rows])


@dataclass(frozen=True)
class FederatedData:
    """The images of every client and of the server.

    Attributes
    ----------
    kind : DataSetKind
        The data set's constants.
    image_size : int
        Images are resized to this many pixels square; 0 keeps them.
    train, test : Source
        The two splits.
    parts : tuple of ndarray
        Rows of `train` that each client holds.
    calibration_rows : ndarray
        Rows of `train` that the server holds, without labels; no client has them.
    test_rows : ndarray
        Rows of `test` on which every model is evaluated.
    holdout : float
        Share of its images that a client evaluates on and does not train on.
    """

    kind: DataSetKind
    image_size: int
    train: Source
    test: Source
    parts: tuple[Indices, ...]
    calibration_rows: Indices
    test_rows: Indices
    holdout: float = 0.0

    @property
    def classes(self) -> int:
        """Number of labels."""
        return self.kind.classes

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image, or the length of a text."""
        return tuple(self._images(self.test, self.test_rows[:1]).inputs.shape[1:])

    @cached_property
    def calibration(self) -> list[Tensor]:
        """Unlabelled batches for REPAIR."""
        return list(torch.split(self._images(self.train, self.calibration_rows).inputs, _CALIBRATION_BATCH))

    @cached_property
    def held_out(self) -> Images:
        """The test images."""
        return self._images(self.test, self.test_rows)

    def training_share(self, client: int) -> Images:
        """The images that one client trains on."""
        return self._share(client)[0]

    def evaluation_share(self, client: int) -> Images:
        """The images that one client holds out; all of its images if they are too few to hold one out."""
        return self._share(client)[1]

    def _share(self, client: int) -> tuple[Images, Images]:
        if client not in self._decoded:
            images = self._images(self.train, self.parts[client])
            held = round(self.holdout * len(images))
            first = len(images) - held
            self._decoded[client] = (images[:first], images[first:] if held else images)
        return self._decoded[client]

    @cached_property
    def _decoded(self) -> dict[int, tuple[Images, Images]]:
        """Cache of shares, because a client trains in every round."""
        return {}

    def _images(self, source: Source, rows: Indices) -> Images:
        raw, labels = torch.from_numpy(source.raw(rows)), torch.from_numpy(source.labels[rows])
        if source.owners is not None:
            return Images(raw, labels)
        inputs = raw.permute(0, 3, 1, 2).float() / 255
        if self.image_size and self.image_size != inputs.shape[-1]:
            inputs = torch.nn.functional.interpolate(inputs, self.image_size, mode="bilinear", antialias=True)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.kind.mean, self.kind.std))
        return Images((inputs - mean) / std, labels)


@lru_cache(maxsize=2)
def federated_data(settings: Settings) -> FederatedData:
    """Data of the federation that the settings describe; a function of the settings alone.

    Raises
    ------
    ConfigError
        When there are fewer images than requested, or these labels cannot be partitioned as requested.
    DataError
        When the data set is neither found nor downloaded.
    """
    train, test = open_source(settings.data, "train"), open_source(settings.data, "test")
    wanted = settings.calibration_size + max(settings.train_size, 1)
    if wanted > len(train.labels):
        raise ConfigError(
            f"train-size {settings.train_size} and calibration-size {settings.calibration_size} exceed the "
            f"{len(train.labels)} training images of {settings.data!r}"
        )
    if train.owners is None or test.owners is None:
        parts, calibration, tested = _divide_images(train, test, settings)
    else:
        parts, calibration, tested = divide(train.owners, test.owners, settings, derived_seed(settings.seed, 1))
    return FederatedData(
        kind=KINDS[settings.data],
        image_size=settings.image_size,
        train=train,
        test=test,
        parts=parts,
        calibration_rows=calibration,
        test_rows=tested,
        holdout=settings.holdout,
    )


def _divide_images(train: Source, test: Source, settings: Settings) -> Division:
    order = np.random.default_rng(derived_seed(settings.seed, 0)).permutation(len(train.labels))
    calibration, rest = order[: settings.calibration_size], order[settings.calibration_size :]
    rows = rest[: settings.train_size or None]
    parts = partition(train.labels[rows], settings, derived_seed(settings.seed, 1))
    return tuple(rows[part] for part in parts), calibration, np.arange(len(test.labels))[: settings.test_size or None]


def derived_seed(seed: int, *path: int) -> int:
    """A seed derived from `seed` and a path; distinct paths give independent streams."""
    return int(np.random.SeedSequence(seed, spawn_key=path).generate_state(1)[0])
