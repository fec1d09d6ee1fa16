"""Calibration data that are unlike the clients': what their BatchNorm shows of it, and what it must not show."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from c2m3_fl.errors import CalibrationError
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, aggregate, clients, digits, mlp, normed, reply, same, train

HELD = slice(1200, None)
REFUSED, TOLD = "are not of the clients' kind", "are unlike the clients' data"


@cache
def trained(skewed, epochs):
    """The replies of six clients with starts of their own, of all classes or of two or three each."""
    data, labels = (each[:1200] for each in digits())
    order = labels.argsort() if skewed else torch.arange(1200)
    found = []
    for node, rows in enumerate(order.split(200)):
        model = normed(node)
        train(model, data[rows], labels[rows], epochs=epochs, seed=node)
        found.append({name: value.clone() for name, value in model.state_dict().items()})
    return found


def deployed(inputs, *, epochs, skewed=False, rounds=1):
    """The metrics of the last of some rounds, and whether the aggregate was deployed."""
    strategy = C2M3(model=normed(), calibration=[inputs], judge=None)
    for _ in range(rounds):
        messages = [reply(node, params) for node, params in enumerate(trained(skewed, epochs))]
        arrays, metrics = aggregate(messages, strategy, normed().state_dict())
    plain, _ = aggregate(
        [reply(node, params) for node, params in enumerate(trained(skewed, epochs))],
        C2M3(model=normed(), example_inputs=EXAMPLE, judge=None),
        normed().state_dict(),
    )
    return metrics, same(arrays, plain)


HONEST = {
    "all": lambda data, labels: data,
    "100": lambda data, labels: data[:100],
    "20": lambda data, labels: data[:20],
    "three classes": lambda data, labels: data[labels < 3],
}


@pytest.mark.parametrize("choose", HONEST.values(), ids=HONEST.keys())
@pytest.mark.parametrize("skewed", [False, True])
def test_data_of_the_clients_kind_are_used_without_a_word(choose, skewed, caplog):
    metrics, plain = deployed(choose(*(each[HELD] for each in digits())), skewed=skewed, epochs=3)
    assert (metrics["c2m3-repaired"], plain) == (1, False)
    assert not [text for text in caplog.messages if REFUSED in text or TOLD in text]


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("factor", [16, 1 / 16])
def test_data_of_another_range_are_refused_after_a_single_epoch_already(skewed, factor, caplog):
    """When nearly half of a client's running statistics are still what they were at the start."""
    metrics, plain = deployed(factor * digits()[0][HELD], skewed=skewed, epochs=1)
    assert (metrics["c2m3-repaired"], plain) == (0, True)
    assert any(REFUSED in text for text in caplog.messages)


SHIFTED = {
    "half the contrast": lambda data: data.mean() + (data - data.mean()) / 2,
    "pixels shuffled": lambda data: data[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))],
}


@pytest.mark.parametrize("change", SHIFTED.values(), ids=SHIFTED.keys())
def test_other_data_of_the_same_range_are_told_once_and_used(change, caplog):
    metrics, plain = deployed(change(digits()[0][HELD]), epochs=5, rounds=2)
    assert (metrics["c2m3-repaired"], plain) == (1, False)
    assert sum(TOLD in text for text in caplog.messages) == 1


FEW = {
    "two inputs": lambda data: data[:2],
    "five inputs": lambda data: data[:5],
    "all but one the same": lambda data: torch.cat([data[:1].expand(49, 64), data[1:2]]),
    "one a million times as large": lambda data: torch.cat([data, 1e6 * data[:1]]),
}


@pytest.mark.parametrize("choose", FEW.values(), ids=FEW.keys())
def test_nothing_is_recalibrated_with_inputs_that_hardly_vary(choose, caplog):
    """No shift shows it: the network has no BatchNorm."""
    inputs = choose(digits()[0][HELD])
    found = C2M3(model=mlp(), calibration=[inputs[:20], inputs[20:]] if len(inputs) > 20 else [inputs], judge=None)
    messages = [reply(node, params) for node, params in enumerate(clients(4))]
    arrays, _ = aggregate(messages, found, mlp().state_dict())
    plain, _ = aggregate(messages, C2M3(model=mlp(), example_inputs=EXAMPLE, judge=None), mlp().state_dict())
    assert same(arrays, plain)
    assert f"the spread of the {len(inputs)} calibration inputs is that of" in caplog.text
    with pytest.raises(CalibrationError, match="all but few are the same: pass more, and more varied, inputs"):
        C2M3(model=mlp(), calibration=[inputs], recalibrate="repair")


def test_inputs_of_several_tensors_vary_where_one_of_them_does():
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 10)

        def forward(self, inputs, mask, bias):
            return self.layer(inputs * mask) + bias

    def batches(inputs):
        count = len(inputs)
        batch = inputs, torch.ones(count, 64, dtype=torch.bool), torch.full((count, 10), 0.1)
        example = tuple(each[:2] for each in batch)
        return C2M3(model=Masked(), calibration=[batch], example_inputs=example, judge=None).setup.data.batches

    varied = digits()[0][HELD][:40]
    assert batches(varied)
    assert not batches(torch.cat([varied[:1].expand(49, 64), varied[1:2]])), "rounding of a mean is no variance"
