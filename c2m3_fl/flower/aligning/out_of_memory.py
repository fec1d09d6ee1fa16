"""What an accelerator cannot hold is computed on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from logging import WARNING
from typing import TypeVar

import torch
from flwr.supercore import log

Value = TypeVar("Value")


def with_cpu_fallback(compute: Callable[[torch.device], Value], device: torch.device, what: str) -> tuple[Value, bool]:
    """Compute on `device`, or on the CPU when that runs out of memory; and whether it did."""
    try:
        return compute(device), False
    except torch.OutOfMemoryError:
        if device.type == "cpu":
            raise
        log(WARNING, "\t> %s: %s is out of memory, going on on the CPU", what, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return compute(torch.device("cpu")), True
