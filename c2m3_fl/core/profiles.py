"""Profiles: descriptions of units that do not depend on the order of the units that they are connected to.

A unit's profile consists of all its parameters: its connections to other units sorted by value, everything else (kernel
positions, inputs, biases) in order. It does not depend on any permutation, so units of different nodes can be compared
before anything is matched: "degree profiles" (Ding, Ma, Wu, Xu: "Efficient random graph matching via degree profiles",
2021). The inner product of two profiles is the largest agreement of the units over all orders of their neighbours, the
bound of Gilmore and Lawler for quadratic assignment. One linear assignment per node and family of groups, with these
inner products as gains, maximises their sum. For a network and a permuted copy of it, the sum is largest at the
permutation of the copy, and only there unless two units have equal profiles: permuted copies are recovered.

Of connections to a space that rotates a profile has the norm. The rotations themselves are left where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from c2m3_fl.core.assignment import oracle
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.core.terms import Term

_LENGTH = 1 << 12  # numbers of a term in one unit's profile: more separate units no better and take long to sort


def profile_vertex(problem: Problem, pool: Executor) -> dict[str, Tensor]:
    """Match every node to the first one by the profiles of their units.

    Returns
    -------
    dict of str to Tensor, shape (nodes, size)
        Index forms; the identity for the first node.
    """
    spec, found = problem.spec, {}
    for root in spec.roots:  # one family's gains at a time
        groups = {name: spec.groups[name] for name in (root, *spec.children(root))}
        gains = {
            name: problem.like.new_zeros(problem.count - 1, group.size, group.size) for name, group in groups.items()
        }
        for number in problem.touched(groups):
            _add_products(problem.terms[number], {k: v for k, v in gains.items() if k not in spec.rotations}, spec)
        for name, index in oracle(PermutationSpec(groups, {}), gains, pool).items():
            found[name] = torch.cat([problem.frames[name][:1], index])
    return found


def _add_products(term: Term, gains: Mapping[str, Tensor], spec: PermutationSpec) -> None:
    """Add the inner products of the first node's profiles with the others'."""
    lengths = [term.dim(axis) for axis, group in enumerate(term.groups) if group in spec.rotations]
    if lengths:
        term = replace(term, value=torch.linalg.vector_norm(term.value, dim=lengths, keepdim=True))
    for axis, group in enumerate(term.groups):
        if group in gains:
            known = profiles(term, axis, 0)
            centre = known.mean(0)  # subtracted: a common offset changes no assignment, but costs precision
            known = known - centre
            for node, gain in enumerate(gains[group], start=1):
                gain.addmm_(known, (profiles(term, axis, node) - centre).T)


def profiles(term: Term, axis: int, node: int) -> Tensor:
    """Profiles of the units on one grouped axis of a term, shape (size, length), scaled to the term's own weight."""
    units = term.value[node].movedim(term.dim(axis) - 1, 0)
    slots = units if axis == 0 else units.movedim(2, 1)  # (size, R, other grouped axes ...)
    slots = slots.reshape(*slots.shape[:2], -1)
    count, neighbours = slots.shape[1:]
    kept = min(count, max(1, _LENGTH // neighbours))
    if neighbours > 1 and kept < count:
        chosen = torch.linspace(0, count - 1, kept, dtype=torch.float64, device=slots.device).round().long()
        slots = slots[:, chosen] * (count / kept) ** 0.5
    return (slots if neighbours == 1 else _sorted(slots)).flatten(1)


def _sorted(values: Tensor) -> Tensor:
    """Values in ascending order along the last dimension; numpy sorts many times faster than torch on a CPU."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(dim=-1).values
