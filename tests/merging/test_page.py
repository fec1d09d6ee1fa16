"""The examples of the room's page run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from c2m3_fl import merging
from tests.merging.networks import CALIBRATION, nodes

PAGE = Path(merging.__file__).with_name("README.md")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_examples_of_the_page_run(block: str) -> None:
    model, (a, b, c) = nodes("mlp", 3)
    names: dict[str, Any] = {"model": model, "a": a, "b": b, "c": c, "batches": CALIBRATION}
    exec(compile(block, str(PAGE), "exec"), names)  # the page's own examples
    assert all(torch.isfinite(value).all() for value in names["merged"].state_dict.values())


def test_what_the_page_imports_is_promised() -> None:
    imported = re.findall(r"from c2m3_fl\.merging import (.*)", PAGE.read_text(encoding="utf-8"))
    assert imported
    assert {name.strip() for line in imported for name in line.split(",")} <= set(merging.__all__)
    assert all(hasattr(merging, name) for name in merging.__all__)
