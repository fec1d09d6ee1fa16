"""Model and data of a simulated server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class SimulatedServer:
    """Model and data of the server of a federation.

    Attributes
    ----------
    model : nn.Module
        The architecture.
    calibration : list of Tensor
        Unlabelled images.
    clients : int
        Number of clients in round 1.
    participation : float
        Share of the clients that train in a round.
    device : torch.device, optional
        Where C2M3 computes; by default CUDA where there is a device.
    """

    model: nn.Module
    calibration: list[Tensor]
    clients: int
    participation: float = 1.0
    device: torch.device | None = None

    @property
    def everyone(self) -> dict[str, Any]:
        """Options of Flower's strategies: who trains; evaluation is left to the server."""
        return {
            "fraction_evaluate": 0.0,
            "fraction_train": self.participation,
            "min_train_nodes": max(1, int(self.participation * self.clients)),
            "min_available_nodes": self.clients,
        }
