"""The wheel, installed alone: what it holds, and what it does where only a few distributions can be imported."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import textwrap
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from importlib.metadata import Distribution, distribution
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ("numpy", "safetensors", "scipy", "torch")
COMMANDS = (*LIBRARY, "matplotlib", "pillow", "rich", "torchvision", "typer")
NETWORK = """
import torch
from torch import nn

def net():
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 2)
    return nn.Sequential(*layers), torch.zeros(2, 3, 8, 8)
"""


def closure(*names: str) -> dict[str, Distribution]:
    """The distributions of these names and of all that they require here."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(name) for name in names]
    seen: set[str] = set()
    while waiting:
        asked = waiting.pop()
        if str(asked) in seen:
            continue
        seen.add(str(asked))
        found[asked.name.lower()] = each = distribution(asked.name)
        for line in each.requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *asked.extras)):
                waiting.append(needed)
    return found


def top_level(each: Distribution) -> Iterator[Path]:
    """Files and folders of a distribution that lie directly in site-packages."""
    for name in {file.parts[0] for file in each.files or ()} - {"..", "__pycache__"}:
        yield Path(str(each.locate_file(name)))


def environment(folder: Path, wheel: Path, *names: str) -> Path:
    """A virtual environment that sees the named distributions, what they require and the wheel; its scripts' folder.

    The distributions are links into this environment: torch alone has some gigabytes.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    scheme = {"base": str(folder), "platbase": str(folder)}
    site, scripts = (Path(sysconfig.get_path(each, "venv", scheme)) for each in ("purelib", "scripts"))
    for each in closure(*names).values():
        for path in top_level(each):
            if path.exists() and not (site / path.name).exists():
                (site / path.name).symlink_to(path)
    install = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install", "--quiet"]
    run(*install, "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel), cwd=folder)
    return scripts


def run(*command: str | Path, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """The finished process, which must end with this status."""
    done = subprocess.run([str(each) for each in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def library(wheel, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("library"), wheel, *LIBRARY)


@pytest.fixture(scope="module")
def commands(wheel, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("commands"), wheel, *COMMANDS)


@pytest.fixture
def task(tmp_path):
    """Three networks, the code that builds them, and images of two classes."""
    (tmp_path / "own.py").write_text(NETWORK)
    scope: dict = {}
    exec(NETWORK, scope)
    for name in ("first", "second", "third"):
        save_file(scope["net"]()[0].state_dict(), tmp_path / f"{name}.safetensors")
    pixels = np.random.default_rng(0)
    for index in range(8):
        (tmp_path / "images" / str(index % 2)).mkdir(parents=True, exist_ok=True)
        drawn = pixels.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(drawn).save(tmp_path / "images" / str(index % 2) / f"{index}.png")
    return tmp_path


def test_the_wheel_holds_one_package_with_all_its_modules_and_nothing_else(wheel):
    held = zipfile.ZipFile(wheel).namelist()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "c2m3_fl").rglob("*.py")}
    package = {name for name in held if ".dist-info/" not in name}
    assert package == sources | {"c2m3_fl/py.typed"}
    assert {name.split("/")[0] for name in held} - {"c2m3_fl"} == {"-".join(wheel.name.split("-")[:2]) + ".dist-info"}


def test_the_wheels_metadata_name_a_version_an_spdx_licence_and_no_address(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["Version"] == project["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["License"] is None
    assert not {"Home-page", "Download-URL", "Project-URL"} & set(metadata)
    assert set(metadata.get_all("Provides-Extra")) == {"all", "cli", "dev", "simulation"}
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert {each.name for each in required if each.marker is None} == {"flwr", *LIBRARY}
    assert not any(each.extras for each in required if each.marker is None), "no Ray without the extra"


def test_the_library_merges_two_networks_where_nothing_else_is_installed(library, tmp_path):
    code = textwrap.dedent("""
        from importlib.util import find_spec
        for name in ("click", "datasets", "flwr", "matplotlib", "ray", "rich", "simulations", "torchvision", "typer"):
            assert find_spec(name) is None, name
        import torch
        from c2m3_fl import match, merge, permutation_spec, repair
        model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        node = model.state_dict()
        order = torch.randperm(8)
        moved = [value[order] if name[0] == "0" else value for name, value in node.items()]
        twin = dict(zip(node, moved)) | {"2.weight": node["2.weight"][:, order]}
        batch = torch.randn(8, 3)
        spec = permutation_spec(model, batch)
        assert len(match(spec, [node, twin]).permutations) == 2
        merged = merge(model, [node, twin], calibration=[batch], basis=0).state_dict
        assert all(torch.allclose(merged[name], node[name], atol=1e-5) for name in node)
        repaired = repair(model, node, [node, node], calibration=[batch])
        print(sorted(repaired.state_dict) == sorted(node))
    """)
    assert run(library / "python", "-c", code, cwd=tmp_path).stdout == "True\n"


def test_the_command_line_names_its_extra_where_it_is_not_installed(library, tmp_path):
    done = run(library / "c2m3-fl", "--help", cwd=tmp_path, status=1)
    assert re.fullmatch(r"error: matplotlib, .* are not installed; run: pip install 'c2m3-fl\[cli\]'\n", done.stderr)
    assert not done.stdout


@pytest.mark.parametrize("command", ["compare", "experiment"])
def test_what_runs_experiments_says_that_it_needs_a_checkout(commands, tmp_path, command):
    done = run(commands / "c2m3-fl", command, cwd=tmp_path, status=1)
    assert re.fullmatch(rf"error: {command} needs a checkout of the repository: .*\n", done.stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        "inspect own:net",
        "merge first.safetensors second.safetensors --model own:net --calibration images -o out.safetensors",
        "barrier first.safetensors second.safetensors --model own:net --data images --points 3 -o out.png",
        "landscape first.safetensors second.safetensors third.safetensors --model own:net --data images -o out.png",
    ],
    ids=lambda arguments: arguments.split()[0],
)
def test_the_commands_work_without_flower_and_without_a_checkout(commands, task, arguments):
    assert run(commands / "c2m3-fl", *arguments.split(), cwd=task).stdout
    if arguments.startswith("merge"):
        merged, node = (load_file(task / name) for name in ("out.safetensors", "first.safetensors"))
        assert merged.keys() == node.keys()
