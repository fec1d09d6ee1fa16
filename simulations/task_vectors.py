"""Merging by task vectors, the differences between what clients trained and the model that they were sent.

They say something where all clients started from that model; clients with starts of their own share no such model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from c2m3_fl.core.spec import Params, floating
from c2m3_fl.flower.incoming.records import from_params, to_params

_KEPT = 0.2  # share of the entries of a task vector that TIES keeps, as in its paper


class TaskAverage(FedAvg):
    """The model that was sent plus the plain mean of the task vectors, without weights.

    Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, with scale 1 / n: the mean of n networks.
    """

    def __init__(self, **options: Any) -> None:  # noqa: ANN401  # FedAvg's own
        super().__init__(**options)
        self.sent: Params = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember the model that is sent."""
        self.sent = to_params(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The model sent plus the merged task vectors; buffers are FedAvg's."""
        messages = [reply for reply in replies if not reply.has_error()]
        nodes = [to_params(record) for each in messages for record in each.content.array_records.values()]
        plain, metrics = super().aggregate_train(server_round, messages)
        if plain is None:
            return None, metrics
        result = to_params(plain)
        names = list(floating(result))
        vectors = torch.stack([_flat(node, names) - _flat(self.sent, names) for node in nodes])
        merged = _flat(self.sent, names) + self.merged(vectors)
        sizes = [result[name].numel() for name in names]
        changed = {
            name: part.view(result[name].shape).to(result[name].dtype)
            for name, part in zip(names, torch.split(merged, sizes), strict=True)
        }
        return from_params({**result, **changed}), metrics

    def merged(self, vectors: Tensor) -> Tensor:
        """One task vector from those of all clients, shape (clients, entries)."""
        return vectors.mean(0)


class Ties(TaskAverage):
    """The model that was sent plus the task vectors, trimmed, and averaged where their signs agree.

    Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, algorithm 1, with the
    share of entries kept of the paper, .2, and scale 1.
    """

    def merged(self, vectors: Tensor) -> Tensor:
        """Trim, elect signs, average (`ties`)."""
        return ties(vectors, _KEPT)


def ties(vectors: Tensor, kept: float) -> Tensor:
    """TIES of task vectors: entries of the elected sign, averaged.

    Parameters
    ----------
    vectors : Tensor, shape (tasks, entries)
        The task vectors.
    kept : float
        Share of the largest entries of each that stay; the others count as zero.
    """
    count = max(1, round(kept * vectors.shape[1]))
    least = vectors.abs().topk(count, dim=1).values[:, -1:]
    trimmed = torch.where(vectors.abs() >= least, vectors, torch.zeros_like(vectors))
    elected = trimmed.sum(0).sign()
    agreeing = (trimmed.sign() == elected) & (trimmed != 0)
    return (trimmed * agreeing).sum(0) / agreeing.sum(0).clamp_min(1)


def _flat(params: Params, names: Sequence[str]) -> Tensor:
    return torch.cat([params[name].double().flatten() for name in names])
