"""``c2m3-fl merge``: merge files of weights into one file, with a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import save_file
from torch import nn

from c2m3_fl.cli.convergence import draw_convergence
from c2m3_fl.cli.curves import draw_agreement
from c2m3_fl.cli.files import call_factory, load_network, load_nodes
from c2m3_fl.cli.images import channels_of, load_images, size_of
from c2m3_fl.cli.limits import PICTURES, check_output
from c2m3_fl.cli.options import Classes, ImageSize, Model, Outputs, Raw
from c2m3_fl.core.basis import consensus
from c2m3_fl.core.estimate import Estimate
from c2m3_fl.core.result import Step
from c2m3_fl.errors import C2M3Error, ConfigError, TraceError
from c2m3_fl.merging.align.methods import METHODS, CycleConsistent, MergeStart, resolve_method
from c2m3_fl.merging.evaluate.scoring import evaluate
from c2m3_fl.merging.merge import merge as merge_networks
from c2m3_fl.merging.merged import Merge
from c2m3_fl.merging.recalibrate.short_names import SHORT_NAMES
from c2m3_fl.network.calibration import ExampleInputs
from c2m3_fl.network.calibration_set import CalibrationSet
from c2m3_fl.network.calls import choose_outputs
from c2m3_fl.network.copying import private_copy
from c2m3_fl.symmetry.discover import permutation_spec


def merge(
    files: Annotated[list[Path], typer.Argument(help="Weights of the networks: safetensors, or torch files.")],
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the merged weights go (safetensors).")],
    calibration: Annotated[
        Path | None,
        typer.Option(help="Folder of images, one subfolder per class gives labels; or package.module:batches."),
    ] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "c2m3",
    start: Annotated[
        str, typer.Option(help="Where the match of method c2m3 starts: auto, activations, identity, barycentre, …")
    ] = "auto",
    recalibrate: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(SHORT_NAMES)}; by default repair, if there are images.")
    ] = None,
    weights: Annotated[list[float] | None, typer.Option(help="Averaging weight, once per file.")] = None,
    width: Annotated[
        list[float] | None, typer.Option(help="Width of a network, once per file: the argument of the factory.")
    ] = None,
    result_width: Annotated[
        float | None, typer.Option(help="Width of the merged network; by default that of the widest.")
    ] = None,
    outputs: Outputs = None,
    image_size: ImageSize = None,
    raw: Raw = False,
    classes: Classes = 0,
    picture: Annotated[
        Path | None, typer.Option(help="Draw how well the networks agree in every tensor, before and after.")
    ] = None,
    convergence: Annotated[Path | None, typer.Option(help="Draw the course of the match (method c2m3).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Merge networks that were trained apart: permute their units into one universe, average, recalibrate."""
    _check(files, method, start, convergence)
    _check_widths(files, width, result_width, picture)
    check_output(output, (".safetensors",))
    for drawing in (each for each in (picture, convergence) if each is not None):
        check_output(drawing, PICTURES)
    own: Sequence[float | None] = width or [None for _ in files]
    kinds = dict.fromkeys(own if result_width is None else [*own, result_width])
    made = {each: load_network(model, classes, each) for each in kinds}
    models = [made[each][0] for each in own]
    network, example = made[own[0]]
    nodes = [load_nodes(each, [file])[0] for each, file in zip(models, files, strict=True)]
    size, images = size_of(example, image_size), None
    if calibration is not None and ":" in calibration.name and not calibration.exists():
        images = call_factory(str(calibration))
    elif calibration is not None:
        images = load_images(calibration, size, channels=channels_of(example), raw=raw)
    elif start == "activations" or method in ("activations", "activations-universe", "cca"):
        raise ConfigError("this method compares activations: name a folder of images with --calibration")
    steps: list[Step] = []
    with _progress(f"merging {len(nodes)} networks by {method} …", steps) as tell:
        held = CalibrationSet.of(
            network,
            images,
            example_inputs=_example(example, size) if images is None else None,
            outputs=outputs or None,
        )
        try:
            spec = None if width else permutation_spec(held.model, held.example_inputs)
        except TraceError as error:
            if example is None and images is None:
                raise ConfigError(
                    f"{model!r} returned no example inputs, and {size} x {size} pixels in three channels do not do: "
                    "let the factory return (module, example inputs), or give --calibration or --image-size"
                ) from error
            raise
        options: dict[str, Any] = {
            "weights": weights,
            "calibration": held if held.batches else None,
            "method": CycleConsistent(cast("MergeStart", start), callback=tell) if method == "c2m3" else method,
            "recalibrate": recalibrate,
        }
        if spec is None:
            target = None if result_width is None else made[result_width][0]
            options |= {"example_inputs": held.example_inputs, "outputs": outputs or None, "width": target}
            merged = merge_networks(models=models, state_dicts=nodes, **options)
        else:
            merged = merge_networks(held.model, nodes, spec=spec, **options)
        report = {"method": method, **asdict(merged.report)}
        if held.labelled:
            scored = [
                *zip(map(str, files), models, nodes, strict=True),
                ("merged", _fitting(made, merged), merged.state_dict),
            ]
            report["accuracy"] = {
                name: evaluate(private_copy(choose_outputs(kind, outputs or None)).eval(), each, held.batches).accuracy
                for name, kind, each in scored
            }
    _save(merged, output)
    if picture is not None and spec is not None:
        before = consensus(spec, nodes, merged.report.weights).layers
        draw_agreement({name: row.tolist() for name, row in before.items()}, merged.report.layers, picture)
    if convergence is not None and steps:
        draw_convergence(steps, convergence)
    elif convergence is not None:
        typer.echo(f"{convergence} is not drawn: the match took no step", err=True)
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        _print(merged, report, output)


def _fitting(made: Mapping[Any, tuple[nn.Module, Any]], merged: Merge) -> nn.Module:
    """The network that the merged state dict fits."""
    shapes = {name: value.shape for name, value in merged.state_dict.items()}
    found = (own for own, _ in made.values())
    return next(own for own in found if {name: value.shape for name, value in own.state_dict().items()} == shapes)


def _check_widths(
    files: Sequence[Path], width: Sequence[float] | None, result_width: float | None, picture: Path | None
) -> None:
    """Refuse options of different widths that do not go together."""
    if width and len(width) != len(files):
        raise ConfigError(f"got {len(width)} of --width, expected one for each of the {len(files)} files")
    if result_width is not None and not width:
        raise ConfigError("--result-width is for networks of different widths: give --width, once per file")
    if width and picture is not None:
        raise ConfigError("--picture compares networks of one width, leave it out with --width")


def _check(files: Sequence[Path], method: str, start: str, convergence: Path | None) -> None:
    """Refuse options that do not go together before anything is read."""
    if convergence is not None and method != "c2m3":
        raise ConfigError(f"--convergence draws the steps of method 'c2m3'; method {method!r} has none")
    if len(files) < 2:
        raise ConfigError(f"got {len(files)} file, expected at least two networks to merge")
    resolve_method(method)
    if start != "auto" and method != "c2m3":
        raise ConfigError(f"--start is for method 'c2m3', not for {method!r}")


@contextmanager
def _progress(title: str, steps: list[Step]) -> Iterator[Callable[[Step], None]]:
    """A bar on the error stream, and a callback for the match that shows every step and appends it to `steps`."""
    estimate = Estimate(CycleConsistent.tolerance)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=1.0)

        def tell(step: Step) -> None:
            steps.append(step)
            left = f"gain {step.gain:.0e}" if step.gap is None else f"gap {step.gap:.0e}"
            text = f"{'reheating, ' if step.trial else ''}step {step.step}, agreement {step.objective:.5g}, {left}"
            progress.update(task, description=text, completed=estimate.add(step))

        yield tell


def _save(merged: Merge, output: Path) -> None:
    try:
        save_file({name: value.contiguous().clone() for name, value in merged.state_dict.items()}, output)
    except OSError as error:
        raise C2M3Error(f"{output} cannot be written: {error}") from error


def _example(given: ExampleInputs | None, size: int) -> ExampleInputs:
    """Inputs to trace with if there are no images: the factory's own, or images of the given size."""
    return torch.zeros(2, 3, size, size) if given is None else given


def _print(merged: Merge, report: dict[str, Any], output: Path) -> None:
    facts = Table.grid(padding=(0, 2))
    facts.add_row("method", report["method"])
    for name, text in merged.report.facts():
        facts.add_row(name, text)
    for name, accuracy in report.get("accuracy", {}).items():
        facts.add_row(f"accuracy {name}", f"{accuracy:.1%} of the calibration images")
    facts.add_row("written to", str(output))
    Console(highlight=False, soft_wrap=True).print(facts)
