"""What a refit asks of clients: exchanges, bytes, consent, and the options that it takes."""

from __future__ import annotations

import pytest
import torch

from c2m3_fl.errors import CalibrationError, ConfigError
from c2m3_fl.flower.incoming.records import to_params
from c2m3_fl.flower.queries.refit import ClientRefit, RegMean, asks_clients, price, refit_by_clients
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.network.program import export_program
from tests.flower.federation import EXAMPLE, mlp
from tests.flower.queries.refits import ALL, NODES, WEIGHTS, app_of, convolutional, networks, normed, refit


def test_regression_mean_of_identical_networks_is_that_network():
    found, merged = refit(convolutional, RegMean(first_layer=True), alike=True)
    assert all(torch.equal(found.state_dict[name], value) for name, value in merged.items())


def test_regression_mean_takes_one_exchange_and_sends_nobody_the_average():
    queries = []

    class Grid(SerialGrid):
        def push_messages(self, messages):
            messages = list(messages)
            queries.append(messages)
            return super().push_messages(messages)

    endpoints, merged = networks(mlp)
    program = export_program(mlp(), EXAMPLE)
    found = refit_by_clients(
        RegMean(first_layer=True), Grid(app_of(), 3), [1, 2, 3], program, merged, endpoints, WEIGHTS
    )
    assert [len(messages) for messages in queries] == [3]
    assert all(list(each.content.array_records) == ["own"] for each in queries[0])
    assert not torch.equal(found.state_dict["2.weight"], merged["2.weight"])
    torch.testing.assert_close(found.state_dict["2.bias"], merged["2.bias"])


def test_no_second_moments_of_the_input_without_the_consent_of_both():
    for options, limits in ((ClientRefit(), {}), (ClientRefit(first_layer=True), {"first_layer": False})):
        found, merged = refit(mlp, options, app=app_of(mlp, **limits))
        fitted = {report.operator for report in found.report.operators if report.fit}
        assert fitted == {"linear_1", "linear_2"}
        assert "0.weight" in dict(found.report.skipped)
        assert not torch.equal(found.state_dict["4.weight"], merged["4.weight"])


def test_clients_refuse_few_rows_and_few_held_out_examples():
    endpoints, _ = networks(mlp)
    program = export_program(mlp(), EXAMPLE)
    sneaky = ClientRefit()
    object.__setattr__(sneaky, "positions", 1)
    with pytest.raises(CalibrationError, match="the query draws 1 rows, and the client answers with at least 32"):
        refit_by_clients(sneaky, SerialGrid(app_of(), 1), [1], program, endpoints[0], endpoints[:1], [1.0])
    object.__setattr__(sneaky, "positions", 64)
    object.__setattr__(sneaky, "holdout", 50)
    with pytest.raises(CalibrationError, match="holds one example in 50 out"):
        refit_by_clients(sneaky, SerialGrid(app_of(), 1), [1], program, endpoints[0], endpoints[:1], [1.0])


@pytest.mark.slow
def test_the_price_is_that_of_the_answers():
    sizes = []

    def weigh(replies):
        sizes.extend(
            sum(value.numel() * value.element_size() for value in to_params(each.content["sums"]).values())
            for each in replies
        )
        return replies

    for make in (mlp, convolutional, normed):
        for options in (ALL, ClientRefit(first_layer=True), ClientRefit(exchanges=2), RegMean(first_layer=True)):
            sizes.clear()
            refit(make, options, transit=weigh)
            found = price(options, export_program(make(), EXAMPLE), make().state_dict())
            assert sum(sizes) == NODES * found.answered
            assert len(sizes) == NODES * found.exchanges


def test_options_out_of_range_are_refused_at_once():
    for make, match in (
        (lambda: ClientRefit(exchanges=0), "exchanges is 0"),
        (lambda: ClientRefit(strengths=()), r"strengths is \(\)"),
        (lambda: ClientRefit(holdout=11), "holdout is 11, expected at most 10"),
        (lambda: ClientRefit(positions=3), "positions is 3"),
        (lambda: RegMean(shrink=2.0), "shrink is 2.0"),
    ):
        with pytest.raises(ConfigError, match=match):
            make()
    assert asks_clients(ClientRefit())
    assert asks_clients(RegMean())
    assert not asks_clients("repair")


def test_the_log_states_the_sizes_before_anything_is_asked(caplog):
    said = []

    class Grid(SerialGrid):
        def push_messages(self, messages):
            said.append([text for text in caplog.messages if "every client is sent" in text])
            return super().push_messages(messages)

    endpoints, merged = networks(mlp)
    program = export_program(mlp(), EXAMPLE)
    options = ClientRefit(first_layer=True, max_bytes=20_000, sketch=4)
    refit_by_clients(options, Grid(app_of(), 3), [1, 2, 3], program, merged, endpoints, WEIGHTS)
    found = price(options, program, merged)
    (line,) = said[0]
    assert len(said) == found.exchanges == 3
    assert f"3 exchanges; every client is sent {found.sent / 1e6:.1f} MB" in line
    assert f"answers {found.answered / 1e6:.1f} MB; by sketches: linear, linear_1" in line
