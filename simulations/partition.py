"""Which training images belong to which client: the partitioners of flwr-datasets."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
from datasets import Dataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    Partitioner,
    PathologicalPartitioner,
    ShardPartitioner,
)

from c2m3_fl.errors import ConfigError
from simulations.settings import Settings

Indices = npt.NDArray[np.int64]

_SMALLEST = 2  # images per client: no statistics can be estimated from a single one


def partition(labels: Indices, settings: Settings, seed: int) -> tuple[Indices, ...]:
    """Disjoint index sets, one per client; a function of the labels, the settings and `seed`.

    Raises
    ------
    ConfigError
        When these labels cannot be partitioned as the settings say.
    """
    if len(labels) < _SMALLEST * settings.clients:
        raise ConfigError(f"clients is {settings.clients}, too many for {len(labels)} training images")
    if settings.partition == "speakers":
        raise ConfigError(f"partition is 'speakers', which images of {settings.data!r} do not have")
    rows = Dataset.from_dict({"index": np.arange(len(labels)), "label": labels})
    partitioner = _partitioner(settings, seed, classes=len(np.unique(labels)))
    partitioner.dataset = rows
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a Dirichlet draw is repeated
            warnings.simplefilter("ignore", FutureWarning)  # of pyarrow, about the sorting of shards
            parts = [partitioner.load_partition(client)["index"] for client in range(settings.clients)]
    except ValueError as error:
        raise ConfigError(f"partition {settings.partition!r} of {len(labels)} images failed: {error}") from error
    return tuple(np.sort(np.asarray(part, dtype=np.int64)) for part in parts)


def _partitioner(settings: Settings, seed: int, classes: int) -> Partitioner:
    if settings.partition == "iid":
        return IidPartitioner(settings.clients)
    if settings.partition == "dirichlet":
        return DirichletPartitioner(
            settings.clients, "label", settings.alpha, min_partition_size=_SMALLEST, shuffle=False, seed=seed
        )
    if (
        settings.partition == "shards"
    ):  # McMahan et al. 2017: images sorted by class, cut, and dealt; no class is missing
        return ShardPartitioner(
            settings.clients, "label", num_shards_per_partition=settings.classes_per_client, shuffle=False, seed=seed
        )
    if settings.classes_per_client > classes:
        raise ConfigError(f"classes-per-client is {settings.classes_per_client}, the data have {classes} classes")
    return PathologicalPartitioner(
        settings.clients,
        "label",
        settings.classes_per_client,
        class_assignment_mode="first-deterministic",
        shuffle=False,
        seed=seed,
    )
