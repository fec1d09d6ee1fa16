from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch

from c2m3_fl import merge
from tests.benchmarks.real_transformers import RECIPES, Characters, Images
from tests.benchmarks.records import read_record, write_record
from tests.benchmarks.rotations_draw import METHODS, RECALIBRATIONS, Merger
from tests.benchmarks.rotations_real import COMMAND, ENDS, Row, _collect, load, rows, table
from tests.benchmarks.sequences import Digits, Transformer

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", ["C2M3, permutations", "C2M3, rotations"])
def test_a_draw_averages_as_merge_does(method):
    data, model = Digits.load(), Transformer(8, 2, 1)
    batches = [data.train[:20]]
    nodes = [dict(Transformer(8, 2, 1).state_dict()) for _ in range(3)]
    merger = Merger(model, batches, CPU)
    turning, how = METHODS[method]
    found = dict(merger.averages(merger.aligned(nodes, method)))["repair"]
    expected = merge(model, nodes, calibration=batches, method=how, rotations=turning).state_dict
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_images_that_are_neither_flipped_nor_moved_are_the_images(monkeypatch, tmp_path):
    pixels = torch.arange(6 * 3 * 32 * 32).reshape(6, 3, 32, 32).remainder(251).to(torch.uint8)
    monkeypatch.setattr("tests.benchmarks.real_transformers._decoded", lambda *_: (pixels, torch.arange(6)))
    task = Images(CPU, replace(RECIPES["vit"], batch=2000), tmp_path)
    inputs, labels = task.batch(torch.Generator().manual_seed(0))
    whole = torch.cat([batch for batch, _ in task.tested()])
    same = (inputs == whole[labels]).flatten(1).all(1)
    flipped = (inputs == whole[labels].flip(3)).flatten(1).all(1)
    for share in (same, flipped):  # one in 2 * 9 * 9
        assert 0.002 < float(share.double().mean()) < 0.02
    assert inputs.shape == (2000, 3, 32, 32)


def test_windows_are_followed_by_the_next_characters(tmp_path):
    folder = tmp_path / "shakespeare"
    folder.mkdir()
    (folder / "input.txt").write_text("abcdefghij" * 500)
    task = Characters(CPU, replace(RECIPES["gpt"], batch=7), tmp_path, length=8)
    inputs, targets = task.batch(torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (7, 8)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    tested = list(task.tested())
    assert sum(windows.numel() for windows, _ in tested) == 496  # of the 500 of the last tenth
    assert len(torch.cat(task.calibration)) == 250


def test_a_table_has_the_loss_above_the_mean_network_and_the_highest_one_between_two():
    common = {"network": "net", "nodes": 2, "recalibration": "none", "seconds": 0.0, "device": "cpu"}
    found = [
        Row(draw=0, method=ENDS, loss=1.0, accuracy=0.9, line=(), **common),
        Row(draw=0, method="plain mean", loss=1.5, accuracy=0.5, line=(0.8, 1.9, 1.2), **common),
    ]
    found[1] = replace(found[1], line=(0.8, *[1.9] * 9, 1.2))
    assert "| plain mean | 0.50 |" in table(found, "barrier")
    assert "| plain mean | 1.06 |" in table(found, "line")  # above .84, at a tenth of the way
    assert f"| {ENDS} | 90.0 |" in table(found, "accuracy")


def test_every_merge_of_a_method_is_scored(tmp_path):
    folder = tmp_path / "shakespeare"
    folder.mkdir()
    (folder / "input.txt").write_text("abcdefghij" * 500)
    task = Characters(CPU, replace(RECIPES["gpt"], batch=7, width=8, steps=2), tmp_path, length=8)
    found = [task.trained(seed, tmp_path) for seed in (0, 1)]
    assert all(map(torch.equal, found[0].values(), task.trained(0, tmp_path).values()))  # as it was kept
    merger = Merger(task.build(), task.calibration, CPU)
    made = rows(task, 0, "plain mean", found, "cpu", lambda _: merger)
    assert [row.recalibration for row in made] == list(RECALIBRATIONS.values())
    assert len(made[0].line) == 11
    assert math.isclose(made[0].line[5], made[0].loss, rel_tol=1e-5)


def test_an_entry_says_of_how_many_draws_it_is_where_some_are_missing():
    common = {"network": "net", "nodes": 2, "recalibration": "none", "seconds": 0.0, "line": (), "device": "cpu"}
    found = [Row(draw=draw, method=ENDS, loss=1.0, accuracy=0.9, **common) for draw in range(3)]
    found += [Row(draw=draw, method="plain mean", loss=1.5 + draw, accuracy=0.5, **common) for draw in range(2)]
    assert "| plain mean | 1.00 ± 0.71 (2) |" in table(found, "barrier")
    assert f"| {ENDS} | 2.7 ± 0.0 |" in table(found, "perplexity")


def test_files_of_different_machines_are_not_put_into_one_record(tmp_path):
    files = [tmp_path / name for name in ("one.json", "two.json")]
    row = Row("net", 2, 0, ENDS, "none", 1.0, 0.9, (), 0.0, "cuda")
    for file, draw in zip(files, range(2), strict=True):
        write_record(file, COMMAND, {}, [asdict(replace(row, draw=draw))], machine={"cores": 16}, date="2026-01-01")
    _collect(files, tmp_path / "all.json")
    assert [each.draw for each in load(tmp_path / "all.json")] == [0, 1]
    assert read_record(tmp_path / "all.json")["date"] == "2026-01-01"  # of the measurement, not of today
    write_record(files[1], COMMAND, {}, [], machine={"cores": 2})
    with pytest.raises(SystemExit, match=r"two.json has machine \{'cores': 2\}, .*one.json has \{'cores': 16\}"):
        _collect(files, tmp_path / "all.json")
