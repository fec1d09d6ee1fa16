"""C2M3, Algorithm 1: Frank-Wolfe over all layers and all nodes, towards one shared universe.

Crisostomi, Fumero, Baieri, Bernard, Rodolà: "C2M3: Cycle-Consistent Multi-Model Merging" (NeurIPS 2024), arXiv
2405.17897. The comments name the lines of the paper's Algorithm 1. Three things differ from it:

- sums run over nodes instead of pairs of nodes (`universe`), so a step costs O(nodes);
- the line search is exact: the agreement along a step is a polynomial (`line_search`);
- nodes step in blocks, by default one at a time (block-coordinate Frank-Wolfe, Lacoste-Julien et al., ICML 2013), each
  against a universe that the blocks before it have moved already; one block of all nodes is the paper's joint step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor

from c2m3_fl.core.assignment import oracle
from c2m3_fl.core.line_search import best_step
from c2m3_fl.core.mapped import share_moved
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.result import Callback, Course, Limits, Step
from c2m3_fl.core.universe import Universe


def frank_wolfe(
    universe: Universe,
    pool: Executor,
    limits: Limits,
    *,
    fading: float = 0.0,
    callback: Callback | None = None,
) -> Course:
    """Algorithm 1 from where the universe stands (C2M3 Alg. 1, l. 1: initialise); one step is a pass over all blocks.

    Parameters
    ----------
    universe : Universe
        Where the ascent starts; it moves along.
    pool : Executor
        Where assignment problems are solved.
    limits : Limits
        Upper limit of steps, tolerance of the gap, and how many nodes form a block.
    fading : float
        Stop early when a pass gains less than this share of the whole rise.
    callback : callable, optional
        Called with a `Step` after every step.
    """
    problem, objectives, gap, still = universe.problem, [universe.objective], math.inf, False
    blocks = _blocks(problem, limits.together)
    while (
        len(objectives) <= limits.max_steps and not limits.over and not _fades(objectives, fading)
    ):  # C2M3 Alg. 1, l. 2: repeat
        gap, step_sizes, moved = 0.0, [], 0.0
        for block in blocks:
            gradient = universe.gradient(block)  # C2M3 Alg. 1, l. 3: the gradient, for every node and group
            vertex = oracle(problem.spec, gradient, pool)  # C2M3 Alg. 1, l. 4: one assignment problem for each
            course = universe.course(block, gradient, vertex)
            slope = max(course[1], 0.0) / problem.unit  # <gradient, vertex - point>: the block's duality gap
            gap += slope
            if callback is not None:
                moved += share_moved(vertex, universe.nearest(block)) / len(blocks)
            if slope * len(blocks) > limits.tolerance:
                step_sizes.append(best_step(course)[0])  # C2M3 Alg. 1, l. 5: the line search
                universe.advance(block, vertex, step_sizes[-1])  # C2M3 Alg. 1, l. 6: step towards the vertex
        still = not step_sizes
        if still:  # C2M3 Alg. 1, l. 7: until converged
            break
        objectives.append(universe.add_up())
        if callback is not None:
            callback(
                Step(
                    len(objectives) - 1,
                    objectives[-1],
                    gap,
                    problem.gain(objectives),
                    sum(step_sizes) / len(step_sizes),
                    moved,
                    problem.count,
                    universe.work,
                )
            )
    return Course(tuple(objectives), gap, still)


def _blocks(problem: Problem, together: int | None) -> list[range]:
    """The nodes that are not frozen, `together` at a time; None for all of them."""
    size = together or problem.count
    first = range(problem.frozen, problem.count, size)
    return [range(start, min(start + size, problem.count)) for start in first]


def _fades(objectives: Sequence[float], fading: float) -> bool:
    return len(objectives) > 2 and objectives[-1] - objectives[-2] <= fading * (objectives[-1] - objectives[0])
