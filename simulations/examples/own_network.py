"""A network that cannot be traced, with a spec by hand: ``python -m simulations.examples.own_network``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from c2m3_fl import Group, PermutationSpec, Segment, TensorSpec, check_invariance, merge
from simulations.examples.digits import accuracy, calibration, train

UNITS = 64


class Branching(nn.Module):
    """A network with a branch that depends on values, which ``torch.export`` refuses."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.again, self.last = nn.Linear(64, UNITS), nn.Linear(UNITS, UNITS), nn.Linear(UNITS, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores, shape (images, 10)."""
        hidden = self.first(images).relu()
        if hidden.mean() < 0.5:
            hidden = self.again(hidden).relu()
        scores: Tensor = self.last(hidden)
        return scores


def spec() -> PermutationSpec:
    """One group, because `last` reads units of `first` or of `again`; axes ``()``, of pixels and classes, are fixed."""
    units = (Segment.contiguous("units", UNITS),)
    return PermutationSpec(
        groups={"units": Group(UNITS)},
        tensors={
            "first.weight": TensorSpec((UNITS, 64), (units, ())),
            "first.bias": TensorSpec((UNITS,), (units,)),
            "again.weight": TensorSpec((UNITS, UNITS), (units, units)),
            "again.bias": TensorSpec((UNITS,), (units,)),
            "last.weight": TensorSpec((10, UNITS), ((), units)),
            "last.bias": TensorSpec((10,), ((),)),
        },
    )


def main() -> dict[str, float]:
    """Check the spec on images, merge two trained networks with it, and return accuracies and the spec's error."""
    first, second = Branching(seed=1), Branching(seed=2)
    train(first, 0, parts=2)
    train(second, 1, parts=2)
    found = {"first": accuracy(first), "second": accuracy(second)}
    images = calibration()[0]
    found["error of the spec"] = check_invariance(first, spec(), images)
    nodes = [first.state_dict(), second.state_dict()]
    first.load_state_dict(merge(first, nodes, spec=spec(), example_inputs=images).state_dict)
    return found | {"merged": accuracy(first)}


if __name__ == "__main__":
    print(main())
