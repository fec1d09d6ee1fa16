"""Data, network, training and accuracy of the examples, on scikit-learn's digits."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

TRAINING, CALIBRATION = 1200, 200  # of 1,797 images; the rest is for testing


class Net(nn.Module):
    """A network with two hidden layers; its initial weights depend on `seed`."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.second, self.last = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores, shape (images, 10)."""
        scores: Tensor = self.last(self.second(self.first(images).relu()).relu())
        return scores


def digits() -> tuple[Tensor, Tensor]:
    """All images, 64 pixels between 0 and 1 each, and their labels, in one random order."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]


def calibration() -> list[Tensor]:
    """Unlabelled images of the server: no client trains on them."""
    return list(torch.split(digits()[0][TRAINING : TRAINING + CALIBRATION], 100))


def train(net: nn.Module, part: int, parts: int, *, epochs: int = 5) -> int:
    """Train on one of `parts` equal shares of the training images, and return the number of images."""
    images, labels = (each[:TRAINING][part::parts] for each in digits())
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        for rows in torch.split(order, 32):
            optimiser.zero_grad()
            cross_entropy(net(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]  # torch's
            optimiser.step()
    return len(labels)


def accuracy(net: nn.Module) -> float:
    """Share of the test images that a network classifies correctly."""
    images, labels = (each[TRAINING + CALIBRATION :] for each in digits())
    with torch.inference_mode():
        return float((net(images).argmax(dim=1) == labels).double().mean())
