from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from c2m3_fl.errors import ConfigError
from simulations import one_shot_table
from simulations.one_shot_table import COLUMNS, MERGES, Cell, Scale, dirichlet, main, table

SMALL = ["--images", "160", "--epochs", "1", "--width", "4", "--clients", "2", "--alphas", "1", "--device", "cpu"]


def test_the_script_needs_no_flower():
    program = "import sys, simulations.one_shot_table; assert not {'flwr', 'flwr_datasets', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("alpha", [0.05, 1.0])
def test_every_image_has_one_client_and_every_client_ten_images(alpha):
    labels = torch.arange(400) % 10
    parts = dirichlet(labels, 5, alpha, seed=0)
    assert torch.cat(parts).sort().values.tolist() == list(range(400))
    assert min(map(len, parts)) >= 10
    assert [part.tolist() for part in parts] == [part.tolist() for part in dirichlet(labels, 5, alpha, seed=0)]


def test_the_smaller_the_concentration_the_fewer_the_classes():
    def classes(alpha):
        return sum(
            len((torch.arange(2000) % 10)[part].unique()) for part in dirichlet(torch.arange(2000) % 10, 5, alpha, 0)
        )

    assert classes(0.05) < classes(0.3) < classes(100.0)


def test_more_clients_than_images_allow_are_refused():
    with pytest.raises(ConfigError, match="40 images for 5 clients, expected 10 for each"):
        dirichlet(torch.zeros(40), 5, 0.1, seed=0)


@pytest.fixture
def blobs(monkeypatch):
    """In place of CIFAR-10: images whose mean tells their class."""

    def load(split, count, device):
        count = min(count, 200)
        generator = torch.Generator().manual_seed(int(split == "train"))
        labels = torch.arange(count) % 10
        return labels[:, None, None, None] / 5 - 1 + 0.1 * torch.randn(count, 3, 32, 32, generator=generator), labels

    monkeypatch.setattr(one_shot_table, "load", load)


@pytest.mark.slow
def test_a_run_that_was_ended_goes_on_and_another_scale_is_refused(tmp_path, monkeypatch, capsys, blobs):
    file = tmp_path / "table.json"
    main([*SMALL, "--starts", "shared", "--output", str(file)])
    asked = []
    cell = one_shot_table.cell
    monkeypatch.setattr(one_shot_table, "cell", lambda *place: asked.append(place[1:4]) or cell(*place))
    main([*SMALL, "--output", str(file)])
    assert asked == [("own", 1.0, 0)]
    stored = json.loads(file.read_text())
    assert [each["start"] for each in stored["cells"]] == ["shared", "own"]
    shared, own = (Cell(**each) for each in stored["cells"])
    assert max(own.moved) > 0
    for each in (shared, own):
        assert set(each.merged) == set(MERGES)
        assert each.merged["C2M3"]["+ head"] > each.merged["FedAvg"]["average"]
    assert "| own | 1.0 | C2M3 |" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"is of scale .*name another --output"):
        main([*SMALL, "--epochs", "2", "--output", str(file)])


def test_the_table_says_what_each_step_adds_and_shows_published_numbers_in_full_only():
    merged = {
        "FedAvg": dict(zip(COLUMNS, (0.2, 0.3, 0.25, 0.4), strict=True)),
        "C2M3": dict(zip(COLUMNS, (0.2, 0.3, 0.25, 0.5), strict=True)),
    }
    cells = [Cell("own", 0.1, seed, merged, [0.1, 0.15], 0.35, [0.0, 0.9], 1.0, 1.0, "") for seed in (0, 1)]
    scaled, full = table(cells, Scale(images=10)), table(cells, Scale())
    assert "| own | 0.1 | FedAvg | 0.200 ± 0.000 | 0.300 ± 0.000 | 0.250 ± 0.000 | 0.400 ± 0.000 |" in scaled
    assert "| own | 0.1 | +0.100 | +0.050 | +0.200 | +0.300 |" in scaled
    assert "published" not in scaled
    assert "| shared | 0.1 | Co-Boosting, published | 0.571 |" in full
    assert "0.702" not in full, "a concentration that was not measured"
