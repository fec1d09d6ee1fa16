"""Replies of several widths that are matched on another device."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord

from c2m3_fl.core.state_dicts import same
from c2m3_fl.flower import C2M3
from c2m3_fl.flower.incoming.records import to_params
from tests.flower.federation import EXAMPLE, digits, mlp, normed, reply, send, shuffled
from tests.flower.widths.federation import sized
from tests.flower.widths.refits import ALL, answering, one_round


def test_replies_that_permute_their_units_are_brought_back(device: torch.device) -> None:
    strategy = sized(device=device)
    strategy.server.resizing.note({1: 0, 2: 1, 3: 2})
    messages = send(strategy, mlp().state_dict(), nodes=3)
    sent = {each.metadata.dst_node_id: to_params(each.content["arrays"]) for each in messages}
    specs = [each.spec for each in strategy.server.resizing.sizes.networks]
    moved = {node: shuffled(spec, sent[node], node) for node, spec in enumerate(specs, start=1)}
    arrays, metrics = strategy.aggregate_train(1, [reply(node, each) for node, each in moved.items()])
    assert metrics["c2m3-share-moved"] > 0
    for name, value in mlp().state_dict().items():
        torch.testing.assert_close(to_params(arrays)[name], value, rtol=0, atol=1e-6)


def test_a_deployed_model_is_restricted_alike(device: torch.device) -> None:
    start = ArrayRecord(mlp().state_dict())
    inputs = [digits()[0][:60]]
    found, expected = (
        to_params(sized(device=place, calibration=inputs, recalibrate="repair").at_width(start, 1))
        for place in (device, torch.device("cpu"))
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)


def test_models_may_be_moved_and_trained_once_the_strategy_has_them(device):
    """As an evaluation on the server does; the refit from clients, restrictions and later replies are the same."""

    def run(change):
        networks = [normed(seed, width) for seed, width in enumerate((12, 6))]
        strategy = C2M3(model=networks[0], sizes=networks[1:], example_inputs=EXAMPLE, deploy="every", recalibrate=ALL)
        strategy.server.resizing.note({1: 0, 2: 1})
        replies = [normed(seed, width).state_dict() for seed, width in enumerate((12, 6), 1)]
        for each in networks:
            change(each)
        app = answering(lambda: normed(0, 12))
        arrays = one_round(strategy, app, replies, normed(0, 12).state_dict(), examples=(10, 20))
        return [to_params(each) for each in (arrays, strategy.at_width(arrays, 0))]

    def changed(network):
        for value in network.state_dict().values():
            value += 1
        network.half().to(device)

    expected = run(lambda network: None)
    for change in (changed, lambda network: network.to("meta")):
        for one, other in zip(run(change), expected, strict=True):
            assert same(one, other)
