"""What the room's page shows of its records is in them."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean

import torch

from c2m3_fl import core
from tests.benchmarks import before_after, gpu, solver
from tests.benchmarks.quality import table
from tests.benchmarks.records import read_record
from tests.core.networks import mlp, planted

ROOM = Path(core.__file__).parent
PAGE = (ROOM / "README.md").read_text(encoding="utf-8")


def test_example_of_the_page_runs_and_its_names_are_promised() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    nodes, _ = planted(mlp(3, 5, 4, 2), 3, 1.0, seed=0)
    names = {"spec": mlp(3, 5, 4, 2), **dict(zip("abc", nodes, strict=True))}
    exec(compile(block, "README.md", "exec", dont_inherit=True), names)  # the page's own example
    (imported,) = re.findall(r"from c2m3_fl.core import \((.*?)\)", block, re.DOTALL)
    assert set(re.findall(r"\w+", imported)) <= set(core.__all__)
    back = names["permutation"].apply(names["spec"], names["found"].between(1, 0), nodes[0])
    assert all(torch.isfinite(value).all() for value in back.values())


def test_tables_of_other_matchers_are_those_of_the_record() -> None:
    assert table(read_record(ROOM / "results" / "quality.json")["rows"]).strip() in PAGE


def test_gains_of_reheatings_are_those_of_the_record() -> None:
    rows = read_record(ROOM / "results" / "reheating.json")["rows"]
    gains = [100 * fmean(max(row["reheatings"][place][0], 0.0) for row in rows) for place in range(3)]
    assert f"over {len(rows)} matches" in PAGE
    assert [f"{gain:.2f}" for gain in gains] == ["0.12", "0.05", "0.05"]
    assert "first reheating gained .12 % of the agreement on average, the second and the third .05 % each" in PAGE


def test_times_on_a_gpu_are_those_of_the_record() -> None:
    rows = read_record(ROOM / "results" / "gpu.json")["rows"]
    assert gpu.table(rows) in PAGE
    assert all(abs(row["objective_ratio"] - 1) < 2e-8 for row in rows if "cpu" in row)
    assert all(row["units_elsewhere"] == 0 for row in rows if "cpu" in row)


def test_times_before_and_after_are_those_of_the_record() -> None:
    assert before_after.tables(read_record(ROOM / "results" / "before_after.json")["rows"]) in PAGE


def test_times_next_to_the_published_algorithm_are_those_of_the_record() -> None:
    rows = read_record(ROOM / "results" / "solver.json")["rows"]
    assert solver.table(rows) in PAGE
    assert all(row["objective"] >= row["published_objective"] for row in rows)
    assert all(row["objective"] >= row["objective_before"] * (1 - 1e-5) for row in rows)
    assert all(min(row["now"]) <= min(row["before"]) for row in rows)
