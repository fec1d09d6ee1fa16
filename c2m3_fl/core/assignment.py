"""The oracle of the search: the permutations that maximise a linear functional, for all nodes and groups.

One linear assignment problem per node and group. A nested group is solved with its parent: pairing block h with
block h' is worth the parent's own entry plus the best inner assignment of every child's sub-block, and one more
assignment pairs the blocks. scipy's solver releases the interpreter lock, so a thread pool scales it.

Where a group is orthogonal, the polar factor takes the place of the assignment, and the nuclear norm that of its worth
(`rotation`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from c2m3_fl.core.potentials import Matrix, identity_is_optimal, potentials
from c2m3_fl.core.reduced import LEAST, reduced_costs
from c2m3_fl.core.rotation import polar, spread
from c2m3_fl.core.spec import Group, PermutationSpec
from c2m3_fl.errors import ParamsError

Index = npt.NDArray[np.int64]

_LARGE = 96  # size from which potentials cost less than they save
_BUNDLES = 32  # a thread takes many problems at a time: small ones cost less than handing them over
_SMALL = 1 << 23  # units cubed, of all problems, below which handing them to threads costs more than they do


def assignment_pool() -> ThreadPoolExecutor:
    """A pool with one thread for every processor that this process may use."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows lack this function
        count = os.cpu_count() or 1
    return ThreadPoolExecutor(max_workers=count, thread_name_prefix="assignment")


def assign(gain: Matrix) -> Index:
    """The permutation p that maximises ``sum_a gain[a, p[a]]``; the identity where it is provably among the best.

    Adding potentials to rows and columns adds a constant to the worth of every permutation, so it changes no answer.
    """
    if not np.isfinite(gain).all():
        raise ParamsError("the agreement overflows: the nodes' values are too large for their dtype, scale them down")
    if identity_is_optimal(gain):
        return np.arange(len(gain))
    if len(gain) < _LARGE:
        return np.asarray(linear_sum_assignment(-gain)[1], dtype=np.int64)
    u, v = potentials(gain)
    cost = u.astype(np.float64)[:, None] - gain
    cost += v
    return np.asarray(linear_sum_assignment(cost)[1], dtype=np.int64)


def assign_nested(
    gain: Matrix, children: Mapping[str, Matrix], groups: Mapping[str, Group] | None = None
) -> tuple[Index, dict[str, Matrix]]:
    """The best permutation of a parent's units together with those of the groups nested in it.

    Parameters
    ----------
    gain : ndarray, shape (blocks, blocks)
        The parent's own functional.
    children : mapping of str to ndarray, shape (blocks * b, blocks * b)
        The functionals of the nested groups.
    groups : mapping of str to Group, optional
        The nested groups, some of which are orthogonal; by default all are permuted.
    """
    blocks = len(gain)
    total = np.array(gain, dtype=np.float64)
    inner: dict[str, Index] = {}
    turned: dict[str, Matrix] = {}
    for name, child in children.items():
        split = child.reshape(blocks, len(child) // blocks, blocks, -1).transpose(0, 2, 1, 3)
        if groups is not None and groups[name].orthogonal:
            turned[name] = polar(split, groups[name].kind == "centred")
            total += (split * turned[name]).sum(axis=(2, 3))
            continue
        best = np.array([[assign(part) for part in row] for row in split])
        rows = np.arange(split.shape[2])
        total += np.take_along_axis(split[:, :, rows], best[..., None], axis=3).sum(axis=(2, 3), dtype=np.float64)
        inner[name] = best
    outer = assign(total)
    return outer, {
        name: (outer[:, None] * best.shape[2] + best[np.arange(blocks), outer]).reshape(-1)
        for name, best in inner.items()
    } | {name: spread(outer, blocks) for name, blocks in turned.items()}


def oracle(spec: PermutationSpec, gains: Mapping[str, Tensor], pool: Executor) -> dict[str, Tensor]:
    """The vertex that maximises the linear functional `gains`, node by node and family by family.

    A vertex consists of permutations and of orthogonal matrices.

    Parameters
    ----------
    spec : PermutationSpec
        The groups and how they nest.
    gains : mapping of str to Tensor, shape (nodes, size, size)
        One functional per node and group.
    pool : Executor
        Where the assignment problems are solved; its size does not change the result.

    Returns
    -------
    mapping of str to Tensor of int64, shape (nodes, size), or of float64, shape (nodes, size, size)
        Index forms, and matrices of the groups that are orthogonal, on the device of `gains`.
    """
    count = len(next(iter(gains.values()))) if gains else 0
    children: dict[str, list[str]] = {name: [] for name in spec.roots}
    for name, group in spec.groups.items():
        if group.parent is not None:
            children[group.parent].append(name)
    large = [
        name
        for name, inside in children.items()
        if gains[name].device.type != "cpu"
        and not (inside or spec.groups[name].orthogonal or spec.groups[name].size < LEAST)
    ]
    costs = reduced_costs(gains, large)
    host = {name: gain.cpu().numpy() for name, gain in gains.items() if name not in large}
    largest_first = sorted(children, key=lambda name: -spec.groups[name].size)
    jobs = [(root, node) for root in largest_first for node in range(count)]

    def solve(some: list[tuple[str, int]]) -> list[tuple[str, int, Matrix]]:
        answers: list[tuple[str, int, Matrix]] = []
        for root, node in some:
            if (root, node) in costs:
                cost = costs[root, node]
                size = spec.groups[root].size
                answers.append((root, node, np.arange(size) if cost is None else linear_sum_assignment(cost)[1]))
                continue
            gain, inner = host[root][node], {name: host[name][node] for name in children[root]}
            if spec.groups[root].orthogonal:
                answers.append((root, node, polar(gain, spec.groups[root].kind == "centred")))
                continue
            outer, nested = assign_nested(gain, inner, spec.groups) if inner else (assign(gain), {})
            answers += [(name, node, index) for name, index in {root: outer, **nested}.items()]
        return answers

    found: dict[str, Matrix] = {
        name: np.empty((count, group.size, group.size))
        if group.orthogonal
        else np.empty((count, group.size), dtype=np.int64)
        for name, group in spec.groups.items()
    }
    small = count * sum(group.size**3 for group in spec.groups.values()) < _SMALL
    bundles = (
        [jobs] if small or len(jobs) == 1 else [jobs[first::_BUNDLES] for first in range(min(_BUNDLES, len(jobs)))]
    )
    for answers in map(solve, bundles) if len(bundles) == 1 else pool.map(solve, bundles):
        for name, node, index in answers:
            found[name][node] = index
    return {name: torch.from_numpy(index).to(gains[name].device) for name, index in found.items()}
