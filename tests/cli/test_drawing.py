from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from c2m3_fl.cli import drawing
from c2m3_fl.cli.tables import markdown, rounds_table
from simulations.presets import PRESETS
from simulations.results import Comparison, Round
from simulations.settings import TITLES, Settings


def _comparison(strategies=("fedavg", "c2m3"), seeds=(0,), rounds=2):
    measured = [
        Round(name, seed, number, 0.1 * number + 0.02 * seed, 1.0, (0.2, 0.4), 0.6, 1.0)
        for seed in seeds
        for name in strategies
        for number in range(1, rounds + 1)
    ]
    return Comparison(Settings().to_run_config(), tuple(measured))


def test_the_table_has_a_row_for_every_strategy_and_round():
    table = rounds_table(_comparison())
    assert table.row_count == 4
    assert [column.header for column in table.columns] == [
        *("strategy", "round", "accuracy", "loss", "mean client", "best client", "ensemble")
    ]


def test_markdown_gives_the_last_round():
    assert markdown(_comparison(("c2m3+repair",))).splitlines()[-1] == (
        "| C2M3 + REPAIR | 0.200 | 1.000 | 0.300 | 0.400 | 0.600 |"
    )


def test_several_seeds_give_mean_and_sample_deviation():
    # accuracies .10, .12, .14: mean .12, deviation sqrt((.02^2 + 0 + .02^2) / 2) = .02
    assert "0.120 ± 0.020" in markdown(_comparison(("fedavg",), seeds=(0, 1, 2), rounds=1))


def test_every_strategy_has_a_line_of_its_own_colour_beside_the_references():
    axes = Figure().subplots()
    drawing._lines(axes, _comparison(tuple(TITLES)))
    labels = [line.get_label() for line in axes.lines]
    assert labels == ["ensemble of the clients", "best client", *TITLES.values()]
    assert len({line.get_color() for line in axes.lines[2:]}) == len(TITLES)
    assert axes.lines[2].get_ydata() == pytest.approx([0.1, 0.2])


def test_a_single_round_is_drawn_as_bars():
    axes = Figure().subplots()
    drawing._bars(axes, _comparison(rounds=1, seeds=(0, 1)))
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.11, 0.11])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["FedAvg", "C2M3"]


def test_make_demo_shows_fedavg_c2m3_the_deployed_model_and_the_ensemble():
    """As the preset has them: nothing is run."""
    recipe = (Path(__file__).parents[2] / "Makefile").read_text().split("\ndemo:")[1].splitlines()[1]
    assert "c2m3-fl compare --preset demo " in recipe
    assert "--strategy" not in recipe
    settings = Settings(**PRESETS["demo"])
    comparison = _comparison(settings.strategies, rounds=settings.rounds)
    shown = {"FedAvg", "C2M3", "C2M3, judged by clients"}  # the last is what clients choose to deploy
    axes = Figure().subplots()
    (drawing._lines if comparison.last_round > 1 else drawing._bars)(axes, comparison)
    assert shown | {"ensemble of the clients"} <= {line.get_label() for line in axes.lines}
    header, _, *rows = markdown(comparison).splitlines()
    assert shown <= {row.split(" | ")[0].removeprefix("| ") for row in rows}
    assert "ensemble" in header


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_picture_is_written(tmp_path, rounds):
    drawing.draw(_comparison(rounds=rounds, seeds=(0, 1)), tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
