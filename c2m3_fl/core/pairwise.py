"""The baselines: Git Re-Basin's weight matching of two networks, and MergeMany for more.

Ainsworth, Hayase, Srinivasa: "Git Re-Basin: Merging Models modulo Permutation Symmetries" (ICLR 2023), Algorithms 1
and 3. Weight matching is block-coordinate ascent on the agreement of two nodes, one of which stays; MergeMany matches
each network in turn to the mean of the others until nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from c2m3_fl.core import permutation
from c2m3_fl.core.assignment import assignment_pool
from c2m3_fl.core.block_ascent import BlockAscent
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.problem import Problem, check_nodes
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.core.starts import start_point
from c2m3_fl.core.universe import Universe

_SWEEPS = 100  # of weight matching; it ends by itself after a handful
_ROUNDS = 20  # of MergeMany, which may cycle


def weight_matching(spec: PermutationSpec, reference: Params, params: Params) -> dict[str, torch.Tensor]:
    """Git Re-Basin's map of one network into the basis of another, starting at the identity.

    Raises
    ------
    ParamsError
        When a network does not fit the spec or is not finite.
    """
    check_nodes(spec, [reference, params])
    with torch.no_grad(), assignment_pool() as pool:
        problem = Problem.of(spec, [reference, params], torch.full((2,), 0.5, dtype=torch.float64), frozen=1)
        ascent = BlockAscent(Universe(problem, start_point(problem, "identity", None)), pool)
        for _ in range(_SWEEPS):
            if not ascent.sweep():
                break
    return {name: rows[1].cpu() for name, rows in problem.frames.items()}


def pairwise_matching(spec: PermutationSpec, nodes: Sequence[Params], reference: int = 0) -> tuple[Permutation, ...]:
    """Every node matched to one reference; the other nodes play no part in its permutation."""
    here = permutation.identity(spec)
    return tuple(
        here if index == reference else weight_matching(spec, nodes[reference], node)
        for index, node in enumerate(nodes)
    )


def merge_many(
    spec: PermutationSpec, nodes: Sequence[Params], *, generator: torch.Generator | None = None
) -> tuple[Permutation, ...]:
    """MergeMany: in random order every node is matched to the mean of the others, until a round changes nothing.

    Returns
    -------
    tuple of Permutation
        Each node's map into the common basis.

    Raises
    ------
    ParamsError
        For no nodes, or nodes that do not fit the spec or are not finite.
    """
    check_nodes(spec, nodes)
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    perms: list[Permutation] = [permutation.identity(spec)] * len(nodes)
    moved = [dict(node) for node in nodes]
    for _ in range(_ROUNDS if len(nodes) > 1 else 0):
        changed = False
        for i in torch.randperm(len(nodes), generator=generator).tolist():
            others = [node for j, node in enumerate(moved) if j != i]
            mean = {
                name: torch.stack([node[name] for node in others]).double().mean(0).to(value.dtype)
                if torch.is_floating_point(value)
                else value
                for name, value in nodes[i].items()
            }
            step = weight_matching(spec, mean, moved[i])
            if not permutation.is_identity(step):
                perms[i], changed = permutation.compose(step, perms[i]), True
                moved[i] = permutation.apply(spec, step, moved[i])
        if not changed:
            break
    return tuple(perms)
