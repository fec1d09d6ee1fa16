from __future__ import annotations

from pathlib import Path

import pytest

import simulations
from c2m3_fl.errors import ConfigError
from simulations.design import load_design, names, read_design
from simulations.strategies import STRATEGIES

TEXT = """
title = "two federations"
seeds = [3, 4]
methods = ["fedavg", "c2m3"]
baseline = "fedavg"
judged = "c2m3"

[settings]
rounds = 2

[axes.start]
shared = { initialisation = "shared" }
own = { initialisation = "independent" }

[axes.partition]
IID = { partition = "iid" }
skewed = { partition = "dirichlet", alpha = 0.1 }

[[also]]
methods = ["fedadam"]
where = { start = ["own"] }

[quick]
seeds = [3]
methods = ["fedavg", "c2m3"]
settings = { rounds = 1 }
where = { partition = ["IID"] }
"""


def _read(text=TEXT, **options):
    return read_design("two", text, **options)


def test_the_cells_are_the_product_of_the_axes():
    found = [(each.labels["start"], each.labels["partition"]) for each in _read().cells]
    assert found == [("shared", "IID"), ("shared", "skewed"), ("own", "IID"), ("own", "skewed")]


def test_a_level_sets_its_settings_and_the_rest_is_shared():
    cell = _read().cells[3].settings
    assert (cell.initialisation, cell.partition, cell.alpha, cell.rounds) == ("independent", "dirichlet", 0.1, 2)


def test_further_methods_run_where_they_are_asked_for():
    assert [each.methods for each in _read().cells] == [("fedavg", "c2m3")] * 2 + [("fedavg", "c2m3", "fedadam")] * 2


def test_quick_reduces_seeds_settings_cells_and_methods():
    quick = _read(quick=True)
    assert (quick.name, quick.seeds, len(quick.cells)) == ("two-quick", (3,), 2)
    assert {each.settings.rounds for each in quick.cells} == {1}
    assert {each.methods for each in quick.cells} == {("fedavg", "c2m3")}


def test_given_seeds_replace_those_written_down():
    assert _read(seeds=[7, 8, 7]).seeds == (7, 8)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("title =", "titel =", "experiment 'two': key is 'titel'.*did you mean 'title'"),
        ("seeds = [3, 4]", "", "experiment 'two' has no 'seeds'"),
        ("seeds = [3, 4]", "seeds = [3, 4.5]", "seeds is .*, expected a list of integers"),
        ("seeds = [3, 4]", "seeds = []", "seeds is .*, at least one"),
        ('"fedavg", "c2m3"]\nbase', '"fedavg", "c2m4"]\nbase', "method is 'c2m4'.*did you mean 'c2m3'"),
        ('judged = "c2m3"', 'judged = "fedadam"', "judged is 'fedadam', expected one of fedavg, c2m3"),
        ('["own"]', '["owned"]', "level of axis 'start' is 'owned'.*did you mean 'own'"),
        ("start = [", "begin = [", "axis is 'begin', expected one of start, partition"),
        ("alpha", "alhpa", "run-config key is 'alhpa'.*did you mean 'alpha'"),
        ('partition = "iid"', "partition = 3", "partition is 3, expected of type str"),
        ("rounds = 2", "rounds = [2]", r"settings.rounds is \[2\], expected a string or a number"),
        ('IID = { partition = "iid" }', "IID = 1", "axis 'partition': IID is 1, expected a table"),
        ("[axes.start]", "[axes.start", "experiment 'two' is not TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(old, new, said):
    assert old in TEXT
    with pytest.raises(ConfigError, match=said):
        _ = _read(TEXT.replace(old, new, 1)).cells


def test_an_unknown_experiment_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"experiment is 'digit'.*did you mean 'digits'"):
        load_design("digit")


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("quick", [False, True])
def test_every_experiment_of_this_checkout_is_valid_and_its_methods_are_functions(name, quick):
    design = load_design(name, quick=quick)
    assert {name for cell in design.cells for name in cell.methods} <= set(STRATEGIES)


def test_methods_of_some_cells_may_be_drawn():
    text = TEXT.replace('judged = "c2m3"', 'judged = "c2m3"\ndrawn = ["fedavg", "fedadam"]')
    assert _read(text).drawn == ("fedavg", "fedadam")


def test_the_page_names_every_experiment_with_its_measurements_and_every_strategy():
    page = (Path(simulations.__file__).parent / "README.md").read_text()
    for name in names():
        design = load_design(name)
        count = len(design.seeds) * sum(len(cell.methods) for cell in design.cells)
        row = next(line for line in page.splitlines() if line.startswith("| `") and f"`{name}`" in line)
        assert f"{count:,}" in row, name
    peers = ("fedavg", "git-rebasin", "mergemany", "activations", "cca")
    listed = [name for name in STRATEGIES if not name.startswith(tuple(f"{peer}+" for peer in peers))]
    assert [name for name in listed if f"`{name}`" not in page] == []
