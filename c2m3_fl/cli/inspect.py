"""``c2m3-fl inspect``: what may be permuted in a network, and what may not and why."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import nn

from c2m3_fl.cli.files import build_classifier, check_output, classifiers, load_network
from c2m3_fl.core.describe import coverage
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.core.spec_json import save_spec
from c2m3_fl.errors import ConfigError
from c2m3_fl.network.calibration import ExampleInputs, as_inputs
from c2m3_fl.symmetry.discover import derive, permutation_spec
from c2m3_fl.symmetry.proof import Prover

_IMAGE = 64  # side of the example image; parameters do not depend on it unless a network fixes its own
_SIDES = {"vit": 224, "maxvit": 224, "inception": 299}


def inspect(
    model: Annotated[
        str, typer.Argument(help="A torchvision classifier, or package.module:factory returning a module.")
    ] = "",
    shape: Annotated[
        list[str] | None,
        typer.Option("--input", help="Shape of an input, '2,3,32,32'; 'tokens:2,16' for integers. One per input."),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the spec as JSON.")] = None,
    zoo: Annotated[bool, typer.Option("--zoo", help="The coverage table of all torchvision classifiers.")] = False,
) -> None:
    """Show the groups of interchangeable units of a network, and every axis that is pinned with its reason."""
    console = Console(soft_wrap=True, highlight=False)
    if zoo:
        _print_table(_zoo([model] if model else None))
        return
    if not model:
        raise ConfigError("no network named; give a torchvision classifier or package.module:factory, or --zoo")
    if save is not None:
        check_output(save, (".json",))
    network, example = _load(model, shape or [])
    spec = permutation_spec(network, example)
    console.print(str(spec), markup=False)
    if save is not None:
        save_spec(spec, save)
        console.print(f"\nwritten to {save}", markup=False)


def _load(name: str, shapes: list[str]) -> tuple[nn.Module, ExampleInputs]:
    """The network, and the example inputs that the shapes, the factory or the zoo's custom give it."""
    network, example = load_network(name)
    module, _, attribute = name.rpartition(":")
    if module in ("", "torchvision"):
        example = example_image(attribute)
    if not shapes and example is None:
        raise ConfigError(f"{name!r} returned no example inputs; give their shapes, --input 2,3,32,32")
    return network, _inputs(shapes) if shapes or example is None else example


def _inputs(shapes: list[str]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for text in shapes:
        kind, _, sizes = text.rpartition(":")
        try:
            shape = tuple(int(size) for size in sizes.split(","))
        except ValueError as error:
            raise ConfigError(f"--input {text!r}: expected sizes like 2,3,32,32 or tokens:2,16") from error
        if kind not in ("", "tokens"):
            raise ConfigError(f"--input {text!r}: unknown kind {kind!r}, expected 'tokens:' or nothing")
        drawn = torch.randint(2, shape, generator=generator) if kind else torch.randn(shape, generator=generator)
        found.append(drawn)
    return tuple(found)


# ------------------------------------------------------------------------------------------------------------- zoo


@dataclass(frozen=True)
class Entry:
    """One line of the coverage table."""

    name: str
    parameters: int
    groups: int
    coverage: float
    seconds: float
    error: float


def example_image(name: str) -> torch.Tensor:
    """Two random images of the smallest usual size that the classifier takes."""
    side = next((side for prefix, side in _SIDES.items() if name.startswith(prefix)), _IMAGE)
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def survey(name: str) -> tuple[Entry, PermutationSpec]:
    """Trace a classifier and measure its invariance; nothing is pinned after the fact."""
    torch.manual_seed(0)
    network, image = build_classifier(name), as_inputs(example_image(name))
    begin = time.process_time()
    spec, modes = derive(network, image)
    seconds = time.process_time() - begin
    error = max(Prover(network, image, training=training).error(spec) for training in modes)
    parameters = sum(value.numel() for value in network.parameters())
    return Entry(name, parameters, len(spec.groups), coverage(spec), seconds, error), spec


def _zoo(names: list[str] | None) -> Iterator[Entry]:
    for name in names or classifiers():
        yield survey(name)[0]
        gc.collect()


def _print_table(entries: Iterator[Entry]) -> None:
    """Markdown, line by line as networks are done."""
    typer.echo("| network | parameters | groups | share permuted | trace (CPU s) | invariance error |")
    typer.echo("| --- | ---: | ---: | ---: | ---: | ---: |")
    for entry in entries:
        typer.echo(
            f"| {entry.name} | {entry.parameters:,} | {entry.groups} | {100 * entry.coverage:.2f} % "
            f"| {entry.seconds:.1f} | {entry.error:.0e} |"
        )
