"""OpenMP's threads do not spin while they wait, which starves the assignment solver's on busy cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # every test starts a process that loads torch


def spins(code, **variables):
    """What libgomp says of its settings when a process loads it, and the variable in the end; None without libgomp."""
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    found = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport os\nprint(os.environ.get('OMP_WAIT_POLICY'))"],
        env={**clean, "OMP_DISPLAY_ENV": "VERBOSE", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    counts = [line.split("'")[1] for line in found.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    return (int(counts[0]) if counts else None), found.stdout.strip()


def test_the_package_makes_them_passive_where_torch_is_not_loaded_yet():
    count, policy = spins("import c2m3_fl, torch")
    assert policy == "PASSIVE"
    assert count in (0, None)


def test_what_the_user_has_set_stays():
    count, policy = spins("import c2m3_fl, torch", OMP_WAIT_POLICY="ACTIVE")
    assert policy == "ACTIVE"
    assert count is None or count > 0


@pytest.mark.parametrize("code", ["import torch, c2m3_fl", "import torch; from c2m3_fl import match"])
def test_nothing_is_touched_where_torch_has_been_loaded(code):
    _, policy = spins(code)
    assert policy == "None"
