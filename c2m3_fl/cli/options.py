"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from c2m3_fl.errors import ConfigError

NETWORK = "A torchvision classifier, or package.module:factory, which returns a module, or (module, example inputs)."

Model = Annotated[str, typer.Option(help=NETWORK)]
LabelledImages = Annotated[Path, typer.Option(help="Folder of images, one subfolder per class.")]
Picture = Annotated[Path, typer.Option("--output", "-o", help="Where the picture goes.")]
KeepStatistics = Annotated[
    bool, typer.Option("--keep-statistics", help="Do not re-estimate BatchNorm's statistics between networks.")
]
ImageSize = Annotated[
    int | None,
    typer.Option(min=1, help="Side of the images, in pixels; by default the factory's example inputs', or 224."),
]
Raw = Annotated[
    bool, typer.Option("--raw", help="Leave pixels in [0, 1]; else they are scaled by ImageNet's mean and spread.")
]
Classes = Annotated[
    int, typer.Option(min=0, max=1_000_000, help="Width of a torchvision network's output; 0 keeps its own.")
]


Outputs = Annotated[
    list[str] | None,
    typer.Option("--outputs", help="An output that is read, by its name or place: logits. By default all of them."),
]


def read_seeds(text: str) -> tuple[int, ...]:
    """The integers of the option ``--seeds``, without repetition."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError as error:
        raise ConfigError(f"seeds is {text!r}, expected integers separated by commas, such as '0,1,2'") from error
