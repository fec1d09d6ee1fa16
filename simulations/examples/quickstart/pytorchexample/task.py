"""Network and training of the quickstart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Net(nn.Module):
    """Two convolutions and three linear layers, as in Flower's quickstart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.pool = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2, 2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores, shape (images, 10)."""
        features = self.pool(self.conv2(self.pool(self.conv1(images).relu())).relu()).flatten(1)
        scores: Tensor = self.fc3(self.fc2(self.fc1(features).relu()).relu())
        return scores


def train(net: nn.Module, batches: DataLoader[Any], epochs: int, rate: float) -> float:
    """Train with momentum .9, and return the mean loss."""
    optimiser = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    losses = []
    for _ in range(epochs):
        for images, labels in batches:
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(net(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimiser.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.inference_mode()
def test(net: nn.Module, batches: DataLoader[Any]) -> tuple[float, float]:
    """Mean loss and accuracy."""
    scores, labels = zip(*((net(images), labels) for images, labels in batches), strict=True)
    found, expected = torch.cat(scores), torch.cat(labels)
    return float(nn.functional.cross_entropy(found, expected)), float((found.argmax(1) == expected).double().mean())
