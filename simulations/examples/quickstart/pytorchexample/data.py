"""CIFAR-10: every client's share of the images, and the server's images."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from datasets import Dataset, load_dataset
from flwr.app.user_config import UserConfig
from flwr_datasets.partitioner import DirichletPartitioner
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as transforms

SERVER = 1000  # training images that the server holds, without labels


@cache
def cifar10(split: str) -> Dataset:
    """The training or test images."""
    folder = os.environ.get("C2M3_DATA")
    if not folder:
        raise RuntimeError(
            "C2M3_DATA is not set; expected a folder with cifar10/train.parquet and cifar10/test.parquet"
        )
    return load_dataset("parquet", data_files={split: f"{folder}/cifar10/{split}.parquet"}, split=split)


@cache
def partitioner(clients: int, alpha: float, images: int, seed: int) -> DirichletPartitioner:
    """The partition of the training images, without those of the server, among the clients."""
    rows = cifar10("train")
    found = DirichletPartitioner(clients, partition_by="label", alpha=alpha, seed=seed)
    found.dataset = rows.select(range(SERVER, min(SERVER + images, len(rows)) if images else len(rows)))
    return found


def share(partition: int, clients: int, config: UserConfig) -> tuple[Dataset, Dataset]:
    """A client's images for training, and the fifth that it holds out for evaluation."""
    alpha, images, seed = float(config["alpha"]), int(config["images"]), int(config["seed"])
    parts = partitioner(clients, alpha, images, seed).load_partition(partition).train_test_split(0.2, seed=42)
    return parts["train"], parts["test"]


def loader(rows: Dataset, size: int, *, shuffle: bool = False) -> DataLoader[Any]:
    """Batches of images between -1 and 1 and labels."""
    return DataLoader(rows, size, shuffle=shuffle, collate_fn=_collate)


def _collate(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    pixels = torch.stack([transforms.pil_to_tensor(row["img"]) for row in rows])
    return pixels / 127.5 - 1, torch.tensor([row["label"] for row in rows])
