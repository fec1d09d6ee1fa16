"""Options that both dialects share, checked once."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Literal, get_args

import torch

from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.aligning.aligner import Basis, Mode
from c2m3_fl.merging.recalibrate.setting import usable_device
from c2m3_fl.ranges import check_number, check_whole

Feedback = Literal["never", "moved", "always"]
Deploy = Literal["last", "every"] | int


@dataclass(frozen=True)
class Options:
    """Options of a strategy beyond the model and the data; `C2M3` documents each of them.

    Raises
    ------
    ConfigError
        For values out of range.
    """

    alignment: Mode = "joint"
    basis: Basis = "global"
    min_replies: int = 1
    outliers: Literal["report", "drop"] = "report"
    memory: int = 1000
    max_steps: int = 100
    tolerance: float = 1e-4
    diagnostics: bool = False
    feedback: Feedback = "moved"
    deploy: Deploy = "last"
    max_seconds: float | None = None
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        check_whole("min_replies", self.min_replies, 1)
        check_whole("memory", self.memory, 0)
        check_whole("max_steps", self.max_steps, 0)
        check_number("tolerance", self.tolerance, 0)
        if self.max_seconds is not None:
            check_number("max_seconds", self.max_seconds, 0)
        if self.memory_limit is not None:
            check_whole("memory_limit", self.memory_limit, 1)
        if self.outliers not in ("report", "drop"):
            raise ConfigError(f"outliers is {self.outliers!r}, expected 'report' or 'drop'")
        if self.feedback not in get_args(Feedback):
            raise ConfigError(f"feedback is {self.feedback!r}, expected 'never', 'moved' or 'always'")
        if self.deploy not in ("last", "every"):
            if isinstance(self.deploy, str):
                raise ConfigError(f"deploy is {self.deploy!r}, expected 'last', 'every' or a number of rounds")
            check_whole("deploy", self.deploy, 1)


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device to compute on: CUDA by default where there is one, else the CPU.

    Raises
    ------
    ConfigError
        For a device that cannot be computed on.
    """
    return usable_device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)


def brief(options: object) -> str:
    """An options object as it was written: its class, and the fields that differ from their defaults."""
    if not is_dataclass(options) or isinstance(options, type):
        return repr(options)
    parts = []
    for each in fields(options):
        value = getattr(options, each.name)
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if repr(value) != repr(default):
            parts.append(f"{each.name}={brief(value)}")
    return f"{type(options).__name__}({', '.join(parts)})"
