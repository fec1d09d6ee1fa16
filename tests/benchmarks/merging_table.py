"""Merges of trained networks: every recalibration after C2M3, every method, shifted calibration data.

    python -m tests.benchmarks.merging_table [CASE ...] [--seeds 0 1 2] [--table recalibration|methods|shift|published]

prints a markdown table, accuracy in percent (mean ± standard deviation over seeds) and CPU seconds, and writes
``c2m3_fl/merging/results/merging-TABLE.json``, where rows of other cases and seeds stay; ``--redraw`` measures nothing.
With ``--validation`` it measures on training images that nothing has seen instead of the test images, and writes
``results/merging-TABLE-validation.json``: the last layer's target and the limit of ``Auto`` were chosen by that.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.merging.align.methods import METHODS
from c2m3_fl.merging.merge import merge
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.symmetry.discover import permutation_spec
from tests.benchmarks.merging_cases import CASES, PUBLISHED, Case, Trained, accuracy, probabilities, trained, validated
from tests.benchmarks.merging_rows import RECALIBRATIONS, Row, merged_setting, own_moments
from tests.benchmarks.published_merges import published_rows, published_tables
from tests.benchmarks.records import read_record, write_record
from tests.benchmarks.shifted_calibration import shift_rows

_ROOT = Path(__file__).parents[2]


def ensemble(found: Trained, weights: list[float], inputs: Tensor) -> Tensor:
    """The nodes' mean probabilities."""
    parts = [
        weight / sum(weights) * probabilities(found.model, node, inputs)
        for weight, node in zip(weights, found.nodes, strict=True)
    ]
    return torch.stack(parts).sum(0)


def distilled(model: nn.Module, start: Mapping[str, Tensor], found: Trained, steps: int = 300) -> dict[str, Tensor]:
    """So many Adam steps from `start` towards the endpoints' mean probabilities on the calibration inputs."""
    inputs = torch.cat(found.calibration)
    targets = ensemble(found, found.weights, inputs)
    student = copy.deepcopy(model)
    student.load_state_dict(start)
    student.train()
    optimiser = torch.optim.Adam(student.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(inputs), (64,), generator=generator)
        optimiser.zero_grad()
        loss = nn.functional.kl_div(student(inputs[rows]).log_softmax(1), targets[rows], reduction="batchmean")
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimiser.step()
    return dict(student.state_dict())


def recalibration_rows(case: Case, seed: int, found: Trained, spec: PermutationSpec) -> Iterator[Row]:
    """Nodes, ensemble, and everything that may follow C2M3."""

    def row(column: str, value: float, seconds: float = 0.0) -> Row:
        return Row(case.title, seed, column, value, seconds)

    scores = [accuracy(found.model, node, found.test) for node in found.nodes]
    yield row("mean node", statistics.mean(scores))
    yield row("best node", max(scores))
    for column, share in (("ensemble", [1.0] * len(scores)), ("ensemble, weighted", found.weights)):
        begin = time.process_time()
        votes = ensemble(found, share, found.test.inputs).argmax(1)
        right = float((votes == found.test.labels).double().mean())
        yield row(column, right, time.process_time() - begin)
    naive = merge(found.model, found.nodes, method="mean", recalibrate="none", spec=spec, weights=found.weights)
    yield row("naive mean", accuracy(found.model, naive.state_dict, found.test), naive.report.seconds)
    moments = own_moments(case, found)
    begin = time.process_time()
    _, settings = merged_setting(found, spec, moments)
    seconds = time.process_time() - begin
    setting = settings(found.calibration)
    yield row("C2M3", accuracy(found.model, setting.merged, found.test), seconds)
    normed = any(operator.mean for operator in setting.programs[0].operators)
    for column, recalibrate in RECALIBRATIONS.items():
        if column == "+ BatchNorm" and not normed:
            continue
        begin = time.process_time()
        done = recalibrate(replace(setting))  # a fresh setting has measured nothing yet
        seconds = time.process_time() - begin
        yield row(column, accuracy(found.model, done.state_dict, found.test), seconds)
        if column == "+ refit":
            begin = time.process_time()
            student = distilled(found.model, done.state_dict, found)
            score = accuracy(found.model, student, found.test)
            yield row(f"{column}, then distilled", score, time.process_time() - begin)
    begin = time.process_time()
    student = distilled(found.model, setting.merged, found)
    yield row("C2M3, distilled", accuracy(found.model, student, found.test), time.process_time() - begin)


def method_rows(case: Case, seed: int, found: Trained, spec: PermutationSpec) -> Iterator[Row]:
    """Every method, with every recalibration that follows it."""
    for method in METHODS:
        for name, recalibrate in (("none", "none"), ("repair", "repair"), ("refit", Refit(scores=True))):
            merged = merge(
                found.model,
                found.nodes,
                spec=spec,
                weights=found.weights,
                calibration=found.calibration,
                method=method,
                recalibrate=recalibrate,
            )
            score = accuracy(found.model, merged.state_dict, found.test)
            yield Row(case.title, seed, f"{method} + {name}", score, merged.report.seconds)


TABLES: dict[str, Callable[[Case, int, Trained, PermutationSpec], Iterator[Row]]] = {
    "recalibration": recalibration_rows,
    "methods": method_rows,
    "shift": shift_rows,
    "published": published_rows,
}


def table(rows: list[Row]) -> str:
    """Markdown: one line per case and column, mean ± standard deviation over seeds."""
    lines = ["| case | | accuracy | seconds |", "| --- | --- | ---: | ---: |"]
    for case, column in dict.fromkeys((row.case, row.column) for row in rows):
        found = [row for row in rows if (row.case, row.column) == (case, column)]
        scores = [100 * row.accuracy for row in found]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        seconds = statistics.mean(row.seconds for row in found)
        lines.append(f"| {case} | {column} | {statistics.mean(scores):.1f} ± {spread:.1f} | {seconds:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Tables of the merging benchmarks.")
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", choices=TABLES, default="recalibration")
    parser.add_argument("--validation", action="store_true", help="measure on unseen training images")
    parser.add_argument("--redraw", action="store_true", help="print the record's table")
    arguments = parser.parse_args()
    cases = CASES | PUBLISHED
    standard = CASES if arguments.table != "published" else [name for name in PUBLISHED if not name.endswith("-full")]
    name = f"merging-{arguments.table}{'-validation' if arguments.validation else ''}.json"
    file = _ROOT / ("results" if arguments.validation else "c2m3_fl/merging/results") / name
    rows = [Row(**each) for each in read_record(file)["rows"]] if file.is_file() else []
    command = f"python -m tests.benchmarks.merging_table --table {arguments.table}"
    for case_name in () if arguments.redraw else arguments.cases or standard:
        for seed in arguments.seeds:
            case = cases[case_name].seeded(seed)
            found = validated(trained(case)) if arguments.validation else trained(case)
            spec = permutation_spec(found.model, found.calibration[0][:4])
            rows = [row for row in rows if (row.case, row.seed) != (case.title, seed)]
            rows += TABLES[arguments.table](case, seed, found, spec)
            write_record(file, command, {"threads": torch.get_num_threads()}, [asdict(row) for row in rows])
    print(published_tables(rows) if arguments.table == "published" else table(rows))


if __name__ == "__main__":
    main()
