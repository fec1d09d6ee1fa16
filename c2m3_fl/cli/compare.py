"""``c2m3-fl compare``: strategies side by side, on the same clients, partitions and seeds."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Optional, get_type_hints

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from c2m3_fl.cli.limits import make_folder
from c2m3_fl.cli.options import read_seeds
from simulations.data import federated_data
from simulations.presets import PRESETS
from simulations.results import PROGRESS, RESULTS, Comparison, Round, load, read_lines, save
from simulations.settings import TITLES, Settings, Value, check_choice

_ENGINES = ("serial", "flwr")
_WIDE = 120  # columns of a table that goes to a file or a log

Report = Callable[[Round], None]


def compare(
    preset: Annotated[str, typer.Option(help=f"Settings to start from: {', '.join(PRESETS)}.")] = "",
    engine: Annotated[
        str, typer.Option(help="'serial': clients one after another in this process; 'flwr': Flower's engine, on Ray.")
    ] = "serial",
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas: the table shows mean and spread.")] = "",
    output: Annotated[Path, typer.Option(help="Folder for results.json, table.md and accuracy.png.")] = Path("results"),
    verbose: Annotated[bool, typer.Option("--verbose", help="With the serial engine, show Flower's own log.")] = False,
    **options: Value | None,
) -> None:
    """Compare strategies on one simulated federation: a table per round, JSON and a picture."""
    check_choice("engine", engine, _ENGINES)
    settings = _settings(preset, options)
    chosen = read_seeds(seeds) or (settings.seed,)
    runs = [replace(settings, seed=seed) for seed in chosen]
    federated_data(runs[0])  # refuses clients and images that the data set does not have
    make_folder(output)
    console = Console(width=None if sys.stdout.isatty() else _WIDE)
    console.print(f"{len(runs)} x {len(settings.strategies)} strategies x {settings.rounds} rounds, engine {engine}")
    with _progress(console, len(runs) * settings.rounds * len(settings.strategies)) as report:
        rounds = _flower(runs, report) if engine == "flwr" else _serial(runs, report, verbose)
    _show(console, Comparison(settings.to_run_config(), rounds), output)


def _show(console: Console, comparison: Comparison, output: Path) -> None:
    """Print the table; write JSON, Markdown and picture, and print their paths."""
    from c2m3_fl.cli.drawing import draw
    from c2m3_fl.cli.tables import markdown, rounds_table

    results, table, picture = output / RESULTS, output / "table.md", output / "accuracy.png"
    save(comparison, results)
    table.write_text(markdown(comparison))
    draw(comparison, picture)
    console.print()
    console.print(rounds_table(comparison))
    for meaning, file in (("results", results), ("table", table), ("picture", picture)):
        console.print(f"{meaning:>8}: {file.resolve()}", highlight=False, soft_wrap=True)


def _serial(runs: list[Settings], report: Report, verbose: bool) -> tuple[Round, ...]:
    """All runs in this process."""
    from c2m3_fl.flower.serial_grid import SerialGrid
    from simulations.client_app import app
    from simulations.comparison import run_comparison
    from simulations.flower_log import flower_log

    rounds: list[Round] = []
    with flower_log(logging.NOTSET if verbose else logging.ERROR):  # after the imports: one of them sets the level
        for settings in runs:
            grid = SerialGrid(app, settings.clients, run_config=settings.to_run_config())
            rounds += run_comparison(grid, settings, report)
    return tuple(rounds)


def _flower(runs: list[Settings], report: Report) -> tuple[Round, ...]:
    """All runs on one SuperLink, one after the other; their progress is read from the file they write."""
    from simulations.engine import flower_engine

    rounds: list[Round] = []
    with flower_engine() as engine:
        for settings in runs:
            folder = engine.home / f"seed-{settings.seed}"
            seen = 0

            def watch(file: Path = folder / PROGRESS) -> None:
                nonlocal seen
                fresh = read_lines(file)[seen:]
                seen += len(fresh)
                for scored in fresh:
                    report(scored)

            engine.run(settings, folder, watch)
            rounds += load(folder / RESULTS).rounds
    return tuple(rounds)


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Report]:
    """A bar over all rounds, and a line for each finished one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=total)

        def report(scored: Round) -> None:
            progress.console.print(
                f"seed {scored.seed}  {TITLES[scored.strategy]:<14} round {scored.round}"
                f"  accuracy {scored.accuracy:.3f}  loss {scored.loss:.3f}  ({scored.seconds:.1f} s)",
                highlight=False,
            )
            progress.update(task, advance=1, description=TITLES[scored.strategy])

        yield report


def _settings(preset: str, options: Mapping[str, Value | None]) -> Settings:
    """The preset's settings, overridden by the options that were given."""
    if preset:
        check_choice("preset", preset, tuple(PRESETS))
    given = {name: value for name, value in options.items() if value is not None}
    values: dict[str, Any] = {**(PRESETS[preset] if preset else {}), **given}
    return Settings(**values)


def _option(each: Field[Any], kind: type) -> inspect.Parameter:
    """A field of `Settings` as an option that is None unless it is given."""
    choices = f": {', '.join(each.metadata['choices'])}" if each.metadata["choices"] else ""
    about = f"{each.metadata['meaning']}{choices} [default: {each.default}]"
    option = typer.Option(help=about[0].upper() + about[1:], show_default=False)
    annotation: Any = Annotated[Optional[kind], option]  # noqa: UP045  # the type is only known when this runs
    return inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _with_settings(function: Callable[..., None]) -> None:
    """Let typer see one option for every field of `Settings` where the function takes ``**options``."""
    hints = get_type_hints(function, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "options"
    ]
    types = get_type_hints(Settings)
    parameters = [*own, *(_option(each, types[each.name]) for each in fields(Settings))]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    function.__annotations__ = {each.name: each.annotation for each in parameters}


_with_settings(compare)
