from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from c2m3_fl.cli.app import app
from c2m3_fl.cli.files import load_network, load_params
from c2m3_fl.cli.images import load_images, size_of
from c2m3_fl.cli.landscape import _names
from c2m3_fl.errors import C2M3Error, ConfigError, DataError, ParamsError

MODEL = "tests.cli.test_merge:network"


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.ReLU(), nn.Linear(16, 2))


def grey() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 2)), torch.zeros(2, 1, 8, 8)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    names = []
    for seed in range(3):
        torch.manual_seed(seed)
        names.append(str(tmp_path / f"{seed}.safetensors"))
        save_file(network().state_dict(), names[-1])
    return names


@pytest.fixture
def images(tmp_path: Path) -> str:
    generator = np.random.default_rng(0)
    for label in ("bird", "cat"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(12):
            pixels = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
    return str(tmp_path / "images")


def test_files_merge_into_one_that_loads(files: list[str], images: str, tmp_path: Path) -> None:
    output = tmp_path / "merged.safetensors"
    arguments = ["merge", *files, "--model", MODEL, "--calibration", images, "-o", str(output), "--image-size", "8"]
    pictures = [tmp_path / "agreement.png", tmp_path / "course.png"]
    arguments += ["--recalibrate", "auto", "--picture", str(pictures[0]), "--convergence", str(pictures[1])]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    network().load_state_dict(load_file(output))
    for wanted in ("c2m3", "agreement", "cosine", "because", "accuracy merged", "written to"):
        assert wanted in result.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["-o", "m.pt"], r"m.pt ends in '.pt', expected .safetensors"),
        (["-o", "nowhere/m.safetensors"], "nowhere is not a folder"),
        (["--picture", "p.xyz"], r"p.xyz ends in '.xyz', expected .png or"),
        (["--method", "c3m3"], "method is 'c3m3'"),
        (["--method", "cca", "--start", "activations"], "--start is for method 'c2m3', not for 'cca'"),
        (["--start", "activations"], "compares activations: name a folder of images"),
        (["--start", "somewhere", "--image-size", "8"], r"start is 'somewhere', expected one of .*'auto'"),
    ],
)
def test_what_cannot_be_written_or_done_is_refused_before_the_work(
    change: list[str], message: str, files: list[str], tmp_path: Path
) -> None:
    arguments = ["merge", *files, "--model", MODEL, "-o", str(tmp_path / "m.safetensors"), *change]
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_one_file_is_no_merge(files: list[str], tmp_path: Path) -> None:
    arguments = ["merge", files[0], "--model", MODEL, "-o", str(tmp_path / "m.safetensors")]
    with pytest.raises(ConfigError, match="got 1 file, expected at least two"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_grey_networks_get_grey_images_and_raw_ones_their_pixels(images: str, tmp_path: Path) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        save_file(grey()[0].state_dict(), tmp_path / f"grey{seed}.safetensors")
    inputs = [str(tmp_path / f"grey{seed}.safetensors") for seed in range(2)]
    arguments = ["merge", *inputs, "--model", "tests.cli.test_merge:grey", "--calibration", images, "--image-size", "8"]
    output = tmp_path / "merged.safetensors"
    assert CliRunner().invoke(app, [*arguments, "-o", str(output)], catch_exceptions=False).exit_code == 0
    grey()[0].load_state_dict(load_file(output))
    (raw, _), (scaled, _) = (load_images(Path(images), 8, channels=1, raw=each)[0] for each in (True, False))
    assert raw.shape == scaled.shape == (24, 1, 8, 8)
    assert 0 <= float(raw.min()) < float(raw.max()) <= 1
    assert float(scaled.min()) < 0
    with pytest.raises(ConfigError, match="images of 2 channels, a folder of images gives 1 or 3"):
        load_images(Path(images), 8, channels=2)


def test_only_c2m3_has_a_course_to_draw(files: list[str], tmp_path: Path) -> None:
    arguments = ["merge", *files, "--model", MODEL, "-o", str(tmp_path / "m.safetensors"), "--method", "mean"]
    with pytest.raises(ConfigError, match="--convergence draws the steps of method 'c2m3'; method 'mean' has none"):
        CliRunner().invoke(app, [*arguments, "--convergence", "course.png"], catch_exceptions=False)


def _merging(files: list[str], output: Path) -> list[str]:
    return ["merge", *files, "--model", MODEL, "-o", str(output), "--image-size", "8"]


def test_a_match_without_a_course_says_so(files: list[str], tmp_path: Path) -> None:
    arguments = _merging([files[0], files[0]], tmp_path / "m.safetensors")
    found = CliRunner().invoke(app, [*arguments, "--convergence", str(tmp_path / "c.png")], catch_exceptions=False)
    assert found.exit_code == 0
    assert "c.png is not drawn: the match took no step" in found.stderr
    assert not (tmp_path / "c.png").exists()


def test_the_report_is_also_json(files: list[str], tmp_path: Path) -> None:
    arguments = [*_merging(files, tmp_path / "m.safetensors"), "--json"]
    report = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)
    assert report["nodes"] == 3
    assert report["method"] == "c2m3"
    assert report["recalibration"] is None


@pytest.mark.parametrize(("command", "count"), [("barrier", 2), ("landscape", 3)])
def test_barriers_and_landscapes_are_drawn(
    command: str, count: int, files: list[str], images: str, tmp_path: Path
) -> None:
    output = tmp_path / "picture.png"
    arguments = [command, *files[:count], "--model", MODEL, "--data", images, "-o", str(output), "--image-size", "8"]
    extra = ["--resolution", "3"] if command == "landscape" else ["--points", "3"]
    assert CliRunner().invoke(app, [*arguments, *extra], catch_exceptions=False).exit_code == 0
    with Image.open(output) as picture:
        assert picture.size[0] > 100


class Both(nn.Sequential):
    """Class scores and the hidden units below them."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self[2](self[1](self[0](x)))
        return {"scores": self[3](hidden), "hidden": hidden}


def both() -> nn.Module:
    return Both(*network())


@pytest.mark.parametrize(("command", "count"), [("barrier", 2), ("landscape", 3)])
def test_barriers_and_landscapes_read_the_outputs_that_are_named(
    command: str, count: int, files: list[str], images: str, tmp_path: Path
) -> None:
    """Hidden units that nobody reads move, and the scores alone have a loss."""
    output = ["-o", str(tmp_path / "picture.png"), "--image-size", "8"]
    extra = ["--resolution", "3"] if command == "landscape" else ["--points", "3"]
    arguments = [command, *files[:count], "--data", images, *output, *extra]
    whole = CliRunner().invoke(app, [*arguments, "--model", "tests.cli.test_merge:both"])
    assert str(whole.exception).startswith("the network gives 2 outputs, expected class scores alone: name them")
    chosen = [*arguments, "--model", "tests.cli.test_merge:both", "--outputs", "scores"]
    plain = [*arguments, "--model", MODEL]
    found, expected = (CliRunner().invoke(app, each, catch_exceptions=False).stdout for each in (chosen, plain))
    assert found == expected


def test_torch_files_are_read_and_pickles_refused(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "weights.pt")
    assert set(load_params(tmp_path / "weights.pt")) == set(network().state_dict())
    torch.save(network(), tmp_path / "module.pt")
    with pytest.raises(DataError, match="loading it could run code"):
        load_params(tmp_path / "module.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ParamsError, match="holds no state dict"):
        load_params(tmp_path / "list.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="not a safetensors file"):
        load_params(tmp_path / "broken.safetensors")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(DataError, match="cannot read it"):
        load_params(tmp_path / "text.pt")
    with pytest.raises(DataError, match="is not a file"):
        load_params(tmp_path / "missing.safetensors")


def test_images_are_as_large_as_the_factory_says() -> None:
    assert [size_of(grey()[1], asked) for asked in (None, 16)] == [8, 16]
    assert size_of(None, None) == 224


def test_folders_named_by_numbers_say_the_class(tmp_path: Path) -> None:
    for name in ("10", "2"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / name / "0.png")
    ((_, labels),) = load_images(tmp_path, 8)
    assert sorted(labels.tolist()) == [2, 10]


def failing() -> nn.Module:
    raise ValueError("no such width")


@pytest.mark.parametrize(
    ("name", "message"), [("failing", "failed: ValueError: no such width"), ("MODEL", "without arguments")]
)
def test_factories_that_fail_are_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"'tests.cli.test_merge:{name}' .*{message}"):
        load_network(f"tests.cli.test_merge:{name}")


def test_networks_of_a_landscape_are_told_apart() -> None:
    assert _names([Path("a/one.pt"), Path("b/two.pt")]) == ["one", "two"]
    assert _names([Path("a/$.pt"), Path("b/$.pt")]) == [r"a/\$", r"b/\$"]


def mono() -> nn.Module:
    return nn.Conv2d(1, 2, 3)


def test_a_guess_of_the_inputs_that_does_not_do_says_how_to_show_them(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    for file in files:
        save_file(mono().state_dict(), file)
    arguments = ["merge", *files, "--model", "tests.cli.test_merge:mono", "-o", str(tmp_path / "c.safetensors")]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert "'tests.cli.test_merge:mono' returned no example inputs" in str(result.exception)
    assert "return (module, example inputs), or give --calibration" in str(result.exception)


def test_mismatches_are_told_apart_by_key_and_shape(files: list[str], tmp_path: Path) -> None:
    params = network().state_dict()
    save_file({name: value for name, value in params.items() if name != "3.bias"}, tmp_path / "fewer.safetensors")
    save_file({**params, "3.bias": torch.zeros(7)}, tmp_path / "reshaped.safetensors")
    for name, message in [("fewer", r"missing \['3.bias'\]"), ("reshaped", r"shape \(7,\), expected \(2,\)")]:
        arguments = ["merge", files[0], str(tmp_path / f"{name}.safetensors"), "--model", MODEL, "-o", "x.safetensors"]
        with pytest.raises(C2M3Error, match=f"{name}.safetensors: .*{message}"):
            CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", "'resnet19' is not a torchvision classifier such as resnet1.*package.module:factory"),
        ("torchvision:resnet19", "'resnet19' is not a torchvision classifier"),
        ("tests.cli.test_merge:missing", "cannot load 'tests.cli.test_merge:missing'"),
        ("time:time", "returned float; expected a module"),
    ],
)
def test_unknown_networks_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_network(name)


@pytest.mark.parametrize("name", ["squeezenet1_1", "torchvision:squeezenet1_1"])
def test_torchvision_networks_take_another_number_of_classes(name: str) -> None:
    assert load_network(name, classes=3)[0].state_dict()["classifier.1.weight"].shape[0] == 3


def test_images_without_subfolders_have_no_labels(images: str, tmp_path: Path) -> None:
    assert [len(batch) for batch in load_images(Path(images), 8)] == [2]
    assert [len(batch) for batch in load_images(Path(images) / "cat", 8)] == [1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        load_images(tmp_path / "empty", 8)
    with pytest.raises(DataError, match="is not a folder"):
        load_images(tmp_path / "nowhere", 8)
    (tmp_path / "empty" / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad.png cannot be read"):
        load_images(tmp_path / "empty", 8)
