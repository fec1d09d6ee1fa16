"""Runs an experiment in a few processes, each with one thread, and continues an interrupted run.

A task is a cell with one seed. Every process appends its measurements to one file of lines; that file says what is
done, even after processes were killed.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from c2m3_fl.errors import SimulationError
from simulations.design import Design
from simulations.ledger import Measurement, Record, append, load, now, ordered, read_lines, save, surroundings
from simulations.settings import Settings
from simulations.trial import key_of, run_cell

Watch = Callable[[Sequence[Measurement], int], None]  # all measurements so far, and how many there will be

_LOOK = 0.5  # seconds between reads of the file


@dataclass(frozen=True)
class Task:
    """One cell from one seed, and the methods that are still to run on it."""

    labels: dict[str, str]
    settings: Settings
    methods: tuple[str, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of its measurements."""
        return tuple(key_of(self.settings, method) for method in self.methods)


def result_file(design: Design, folder: Path) -> Path:
    """The JSON file of a finished experiment."""
    return folder / f"{design.name}.json"


def run_design(
    design: Design,
    folder: Path,
    *,
    workers: int = 1,
    fresh: bool = False,
    device: torch.device | None = None,
    watch: Watch = lambda _found, _total: None,
) -> Record:
    """Run the missing measurements of an experiment, and write its JSON file.

    Measurements of the JSON file and of the lines beside it are reused if their settings are those of the design. The
    code that made them is not compared: `fresh` drops them.

    Parameters
    ----------
    design : Design
        The experiment.
    folder : Path
        Folder of ``NAME.json``, and of ``NAME.jsonl`` until all is done.
    workers : int
        Number of processes; with 1 everything runs in this process.
    fresh : bool
        Whether to measure everything again.
    device : torch.device, optional
        Where clients train, C2M3 computes and models are evaluated; by default CUDA where there is a device.
    watch : callable
        Called with the progress.

    Raises
    ------
    SimulationError
        When a task failed; the measurements of the others are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = result_file(design, folder)
    lines = file.with_suffix(".jsonl")
    if fresh:
        lines.unlink(missing_ok=True)
    earlier = load(file).measurements if file.exists() and not fresh else ()
    tasks = _tasks(design)
    keys = [key for task in tasks for key in task.keys]
    total = len(keys)

    def found() -> tuple[Measurement, ...]:
        return ordered([*earlier, *read_lines(lines)], keys)

    started, known = now(), {each.key for each in found()}
    rest = [task for task in (_remaining(each, known) for each in tasks) if task.methods]
    watch(found(), total)
    failures = list(_failures(rest, lines, workers, device, lambda: watch(found(), total)))
    watch(found(), total)
    if failures:
        raise SimulationError(
            f"{len(failures)} of {len(rest)} tasks failed; the other measurements are kept in {lines}; "
            f"the first failure: {failures[0]}"
        )
    record = Record(_about(design, found(), started), found())
    save(record, file)
    lines.unlink(missing_ok=True)
    return record


def _tasks(design: Design) -> list[Task]:
    """All tasks, seed by seed, so that an unfinished run has measured every cell early."""
    return [
        Task(dict(cell.labels), replace(cell.settings, seed=seed), cell.methods)
        for seed in design.seeds
        for cell in design.cells
    ]


def _remaining(task: Task, known: set[str]) -> Task:
    return replace(task, methods=tuple(name for name in task.methods if key_of(task.settings, name) not in known))


def _failures(
    tasks: Sequence[Task], lines: Path, workers: int, device: torch.device | None, look: Callable[[], None]
) -> Iterator[str]:
    """Run the tasks, and yield a description of every failure."""
    if workers == 1:
        for task in tasks:
            try:
                _run(task, lines, device, look)
            except Exception as error:  # the other cells are still worth measuring
                yield _failed(task, error)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _prepare, (os.getpid(),)) as pool:
        waiting: dict[Future[None], Task] = {pool.submit(_run, task, lines, device): task for task in tasks}
        try:
            while waiting:
                done, _ = wait(waiting, _LOOK, FIRST_COMPLETED)
                look()
                for future in done:
                    task, failed = waiting.pop(future), future.exception()
                    if failed is not None:
                        yield _failed(task, failed)
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def _run(task: Task, lines: Path, device: torch.device | None, look: Callable[[], None] = lambda: None) -> None:
    def report(measurement: Measurement) -> None:
        append(measurement, lines)
        look()

    run_cell(task.labels, task.settings, task.methods, report, device=device)


def _prepare(parent: int) -> None:
    """In a worker: compute with one thread, and exit when the parent process has ended."""
    torch.set_num_threads(1)

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _failed(task: Task, error: BaseException) -> str:
    where = ", ".join(f"{axis} {level}" for axis, level in task.labels.items())
    return f"{where}, seed {task.settings.seed}: {type(error).__name__}: {error}"


def _about(design: Design, measurements: Sequence[Measurement], started: str) -> dict[str, object]:
    dates = sorted(each.date for each in measurements)
    return {
        "name": design.name,
        "title": design.title,
        "measured": {"from": min(dates, default=started), "to": max(dates, default=started)},
        "seconds": round(sum(each.seconds for each in measurements)),
        **surroundings(),
        "design": asdict(design),
    }
