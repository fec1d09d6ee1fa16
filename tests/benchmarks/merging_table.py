"""Merges of trained networks: every recalibration after C2M3, every method, shifted calibration data.

    python -m tests.benchmarks.merging_table [CASE ...] [--seeds 0 1 2] [--table recalibration|methods|shift|published]

prints a markdown table, accuracy in percent (mean ± standard deviation over seeds) and CPU seconds, and writes
``results/merging-TABLE.json``, where rows of other cases and seeds stay. With ``--validation`` it measures on training
images that nothing has seen instead of the test images, and writes ``results/merging-TABLE-validation.json``: that is
what the last layer's target and the limit of ``Auto`` were chosen by.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from c2m3_fl.core import permutation
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.merging.align.base import Alignment, Method, Nodes
from c2m3_fl.merging.align.methods import METHODS, CycleConsistent, MergeMany
from c2m3_fl.merging.merge import Merge, merge
from c2m3_fl.merging.recalibrate.auto import Auto
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.merging.recalibrate.repair import BatchNormStatistics, Repair
from c2m3_fl.merging.recalibrate.setting import Setting, prepare
from c2m3_fl.merging.recalibrate.shift import channel_moments, with_own_moments
from c2m3_fl.merging.recalibrate.short_names import Recalibration
from c2m3_fl.merging.reports import Recalibrated
from c2m3_fl.network.moments import Moments
from c2m3_fl.symmetry.discover import permutation_spec
from tests.benchmarks.merging_cases import CASES, PUBLISHED, Case, Trained, accuracy, probabilities, trained, validated

RESULTS = Path("results")
_ORDERS = 3  # random orders that MergeMany is averaged over
_COUNTS = (2, 3, 5)  # numbers of networks of the published setting, beside all there are
_PUBLISHED: dict[str, tuple[Recalibration | str, Sequence[str]]] = {  # all methods for all networks with REPAIR, and
    "REPAIR": ("repair", ("mergemany", "c2m3", "cca")),  # these for fewer
    "batchnorm": ("batchnorm", ("mergemany", "c2m3", "cca")),
    "refit": (Refit(scores=True), ("c2m3", "cca")),
}
RECALIBRATIONS: dict[str, Recalibration] = {
    "+ BatchNorm": BatchNormStatistics(),
    "+ REPAIR": Repair(),
    "+ REPAIR, closed form": Repair(closed_form=True),
    "+ last layer refit": Refit(final_only=True, scores=True),
    "+ refit": Refit(scores=True),
}


@dataclass(frozen=True)
class Row:
    """One measurement."""

    case: str
    seed: int
    column: str
    accuracy: float
    seconds: float
    note: str = ""


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


def own_moments(case: Case, found: Trained) -> list[dict[str, Moments]]:
    """What every node sends: the moments of its channels on (500 of) the images it was trained on."""
    clients = range(len(found.nodes))
    rows = [found.data.share(index).inputs for index in clients]
    data = [torch.cat(rows)[:500] if case.whole else rows[index][:500] for index in clients]
    return [channel_moments(found.model, node, [own]) for node, own in zip(found.nodes, data, strict=True)]


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


def merged_setting(
    found: Trained, spec: PermutationSpec, moments: list[dict[str, Moments]]
) -> tuple[Merge, Callable[[list[Tensor]], Setting]]:
    """The nodes merged by C2M3, and what makes a setting of recalibration from that for any calibration data."""
    done = merge(found.model, found.nodes, recalibrate="none", spec=spec, weights=found.weights)
    assert done.match is not None
    moves = [done.match.between(done.report.basis, index) for index in range(len(found.nodes))]
    aligned = [permutation.apply(spec, move, node) for move, node in zip(moves, found.nodes, strict=True)]

    def setting(calibration: list[Tensor]) -> Setting:
        plain = prepare(found.model, done.state_dict, aligned, calibration, weights=found.weights)
        return with_own_moments(plain, spec, moves, moments)

    return done, setting


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


def shifted(found: Trained) -> dict[str, Tensor]:
    """Calibration inputs that are not, or not all, what the nodes were trained on."""
    own = torch.cat(found.calibration)
    generator = torch.Generator().manual_seed(0)
    labels = torch.from_numpy(found.data.train.labels[found.data.calibration_rows])
    foreign = "mnist-iid" if own.shape[1] == 3 else "cifar-iid"
    other = torch.cat(trained_calibration(CASES[foreign]))[: len(own)].mean(1, keepdim=True)
    blur = torch.ones(own.shape[1], 1, 5, 5) / 25
    return {
        "own": own,
        "100 inputs": own[:100],
        "three classes": own[labels < 3],
        "blurred": nn.functional.conv2d(own, blur, padding=2, groups=own.shape[1]),
        "noisy": own + torch.randn(own.shape, generator=generator),
        "noise": torch.randn(own.shape, generator=generator),
        "other data": nn.functional.interpolate(other, own.shape[-1]).expand(-1, own.shape[1], -1, -1).contiguous(),
    }


def trained_calibration(case: Case) -> list[Tensor]:
    """Calibration batches of a case."""
    from simulations.data import federated_data

    return federated_data(case.settings).calibration


def shift_rows(case: Case, seed: int, found: Trained, spec: PermutationSpec) -> Iterator[Row]:
    """REPAIR, refit and auto with shifted calibration data."""
    _, settings = merged_setting(found, spec, own_moments(case, found))
    for name, inputs in shifted(found).items():
        setting = settings(list(inputs.split(250)))
        yield Row(case.title, seed, f"{name}: C2M3", accuracy(found.model, setting.merged, found.test), 0.0)
        kept: dict[str, Recalibrated] = {}

        def keeping(column: str, setting: Setting, kept: dict[str, Recalibrated] = kept) -> Recalibrated:
            if column not in kept:
                kept[column] = RECALIBRATIONS[column](setting)
            return kept[column]

        auto = Auto(repair=partial(keeping, "+ REPAIR"), refit=partial(keeping, "+ refit"))
        for column, recalibrate in (("+ REPAIR", auto.repair), ("+ refit", auto.refit), ("+ auto", auto)):
            done = recalibrate(setting)
            decision = done.report.decision
            note = "" if decision is None else f"{decision.chosen}, shift {decision.shift:.2f}: {decision.reason}"
            score = accuracy(found.model, done.state_dict, found.test)
            yield Row(case.title, seed, f"{name}: {column}", score, done.report.seconds, note)


@dataclass
class Once:
    """A method that remembers its alignment, for several recalibrations of the same nodes."""

    method: Method
    found: Alignment | None = None

    def __call__(self, nodes: Nodes) -> Alignment:
        """The alignment of the first call."""
        if self.found is None:
            self.found = self.method(nodes)
        return self.found


def published_rows(case: Case, seed: int, found: Trained, spec: PermutationSpec) -> Iterator[Row]:
    """Every method with REPAIR, for all nodes and for the first few; notes say the share of the nodes' accuracy.

    Some of them, for all nodes, with BatchNorm re-estimated and with refit, too.
    MergeMany is the mean over random orders.
    """
    for count in sorted({*(count for count in _COUNTS if count < len(found.nodes)), len(found.nodes)}):
        part = replace(found, nodes=found.nodes[:count], weights=found.weights[:count])
        mean = statistics.mean(accuracy(found.model, node, found.test) for node in part.nodes)
        yield Row(case.title, seed, f"{count} nodes: mean node", mean, 0.0)
        everything = count == len(found.nodes)
        known = {**METHODS, "c2m3 from activations": CycleConsistent(start="activations")}
        for name in known if everything else _PUBLISHED["REPAIR"][1]:
            orders = [MergeMany(order) for order in range(_ORDERS)] if name == "mergemany" else [known[name]]
            methods = [Once(order) for order in orders]
            for column, (recalibrate, wanted) in _PUBLISHED.items():
                if column == "REPAIR" or (everything and name in wanted):
                    yield _published_row(case, seed, part, spec, mean, f"{name} + {column}", methods, recalibrate)


def _published_row(
    case: Case,
    seed: int,
    found: Trained,
    spec: PermutationSpec,
    mean: float,
    column: str,
    methods: Sequence[Method],
    recalibrate: Recalibration | str,
) -> Row:
    options: Any = {"spec": spec, "weights": found.weights, "calibration": found.calibration}
    runs = [merge(found.model, found.nodes, method=each, recalibrate=recalibrate, **options) for each in methods]
    scores = [accuracy(found.model, each.state_dict, found.test) for each in runs]
    score, seconds = statistics.mean(scores), statistics.mean(each.report.seconds for each in runs)
    note = f"{score / mean:.3f} of the nodes' mean"
    if len(scores) > 1:
        note += f"; {len(scores)} random orders: {', '.join(f'{each:.3f}' for each in scores)}"
    return Row(case.title, seed, f"{len(found.nodes)} nodes: {column}", score, seconds, note)


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
    arguments = parser.parse_args()
    cases = CASES | PUBLISHED
    standard = CASES if arguments.table != "published" else [name for name in PUBLISHED if not name.endswith("-full")]
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"merging-{arguments.table}{'-validation' if arguments.validation else ''}.json"
    rows = [Row(**each) for each in json.loads(file.read_text())] if file.is_file() else []
    for name in arguments.cases or standard:
        for seed in arguments.seeds:
            case = cases[name].seeded(seed)
            found = validated(trained(case)) if arguments.validation else trained(case)
            spec = permutation_spec(found.model, found.calibration[0][:4])
            rows = [row for row in rows if (row.case, row.seed) != (case.title, seed)]
            rows += TABLES[arguments.table](case, seed, found, spec)
            file.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
