"""What the page says of attacks is what their record says, and seeds that are known are not measured again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import attacks
from tests.benchmarks.attacks import CLIENTS, HOSTILE, PAGE, RECORD, WAYS, measure, report
from tests.benchmarks.records import read_record


def test_the_page_is_drawn_from_the_record():
    assert report(read_record(RECORD)) in PAGE.read_text()


def test_seeds_are_added_to_a_record_and_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measured = []

    def run_case(bench, setting, attack):
        measured.append((setting.independent, setting.seed))
        value = dict.fromkeys(attacks.STRATEGIES, dict.fromkeys(WAYS, 0.2 + 0.4 * setting.seed))
        row = {"start": attacks.STARTS[setting.independent], "seed": setting.seed, "attack": attack}
        return {**row, "accuracy": value, "backdoor": value, "named": {"honest": 1, "hostile": 2}}

    monkeypatch.setattr(attacks, "run_case", run_case)
    monkeypatch.setattr(attacks, "ATTACKS", ["none", "sign flip"])
    monkeypatch.setattr(attacks.Bench, "build", staticmethod(lambda: None))
    file = tmp_path / "attacks.json"
    measure(file, range(1), [True])
    assert "One seed" in report(read_record(file))
    measure(file, range(2), [True, False])
    assert measured == [(True, 0)] * 2 + [(True, 1)] * 2 + [(False, 0)] * 2 + [(False, 1)] * 2
    text = report(read_record(file))
    assert "Means of 2 seeds" in text
    assert f"Honest replies that were named: 8 of {4 * CLIENTS + 4 * (CLIENTS - HOSTILE)}." in text
    assert f"| sign flip |{' .40 → .40 → .40 |' * len(attacks.STRATEGIES)} 4/{2 * HOSTILE} |" in text
