"""Where the data sets are, one thread and one seed for every test, and a reason for every test that is left out."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.standin import standin

torch.set_num_threads(1)

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

if _SHARED.is_dir():
    os.environ.setdefault("C2M3_DATA", str(_SHARED))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Whatever a test draws from the global generators depends on nothing that ran before it in the same process."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # the state that the tested code may draw from
    torch.manual_seed(0)


@pytest.fixture(params=["stand-in", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device other than the CPU: a GPU where there is one, and everywhere a stand-in (`tests.standin`)."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device: torch.cuda.is_available() is False")
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # of single precision, like the CPU
            yield torch.device("cuda")
        return
    with standin() as place:
        yield place


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the data sets where there are none."""
    root = os.environ.get("C2M3_DATA", "")
    if root and (Path(root) / "mnist" / "test.parquet").is_file():
        return
    where = f"C2M3_DATA is {root!r}" if root else f"C2M3_DATA is not set and there is no {_SHARED}"
    missing = pytest.mark.skip(reason=f"no data sets: {where}; expected a folder with mnist/{{train,test}}.parquet")
    for item in items:
        if item.get_closest_marker("data"):
            item.add_marker(missing)
