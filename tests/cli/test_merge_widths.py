"""``c2m3-fl merge`` and ``inspect`` of networks of different widths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from c2m3_fl.cli.app import app
from c2m3_fl.errors import C2M3Error, ConfigError, SpecError

BATCHES = "tests.cli.test_merge_widths:batches"


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(24, 3, 8, 8, generator=generator)
    return [(images, torch.randint(2, (24,), generator=generator))]


def wide(width: float) -> nn.Module:
    units = round(8 * width)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, units), nn.ReLU(), nn.Linear(units, 2))


@pytest.fixture
def several(tmp_path: Path) -> list[str]:
    names = []
    for width in (0.5, 1, 2):
        torch.manual_seed(0)
        names.append(str(tmp_path / f"width{width}.safetensors"))
        save_file(wide(width).state_dict(), names[-1])
    return names


def _widths(files: list[str], output: Path, *more: str) -> list[str]:
    made = ["merge", *files, "--model", "tests.cli.test_merge_widths:wide", "-o", str(output), "--image-size", "8"]
    return [*made, *more]


@pytest.mark.parametrize("chosen", [None, 0.5, 1.5])
def test_files_of_different_widths_merge_into_one_of_the_wanted_width(
    chosen: float | None, several: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "merged.safetensors"
    more = ["--calibration", BATCHES, "--width", "0.5", "--width", "1", "--width", "2"]
    more += [] if chosen is None else ["--result-width", str(chosen)]
    result = CliRunner().invoke(app, _widths(several, output, *more), catch_exceptions=False)
    assert result.exit_code == 0
    wide(2 if chosen is None else chosen).load_state_dict(load_file(output))
    for shown in ("units of the widest network that each network has: 25%, 50%, 100%", "accuracy merged"):
        assert shown in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--width", "1"], "got 1 of --width, expected one for each of the 3 files"),
        (["--result-width", "1"], "--result-width is for networks of different widths: give --width, once per file"),
        (["--width", "1", "--width", "1", "--width", "2", "--picture", "p.png"], "--picture compares networks of one"),
        (["--width", "1", "--width", "1", "--width", "0"], "failed: .* a factory that is called with the width, 0"),
        (["--width", "1", "--width", "1", "--width", "2"], r"width0.5.safetensors: '1.weight' has shape \(4, 192\)"),
    ],
)
def test_widths_that_do_not_go_together_are_refused(
    more: list[str], message: str, several: list[str], tmp_path: Path
) -> None:
    with pytest.raises(C2M3Error, match=message):
        CliRunner().invoke(app, _widths(several, tmp_path / "m.safetensors", *more), catch_exceptions=False)


def test_a_torchvision_network_has_one_width(several: list[str], tmp_path: Path) -> None:
    arguments = ["merge", *several[:2], "--model", "resnet18", "-o", str(tmp_path / "m.safetensors")]
    with pytest.raises(ConfigError, match="'resnet18' has one width; networks of several widths are named package"):
        CliRunner().invoke(app, [*arguments, "--width", "1", "--width", "2"], catch_exceptions=False)


def deeper(width: float) -> nn.Module:
    return wide(width) if width < 2 else nn.Sequential(*wide(width).children(), nn.ReLU(), nn.Linear(2, 2))


def test_inspect_compares_the_groups_of_several_widths() -> None:
    arguments = ["inspect", "tests.cli.test_merge_widths:wide", "--input", "2,3,8,8", "--width", "0.5", "--width", "2"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["group", "width", "0.5", "width", "2"] in lines
    assert ["1", "4", "16"] in lines


def test_inspect_names_the_place_where_networks_differ_in_more_than_width() -> None:
    arguments = ["inspect", "tests.cli.test_merge_widths:deeper", "--input", "2,3,8,8", "--width", "1", "--width", "2"]
    with pytest.raises(SpecError, match=r"width 2 differs from width 1 in more than its width: it has the tensor '5\."):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
