"""The solver against the published algorithm and an older checkout, measured side by side in one run.

    python -m tests.benchmarks.solver ../older            every case, record and tables in c2m3_fl/core/README.md
    python -m tests.benchmarks.solver                     the same without it, as tables only
    python -m tests.benchmarks.solver --draw              the tables of the record

Times are CPU seconds of one thread, so that a busy machine does not blur them. The published algorithm is run for
`--steps` steps; where its whole match would take too long it is the measured seconds per step times the number of
steps that the same iteration, computed in O(nodes), needs to stall by the same rule. Whole matches are those of
`before_after`: on the same nodes, in processes that take turns.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from c2m3_fl.core.assignment import assignment_pool, oracle
from c2m3_fl.core.frank_wolfe import frank_wolfe
from c2m3_fl.core.line_search import best_step
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.result import Limits
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.core.starts import start_point
from c2m3_fl.core.universe import Universe
from simulations.grid_tables import page
from tests.benchmarks.before_after import run
from tests.benchmarks.networks import mlp, related_nodes, resnet20, vgg16
from tests.benchmarks.published import frank_wolfe_step, objective, published_match
from tests.benchmarks.published import gradient as published_gradient
from tests.benchmarks.records import read_record, revision, write_record

_WHOLE = 60.0  # CPU seconds up to which the published algorithm is run to its end

_FOLDER = Path("c2m3_fl/core")
RECORD, PAGE = _FOLDER / "results" / "solver.json", _FOLDER / "README.md"


@dataclass(frozen=True)
class Case:
    """A network, as `before_after` writes it too, and how many nodes."""

    title: str
    spec: Callable[[], PermutationSpec]
    expression: str
    nodes: int


CASES = {
    "mlp256-3": Case("MLP 784-256-256-10", lambda: mlp(784, 256, 256, 10), "mlp(784, 256, 256, 10)", 3),
    "mlp256-10": Case("MLP 784-256-256-10", lambda: mlp(784, 256, 256, 10), "mlp(784, 256, 256, 10)", 10),
    "mlp512-3": Case("MLP 784-512³-10", lambda: mlp(784, 512, 512, 512, 10), "mlp(784, 512, 512, 512, 10)", 3),
    "mlp512-10": Case("MLP 784-512³-10", lambda: mlp(784, 512, 512, 512, 10), "mlp(784, 512, 512, 512, 10)", 10),
    "resnet20-3": Case("ResNet20 width 2", lambda: resnet20(2), "resnet20(2)", 3),
    "resnet20-10": Case("ResNet20 width 2", lambda: resnet20(2), "resnet20(2)", 10),
    "vgg16-3": Case("VGG16", vgg16, "vgg16()", 3),
}


@dataclass(frozen=True)
class Row:
    """One line of the table; seconds are CPU seconds of one thread."""

    case: str
    published_step: float
    step_min: float
    step_median: float
    step_max: float
    limit_share: float
    published_match: float
    published_measured: bool
    before: tuple[float, ...]  # whole matches of the older checkout, turn by turn
    now: tuple[float, ...]
    published_objective: float
    objective_before: float
    objective: float
    objective_difference: float
    gradient_difference: float


def cpu(action: Callable[[], object]) -> float:
    """CPU seconds that an action takes."""
    start = time.process_time()
    action()
    return time.process_time() - start


def one_pass(universe: Universe) -> tuple[float, float]:
    """CPU seconds of one pass over all nodes, and of its products and assignments alone."""
    whole, limit = 0.0, 0.0
    with assignment_pool() as pool:
        for node in range(universe.problem.count):
            block = range(node, node + 1)
            start = time.process_time()
            gradient = universe.gradient(block)
            vertex = oracle(universe.problem.spec, gradient, pool)
            limit += time.process_time() - start
            step_size, _ = best_step(universe.course(block, gradient, vertex))
            universe.advance(block, vertex, step_size)
            whole += time.process_time() - start
    return whole, limit


def stalled(objectives: tuple[float, ...], tolerance: float = 1e-4, patience: int = 5) -> int:
    """Steps after which a course of objectives stalls by the published rule."""
    calm = 0
    for step, (old, new) in enumerate(pairwise(objectives), start=1):
        calm = calm + 1 if abs(new - old) <= tolerance * abs(old) else 0
        if calm == patience:
            return step
    return len(objectives) - 1


def whole_matches(case: str, trees: Mapping[str, Path], turns: int) -> dict[str, list[dict[str, float]]]:
    """Matches of one case by the code of each checkout, turn by turn."""
    found: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
    for _ in range(turns):
        for code, tree in trees.items():
            found[code] += run(tree, {case: (CASES[case].expression, CASES[case].nodes, 1)})
    return found


def measure(case: str, steps: int, trees: Mapping[str, Path], turns: int) -> Row:
    """Measure one case."""
    spec, count = CASES[case].spec(), CASES[case].nodes
    nodes = related_nodes(spec, count)
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    problem = Problem.of(spec, nodes, weights)
    universe = Universe(problem, start_point(problem, "identity", None))
    eye: list[dict[str, Tensor]] = [{name: torch.eye(group.size) for name, group in spec.groups.items()} for _ in nodes]
    here, ours = objective(spec, nodes, eye), universe.objective
    published_steps, matrices = [], eye
    for _ in range(steps):
        start = time.process_time()
        matrices, _ = frank_wolfe_step(spec, nodes, matrices)
        published_steps.append(time.process_time() - start)
    gradients = universe.gradient(range(count))
    slopes = published_gradient(spec, nodes, eye) if count <= 3 else []
    differences = [
        float((gradients[name][i] / count - slope).norm() / slope.norm().clamp(min=1e-30))
        for i, own in enumerate(slopes)
        for name, slope in own.items()
    ]
    timed = [one_pass(universe) for _ in range(5)]
    needed = stalled(_course(problem, 100)[0])
    per_step = statistics.median(published_steps)
    measured = per_step * needed <= _WHOLE
    if measured:
        start = time.process_time()
        yardstick = published_match(spec, nodes)
        published_seconds, published_value = time.process_time() - start, yardstick.objectives[-1]
    else:
        published_seconds, published_value = per_step * needed, _course(problem, needed)[1]
    matches = whole_matches(case, trees, turns)
    seconds = {code: tuple(each["cpu"] for each in rows) for code, rows in matches.items()}
    reached = {code: min((each["agreement"] for each in rows), default=math.nan) for code, rows in matches.items()}
    own = [second for second, _ in timed]
    size = float(sum(value.double().square().sum() for node in nodes for value in node.values())) / count**2
    return Row(
        case=case,
        published_step=per_step,
        step_min=min(own),
        step_median=statistics.median(own),
        step_max=max(own),
        limit_share=statistics.median(limit / whole for whole, limit in timed),
        published_match=published_seconds,
        published_measured=measured,
        before=seconds["before"],
        now=seconds["now"],
        published_objective=published_value,
        objective_before=reached["before"],
        objective=reached["now"],
        objective_difference=abs(here - ours) / size,
        gradient_difference=max(differences, default=float("nan")),
    )


def _course(problem: Problem, steps: int) -> tuple[tuple[float, ...], float]:
    """The published iteration in O(nodes) and with exact steps: its course, and its last point rounded."""
    with assignment_pool() as pool:
        universe = Universe(problem, start_point(problem, "identity", None))
        course = frank_wolfe(universe, pool, Limits(steps, 1e-6, polish=False, together=None))
        for node in range(problem.count):
            matrices = {name: universe.matrix(node, name)[None] for name in problem.spec.groups}
            universe.settle(node, {name: index[0] for name, index in oracle(problem.spec, matrices, pool).items()})
        return course.objectives, universe.add_up()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: whole matches, and below them one step or pass."""
    heads = ["case", "published", "before, min / median / max", "now", "published / now", "now / before"]
    whole = [f"| {' | '.join([*heads, 'f / published', 'f / before'])} |", "| --- |" + " ---: |" * (len(heads) + 1)]
    passes = [
        "| case | published step | our pass, min / median / max | published / ours | limit |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        case, now = CASES[row["case"]], statistics.median(row["now"])
        title = f"{case.title}, {case.nodes} nodes"
        starred = "" if row["published_measured"] else "*"
        older = f"{min(row['now']) / min(row['before']):.2f}" if row["before"] else ""
        cells = [
            title,
            f"{row['published_match']:.{0 if row['published_match'] >= 100 else 1}f}{starred}",
            _spread(row["before"]),
            _spread(row["now"]),
            f"**{row['published_match'] / now:.0f}×**",
            older,
            f"{row['objective'] / row['published_objective']:.4f}",
            f"{row['objective'] / row['objective_before']:.5f}" if row["before"] else "",
        ]
        whole.append(f"| {' | '.join(cells)} |")
        steps = row["step_min"], row["step_median"], row["step_max"]
        cells = [
            title,
            f"{row['published_step']:.2f}",
            " / ".join(f"{step:.3f}" for step in steps),
            f"{row['published_step'] / row['step_median']:.0f}×",
            f"{100 * row['limit_share']:.0f} %",
        ]
        passes.append(f"| {' | '.join(cells)} |")
    return "\n".join([*whole, "", *passes]) + "\n"


def _spread(seconds: Sequence[float]) -> str:
    return " / ".join(f"{of(seconds):.2f}" for of in (min, statistics.median, max)) if seconds else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="an older checkout")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--steps", type=int, default=1, help="steps of the published algorithm to time")
    parser.add_argument("--turns", type=int, default=3, help="whole matches of each checkout")
    options = parser.parse_args()
    if not options.draw:
        torch.set_num_threads(1)
        trees = {"before": options.before, "now": Path()} if options.before is not None else {"now": Path()}
        rows = []
        for case in options.cases:
            rows.append(asdict(measure(case, options.steps, trees, options.turns)))
            print(table(rows), flush=True)
        if options.before is None or options.cases != list(CASES):
            return
        configuration = {"steps": options.steps, "turns": options.turns, "before": revision(options.before)}
        write_record(RECORD, "python -m tests.benchmarks.solver OLDER", configuration, rows)
    text = table(read_record(RECORD)["rows"])
    print(text)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), "solver", text), encoding="utf-8")


if __name__ == "__main__":
    main()
