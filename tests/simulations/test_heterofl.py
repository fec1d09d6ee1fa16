"""HeteroFL: nested slices and their mean."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import nn

from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.serial_grid import SerialGrid
from simulations.heterofl import HeteroFL, mean_of_slices, sliced, with_norms, with_scalers, with_static_norms
from tests.flower.federation import answer

WHOLE = {"w": torch.arange(12.0).reshape(4, 3), "b": torch.zeros(4)}
SHAPES = {1: {"w": (4, 3), "b": (4,)}, 2: {"w": (2, 3), "b": (2,)}, 3: {"w": (1, 3), "b": (1,)}}


def test_a_slice_is_the_first_units() -> None:
    found = sliced(WHOLE, SHAPES[2])
    torch.testing.assert_close(found["w"], WHOLE["w"][:2])
    found["w"] += 1  # and a copy
    assert float(WHOLE["w"][0, 0]) == 0


def test_an_entry_is_the_mean_of_the_slices_that_have_it_and_stays_where_none_has() -> None:
    nodes = [{"w": torch.full((2, 3), 1.0), "b": torch.ones(2)}, {"w": torch.full((1, 3), 4.0), "b": torch.ones(1)}]
    found = mean_of_slices(WHOLE, nodes, [1.0, 2.0])
    torch.testing.assert_close(found["w"], torch.cat([torch.full((1, 3), 3.0), torch.ones(1, 3), WHOLE["w"][2:]]))
    torch.testing.assert_close(found["b"], torch.tensor([1.0, 1, 0, 0]))


def test_each_client_is_sent_its_slice_and_unchanged_slices_give_the_model() -> None:
    strategy = HeteroFL(SHAPES)
    grid = SerialGrid(lambda message, context: message, 3)  # type: ignore[arg-type]  # nobody trains
    messages = list(strategy.configure_train(1, from_params(WHOLE), ConfigRecord(), grid))
    replies = []
    for message in messages:
        node, record = message.metadata.dst_node_id, message.content["arrays"]
        assert isinstance(record, ArrayRecord)
        assert {name: tuple(array.shape) for name, array in record.items()} == SHAPES[node]
        content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": node})})
        replies.append(answer(node, content))
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    found = to_params(arrays)
    assert all(torch.equal(found[name], value) for name, value in WHOLE.items())


def test_outputs_are_scaled_in_training_alone() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    scaled, inputs = with_scalers(network, 0.5), torch.randn(4, 3)
    torch.testing.assert_close(scaled.eval()(inputs), network(inputs))
    expected = network[2](torch.relu(2 * network[0](inputs)))
    torch.testing.assert_close(scaled.train()(inputs), expected)


def test_static_statistics_are_those_of_all_clients_data() -> None:
    network = with_norms(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)))
    assert [type(each).__name__ for each in network] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    shares = [torch.randn(50, 3) + 4 * client for client in range(2)]
    found = with_static_norms(network, network.state_dict(), shares)
    outputs = [network[0](inputs) for inputs in shares]
    torch.testing.assert_close(found["1.running_mean"], torch.stack([each.mean(0) for each in outputs]).mean(0))
    torch.testing.assert_close(found["1.running_var"], torch.stack([each.var(0) for each in outputs]).mean(0))
    assert not network[1].num_batches_tracked.any()
