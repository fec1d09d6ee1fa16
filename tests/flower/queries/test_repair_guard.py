"""The clients' moments tell the guard whether the server's data are like theirs."""

from __future__ import annotations

import pytest

from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.queries.repair import ClientStatistics
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, answering, digits, digits_app, mlp
from tests.flower.queries.repairs import run


def guarded(data, app=None, **options):
    """The round's metrics of a federation whose server holds `data` and lets the guard decide."""
    app = app or answering(app=digits_app(independent=True, epochs=5))
    options |= {"calibration": [data], "recalibrate": "auto", "diagnostics": True}
    return run(SerialGrid(app, 4), rounds=1, **options).train_metrics_clientapp[1]


def test_the_clients_own_moments_show_the_guard_whether_the_servers_data_are_like_theirs():
    data = digits()[0][:400]
    unknown, like, unlike = guarded(data), *(guarded(each, moments=ClientStatistics()) for each in (data, 3 - 3 * data))
    assert "c2m3-guard-shift" not in unknown
    assert like["c2m3-guard-shift"] < 0.2 < 0.8 < unlike["c2m3-guard-shift"]
    assert [metrics.get("c2m3-guard-kept/refit") for metrics in (unknown, like, unlike)] == [None, 1, None]


def test_where_a_client_gives_no_moments_the_guard_holds_back(caplog):
    data = digits()[0][:400]
    metrics = guarded(data, digits_app(independent=True, epochs=5), moments=ClientStatistics())
    assert (metrics["c2m3-repaired"], metrics["c2m3-guard-kept/repair"]) == (1, 1)
    assert any("nothing shows a shift" in text for text in caplog.messages)


def test_moments_without_calibration_data_to_compare_them_with_are_refused():
    for held in (None, ClientStatistics()):
        with pytest.raises(ConfigError, match="pass calibration"):
            C2M3(model=mlp(), example_inputs=EXAMPLE, calibration=held, moments=ClientStatistics())
