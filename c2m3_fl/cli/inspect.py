"""``c2m3-fl inspect``: the groups of units of a network that may be permuted, and the pinned axes with reasons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import nn

from c2m3_fl.cli.files import load_network
from c2m3_fl.cli.limits import check_memory, check_output
from c2m3_fl.cli.options import NETWORK, Outputs
from c2m3_fl.cli.zoo import HEADER, example_image, load, measure
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.core.spec_json import save_spec
from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.widths.agree import check_alike
from c2m3_fl.network.calibration import ExampleInputs
from c2m3_fl.network.calls import choose_outputs
from c2m3_fl.symmetry.discover import check_invariance, permutation_spec
from c2m3_fl.symmetry.folding import find_folding

_BYTES = 8  # of a token, the larger kind of input


def inspect(
    model: Annotated[str, typer.Argument(help=NETWORK)] = "",
    shape: Annotated[
        list[str] | None,
        typer.Option("--input", help="Shape of an input, '2,3,32,32'; 'tokens:2,16' for integers. One per input."),
    ] = None,
    outputs: Outputs = None,
    width: Annotated[
        list[float] | None,
        typer.Option(help="A width, the argument of the factory; of several, the sizes of all groups are compared."),
    ] = None,
    rotations: Annotated[
        bool, typer.Option("--rotations", help="Rotate the groups that linear operators alone read, of folded params.")
    ] = False,
    save: Annotated[Path | None, typer.Option(help="Write the spec, or with --zoo the measurements, as JSON.")] = None,
    zoo: Annotated[bool, typer.Option("--zoo", help="The coverage table of all torchvision classifiers.")] = False,
    saved: Annotated[
        Path | None, typer.Option("--from", help="With --zoo: print the table of a file of measurements.")
    ] = None,
) -> None:
    """Show the groups of interchangeable units of a network, and every pinned axis with its reason."""
    console = Console(soft_wrap=True, highlight=False)
    if save is not None:
        check_output(save, (".json",))
    if zoo:
        _print_zoo(model, save, saved)
        return
    if not model:
        raise ConfigError("no network named; give a torchvision classifier or package.module:factory, or --zoo")
    network, example = _load(model, shape or [], width[0] if width else None)
    network = choose_outputs(network, outputs or None)
    spec = permutation_spec(network, example, rotations=rotations)
    console.print(str(spec), markup=False)
    if rotations:
        console.print("\n".join(_folding(network, example)), markup=False)
    if width:
        found = [choose_outputs(load_network(model, width=each)[0], outputs or None) for each in width[1:]]
        specs = [spec, *(permutation_spec(each, example) for each in found)]
        console.print("\n".join(_widths(specs, [f"width {each:g}" for each in width])), markup=False)
    console.print("\n".join(_proof(network, spec, example)), markup=False)
    if save is not None:
        save_spec(spec, save)
        console.print(f"\nwritten to {save}", markup=False)


def _folding(network: nn.Module, example: ExampleInputs) -> Iterator[str]:
    """The norms that keep their scales, so that the streams that they read permute."""
    kept = find_folding(network, example).kept
    if kept:
        yield "\nscales of norms that cannot be folded"
        yield from (f"  {name}: {reason}" for name, reason in kept.items())


def _proof(network: nn.Module, spec: PermutationSpec, example: ExampleInputs) -> Iterator[str]:
    """In which modes and batch sizes the groups are proven, and what the proof could have seen."""
    yield f"\nproven in: {'; '.join(spec.proven)}"
    found = check_invariance(network, spec, example)
    if found.power:
        yield "\nsmallest change that a wrong permutation of one axis alone would cause, as far as 1e-7 visible"
        width = max(map(len, found.power))
        yield from (f"  {name:<{width}}  {change:.0e}" for name, change in found.power.items())


def _widths(specs: Sequence[PermutationSpec], names: Sequence[str]) -> Iterator[str]:
    """Units of every group in networks of several widths, which must not differ in anything else."""
    check_alike(specs, names)
    wide = max(map(len, ["group", *specs[0].groups]))
    yield "\nunits of every group, by width"
    yield f"  {'group':<{wide}}  " + "  ".join(f"{name:>10}" for name in names)
    for group in specs[0].groups:
        yield f"  {group:<{wide}}  " + "  ".join(f"{spec.groups[group].size:>10}" for spec in specs)


def _print_zoo(model: str, save: Path | None, saved: Path | None) -> None:
    """Print the coverage table, one line per finished network."""
    entries = load(saved) if saved is not None else measure([model] if model else None, save)
    typer.echo(HEADER)
    for entry in entries:
        typer.echo(entry.line())


def _load(name: str, shapes: list[str], width: float | None) -> tuple[nn.Module, ExampleInputs]:
    """The network and its example inputs: of the given shapes, of the factory, or for a classifier an image."""
    network, example = load_network(name, width=width)
    module, _, attribute = name.rpartition(":")
    if module in ("", "torchvision"):
        example = example_image(attribute)
    if not shapes and example is None:
        raise ConfigError(
            f"{name!r} returned no example inputs; give their shapes, --input 2,3,32,32, or "
            "return (module, example inputs)"
        )
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
        if min(shape) < 1:
            raise ConfigError(f"--input {text!r}: expected sizes of at least 1")
        check_memory(_BYTES * prod(shape), f"--input {text!r}: inputs of this shape")
        drawn = torch.randint(2, shape, generator=generator) if kind else torch.randn(shape, generator=generator)
        found.append(drawn)
    return tuple(found)
