"""The deployed model's temperature: the judge compares the chosen network with itself at other temperatures."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.nn import functional

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import CalibrationError
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.merging.recalibrate.head.last_layer import with_temperature
from c2m3_fl.network.program import export_program
from tests.flower.deploying.test_candidates import deployed, played
from tests.flower.federation import accuracy, calibration, digits, mlp, same

ALONE = {"head": None, "calibration": calibration()}
LABELLED = {"head": None, "calibration": [tuple(each[1200:] for each in digits())], "judge": "labels"}


@cache
def trained() -> Params:
    model = mlp(1)
    data, labels = (each[:1200] for each in digits())
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimiser.zero_grad()
        functional.cross_entropy(model(data), labels).backward()
        optimiser.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def scaled(factor: float) -> Params:
    """A trained network with its scores multiplied by `factor`."""
    return trained() | {name: factor * trained()[name] for name in ("4.weight", "4.bias")}


def loss_of(params: Params) -> float:
    model = mlp()
    model.load_state_dict(dict(params))
    data, labels = (each[1200:1400] for each in digits())
    with torch.no_grad():
        return float(functional.cross_entropy(model(data), labels))


def clients(factor: float, metric: str = "loss") -> ClientApp:
    """Clients that send this network and evaluate on images that nobody trained on."""
    app = ClientApp()

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        content = {"arrays": from_params(scaled(factor)), "metrics": MetricRecord({"num-examples": 10})}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"]
        found = loss_of(to_params(arrays)) if metric == "loss" else accuracy(mlp, arrays)
        metrics = MetricRecord({"num-examples": 10, metric: found})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


@pytest.mark.parametrize(
    ("options", "factor", "expected"),
    [(ALONE, 8.0, 3.0), (ALONE, 0.3, 0.5), (LABELLED, 0.1, 0.5)],
    ids=["clients: too sure", "clients: too unsure", "labels: too unsure"],
)
def test_scores_of_the_wrong_scale_are_divided_by_the_temperature_that_is_judged_best(options, factor, expected):
    strategy, result, _ = played(options, clients_app=clients(factor))
    sent, found = to_params(strategy.trajectory), to_params(result.arrays)
    assert result.train_metrics_clientapp[2]["c2m3-temperature"] == expected
    assert loss_of(found) < 0.7 * loss_of(sent)
    if deployed(result, 2)[0] == "aggregate":
        for name in ("4.weight", "4.bias"):
            torch.testing.assert_close(found[name], sent[name] / expected)
        assert all(torch.equal(found[name], sent[name]) for name in sent if not name.startswith("4."))
        assert accuracy(mlp, result.arrays) == accuracy(mlp, strategy.trajectory)


def test_two_clients_choose_no_temperature():
    strategy, result, _ = played(ALONE, clients_app=clients(8.0), transit=lambda replies: replies[:2])
    assert "c2m3-temperature" not in result.train_metrics_clientapp[2]
    assert same(result.arrays, strategy.trajectory)


def test_scores_of_the_right_scale_stay_bit_for_bit():
    strategy, result, _ = played(ALONE, clients_app=clients(1.0))
    assert deployed(result, 2)[0] == "aggregate"
    assert result.train_metrics_clientapp[2]["c2m3-temperature"] == 1.0
    assert same(result.arrays, strategy.trajectory)


def test_a_metric_that_no_temperature_changes_leaves_the_scores_as_they_are():
    strategy, result, _ = played(
        {**ALONE, "judge": "clients", "judge_key": "accuracy"}, clients_app=clients(8, "accuracy")
    )
    assert result.train_metrics_clientapp[2]["c2m3-temperature"] == 1.0
    assert same(result.arrays, strategy.trajectory)


class Tied(nn.Module):
    """The embedding is the last layer, too: dividing it would change what the network reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.scores = nn.Linear(4, 5, bias=False)
        self.scores.weight = self.embedding.weight

    def forward(self, tokens):
        return self.scores(torch.tanh(self.embedding(tokens).mean(1)))


def test_a_temperature_divides_the_scores_and_nothing_else():
    torch.manual_seed(0)
    data = torch.randn(7, 64)
    model = mlp(3)
    program = export_program(model, (data,))
    params = model.state_dict()
    before = {name: value.clone() for name, value in params.items()}
    expected = model(data) / 2.5
    model.load_state_dict(with_temperature(program, before, 2.5))
    torch.testing.assert_close(model(data), expected)
    tied = Tied()
    with pytest.raises(CalibrationError, match="no head"):
        with_temperature(export_program(tied, (torch.zeros(2, 3, dtype=torch.long),)), tied.state_dict(), 2.0)
