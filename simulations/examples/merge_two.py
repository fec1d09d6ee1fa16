"""Merge two networks that were trained apart: ``python -m simulations.examples.merge_two``."""

from __future__ import annotations

from c2m3_fl import merge
from simulations.examples.digits import Net, accuracy, calibration, train


def main() -> dict[str, float]:
    """Train on either half of the images from different initial weights, merge, and return all accuracies."""
    first, second = Net(seed=1), Net(seed=2)
    train(first, 0, 2)
    train(second, 1, 2)

    nodes = [first.state_dict(), second.state_dict()]
    merged = merge(Net(), nodes, calibration=calibration())
    print(merged.report)

    found = {"first": accuracy(first), "second": accuracy(second)}
    model = Net()
    model.load_state_dict({name: (nodes[0][name] + nodes[1][name]) / 2 for name in nodes[0]})
    found["mean"] = accuracy(model)
    model.load_state_dict(merged.state_dict)
    return found | {"merged": accuracy(model)}


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:8} {value:.3f}")
