"""Whether nodes whose groups rotate may stay as they are.

Training turns what may be turned a little, so the agreement of nodes that have left one network can nearly always be
raised by rotations of a few degrees. A permutation has no small move: the smallest exchanges two units. So a rotation
of a group that gains less than one of its units agrees, on average, counts as none; a permutation never does.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor

from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.assignment import oracle
from c2m3_fl.core.places import worth
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.starts import at_perms
from c2m3_fl.core.universe import Universe


def still_gap(problem: Problem, pool: Executor, tolerance: float) -> float | None:
    """The relative duality gap of nodes that may stay as they are; None where they may not.

    Parameters
    ----------
    problem : Problem
        What is to be matched; some of its groups rotate.
    pool : Executor
        Where assignment problems are solved.
    tolerance : float
        What permutations of all nodes may gain, relative to the agreement.
    """
    spec, total, permuted = problem.spec, 0.0, 0.0
    families = [(root, *spec.children(root)) for root in spec.roots]
    universe = Universe(problem, at_perms(problem, [permutation.identity(spec)] * problem.count))
    for node in range(problem.frozen, problem.count):
        gradient = {name: each[0] for name, each in universe.gradient(range(node, node + 1)).items()}
        best = {k: v[0] for k, v in oracle(spec, {k: v[None] for k, v in gradient.items()}, pool).items()}
        share = float(problem.weights[node])
        for root, *children in families:
            gains = {
                name: share * (_worth(gradient, best, name) - _worth(gradient, None, name))
                for name in (root, *children)
            }
            total += sum(gains.values())
            if not spec.groups[root].orthogonal and not permutation.stays(best[root]):
                permuted += max(sum(gains.values()), 0.0)  # with it, all that is nested in it
                continue
            for name, gain in gains.items():
                group = spec.groups[name]
                if not group.orthogonal:
                    permuted += max(gain, 0.0)
                elif gain > share * _worth(gradient, best, name) / group.size:
                    return None
    return max(total, 0.0) / problem.unit if permuted <= tolerance * problem.unit else None


def _worth(gradient: Mapping[str, Tensor], at: Mapping[str, Tensor] | None, name: str) -> float:
    """The inner product of a group's gradient with a permutation or rotation; None is the identity."""
    return float(worth(gradient[name], None if at is None else at[name]))
