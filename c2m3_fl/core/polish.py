"""Block-coordinate ascent: one node and one family of groups at a time against the universe of the others.

The agreement is linear in one node's permutation of one group (as long as no tensor carries the group twice), so the
oracle's answer is the best this block can do: from a soft point a sweep ends at permutations and loses nothing, from
permutations it climbs until no block can improve. Where a tensor carries a family twice the answer is a proposal,
and only true improvements are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor

import torch
from torch import Tensor

from c2m3_fl.core.assignment import oracle
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.core.universe import Images, contract, gather, inner, weighted_sum

_ROUNDING = 4  # gains below this many units of rounding are no improvement


class BlockAscent:
    """The state of the ascent: the images of every term, changed in place, and the permutations found so far.

    Parameters
    ----------
    spec : PermutationSpec
        The groups and how they nest.
    images : sequence of Images
        Where the ascent starts; not mutated.
    weights : Tensor of float64, shape (nodes,)
        Averaging weights.
    pool : Executor
        Where assignment problems are solved.
    """

    def __init__(self, spec: PermutationSpec, images: Sequence[Images], weights: Tensor, pool: Executor) -> None:
        self._spec, self._weights, self._pool = spec, weights, pool
        self._families = {root: (root, *spec.children(root)) for root in spec.roots}
        self._terms = [image.term for image in images]
        self._maps = [[image.maps[0], *(tensor.clone() for tensor in image.maps[1:])] for image in images]
        self._means = [weighted_sum(maps[-1], weights) for maps in self._maps]
        self._changes = 0
        self._changed = [0] * len(images)
        self._seen: dict[tuple[int, str], int] = {}

    @property
    def images(self) -> list[Images]:
        """The images at the current point."""
        return [Images(term, tuple(maps)) for term, maps in zip(self._terms, self._maps, strict=True)]

    def sweep(self, vertex: dict[str, Tensor], soft: Mapping[str, Tensor] | None = None) -> bool:
        """Move every block once; whether any of them moved.

        Parameters
        ----------
        vertex : dict of str to Tensor, shape (nodes, size)
            The permutations at the current point; updated in place.
        soft : mapping of str to Tensor, shape (nodes, size, size), optional
            The doubly stochastic matrices of a soft point. Then every block moves to permutations, to the nearest
            ones where the proposal would lose.
        """
        moved = False
        for node in range(len(self._weights)):
            for root, family in self._families.items():
                touched = [t for t, term in enumerate(self._terms) if set(term.groups) & set(family)]
                newest = max((self._changed[t] for t in touched), default=0)
                if soft is None and self._seen.get((node, root), -1) >= newest:
                    continue  # nothing that this block sees has changed since it was last best
                moved |= self._move(node, family, touched, vertex, soft)
                self._seen[node, root] = self._changes
        return moved

    def _move(
        self,
        node: int,
        family: tuple[str, ...],
        touched: list[int],
        vertex: dict[str, Tensor],
        soft: Mapping[str, Tensor] | None,
    ) -> bool:
        others = {t: self._means[t] - float(self._weights[node]) * self._maps[t][-1][node] for t in touched}
        proposal = self._oracle(family, self._gain(node, family, others))
        mapped = {t: self._mapped(t, node, proposal) for t in touched}
        gain = sum(inner(others[t], mapped[t][max(mapped[t])] - self._maps[t][-1][node]) for t in touched)
        if soft is not None and gain < 0:
            proposal = self._oracle(family, {name: soft[name][node] for name in family})
            mapped = {t: self._mapped(t, node, proposal) for t in touched}
        elif soft is None and gain <= self._noise(node, others):
            return False
        self._changes += 1
        for t in touched:
            moved = mapped[t][len(self._maps[t]) - 1]
            self._means[t].add_(moved - self._maps[t][-1][node], alpha=float(self._weights[node]))
            self._changed[t] = self._changes
            for mask, tensor in mapped[t].items():
                self._maps[t][mask][node] = tensor
        for name in family:
            vertex[name][node] = proposal[name]
        return True

    def _oracle(self, family: tuple[str, ...], gains: Mapping[str, Tensor]) -> dict[str, Tensor]:
        groups = {name: self._spec.groups[name] for name in family}
        found = oracle(PermutationSpec(groups, {}), {name: gains[name][None] for name in family}, self._pool)
        return {name: index[0] for name, index in found.items()}

    def _gain(self, node: int, family: tuple[str, ...], others: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """The gradient of one block, its node's weight factored out."""
        sizes = {name: self._spec.groups[name].size for name in family}
        like = self._maps[0][0] if self._maps else torch.zeros(())
        gain = {name: torch.zeros(size, size, dtype=like.dtype, device=like.device) for name, size in sizes.items()}
        for t, other in others.items():
            term, maps = self._terms[t], self._maps[t]
            for axis, group in enumerate(term.groups):
                if group in gain:
                    rest = maps[(len(maps) - 1) & ~(1 << axis)][node]
                    gain[group] += contract(other[None], rest[None], term.dim(axis))[0]
        return gain

    def _mapped(self, t: int, node: int, proposal: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """The node's images of a term that change when its family moves to `proposal`, by mask."""
        term, maps = self._terms[t], self._maps[t]
        result: dict[int, Tensor] = {}
        for mask in range(1, len(maps)):
            for axis, group in enumerate(term.groups):
                if mask >> axis & 1 and group in proposal:
                    base = mask & ~(1 << axis)
                    source = result.get(base, maps[base][node])
                    result[mask] = gather(source[None], term.dim(axis), proposal[group][None])[0]
                    break
        return result

    def _noise(self, node: int, others: Mapping[int, Tensor]) -> float:
        """The gain that rounding alone could feign."""
        size = sum(
            (inner(other, other) * inner(self._maps[t][-1][node], self._maps[t][-1][node])) ** 0.5
            for t, other in others.items()
        )
        return _ROUNDING * torch.finfo(self._maps[0][0].dtype).eps * size if others else 0.0
