"""After a failed round a wrapped strategy is what it was, however deep its state lies and whoever shares it."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.common import EvaluateRes
from flwr.server import strategy as legacy
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi

from c2m3_fl.errors import ParamsError
from c2m3_fl.flower import LegacyC2M3
from c2m3_fl.flower.incoming.records import to_params
from c2m3_fl.flower.rewind import Before
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, answer, clients, mlp, reply, same, send
from tests.flower.legacy_federation import OK, Local

HUGE = 1e30  # finite in float32, its square is not


class OwnMoments(FedAvg):
    """An adaptive optimiser of the user's own, whose state is a dict of tensors changed in place."""

    def __init__(self):
        super().__init__()
        self.moments = {}

    def configure_train(self, server_round, arrays, config, grid):
        self.sent = arrays.to_torch_state_dict()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        found = {}
        for name, value in arrays.to_torch_state_dict().items():
            step = value - self.sent[name]
            self.moments.setdefault(name, torch.zeros_like(step)).mul_(0.9).add_(step**2)
            found[name] = self.sent[name] + step / (self.moments[name].sqrt() + 1e-3)
        return ArrayRecord(found), metrics


ADAPTIVE = {
    "FedAdam": FedAdam,
    "FedYogi": FedYogi,
    "FedAdagrad": FedAdagrad,
    "FedAvgM": lambda: FedAvgM(server_momentum=0.9),
    "own": OwnMoments,
}


def rounds(strategy, faulty, poisoned=(2,)):
    """Three rounds of one strategy; in the poisoned ones node 3 sends `faulty`, or nothing."""
    found, current = [], mlp().state_dict()
    for number in (1, 2, 3):
        send(strategy, current, round_number=number)
        replies = {
            node: {k: v + 0.001 * number for k, v in each.items()}
            for node, each in enumerate(clients(4, independent=False))
        }
        if number in poisoned:
            replies[3] = faulty
        messages = [reply(node, each) for node, each in replies.items() if each is not None]
        arrays, metrics = strategy.aggregate_train(number, messages)
        current = to_params(arrays)
        found.append((arrays, metrics))
    return found


def poison(value):
    return {name: torch.full_like(each, value) for name, each in mlp().state_dict().items()}


@pytest.mark.parametrize("make", ADAPTIVE.values(), ids=ADAPTIVE.keys())
def test_one_huge_reply_does_not_freeze_an_adaptive_strategy(make):
    """In round two FedAdam's arrays are float64, in which the square is finite."""
    found, expected = (
        rounds(C2M3(make(), model=mlp(), example_inputs=EXAMPLE), faulty) for faulty in (poison(HUGE), None)
    )
    assert [metrics["c2m3-dropped"] for _, metrics in found] == [0, 1, 0]
    for (arrays, metrics), (spared, _) in zip(found, expected, strict=True):
        assert metrics["c2m3-kept-previous"] == 0
        assert same(arrays, spared)


@pytest.mark.parametrize("value", [HUGE, 1e6, 10.0])
def test_huge_replies_in_every_round_do_not_freeze_an_adaptive_strategy_either(value):
    """Squares that float32 holds slow it down as well: FedAdam forgets one per cent of them a round."""
    found, expected = (
        rounds(C2M3(FedAdam(), model=mlp(), example_inputs=EXAMPLE), faulty, (1, 2, 3))
        for faulty in (poison(value), None)
    )
    assert [metrics["c2m3-dropped"] for _, metrics in found] == [1, 1, 1]
    assert all(same(arrays, spared) for (arrays, _), (spared, _) in zip(found, expected, strict=True))


class Remembers:
    """An object of the user's own."""

    def __init__(self, values):
        self.values = values


@dataclass(slots=True)
class Slotted:
    count: int = 0
    arrays: dict = field(default_factory=dict)


class Hoarder(FedAvg):
    """State of every kind, changed in place by `spoil`."""

    def __init__(self):
        super().__init__()
        self.rounds, self.deep, self.slots = [1], {"a": [{"b": np.zeros(2)}]}, Slotted(1, {"w": np.ones(2)})
        self.queue, self.names, self.object = deque([1]), {"x"}, Remembers([torch.zeros(2)])
        self.record = ArrayRecord({"w": Array(np.zeros(2))})
        self.net, self.generator, self.rng = torch.nn.Linear(2, 1), torch.Generator(), np.random.default_rng(0)
        self.optimiser, self.dice = torch.optim.Adam(self.net.parameters(), lr=0.1), random.Random(0)

    def spoil(self):
        self.net(torch.ones(2)).sum().backward()
        self.optimiser.step()
        self.rounds.append(2)
        self.deep["a"][0]["b"][0] = np.nan
        self.deep["a"].append(self)  # a cycle
        self.slots.count, self.slots.arrays["w"][1] = 2, np.inf
        self.queue.clear()
        self.names.add("y")
        self.object.values[0].fill_(np.nan)
        self.object.new = 1
        self.record.clear()
        self.rounds, self.later = [], 5
        return [self.draw() for _ in range(3)]

    def draw(self):
        return torch.rand((), generator=self.generator).item(), self.rng.random(), self.dice.random()

    def held(self):
        state = self.optimiser.state_dict()["state"]
        weights = [each.tolist() for each in self.net.parameters()]
        plain = (self.rounds, self.queue, self.names, self.slots.count, self.slots.arrays["w"].tolist())
        nested = (self.deep["a"][0]["b"].tolist(), len(self.deep["a"]), [each.tolist() for each in self.object.values])
        return plain, nested, vars(self.object).keys(), list(self.record), state, weights, vars(self).keys()


def test_state_of_every_kind_is_taken_back_in_place_as_often_as_need_be():
    strategy = Hoarder()
    rounds_of_the_user, expected = strategy.rounds, repr(strategy.held())
    before, drawn = Before(strategy), []
    for _ in range(2):
        drawn.append(strategy.spoil())
        assert repr(strategy.held()) != expected
        before.rewind()
        assert repr(strategy.held()) == expected
        assert strategy.rounds is rounds_of_the_user
    assert drawn[0] == drawn[1]


class Locked:
    def __init__(self):
        self.lock, self.sent = Lock(), []


class Awkward(torch.Tensor):
    def detach(self):
        raise RuntimeError("no copies")


def test_what_cannot_be_copied_or_compared_does_not_end_the_run():
    strategy = FedAvg()
    strategy.odd = torch.zeros(2).as_subclass(Awkward)
    strategy.eight, strategy.meta = torch.ones(2).to(torch.float8_e4m3fn), torch.ones(2, device="meta")
    strategy.counts = [1]
    before = Before(strategy)
    strategy.counts.append(2)
    before.check()
    before.rewind()
    assert strategy.counts == [1]


def test_what_threads_share_and_what_is_data_is_left_alone():
    strategy = FedAvg()
    strategy.writer, strategy.data = Locked(), torch.utils.data.TensorDataset(torch.zeros(2))
    before = Before(strategy)
    strategy.writer.sent.append("line")
    strategy.data.tensors[0].fill_(1)
    before.rewind()
    assert strategy.writer.sent == ["line"]
    assert strategy.data.tensors[0].tolist() == [1, 1]


@pytest.mark.parametrize("base", [FedAvg, legacy.FedAvg])
@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"w": np.array([1, np.nan])}, r"FedAvg\.state\['w'\] holds NaN"),
        ([torch.tensor([1e20])], r"FedAvg\.state\[0\] holds NaN, or values whose squares overflow"),
        (Remembers(ArrayRecord({"w": Array(np.full(2, -np.inf))})), r"FedAvg\.state\.values\['w'\]"),
        (np.float16("inf"), None),
        (float("nan"), None),
        ([1.0, float("inf")], None),
        (np.full(3, 1e10), None),
        (np.array([np.nan], dtype=object), None),
    ],
)
def test_arrays_that_are_not_finite_any_more_are_found(base, value, where):
    """A number that was none before is the strategy's own choice: a loss that nobody has reported yet."""
    strategy = base()
    before = Before(strategy)
    strategy.state = value
    if where is None:
        before.check()
    else:
        with pytest.raises(ParamsError, match=where):
            before.check()
        before = Before(strategy)
        before.check()


def test_numbers_that_were_finite_are_watched():
    strategy = FedAvg()
    strategy.norm, strategy.best = 1.0, float("inf")
    before = Before(strategy)
    strategy.best = float("nan")
    before.check()
    strategy.norm = 1e300
    with pytest.raises(ParamsError, match=r"FedAvg\.norm"):
        before.check()


class BestSoFar:
    """State that a strategy of the user's own changes while it aggregates an evaluation that then fails."""

    def __init__(self):
        super().__init__()
        self.losses, self.moments = [1.0], np.zeros(2)

    def aggregate_evaluate(self, server_round, replies, failures=None):
        self.losses.append(0.5)
        self.moments += server_round
        if server_round == 2:
            raise ZeroDivisionError("no clients with a loss")
        if server_round == 3:
            self.moments[0] = np.nan
        return (0.5, {}) if failures is not None else MetricRecord({"loss": 0.5})


class Current(BestSoFar, FedAvg):
    pass


class Legacy(BestSoFar, legacy.FedAvg):
    pass


@pytest.mark.parametrize("dialect", ["current", "legacy"])
def test_an_evaluation_that_fails_leaves_no_trace_in_the_wrapped_strategy(dialect, caplog):
    """Round 2 raises, round 3 leaves NaN in an array: neither has an evaluation, and what follows is as before."""
    current = dialect == "current"
    inside = Current() if current else Legacy()
    outer = (C2M3 if current else LegacyC2M3)(inside, model=mlp(), example_inputs=EXAMPLE)
    shared, found = inside.losses, []
    for number in (1, 2, 3, 4):
        if current:
            sent = [answer(7, RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": 0.5})}))]
            found.append(outer.aggregate_evaluate(number, sent))
        else:
            results = [(Local(0, 1), EvaluateRes(OK, 0.5, 1, {}))]
            found.append(outer.aggregate_evaluate(number, results, [])[0])
    assert [each is None for each in found] == [False, True, True, False]
    assert shared == [1.0, 0.5, 0.5]
    assert inside.losses is shared
    assert inside.moments.tolist() == [5, 5]
    assert "failed: ZeroDivisionError: no clients with a loss" in caplog.text
    assert f"state {type(inside).__name__}.moments holds NaN" in caplog.text
