"""Whatever a command is given, it ends with one line, before it has taken memory or done the work."""

from __future__ import annotations

import os
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from c2m3_fl.cli import app
from c2m3_fl.cli.files import load_params
from c2m3_fl.cli.images import load_images
from c2m3_fl.cli.limits import check_memory
from c2m3_fl.errors import ConfigError, DataError, ParamsError

MODEL = ("--model", "tests.cli.test_limits:network")


def network() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(2, 3, 8, 8)


def leave() -> None:
    sys.exit(3)


def params() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return network()[0].state_dict()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(os.fspath(Path(__file__).parents[2]))
    for name in ("a", "b"):
        save_file(params(), f"{name}.safetensors")
    for name in ("folder.png", "folder.safetensors", "images/0", "images/1"):
        Path(name).mkdir(parents=True)
    for label in (0, 1):
        Image.new("RGB", (8, 8), (50 * label, 0, 9)).save(f"images/{label}/x.png")
    return tmp_path


def run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int = 1
) -> str:
    """The only line that a command that fails prints."""
    monkeypatch.setattr(sys, "argv", ["c2m3-fl", *arguments])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == status
    written = capsys.readouterr()
    (line,) = (written.out + written.err).splitlines()
    return line


PAIR = ("a.safetensors", "b.safetensors", *MODEL)
REFUSED = {
    "an output that is a folder": (["merge", *PAIR, "-o", "folder.safetensors"], "it is a folder; name a file"),
    "a picture that is a folder": (
        ["merge", *PAIR, "-o", "c.safetensors", "--picture", "folder.png"],
        "folder.png cannot be written: it is a folder",
    ),
    "a drawing that is a folder": (["barrier", *PAIR, "--data", "images", "-o", "folder.png"], "it is a folder"),
    "results in a file": (["compare", "--output", "a.safetensors"], "cannot be made into a folder"),
    "results below a file": (["compare", "--output", "a.safetensors/x"], "cannot be made into a folder"),
    "an experiment in a file": (["experiment", "digits", "--output", "a.safetensors"], "cannot be made into a folder"),
    "images of a terabyte": (
        ["merge", *PAIR, "-o", "c.safetensors", "--calibration", "images", "--image-size", "300000"],
        "2 images of 300000 x 300000 pixels take 2,160 GB, this machine has",
    ),
    "inputs of a terabyte": (["inspect", MODEL[1], "--input", "1000000,1000000"], "take 8,000 GB, this machine has"),
    "a factory that exits": (
        ["inspect", "tests.cli.test_limits:leave"],
        "'tests.cli.test_limits:leave' failed: SystemExit: 3; expected a factory",
    ),
    "weights for one": (
        ["merge", *PAIR, "-o", "c.safetensors", "--weights", "1"],
        "weights: got 1, expected one for each",
    ),
    "a negative size": (["inspect", MODEL[1], "--input", "2,-1"], "expected sizes of at least 1"),
    "a size beyond int64": (["inspect", MODEL[1], "--input", f"2,{10**30}"], "GB, this machine has"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_a_command_is_refused_before_it_works(
    arguments: list[str],
    message: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in run(arguments, monkeypatch, capsys)
    assert not (place / "c.safetensors").exists()


USAGE = {
    "an unknown command": (["mrege"], "No such command 'mrege'"),
    "an unknown option": (["merge", *PAIR, "-o", "c.safetensors", "--metod", "c2m3"], "No such option"),
    "a missing option": (
        ["merge", "a.safetensors", "b.safetensors", "-o", "c.safetensors"],
        "Missing option '--model'",
    ),
    "a missing argument": (["merge", *MODEL, "-o", "c.safetensors"], "Missing argument"),
    "a number that is none": (["compare", "--clients", "x"], "'x' is not a valid integer"),
    "a number out of range": (["merge", *PAIR, "-o", "c.safetensors", "--image-size", "0"], "0 is not in the range"),
    "an argument too many": (["inspect", MODEL[1], "a"], "Got unexpected extra argument (a)"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE)
def test_options_and_arguments_that_do_not_exist_end_with_one_line_that_names_the_help(
    arguments: list[str],
    message: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = run(arguments, monkeypatch, capsys, status=2)
    assert line.startswith("error: ")
    assert message in line
    assert "--help shows what there is" in line


def test_help_and_success_end_with_status_zero(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["c2m3-fl", "inspect", "--help"])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 0
    assert "Usage:" in capsys.readouterr().out


def test_what_nobody_thought_of_ends_with_one_line_and_shows_its_traceback_on_demand(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise MemoryError("of two\nlines")

    monkeypatch.setattr("c2m3_fl.cli.merge.load_network", fail)
    arguments = ["merge", *PAIR, "-o", "c.safetensors"]
    assert run(arguments, monkeypatch, capsys) == "error: MemoryError: of two lines (C2M3_TRACEBACK=1 shows where)"
    monkeypatch.setenv("C2M3_TRACEBACK", "1")
    with pytest.raises(MemoryError):
        app.main()


def quantised(value: Tensor) -> Tensor:
    return torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)


KINDS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sparse": (Tensor.to_sparse, "is torch.sparse_coo, expected a dense tensor"),
    "CSR": (lambda value: value.reshape(len(value), -1).to_sparse_csr(), "is torch.sparse_csr"),
    "meta": (lambda value: value.to("meta"), "is without content"),
    "quantised": (quantised, "is quantized"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("convert", "message"), KINDS.values(), ids=KINDS)
def test_tensors_that_are_not_dense_are_refused(
    convert: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    torch.save({name: convert(value) for name, value in params().items()}, tmp_path / "a.pt")
    with pytest.raises(ParamsError, match=message):
        load_params(tmp_path / "a.pt")


def test_keys_that_are_not_names_are_refused(tmp_path: Path) -> None:
    torch.save(dict(enumerate(params().values())), tmp_path / "a.pt")
    with pytest.raises(ParamsError, match="holds no state dict"):
        load_params(tmp_path / "a.pt")


def test_an_archive_that_unpacks_to_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1_000_000)}, tmp_path / "a.pt")
    assert load_params(tmp_path / "a.pt")["w"].shape == (1_000_000,)
    plain, packed = zipfile.ZipFile(tmp_path / "a.pt"), zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED)
    with plain, packed:
        for each in plain.infolist():
            packed.writestr(each.filename, plain.read(each))
    tracemalloc.start()
    with pytest.raises(
        DataError, match=r"b.pt unpacks to 4,\d+,\d+ bytes from \d,\d+, expected an archive that is not"
    ):
        load_params(tmp_path / "b.pt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_file_of_the_old_format_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    """The number of elements is in the pickle before them: BININT2 1000, here BININT 4e8."""
    file, weight = tmp_path / "a.pt", torch.randn(1000)
    torch.save({"w": weight, "again": weight}, file, _use_new_zipfile_serialization=False)
    assert torch.equal(load_params(file)["w"], weight)
    file.write_bytes(file.read_bytes().replace(b"M\xe8\x03", b"J" + (400_000_000).to_bytes(4, "little")))
    with pytest.raises(DataError, match=r"says that its tensors take 1,600,000,000 bytes, and has 4,\d+"):
        load_params(file)


@pytest.mark.parametrize("side", [10_000, 14_000])
def test_images_of_too_many_pixels_are_refused(side: int, tmp_path: Path) -> None:
    """From the header alone: Pillow warns from 89 million pixels on and fails from twice as many on."""
    Image.new("1", (side, side)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x\.png has too many pixels, expected at most 89,478,485"):
        load_images(tmp_path, 8)


def test_broken_images_are_refused_whatever_pillow_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    for error in (SyntaxError("broken PNG file"), ValueError("text chunk"), MemoryError(), OverflowError()):

        def fail(*args: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Image.Image, "convert", fail)
        with pytest.raises(DataError, match=rf"x\.png cannot be read as an image: {type(error).__name__}"):
            load_images(tmp_path, 8)


def test_classes_that_no_network_has_are_refused(tmp_path: Path) -> None:
    for name in ("0", str(10**23)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png")
    with pytest.raises(DataError, match=f"has a class {10**23}, expected numbers up to 999999"):
        load_images(tmp_path, 8)


def test_what_fits_is_allowed() -> None:
    check_memory(10**6, "a million bytes")
    with pytest.raises(ConfigError, match="a lot take 1,000,000,000 GB, this machine has"):
        check_memory(10**18, "a lot")
