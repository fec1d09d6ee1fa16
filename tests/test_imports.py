"""What `import c2m3_fl` promises: few names, all there, and nothing loaded before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

import c2m3_fl

_HEAVY = ("flwr", "flwr_datasets", "datasets", "ray", "torchvision", "sklearn", "matplotlib", "typer", "rich")


@pytest.mark.parametrize("name", c2m3_fl.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(c2m3_fl, name).__doc__


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"'merg'; it has .*merge"):
        c2m3_fl.merg  # noqa: B018  # the access is what is tested


def test_the_library_runs_where_flower_is_not_installed():
    """Merging two networks in a process in which importing any of the heavy packages fails."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({_HEAVY!r}))  # None: importing it raises ImportError
import torch
from c2m3_fl import merge
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
node = model.state_dict()
merged = merge(model, [node, node], calibration=[torch.randn(8, 3)])
sys.exit(0 if merged.state_dict.keys() == node.keys() else 1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
