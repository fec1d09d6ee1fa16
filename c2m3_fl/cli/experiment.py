"""``c2m3-fl experiment``: run an experiment of ``simulations/experiments``, or the rest of it, and draw the results."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import simulations
from c2m3_fl.cli.limits import make_folder
from c2m3_fl.cli.options import read_seeds
from c2m3_fl.merging.recalibrate.setting import usable_device
from simulations.design import Design, load_design, names
from simulations.ledger import Measurement, load
from simulations.runner import Watch, result_file, run_design
from simulations.settings import TITLES

_FOLDER = Path(simulations.__file__).parent
_WIDE = 120  # columns of output that goes to a file or a log


def experiment(
    name: Annotated[str, typer.Argument(help=f"Which one: {', '.join(names())}.")],
    quick: Annotated[bool, typer.Option("--quick", help="Run the reduced form that the experiment defines.")] = False,
    seeds: Annotated[str, typer.Option(help="Seeds in place of the experiment's own, separated by commas.")] = "",
    workers: Annotated[int, typer.Option(help="Processes, with one thread each.", min=1)] = 2,
    device: Annotated[
        str, typer.Option(help="Where to compute, such as 'cpu' or 'cuda:0'; by default CUDA where there is a device.")
    ] = "",
    output: Annotated[Path, typer.Option(help="Folder for NAME.json, NAME.md and NAME.png.")] = _FOLDER / "results",
    fresh: Annotated[bool, typer.Option("--fresh", help="Drop earlier measurements and measure again.")] = False,
    draw: Annotated[bool, typer.Option("--draw", help="Only draw, from NAME.json.")] = False,
) -> None:
    """Run an experiment of simulations/experiments, or the rest of one that was interrupted."""
    design = load_design(name, quick=quick, seeds=read_seeds(seeds))
    place = usable_device(device) if device else None
    make_folder(output)
    console = Console(width=None if sys.stdout.isatty() else _WIDE)
    if not draw:
        console.print(f"{design.title}: {len(design.cells)} cells x {len(design.seeds)} seeds, {workers} workers")
        with _progress(console) as watch:
            run_design(design, output, workers=workers, fresh=fresh, device=place, watch=watch)
    _draw(design, output, console)


def _draw(design: Design, output: Path, console: Console) -> None:
    """Write tables and picture beside the JSON and, for this checkout's results, the tables in the pages."""
    from simulations import grid_pictures, grid_tables, method_pictures
    from simulations.verdict import one_round

    file = result_file(design, output)
    record = load(file)
    table, picture = file.with_suffix(".md"), file.with_suffix(".png")
    written = grid_tables.markdown(record)
    table.write_text(written)
    (method_pictures if one_round(record) else grid_pictures).draw(record, picture)
    if output.resolve() == (_FOLDER / "results").resolve():
        pages = {
            _FOLDER: (design.name, written),
            _FOLDER.parent: (f"{design.name}, in short", grid_tables.summary(record)),
        }
        for folder, (mark, text) in pages.items():
            readme = folder / "README.md"
            if readme.exists():
                readme.write_text(grid_tables.page(readme.read_text(), mark, text))
    for meaning, path in (("results", file), ("tables", table), ("picture", picture)):
        console.print(f"{meaning:>8}: {path.resolve()}", highlight=False, soft_wrap=True)


@contextmanager
def _progress(console: Console) -> Iterator[Watch]:
    """A bar over all measurements, a line for each new one, and the estimated remaining time."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("starting", total=None)
        seen: set[str] = set()
        before, since = -1, time.monotonic()

        def watch(found: Sequence[Measurement], total: int) -> None:
            nonlocal before
            if before < 0:  # the first call: measurements of an earlier run
                before = len(found)
                seen.update(each.key for each in found)
            rest = _rest(len(found) - before, total - len(found), time.monotonic() - since)
            for each in found:
                if each.key not in seen:
                    seen.add(each.key)
                    progress.console.print(_line(each, len(found), total, rest), highlight=False, soft_wrap=True)
            progress.update(bar, total=total, completed=len(found), description=rest)

        yield watch


def _line(each: Measurement, done: int, total: int, rest: str) -> str:
    accuracy = each.accuracy[-1] if each.accuracy[-1] is not None else float("nan")
    return (
        f"{done}/{total}  {', '.join(each.cell.values())}, seed {each.seed}  {TITLES[each.method]}  "
        f"accuracy {accuracy:.3f}  ({each.seconds:.1f} s; {rest})"
    )


def _rest(done: int, left: int, seconds: float) -> str:
    """Remaining time, estimated from the mean time of this run's measurements."""
    if done == 0:
        return "remaining time not known yet"
    minutes, seconds = divmod(round(left * seconds / done), 60)
    return f"about {minutes:.0f}:{seconds:02.0f} min left"
