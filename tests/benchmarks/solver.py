"""The solver against the published algorithm, measured side by side in one run.

    python -m tests.benchmarks.solver                   every case, table and c2m3_fl/core/results/solver.json
    python -m tests.benchmarks.solver --cases mlp-3     some of them

Times are CPU seconds of one thread, so that a busy machine does not blur them. The published algorithm is run for
`--steps` steps; where its whole match would take too long it is the measured seconds per step times the number of
steps that the same iteration, computed in O(nodes), needs to stall by the same rule.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from c2m3_fl.core.assignment import assignment_pool, oracle
from c2m3_fl.core.frank_wolfe import frank_wolfe
from c2m3_fl.core.line_search import best_step
from c2m3_fl.core.match import match
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.result import Limits
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.core.starts import start_point
from c2m3_fl.core.universe import Universe
from tests.benchmarks.networks import mlp, related_nodes, resnet20, vgg16
from tests.benchmarks.published import frank_wolfe_step, objective, published_match
from tests.benchmarks.published import gradient as published_gradient
from tests.benchmarks.records import write_record

_WHOLE = 60.0  # CPU seconds up to which the published algorithm is run to its end

CASES: dict[str, tuple[Callable[[], PermutationSpec], int]] = {
    "mlp256-3": (lambda: mlp(784, 256, 256, 10), 3),
    "mlp256-10": (lambda: mlp(784, 256, 256, 10), 10),
    "mlp512-3": (lambda: mlp(784, 512, 512, 512, 10), 3),
    "mlp512-10": (lambda: mlp(784, 512, 512, 512, 10), 10),
    "resnet20-3": (lambda: resnet20(2), 3),
    "resnet20-10": (lambda: resnet20(2), 10),
    "vgg16-3": (vgg16, 3),
}


@dataclass(frozen=True)
class Row:
    """One line of the table; seconds are CPU seconds of one thread."""

    case: str
    step_ratio: float
    match_ratio: float
    published_step: float
    step_min: float
    step_median: float
    step_max: float
    limit_share: float
    published_match: float
    published_measured: bool
    match: float
    published_objective: float
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


def measure(case: str, steps: int) -> Row:
    """Measure one case."""
    build, count = CASES[case]
    spec = build()
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
    found = []
    seconds = cpu(lambda: found.append(match(spec, nodes)))
    own = [second for second, _ in timed]
    size = float(sum(value.double().square().sum() for node in nodes for value in node.values())) / count**2
    return Row(
        case=case,
        step_ratio=per_step / statistics.median(own),
        match_ratio=published_seconds / seconds,
        published_step=per_step,
        step_min=min(own),
        step_median=statistics.median(own),
        step_max=max(own),
        limit_share=statistics.median(limit / whole for whole, limit in timed),
        published_match=published_seconds,
        published_measured=measured,
        match=seconds,
        published_objective=published_value,
        objective=found[0].objectives[-1],
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


def table(rows: list[Row]) -> str:
    """The table, ratio first."""
    head = "case          step x  match x | published step    ours min / med / max   limit | "
    head += "published match    ours | f/f_pub"
    lines = [head, "-" * len(head)]
    lines += [
        f"{row.case:12s} {row.step_ratio:7.0f} {row.match_ratio:8.0f} | {row.published_step:14.2f} "
        f"{row.step_min:8.3f} {row.step_median:6.3f} {row.step_max:6.3f} {row.limit_share:7.0%} | "
        f"{row.published_match:14.1f}{' ' if row.published_measured else '*'} {row.match:7.2f} | "
        f"{row.objective / row.published_objective:.4f}"
        for row in rows
    ]
    lines.append(
        "CPU seconds of one thread; limit: share of a step that is products and assignments; * steps x seconds"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--steps", type=int, default=1, help="steps of the published algorithm to time")
    parser.add_argument("--out", type=Path, default=Path("c2m3_fl/core/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in options.cases:
        rows.append(measure(case, options.steps))
        print(table(rows).splitlines()[-2], flush=True)
    print(table(rows))
    configuration = {"cases": options.cases, "steps": options.steps}
    command = "python -m tests.benchmarks.solver"
    write_record(options.out / "solver.json", command, configuration, [asdict(row) for row in rows])


if __name__ == "__main__":
    main()
