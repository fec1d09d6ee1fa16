"""``c2m3-fl barrier``: loss and accuracy along the segment between two networks, before and after the match."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from c2m3_fl.cli.curves import draw_segments
from c2m3_fl.cli.files import load_network, load_nodes
from c2m3_fl.cli.images import channels_of, load_images, size_of
from c2m3_fl.cli.limits import PICTURES, check_output
from c2m3_fl.cli.options import Classes, ImageSize, KeepStatistics, LabelledImages, Model, Outputs, Picture, Raw
from c2m3_fl.core import permutation
from c2m3_fl.core.match import match
from c2m3_fl.merging.evaluate.barrier import barrier as segment
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.network.calls import choose_outputs
from c2m3_fl.symmetry.discover import permutation_spec


def barrier(
    first: Annotated[Path, typer.Argument(help="Weights of one network.")],
    second: Annotated[Path, typer.Argument(help="Weights of the other.")],
    model: Model,
    data: LabelledImages,
    output: Picture = Path("barrier.png"),
    points: Annotated[int, typer.Option(min=2, max=1000, help="Points of the segment, ends included.")] = 11,
    keep_statistics: KeepStatistics = False,
    image_size: ImageSize = None,
    raw: Raw = False,
    classes: Classes = 0,
    outputs: Outputs = None,
) -> None:
    """Draw loss and accuracy along the segment between two networks, as they are and in one basis."""
    check_output(output, PICTURES)
    network, example = load_network(model, classes)
    network = choose_outputs(network, outputs or None)
    nodes = load_nodes(network, (first, second))
    images = load_images(data, size_of(example, image_size), channels=channels_of(example), raw=raw)
    renormalise = False if keep_statistics else None
    with Console(stderr=True).status("scoring …"):
        spec = permutation_spec(network, CalibrationSet.of(network, images).example_inputs)
        moved = permutation.apply(spec, match(spec, nodes).between(0, 1), nodes[1])
        found = {
            "as they are": segment(network, nodes[0], nodes[1], images, points=points, renormalise=renormalise),
            "matched": segment(network, nodes[0], moved, images, points=points, renormalise=renormalise),
        }
    draw_segments(found, output)
    for name, each in found.items():
        typer.echo(f"{name}: barrier {each.loss_barrier:.3f} in loss, {each.accuracy_barrier:.1%} in accuracy")
    typer.echo(f"written to {output}")
