"""Every stock strategy inside: its own result where nothing moves, a model where everything does."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import (
    Bulyan,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
)

from c2m3_fl.flower.incoming.records import from_params, reply_schema, schema_of, schema_of_params, to_params
from c2m3_fl.flower.incoming.replies import sort_messages
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import (
    EXAMPLE,
    accuracy,
    digits_app,
    mlp,
    normed,
    same,
)

STOCK = {
    "FedAvg": lambda: FedAvg(fraction_evaluate=0.0),
    "FedProx": lambda: FedProx(fraction_evaluate=0.0, proximal_mu=0.1),
    "FedAvgM": lambda: FedAvgM(fraction_evaluate=0.0, server_momentum=0.5, server_learning_rate=0.9),
    "FedAdam": lambda: FedAdam(fraction_evaluate=0.0),
    "FedAdagrad": lambda: FedAdagrad(fraction_evaluate=0.0),
    "FedYogi": lambda: FedYogi(fraction_evaluate=0.0, eta=0.1),
    "FedMedian": lambda: FedMedian(fraction_evaluate=0.0),
    "FedTrimmedAvg": lambda: FedTrimmedAvg(fraction_evaluate=0.0, beta=0.2),
    "Krum": lambda: Krum(fraction_evaluate=0.0, num_malicious_nodes=1),
    "MultiKrum": lambda: MultiKrum(fraction_evaluate=0.0, num_malicious_nodes=1, num_nodes_to_select=4),
    "Bulyan": lambda: Bulyan(fraction_evaluate=0.0, num_malicious_nodes=1),
    "QFedAvg": lambda: QFedAvg(client_learning_rate=0.1, q=0.01, fraction_evaluate=0.0),
}
each_strategy = pytest.mark.parametrize("make", STOCK.values(), ids=STOCK.keys())
NODES = 7  # the fewest that Bulyan takes with one malicious node


def floats(record: ArrayRecord) -> dict[str, torch.Tensor]:
    return {name: value for name, value in to_params(record).items() if value.is_floating_point()}


def rounds_side_by_side(make, app, model, count):
    """C2M3, and a bare server of its own that gets the same replies in the same order."""
    ours, stock = C2M3(make(), model=model, example_inputs=EXAMPLE), make()
    arrays = bare = from_params(model.state_dict())
    grid = SerialGrid(app, NODES)
    for current in range(1, count + 1):
        messages = list(ours.configure_train(current, arrays, ConfigRecord(), grid))
        stock.configure_train(current, bare, ConfigRecord(), grid)
        replies = list(grid.send_and_receive(messages))
        expected = reply_schema(schema_of_params(ours.setup.state_dict()), schema_of(arrays))
        ordered = sort_messages(deepcopy(replies), expected, weighted_by="num-examples").replies
        bare, _ = stock.aggregate_train(current, [each.source for each in ordered])
        arrays, metrics = ours.aggregate_train(current, replies)
        yield arrays, bare, metrics


@each_strategy
def test_with_nothing_to_move_every_strategy_gives_its_own_result_bit_for_bit(make):
    """Round after round: so its momenta, too, are those of a bare server."""
    for arrays, expected, metrics in rounds_side_by_side(make, digits_app(rate=0.02), mlp(), 3):
        assert (metrics["c2m3-share-moved"], metrics["c2m3-kept-previous"]) == (0, 0)
        assert same(arrays, expected)


@pytest.mark.parametrize("make", [STOCK["FedAvg"], STOCK["FedAvgM"], STOCK["FedAdam"]])
def test_no_harm_holds_with_batch_norm_and_its_counters(make):
    """All but running variances that a momentum takes below zero, and those of the rounds that follow."""
    app, mended = digits_app(normed, rate=0.02), set()
    for arrays, expected, metrics in rounds_side_by_side(make, app, normed(), 4):
        assert (metrics["c2m3-share-moved"], metrics["c2m3-kept-previous"]) == (0, 0)
        stock = to_params(expected)
        mended |= {name for name, value in floats(expected).items() if "var" in name and bool((value < 0).any())}
        for name, value in floats(arrays).items():
            assert value.dtype == stock[name].dtype
            assert torch.equal(value, stock[name]) or name in mended, name
            assert bool((value >= 0).all()) or name not in mended
    assert mended == ({"1.running_var"} if make is STOCK["FedAvgM"] else set())


def test_counters_of_batches_do_not_decide_the_order_in_which_a_strategy_sums():
    """A run of C2M3 and one of a bare server, whose counters drift apart, on the same replies sorted the same way."""
    model, first = normed(), from_params(normed().state_dict())
    expected, runs = reply_schema(schema_of_params(model.state_dict()), schema_of(first)), []

    def uneven(replies):
        """As if the clients had different numbers of batches."""
        for reply in replies:
            record = reply.content["arrays"]
            batches = torch.from_numpy(record["1.num_batches_tracked"].numpy()) + 7 * reply.metadata.src_node_id
            record["1.num_batches_tracked"] = Array(batches.to(torch.int64).numpy())
        return [each.source for each in sort_messages(replies, expected, weighted_by="num-examples").replies]

    for strategy in (C2M3(STOCK["FedAvg"](), model=model, example_inputs=EXAMPLE), STOCK["FedAvg"]()):
        rounds = []
        grid = SerialGrid(digits_app(normed, rate=0.02), NODES, transit=uneven)
        strategy.start(grid, first, num_rounds=5, evaluate_fn=lambda _, arrays, kept=rounds: kept.append(arrays))
        runs.append(rounds)
    ours, stock = ([to_params(each) for each in rounds] for rounds in runs)
    assert int(ours[-1]["1.num_batches_tracked"]) != int(stock[-1]["1.num_batches_tracked"])
    for mine, its in zip(ours, stock, strict=True):
        assert all(torch.equal(value, its[name]) for name, value in mine.items() if value.is_floating_point())


@each_strategy
@pytest.mark.parametrize("independent", [False, True], ids=["shared", "independent"])
def test_every_strategy_learns_for_several_rounds(make, independent):
    app = digits_app(independent=independent)
    strategy = C2M3(make(), model=mlp(), example_inputs=EXAMPLE)
    result = strategy.start(SerialGrid(app, NODES), from_params(mlp().state_dict()), num_rounds=6)
    assert [metrics["c2m3-kept-previous"] for metrics in result.train_metrics_clientapp.values()] == [0] * 6
    assert accuracy(mlp, result.arrays) > 0.5  # ten classes


def test_batch_norm_counters_do_not_stop_q_fed_avg():
    strategy = C2M3(STOCK["QFedAvg"](), model=normed(), example_inputs=EXAMPLE)
    result = strategy.start(SerialGrid(digits_app(normed), 3), from_params(normed().state_dict()), num_rounds=2)
    sent = normed().state_dict()
    assert list(result.arrays) == list(sent)
    assert result.arrays["1.num_batches_tracked"].dtype == "int64"
    assert [metrics["c2m3-replies"] for metrics in result.train_metrics_clientapp.values()] == [3, 3]
