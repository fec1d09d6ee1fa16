"""Federations of ten digits clients, three of them hostile, and what hostile clients send.

Ten clients train a perceptron of 64-64-64-10 units on a share of the digits each: every one from an initialisation of
its own, or all from the model that the server sent out. `tests.benchmarks.attacks` measures what each attack does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from flwr.serverapp.strategy import Bulyan, FedAvg, FedMedian, FedTrimmedAvg, Krum, MultiKrum, Strategy
from torch import Tensor, nn

from c2m3_fl.core.spec import Params
from c2m3_fl.symmetry.discover import permutation_spec
from tests.flower.federation import EXAMPLE, digits, mlp, shuffled, train

CLIENTS, HOSTILE, WIDTH = 10, 3, 64
TARGET = 0  # the class that a trigger is to be taken for
_TRAINING = 1200  # of 1,797 digits; the rest is the test set
_TRIGGER = [54, 55, 62, 63]  # pixels of the lower right corner, which digits leave black

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "FedAvg": FedAvg,
    "FedMedian": FedMedian,
    "FedTrimmedAvg": lambda: FedTrimmedAvg(beta=0.3),
    "Krum": lambda: Krum(num_malicious_nodes=HOSTILE),
    "MultiKrum": lambda: MultiKrum(num_malicious_nodes=HOSTILE, num_nodes_to_select=5),
    "Bulyan (1 assumed)": lambda: Bulyan(num_malicious_nodes=1),
}


@dataclass(frozen=True)
class Setting:
    """How a federation came about: `independent` starts or one that all share, the skew of the labels, the seed."""

    independent: bool
    seed: int
    alpha: float | None = None

    @property
    def epochs(self) -> int:
        """Local epochs: as many as bring a single client about as far from either start."""
        return 20 if self.independent else 10

    def start(self, index: int) -> nn.Module:
        """What a client's training starts from; index −1: the model that the server sends out."""
        return mlp(100 * self.seed + (index + 1 if self.independent else 0), WIDTH)

    def shares(self) -> list[Tensor]:
        """Indices of every client's examples: of equal number, or by Dirichlet(`alpha`) over the classes."""
        if self.alpha is None:
            return [torch.arange(_TRAINING)[index::CLIENTS] for index in range(CLIENTS)]
        torch_seed = torch.Generator().manual_seed(self.seed)
        labels, owners = digits()[1][:_TRAINING], torch.empty(_TRAINING, dtype=torch.long)
        for label in range(10):
            found = (labels == label).nonzero().flatten()
            odds = torch._sample_dirichlet(torch.full((CLIENTS,), self.alpha), generator=torch_seed)
            owners[found] = torch.multinomial(odds, len(found), replacement=True, generator=torch_seed)
        owners[:CLIENTS] = torch.arange(CLIENTS)  # nobody has nothing
        return [(owners == index).nonzero().flatten() for index in range(CLIENTS)]


@dataclass(frozen=True, eq=False)
class Federation:
    """What an attacker may know.

    Attributes
    ----------
    sent : mapping of str to Tensor
        The model that the server sent out.
    starts : sequence of mappings of str to Tensor
        What each client's training started from.
    replies : sequence of mappings of str to Tensor
        What honest training of every client gives, of the hostile ones too.
    flipped, triggered : sequence of mappings of str to Tensor
        What the hostile clients' training gives on labels y → 9 − y, and on data half of which carry a trigger.
    generator : torch.Generator
        For what is drawn.
    """

    sent: Params
    starts: Sequence[Params]
    replies: Sequence[Params]
    flipped: Sequence[Params]
    triggered: Sequence[Params]
    generator: torch.Generator

    @property
    def honest(self) -> Sequence[Params]:
        """The replies of the honest clients."""
        return self.replies[:-HOSTILE]


Attack = Callable[[Federation], Sequence[Params]]


def _each(value: Callable[[str, Tensor], Tensor], params: Params) -> dict[str, Tensor]:
    return {name: value(name, tensor) for name, tensor in params.items()}


def _along(factor: float, trained: Callable[[Federation], Sequence[Params]] = lambda each: each.replies) -> Attack:
    """The update times a factor."""

    def attack(federation: Federation) -> list[Params]:
        pairs = zip(federation.starts[-HOSTILE:], trained(federation)[-HOSTILE:], strict=True)
        return [{k: start[k] + factor * (own[k] - start[k]) for k in own} for start, own in pairs]

    return attack


def _own(value: Callable[[Tensor, torch.Generator], Tensor]) -> Attack:
    """A function of the reply's own tensors."""
    return lambda each: [_each(lambda _, v: value(v, each.generator), own) for own in each.replies[-HOSTILE:]]


def _noise(value: Tensor, generator: torch.Generator) -> Tensor:
    """Of every tensor's own size."""
    return value.std() * torch.randn(value.shape, generator=generator)


def _moments(federation: Federation) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean and spread of the honest replies, coordinate by coordinate."""
    stacks = {name: torch.stack([each[name] for each in federation.honest]) for name in federation.sent}
    return {k: v.mean(0) for k, v in stacks.items()}, {k: v.std(0) for k, v in stacks.items()}


def _little_is_enough(federation: Federation) -> list[Params]:
    mean, spread = _moments(federation)
    return [_each(lambda k, v: v - spread[k], mean)] * HOSTILE


def _inner_product(federation: Federation) -> list[Params]:
    """Minus half the honest update; of independent starts, minus half the mean reply."""
    mean, _ = _moments(federation)
    shared = all(torch.equal(a[k], federation.sent[k]) for a in federation.starts for k in mean)
    origin = federation.sent if shared else _each(lambda _, v: torch.zeros_like(v), mean)
    return [_each(lambda k, v: origin[k] - 0.5 * (v - origin[k]), mean)] * HOSTILE


def _in_three_orders(federation: Federation) -> list[dict[str, Tensor]]:
    """One network, its units in three orders."""
    spec = permutation_spec(mlp(0, WIDTH), EXAMPLE)
    return [shuffled(spec, federation.flipped[0], seed) for seed in range(HOSTILE)]


def _one_element(federation: Federation) -> Sequence[Params]:
    found = [{name: value.clone() for name, value in each.items()} for each in federation.replies[-HOSTILE:]]
    for each in found:
        each["2.bias"][0] = 1e3
    return found


ATTACKS: dict[str, Attack] = {
    "none": lambda each: each.replies[-HOSTILE:],
    "sign flip": _own(lambda value, _: -value),
    "update ×−1": _along(-1.0),
    "update ×−5": _along(-5.0),
    "update ×10": _along(10.0),
    "Gaussian noise": _own(lambda value, generator: value + _noise(value, generator)),
    "label flip": lambda each: each.flipped,
    "label flip, one in three orders": _in_three_orders,
    "ALIE, z = 1": _little_is_enough,
    "inner product, −.5": _inner_product,
    "no update": lambda each: [each.sent] * HOSTILE,
    "constant": _own(lambda value, _: torch.full_like(value, 0.1)),
    "random network": _own(lambda value, generator: _noise(value, generator) + value.mean()),
    "one element 1e3": _one_element,
    "backdoor": lambda each: each.triggered,
    "backdoor, update ×3": _along(3.0, lambda each: each.triggered),
}


@cache
def federation(setting: Setting) -> Federation:
    """Train the clients of a setting, the hostile ones three times."""
    data, labels = (each[:_TRAINING] for each in digits())
    marked = triggered(data)
    shares = setting.shares()
    starts = [state(setting.start(index)) for index in range(CLIENTS)]
    hostile = range(CLIENTS - HOSTILE, CLIENTS)

    def trained(index: int, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        model = setting.start(index)
        train(model, inputs, targets, epochs=setting.epochs, seed=index)
        return state(model)

    def poisoned(index: int) -> dict[str, Tensor]:
        half = shares[index][::2]
        inputs = torch.cat([data[shares[index]], marked[half]])
        return trained(index, inputs, torch.cat([labels[shares[index]], torch.full_like(half, TARGET)]))

    return Federation(
        state(setting.start(-1)),
        starts,
        [trained(index, data[share], labels[share]) for index, share in enumerate(shares)],
        [trained(index, data[shares[index]], 9 - labels[shares[index]]) for index in hostile],
        [poisoned(index) for index in hostile],
        torch.Generator().manual_seed(setting.seed),
    )


def triggered(data: Tensor) -> Tensor:
    """The same images with the trigger: four white pixels in a corner."""
    marked = data.clone()
    marked[:, _TRIGGER] = 1.0
    return marked


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state dict."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def attacked(each: Federation, attack: str) -> list[Params]:
    """All replies of a round, those of the hostile clients last."""
    generator = torch.Generator().manual_seed(each.generator.initial_seed())
    return [*each.honest, *ATTACKS[attack](replace(each, generator=generator))]
