"""The coverage table of torchvision's classifiers: measured once, stored as JSON, printed from it as Markdown."""

from __future__ import annotations

import gc
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from c2m3_fl.cli.files import build_classifier, classifiers
from c2m3_fl.core.describe import coverage
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.errors import DataError
from c2m3_fl.network.calibration import as_inputs
from c2m3_fl.symmetry.discover import derive
from c2m3_fl.symmetry.proof import Prover

HEADER = (
    "| network | parameters | groups | share permuted | trace (CPU s) | invariance error |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: |"
)
_IMAGE = 64  # side of the example image; parameters do not depend on it unless a network fixes its own
_PACKAGES = ("c2m3-fl", "torch", "torchvision", "numpy", "scipy")
_SIDES = {"vit": 224, "maxvit": 224, "inception": 299}


@dataclass(frozen=True)
class Row:
    """One line of the coverage table.

    Attributes
    ----------
    name : str
        The classifier's name in torchvision.
    parameters : int
        Number of its parameters.
    groups : int
        Number of groups of its spec.
    coverage : float
        Share of the parameters that some permutation moves, 0 to 1.
    seconds : float
        CPU seconds to trace it, proof excluded.
    error : float
        Largest relative change of the outputs under random permutations of all groups.
    """

    name: str
    parameters: int
    groups: int
    coverage: float
    seconds: float
    error: float

    def line(self) -> str:
        """The row as a line of a Markdown table."""
        return (
            f"| {self.name} | {self.parameters:,} | {self.groups} | {100 * self.coverage:.2f} % "
            f"| {self.seconds:.1f} | {self.error:.0e} |"
        )


def example_image(name: str) -> torch.Tensor:
    """Two random images: 64 pixels wide, or as wide as the classifier requires."""
    side = next((side for prefix, side in _SIDES.items() if name.startswith(prefix)), _IMAGE)
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def survey(name: str) -> tuple[Row, PermutationSpec]:
    """Trace a classifier and measure the invariance error of the traced spec, before the check pins any group."""
    torch.manual_seed(0)
    network, image = build_classifier(name), as_inputs(example_image(name))
    begin = time.process_time()
    spec, modes = derive(network, image)
    seconds = time.process_time() - begin
    error = max(Prover(network, image, training=training).error(spec) for training in modes)
    parameters = sum(value.numel() for value in network.parameters())
    return Row(name, parameters, len(spec.groups), coverage(spec), seconds, error), spec


def measure(names: Sequence[str] | None, file: Path | None) -> Iterator[Row]:
    """Survey classifiers (None: all of torchvision's) one at a time; after each, all results so far go into `file`."""
    done = []
    for name in names or classifiers():
        done.append(survey(name)[0])
        if file is not None:
            _write(done, file)
        yield done[-1]
        gc.collect()


def load(file: Path) -> list[Row]:
    """The rows that `measure` wrote to a file.

    Raises
    ------
    DataError
        When the file cannot be read or does not hold a coverage table.
    """
    try:
        return [Row(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} holds no coverage table ({error}); write one: c2m3-fl inspect --zoo --save {file}"
        ) from error


def _write(entries: Sequence[Row], file: Path) -> None:
    content = {
        "command": "c2m3-fl inspect --zoo --save FILE",
        "configuration": {"seed": 0, "images": 2, "side": _IMAGE, "other sides": _SIDES},
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "rows": [asdict(entry) for entry in entries],
    }
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
