"""Merged models that clients must not train: far from all replies, or broken on the example inputs."""

from __future__ import annotations

import math
import threading
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg
from torch import nn

from c2m3_fl.errors import ParamsError
from c2m3_fl.flower import acceptance
from c2m3_fl.flower.acceptance import check_norm, check_runs
from c2m3_fl.flower.incoming.buffers import Buffers
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.strategy import C2M3
from c2m3_fl.merging.recalibrate.repair import Repair
from c2m3_fl.network.calibration import as_batch
from tests.flower.federation import EXAMPLE, aggregate, digits, good, mlp, normed, reply, same, send


class Scaling(FedAvg):
    """The mean, times a factor: a strategy that goes wrong on some replies."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        scaled = {key: Array(np.asarray(self.factor * each.numpy())) for key, each in arrays.items()}
        return ArrayRecord(scaled), metrics


@pytest.mark.parametrize(("factor", "kept"), [(0.0, 1), (1e-4, 1), (0.1, 0), (30.0, 0), (1e3, 1)])
def test_a_result_far_from_the_sizes_of_all_replies_is_not_accepted(factor, kept, caplog):
    sent = mlp().state_dict()
    arrays, metrics = aggregate(good(), C2M3(Scaling(factor), model=mlp(), example_inputs=EXAMPLE))
    assert metrics["c2m3-kept-previous"] == kept
    assert same(arrays, from_params(sent)) == bool(kept)
    said = any("the merged model's norm is" in text and "model stays" in text for text in caplog.messages)
    assert said == bool(kept)


def test_sizes_of_replies_bound_the_merged_model():
    for found in (1e-3, 1e2):
        check_norm({"w": torch.tensor([found, 0.0])}, [1.0, 0.1, 1.0])
    for found in (0.9e-3, 1.1e2, math.nan, math.inf):
        with pytest.raises(ParamsError, match=r"expected from 0\.001 to 100"):
            check_norm({"w": torch.tensor([found, 0.0])}, [1.0, 0.1, 1.0])


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.place, self.linear = nn.Parameter(torch.tensor(1.0)), nn.Linear(4, 3)

    def forward(self, x):
        return torch.log(self.place) * self.linear(x)[:, [int(self.place.abs())]]


def test_a_merged_model_that_raises_or_gives_nan_where_the_sent_one_does_not_is_refused():
    model = Looking()
    sent, example = model.state_dict(), as_batch(torch.ones(2, 4))
    check_runs(model, example, sent, sent)
    with pytest.raises(ParamsError, match="the merged model raises IndexError"):
        check_runs(model, example, {**sent, "place": torch.tensor(5.0)}, sent)
    with pytest.raises(ParamsError, match="the merged model gives NaN on the example inputs"):
        check_runs(model, example, {**sent, "place": torch.tensor(-1.0)}, sent)
    check_runs(model, example, sent, {**sent, "place": torch.tensor(-1.0)})
    nan = {**sent, "place": torch.tensor(-2.0)}
    check_runs(
        model, example, nan, {**sent, "place": torch.tensor(-1.0)}
    )  # the network gives NaN on these inputs anyway


class Negating(FedAvg):
    """The mean, one tensor of it below zero."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        arrays[self.name] = Array(np.asarray(-arrays[self.name].numpy()))
        return arrays, metrics


def test_a_merged_model_that_gives_nan_on_the_example_inputs_is_not_sent(caplog):
    sent = Fragile().state_dict()
    replies = [reply(node, sent) for node in range(3)]
    arrays, metrics = aggregate(replies, C2M3(Negating("width"), model=Fragile(), example_inputs=EXAMPLE), sent)
    assert same(arrays, from_params(sent))
    assert metrics["c2m3-kept-previous"] == 1
    assert any("the merged model gives NaN on the example inputs" in text for text in caplog.messages)


def test_variances_below_zero_are_the_smallest_of_the_replies():
    sent = normed().state_dict()
    replies = [reply(node, {**sent, "1.running_var": torch.full((16,), 2.0 + node)}) for node in range(3)]
    strategy = C2M3(Negating("1.running_var"), model=normed(), example_inputs=EXAMPLE)
    arrays, metrics = aggregate(replies, strategy, sent)
    assert torch.equal(to_params(arrays)["1.running_var"], torch.full((16,), 2.0))
    assert metrics["c2m3-kept-previous"] == 0


class Fragile(nn.Module):
    """Looks up a table at a place that it counts in training, and divides by a root of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.width = nn.Linear(64, 3), nn.Parameter(torch.tensor(4.0))
        self.register_buffer("place", torch.tensor(0))

    def forward(self, x):
        outputs = self.linear(x) / self.width.sqrt()
        if self.training:
            outputs = outputs + self.linear.bias[self.place]
            self.place.copy_((self.place + 1) % 3)
        return outputs


class Single(nn.Module):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 3)

    def __deepcopy__(self, memo):
        raise RuntimeError("only tensors created explicitly by the user support the deepcopy protocol")

    def forward(self, x):
        return self.linear(x)


def test_a_network_that_cannot_be_copied_is_not_tried_and_its_rounds_go_on():
    sent = Single().state_dict()
    check_runs(Single(), as_batch(EXAMPLE), sent, sent)
    assert Buffers.of(Single(), as_batch(EXAMPLE)) == Buffers(frozenset(), frozenset(), frozenset())


BREAKING = {"width": torch.tensor(-100.0), "place": torch.tensor(1000)}


@pytest.mark.parametrize("name", BREAKING)
def test_a_reply_that_would_break_the_merged_model_costs_that_reply(name, caplog):
    model = Fragile()
    sent = model.state_dict()
    fine = [reply(node, {**sent, "linear.bias": sent["linear.bias"] + node}) for node in range(3)]
    expected, _ = aggregate(fine, C2M3(model=model, example_inputs=EXAMPLE), sent)
    bad = reply(9, {**sent, name: BREAKING[name]})
    arrays, metrics = aggregate([*fine, bad], C2M3(model=model, example_inputs=EXAMPLE), sent)
    assert same(arrays, expected)
    assert (metrics["c2m3-dropped"], metrics["c2m3-kept-previous"]) == (1, 0)
    assert any("the merged model" in text and "on the example inputs" in text for text in caplog.messages)


def test_a_recalibration_that_breaks_the_model_is_left_out(caplog):
    def breaking(setting):
        found = repair(setting)
        return replace(found, state_dict={**found.state_dict, "1.running_var": -torch.ones(16)})

    repair, sent = Repair(), normed().state_dict()
    replies = [reply(node, {name: value + node for name, value in sent.items()}) for node in range(2)]
    strategy = C2M3(model=normed(), calibration=[digits()[0][:50]], recalibrate=breaking)
    arrays, metrics = aggregate(replies, strategy, sent)
    assert same(arrays, aggregate(replies, C2M3(model=normed(), example_inputs=EXAMPLE), sent)[0])
    assert metrics["c2m3-repaired"] == 0
    assert any("gives NaN on the example inputs: the merged model stays as it is" in text for text in caplog.messages)


def test_the_network_is_copied_before_a_client_of_this_process_may_train_that_very_object(monkeypatch):
    threads = []

    def recorded(model):
        threads.append(threading.current_thread())
        return deepcopy(model)

    monkeypatch.setattr(acceptance, "deepcopy", recorded)
    strategy = C2M3(FedAvg(), model=mlp(), example_inputs=EXAMPLE)
    send(strategy, mlp().state_dict())
    strategy.server.ahead.finished()
    assert threads == [threading.main_thread()] * 2
