"""Outputs that are read, constant inputs, and dicts as batches."""

from __future__ import annotations

import copy
from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from c2m3_fl import C2M3, check_invariance, merge, permutation_spec
from c2m3_fl.errors import CalibrationError, ConfigError
from c2m3_fl.network.calibration import load_batches
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.network.calls import as_called

TOKENS = torch.randint(9, (3, 5), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(3, 5, dtype=torch.bool)


class Cache:
    """What a network keeps for its next call: no tensor, and no container that PyTorch knows."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


@dataclass
class Answer:
    """Outputs as a dataclass."""

    logits: Tensor
    cache: Cache | None
    hidden: tuple[Tensor, ...]
    count: int


class Classifier(nn.Module):
    """A classifier as libraries write them: a mask, flags, labels for a loss, outputs in a container."""

    def __init__(self, kind: str = "dataclass") -> None:
        super().__init__()
        self.embedding, self.inner, self.scores, self.kind = nn.Embedding(9, 6), nn.Linear(6, 7), nn.Linear(7, 2), kind

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        squared: bool = False,
        **options: Any,
    ) -> Any:
        embedded = self.embedding(tokens)
        if mask is not None:
            embedded = embedded * mask[..., None]
        hidden = self.inner(embedded.mean(1)).relu()
        logits = self.scores(hidden.square() if squared else hidden)
        if self.kind == "dataclass":
            return Answer(logits, Cache(hidden), (hidden,), 3)
        found = {"logits": logits, "cache": Cache(hidden), "hidden": [hidden], "count": 3}
        if labels is not None:
            found = {"loss": nn.functional.cross_entropy(logits, labels), **found}
        return found if self.kind == "dict" else tuple(found.values())


def groups(network: nn.Module, inputs: Any, outputs: Any = None) -> set[str]:
    """Names of the groups."""
    spec = permutation_spec(network, inputs, outputs=outputs)
    assert check_invariance(network, spec, inputs, outputs=outputs) < 1e-12
    return set(spec.groups)


@pytest.mark.parametrize(
    ("kind", "output"), [("dataclass", "logits"), ("dict", "logits"), ("tuple", 0), ("tuple", "0")]
)
def test_only_outputs_that_are_read_pin_units(kind: str, output: str | int) -> None:
    network = Classifier(kind)
    assert groups(network, TOKENS) == {"embedding"}, "the hidden state is an output, the cache is not"
    assert groups(network, TOKENS, output) == {"embedding", "inner"}
    assert groups(network, TOKENS, [output]) == {"embedding", "inner"}


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ("scores", r"no output 'scores'; it returns \['logits', 'cache', 'hidden', 'count'\]"),
        (4, "no output 4"),
        ("cache", "'cache' is a Cache, which holds no tensor"),
        ([], r"outputs is \[\], expected"),
        (True, "outputs is True, expected"),
        (1.5, "outputs is 1.5, expected"),
    ],
)
def test_an_output_that_does_not_exist_is_refused(outputs: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        permutation_spec(Classifier(), TOKENS, outputs=outputs)


def test_a_network_of_one_output_says_so() -> None:
    with pytest.raises(ConfigError, match=r"has no output 'logits'; it returns one output$"):
        permutation_spec(nn.Linear(4, 2), torch.zeros(1, 4), outputs="logits")


def test_batches_of_dicts_keep_class_labels_apart() -> None:
    labels = torch.tensor([0, 1, 1])
    raw = UserDict({"mask": MASK, "labels": labels, "tokens": TOKENS})
    for given in (raw, dict(raw)):
        (batch,) = load_batches([given], model=Classifier())
        assert batch.names == ("tokens", "mask")
        assert batch.labels is labels
    (batch,) = load_batches([{**raw, "labels": TOKENS}], model=Classifier())
    assert batch.names == ("tokens", "mask", "labels"), "a label per token is an input, if the network takes it"
    (batch,) = load_batches([raw], model=Classifier(), inputs=("tokens", "labels"))
    assert batch.names == ("tokens", "labels")


def test_masks_of_minus_infinity_are_inputs_and_other_infinities_are_not() -> None:
    network, mask = nn.Bilinear(2, 2, 2), torch.tensor([[0.0, -torch.inf]])
    assert load_batches([(mask.exp(), mask)], model=network, example_inputs=(mask, mask))
    for inputs in ((mask, mask), (mask.exp(), -mask), (mask.exp(), mask * torch.nan)):
        with pytest.raises(CalibrationError, match="NaN or infinite"):
            load_batches([inputs], model=network, example_inputs=(mask, mask))


def test_example_inputs_that_are_no_tensors_are_passed_in_every_call() -> None:
    network, inputs = Classifier("dict"), {"tokens": TOKENS, "squared": True, "labels": None}
    held = CalibrationSet.of(network, [{"tokens": TOKENS}], example_inputs=inputs, outputs="logits")
    assert held.batches[0].names == ("tokens",)
    assert torch.equal(held.model(TOKENS), network(TOKENS, squared=True)["logits"])
    assert not torch.equal(held.model(TOKENS), held.model(TOKENS, squared=False))


def test_merge_and_strategy_take_dicts_and_outputs() -> None:
    network, order = Classifier(), torch.randperm(7)
    node = network.state_dict()
    twin = {**node, "inner.weight": node["inner.weight"][order], "inner.bias": node["inner.bias"][order]}
    twin["scores.weight"] = node["scores.weight"][:, order]
    batch = UserDict({"tokens": TOKENS, "mask": MASK, "label": torch.tensor([0, 1, 1])})
    merged = merge(network, [node, twin], calibration=[batch], outputs="logits", recalibrate="none", basis=0)
    assert all(torch.equal(merged.state_dict[name], node[name]) for name in node)
    strategy = C2M3(model=network, example_inputs=batch, inputs=("tokens", "mask"), outputs="logits")
    assert set(strategy.setup.spec.groups) == {"embedding", "inner"}


def test_a_choice_of_outputs_survives_copies_and_assigned_forwards() -> None:
    network = Classifier()
    network.forward = network.forward  # as tools do that patch an instance
    chosen = as_called(as_called(network, outputs=["logits", "hidden"]), outputs=0)
    twin = copy.deepcopy(chosen)
    assert torch.equal(chosen(TOKENS), network(TOKENS).logits)
    with torch.no_grad():
        twin.scores.bias += 1
    torch.testing.assert_close(twin(TOKENS), network(TOKENS).logits + 1)
    assert list(chosen.state_dict()) == list(network.state_dict())
    with pytest.raises(ConfigError, match="cannot be chosen for a GraphModule"):
        as_called(fx.symbolic_trace(nn.Linear(2, 2)), outputs=0)
