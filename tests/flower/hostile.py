"""Attackers among independently initialised clients: `python -m tests.flower.hostile` prints the table.

Ten clients train a perceptron of 64-64-64-10 units on a tenth of the digits each, every one from an initialisation
of its own; three of them are hostile. One round; accuracy of the global model on held-out digits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from flwr.serverapp.strategy import Bulyan, FedAvg, FedMedian, FedTrimmedAvg, Krum, MultiKrum, Strategy
from torch import Tensor

from c2m3_fl.core.spec import Params
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, accuracy, digits, mlp, reply, send, train

CLIENTS, HOSTILE, WIDTH, EPOCHS = 10, 3, 64, 20

Attack = Callable[[Params, torch.Generator], dict[str, Tensor]]


def _scaled(factor: float) -> Attack:
    return lambda params, generator: {name: factor * value for name, value in params.items()}


def _random(params: Params, generator: torch.Generator) -> dict[str, Tensor]:
    """Noise of every tensor's own size: nothing to tell it by its norm."""
    return {
        name: value.std() * torch.randn(value.shape, generator=generator) + value.mean()
        for name, value in params.items()
    }


ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "sign flip": _scaled(-1.0),
    "sign flip ×5": _scaled(-5.0),
    "scaled ×10": _scaled(10.0),
    "scaled ×1000": _scaled(1000.0),
    "random weights": _random,
}

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "FedAvg": FedAvg,
    "FedMedian": FedMedian,
    "FedTrimmedAvg": lambda: FedTrimmedAvg(beta=0.3),
    "Krum": lambda: Krum(num_malicious_nodes=HOSTILE),
    "MultiKrum": lambda: MultiKrum(num_malicious_nodes=HOSTILE, num_nodes_to_select=5),
    "Bulyan (1 assumed)": lambda: Bulyan(num_malicious_nodes=1),
}


def honest(seed: int) -> list[dict[str, Tensor]]:
    """Clients' state dicts, each from its own initialisation and data."""
    found = []
    for index in range(CLIENTS):
        model = mlp(100 * seed + index + 1, WIDTH)
        data, labels = (each[:1200][index::CLIENTS] for each in digits())
        train(model, data, labels, epochs=EPOCHS, seed=index)
        found.append({name: value.detach().clone() for name, value in model.state_dict().items()})
    return found


def attacked(clients: Sequence[Params], attack: Attack | None, seed: int) -> list[Params]:
    """The same clients, the last few of them hostile."""
    generator = torch.Generator().manual_seed(seed)
    hostile = [attack(params, generator) if attack else params for params in clients[-HOSTILE:]]
    return [*clients[:-HOSTILE], *hostile]


def merged(strategy: Strategy, clients: Sequence[Params]) -> float:
    """Accuracy after one round."""
    send(strategy, mlp(0, WIDTH).state_dict())
    arrays, _ = strategy.aggregate_train(1, [reply(node, params) for node, params in enumerate(clients)])
    assert arrays is not None
    return accuracy(lambda: mlp(0, WIDTH), arrays)


def table(seeds: Sequence[int] = (0, 1, 2)) -> None:
    """Print plain and in-universe accuracies, means over the seeds."""
    federations = [honest(seed) for seed in seeds]
    print("| strategy | " + " | ".join(ATTACKS) + " |")
    print("| --- |" + " --- |" * len(ATTACKS))
    for name, make in STRATEGIES.items():
        cells = []
        for attack in ATTACKS.values():
            parties = [attacked(clients, attack, seed) for seed, clients in zip(seeds, federations, strict=True)]
            plain = fmean(merged(make(), clients) for clients in parties)
            ours = fmean(
                merged(C2M3(make(), model=mlp(0, WIDTH), example_inputs=EXAMPLE), clients) for clients in parties
            )
            cells.append(f"{plain:.3f} → **{ours:.3f}**")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.ERROR)
    table()
