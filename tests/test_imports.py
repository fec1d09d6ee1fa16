"""What the five public packages promise: few names, all there, and nothing loaded before it is needed."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import c2m3_fl
from c2m3_fl import errors

_PACKAGES = ("c2m3_fl", "c2m3_fl.core", "c2m3_fl.flower", "c2m3_fl.merging", "c2m3_fl.symmetry")
_NAMES = [(package, name) for package in _PACKAGES for name in import_module(package).__all__]
_HEAVY = ("flwr", "flwr_datasets", "datasets", "ray", "torchvision", "sklearn", "matplotlib", "typer", "rich")


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which importing any of the heavy packages fails."""
    block = f"import sys\nsys.modules.update(dict.fromkeys({_HEAVY!r}))  # None: importing it raises ImportError\n"
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("package", "name"), _NAMES)
def test_every_public_name_can_be_imported_and_is_described(package, name):
    assert getattr(import_module(package), name).__doc__


@pytest.mark.parametrize("package", _PACKAGES)
def test_there_is_one_of_each_public_name(package):
    names = import_module(package).__all__
    assert len(names) == len(set(names))


def test_a_name_means_the_same_wherever_it_is_public():
    found: dict[str, set[int]] = {}
    for package, name in _NAMES:
        found.setdefault(name, set()).add(id(getattr(import_module(package), name)))
    assert not {name for name, objects in found.items() if len(objects) > 1}


def test_the_top_level_adds_the_errors_and_nothing_else():
    below = {name for package, name in _NAMES if package != "c2m3_fl"}
    defined = {name for name, each in vars(errors).items() if isinstance(each, type)}
    assert set(c2m3_fl.__all__) - below == defined


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"'merg'; it has .*merge"):
        c2m3_fl.merg  # noqa: B018  # the access is what is tested


def test_the_library_runs_where_flower_is_not_installed():
    done = run("""
import torch
from c2m3_fl import check_invariance, match, merge, permutation_spec, repair
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
node, data = model.state_dict(), torch.randn(8, 3)
spec = permutation_spec(model, data)
assert check_invariance(model, spec, data) < 1e-9
found = match(spec, [node, node])
merged = merge(model, [node, node], calibration=[data])
assert merged.state_dict.keys() == node.keys()
assert callable(repair)
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["c2m3_fl", "c2m3_fl.flower"])
def test_where_flower_is_missing_the_error_names_the_pip_command(package):
    done = run(f"from {package} import C2M3")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("flwr is not installed; run: pip install flwr")
