"""What faulty, missing and foreign answers cost a refit from clients."""

from __future__ import annotations

import logging

import pytest
import torch
from flwr.app import Error
from flwr.clientapp import ClientApp

from c2m3_fl.errors import CalibrationError
from c2m3_fl.flower.incoming.admitted import report_unanswered
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.queries.refit import ClientRefit, refit_by_clients
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.network.program import export_program
from tests.flower.federation import EXAMPLE, answer, mlp
from tests.flower.queries.refits import NODES, WEIGHTS, app_of, networks, refit

FAULT = Error(0, "ValueError: no query")


def corrupt(harm, node=2, part="/xx"):
    def transit(replies):
        for each in replies:
            if each.metadata.src_node_id == node and not each.has_error():
                arrays = to_params(each.content["sums"])
                changed = {name: harm(value) if name.endswith(part) else value for name, value in arrays.items()}
                each.content["sums"] = from_params(changed)
        return replies

    return transit


HARM = {
    "a larger Gram": (lambda value: value * 1e5, "/xx"),
    "correlation above one": (lambda value: value * 1e5, "/xr"),
}


@pytest.mark.parametrize("name", HARM)
def test_a_faulty_answer_leaves_the_result_to_the_others(name):
    harm, part = HARM[name]
    options = ClientRefit(first_layer=True)
    found, _ = refit(mlp, options, transit=corrupt(harm, part=part))
    endpoints, merged = networks(mlp)
    program, grid = export_program(mlp(), EXAMPLE), SerialGrid(app_of(), NODES)

    def without(replies):
        return [each for each in replies if each.metadata.src_node_id != 2]

    grid.transit = without
    expected = refit_by_clients(options, grid, [1, 2, 3], program, merged, endpoints, WEIGHTS).state_dict
    for key, value in expected.items():
        torch.testing.assert_close(found.state_dict[key], value)


def test_a_client_that_vanishes_between_exchanges_or_answers_some_operators_only_costs_nothing_else():
    asked = []

    def vanishing(replies):
        asked.append(1)
        return [each for each in replies if each.metadata.src_node_id != 2 or len(asked) == 1]

    found, merged = refit(mlp, transit=vanishing)
    assert len(found.report.operators) == 6
    assert not torch.equal(found.state_dict["4.weight"], merged["4.weight"])

    def partial(replies):
        for each in replies:
            if each.metadata.src_node_id == 2:
                record = each.content["sums"]
                for name in [name for name in record if name.startswith("linear/")]:
                    del record[name]
        return replies

    halved, _ = refit(mlp, ClientRefit(exchanges=1, first_layer=True), transit=partial)
    assert len(halved.report.operators) == 6


def test_without_any_answer_the_aggregate_is_left_to_the_caller_and_nobody_is_named(caplog):
    with pytest.raises(CalibrationError, match="no client answered the query for sums"):
        refit(mlp, transit=lambda replies: [])
    with pytest.raises(CalibrationError, match="add answer_statistics to its app"):
        refit(mlp, app=ClientApp())
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_nodes_without_an_answer_for_one_reason_are_one_line(caplog):
    def refusing(replies):
        return [replies[0], *(answer(each.metadata.src_node_id, FAULT) for each in replies[1:])]

    refit(mlp, ClientRefit(exchanges=1, first_layer=True), transit=refusing)
    told = [text for text in caplog.messages if "no sums" in text]
    assert told == ["\t> no sums from nodes 2, 3: the client failed: ValueError: no query"]
    report_unanswered("moments", dict.fromkeys(range(12), "gone"))
    assert caplog.messages[-1] == "\t> no moments from nodes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 others: gone"


def test_a_scaled_reply_is_not_asked_and_changes_nothing():
    endpoints, merged = networks(mlp, alike=False)
    four = [*endpoints, {name: -5 * value for name, value in endpoints[0].items()}]
    program, options = export_program(mlp(), EXAMPLE), ClientRefit(first_layer=True)
    ids, weights = [1, 2, 3, 4], [1.0, 1.0, 1.0, 1.0]
    found = refit_by_clients(options, SerialGrid(app_of(), 4), ids, program, merged, four, weights).state_dict
    expected = refit_by_clients(
        options, SerialGrid(app_of(), 4), ids[:3], program, merged, endpoints, weights[:3]
    ).state_dict
    assert all(torch.equal(found[name], expected[name]) for name in found)
