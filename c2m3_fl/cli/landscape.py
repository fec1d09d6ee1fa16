"""``c2m3-fl landscape``: the loss across the plane through three networks, before and after the match."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from c2m3_fl.cli.curves import draw_landscapes
from c2m3_fl.cli.files import load_network, load_nodes
from c2m3_fl.cli.images import channels_of, load_images, size_of
from c2m3_fl.cli.limits import PICTURES, check_output
from c2m3_fl.cli.options import Classes, ImageSize, KeepStatistics, LabelledImages, Model, Outputs, Picture, Raw
from c2m3_fl.core import permutation
from c2m3_fl.core.match import match
from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.evaluate.landscape import landscape as plane
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.network.calls import choose_outputs
from c2m3_fl.symmetry.discover import permutation_spec


def landscape(
    files: Annotated[list[Path], typer.Argument(help="Weights of three networks.")],
    model: Model,
    data: LabelledImages,
    output: Picture = Path("landscape.png"),
    resolution: Annotated[int, typer.Option(min=2, max=1000, help="Points along each side.")] = 15,
    keep_statistics: KeepStatistics = False,
    image_size: ImageSize = None,
    raw: Raw = False,
    classes: Classes = 0,
    outputs: Outputs = None,
) -> None:
    """Draw the loss across the plane through three networks, as they are and in one basis."""
    if len(files) != 3:
        raise ConfigError(f"a plane is spanned by three networks, got {len(files)} files")
    check_output(output, PICTURES)
    network, example = load_network(model, classes)
    network = choose_outputs(network, outputs or None)
    nodes = load_nodes(network, files)
    images = load_images(data, size_of(example, image_size), channels=channels_of(example), raw=raw)
    renormalise = False if keep_statistics else None
    with Console(stderr=True).status("scoring …"):
        spec = permutation_spec(network, CalibrationSet.of(network, images).example_inputs)
        found = match(spec, nodes)
        moved = [permutation.apply(spec, found.between(0, index), node) for index, node in enumerate(nodes)]
        drawn = {
            "as they are": plane(network, nodes, images, resolution=resolution, renormalise=renormalise),
            "in one basis": plane(network, moved, images, resolution=resolution, renormalise=renormalise),
        }
    draw_landscapes(drawn, _names(files), output)
    typer.echo(f"written to {output}")


def _names(files: Sequence[Path]) -> list[str]:
    """Names of the networks in the picture: the files' names, with folders if the names are not distinct."""
    stems = [file.stem for file in files]
    names = stems if len(set(stems)) == len(stems) else [str(file.with_suffix("")) for file in files]
    return [name.replace("$", r"\$") for name in names]  # a dollar sign would begin a formula
