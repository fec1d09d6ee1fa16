"""The last layer of class scores is found where there is one, and named where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from c2m3_fl.errors import CalibrationError
from c2m3_fl.merging.recalibrate.head.last_layer import last_layer, reads_input, with_head
from c2m3_fl.merging.recalibrate.softmax_fit import Layer
from c2m3_fl.network.program import export_program


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.mix = nn.Parameter(torch.randn(6, 3))

    def forward(self, x):
        return torch.relu(self.body(x)) @ self.mix


class Added(Product):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return super().forward(x) + self.shift


class Pair(Product):
    def forward(self, x):
        scores = super().forward(x)
        return scores, scores.sum(1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)

    def forward(self, x):
        return self.twice(torch.relu(self.twice(x)))


def body(*last):
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), *last)


def program(model, example=None):
    return export_program(model, (torch.zeros(2, 4) if example is None else example,))


@pytest.mark.parametrize(
    ("model", "weight"),
    [
        (body(nn.Linear(6, 3)), "2.weight"),
        (body(nn.Linear(6, 3, bias=False)), "2.weight"),
        (body(nn.Linear(6, 3), nn.LogSoftmax(1)), "2.weight"),
        (body(nn.Linear(6, 3), nn.LogSoftmax(-1)), "2.weight"),
        (Product(), "mix"),
    ],
)
def test_the_layer_that_gives_the_scores_is_found(model, weight):
    assert last_layer(program(model)).weight == weight


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (body(nn.Linear(6, 1)), r"gives outputs of shape \(2, 1\)"),
        (body(nn.Linear(6, 3), nn.Sigmoid()), "computed by aten.sigmoid"),
        (body(nn.Linear(6, 4), nn.Unflatten(1, (2, 2))), "computed by aten"),
        (Added(), "computed by aten.add"),
        (Pair(), "has 2 outputs"),
        (Tied(), "computed by aten.linear.default, expected a linear layer with a weight of its own"),
    ],
)
def test_other_outputs_are_named(model, reason):
    with pytest.raises(CalibrationError, match=reason):
        last_layer(program(model))


def test_outputs_at_many_positions_are_not_class_scores():
    with pytest.raises(CalibrationError, match=r"shape \(2, 5, 3\)"):
        last_layer(program(body(nn.Linear(6, 3)), torch.zeros(2, 5, 4)))


def test_a_layer_reads_the_input_unless_an_operator_lies_between():
    linear = program(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    assert reads_input(linear, last_layer(linear))
    deep = program(body(nn.Linear(6, 3)))
    assert not reads_input(deep, last_layer(deep))


def test_batch_norm_of_the_input_is_the_input():
    normed = program(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    assert reads_input(normed, last_layer(normed))
    deep = program(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))
    assert not reads_input(deep, last_layer(deep))


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)])
def test_any_other_norm_of_the_input_is_the_input_too(norm):
    normed = program(nn.Sequential(nn.Flatten(), norm, nn.Linear(4, 3)))
    assert reads_input(normed, last_layer(normed))
    deep = program(nn.Sequential(nn.Flatten(), norm, nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)))
    assert not reads_input(deep, last_layer(deep))


class Recurrent(nn.Module):
    """Reads a sequence, or tokens where `embedded`; a layer of scores on the last step."""

    def __init__(self, *, embedded: bool, kind: type[nn.RNNBase] | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4) if embedded else nn.Identity()
        self.cell = kind(4, 6, batch_first=True) if kind else None
        self.scores = nn.Linear(6 if kind else 4, 3)

    def forward(self, sequence):
        found = self.embedding(sequence)
        return self.scores((found if self.cell is None else self.cell(found)[0])[:, -1])


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, None])
def test_what_a_recurrent_layer_computes_is_not_the_input_and_an_embedding_alone_is(kind, embedded):
    example = torch.zeros(2, 3, dtype=torch.long) if embedded else torch.zeros(2, 3, 4)
    found = program(Recurrent(embedded=embedded, kind=kind), example)
    assert reads_input(found, last_layer(found)) == (kind is None)


@pytest.mark.parametrize("model", [body(nn.Linear(6, 3)), Product()])
def test_a_new_head_gives_its_scores_divided_by_the_temperature(model):
    found = program(model)
    generator = torch.Generator().manual_seed(0)
    layer = Layer(torch.randn(6, 3, generator=generator).double(), torch.randn(3, generator=generator).double())
    params = with_head(found, model.state_dict(), layer, 0.5)
    inputs = torch.randn(5, 4, generator=generator)
    hidden = torch.relu(model[0](inputs) if isinstance(model, nn.Sequential) else model.body(inputs))
    expected = 2 * (layer(hidden.double()) if last_layer(found).bias else hidden.double() @ layer.weight)
    torch.testing.assert_close(
        torch.func.functional_call(model, params, (inputs,)).double(), expected, atol=1e-5, rtol=1e-5
    )
