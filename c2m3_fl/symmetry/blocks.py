"""From cells of units that play the same role to groups that a spec can express: a forest of blocks, one level deep.

Cells whose units correspond one to one move together and form one *bundle*. A bundle whose units lie in the blocks of
another is nested in it. A spec expresses neither crossing blocks nor blocks nested more than one level deep. In both
cases the structure with the least freedom is *frozen*: its units keep their rank inside their block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lgamma

import numpy as np

from c2m3_fl.symmetry.colour_refinement import Facts, components, mix, occurrence, refine
from c2m3_fl.symmetry.facts import Atoms

Maps = dict[int, dict[int, Atoms]]
Factor = tuple[int, Atoms]


@dataclass(frozen=True, eq=False)
class Forest:
    """Interchangeable units and their blocks.

    Attributes
    ----------
    sizes : ndarray, shape (bundles,)
        Number of units of every bundle.
    bundle : ndarray, shape (classes,)
        The bundle that a class belongs to, or -1 if the class cannot move.
    unit : ndarray, shape (classes,)
        The unit of the bundle that a class is part of.
    cell : ndarray, shape (classes,)
        Classes of one cell are corresponding parts of their units.
    parent : mapping of int to (int, ndarray)
        For each nested bundle: the bundle of its blocks, and the block (a unit of that bundle) of each of its units.
    products : mapping of int to ((int, ndarray), (int, ndarray))
        Bundles whose units are pairs of units of two others; each pair that shares a block occurs once. Per factor: the
        other bundle, and the unit of it in each pair.
    frozen : tuple of (ndarray, str)
        Classes that could move more freely than a spec expresses, and the reason why they do not.
    """

    sizes: Atoms
    bundle: Atoms
    unit: Atoms
    cell: Atoms
    parent: dict[int, tuple[int, Atoms]]
    products: dict[int, tuple[Factor, Factor]]
    frozen: tuple[tuple[Atoms, str], ...]


class _Unsettled(Exception):  # noqa: N818  # not an error: control returns to refinement with more facts
    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.facts = facts


def settle(facts: Facts, on_axis: Atoms) -> Forest:
    """Refine and freeze until a spec can express the rest.

    Parameters
    ----------
    facts : Facts
        What tracing found.
    on_axis : ndarray of bool, shape (classes,)
        Whether a class lies on an axis of a parameter.
    """
    while True:
        try:
            added = np.zeros(facts.size - len(on_axis), dtype=bool)
            return _Arrangement(facts, refine(facts), np.concatenate([on_axis, added])).forest()
        except _Unsettled as more:
            facts = more.facts


class _Arrangement:
    """Cells of one refinement, bundled; raises `_Unsettled` with added facts unless they form a forest."""

    def __init__(self, facts: Facts, colours: Atoms, on_axis: Atoms) -> None:
        self.facts = facts
        self.colours = colours
        self.counts = np.bincount(colours, minlength=1)
        self.moves = self.counts[colours] > 1
        self.runs = self._functions()
        self.unit, self.bundle, self.sizes = self._bundles()
        self.matters = np.zeros(len(self.sizes), dtype=bool)
        self.matters[self.bundle[self.moves & on_axis]] = True
        self.maps = self._maps()

    def _functions(self) -> list[tuple[Atoms, Atoms]]:
        """Distinct functions from the units of a cell to their blocks, as (children, parents)."""
        facts, colours = self.facts, self.colours
        keep = np.flatnonzero(self.moves[facts.children] & self.moves[facts.parents])
        kinds, children, parents = facts.kinds[keep], facts.children[keep], facts.parents[keep]
        order = np.lexsort((children, colours[children], kinds))
        kinds, children, parents = kinds[order], children[order], parents[order]
        cells = colours[children]
        borders = np.flatnonzero((np.diff(kinds) != 0) | (np.diff(cells) != 0)) + 1
        found = {}
        for child, parent in zip(np.split(children, borders), np.split(parents, borders), strict=True):
            if len(child):
                found[child.tobytes() + parent.tobytes()] = (child, parent)
        return list(found.values())

    def _is_tie(self, run: tuple[Atoms, Atoms]) -> bool:
        return bool(self.counts[self.colours[run[0][0]]] == self.counts[self.colours[run[1][0]]])

    def _bundles(self) -> tuple[Atoms, Atoms, Atoms]:
        ties = [run for run in self.runs if self._is_tie(run)]
        empty = np.empty(0, np.int64)
        first, second = (np.concatenate([empty, *(run[side] for run in ties)]) for side in (0, 1))
        whole = components(self.facts.size, first, second)
        moving = np.flatnonzero(self.moves)
        pairs, counts = np.unique(np.stack([whole[moving], self.colours[moving]]), axis=1, return_counts=True)
        if (counts > 1).any():  # a unit tied to itself in another place: no rank is consistent
            cell = pairs[1, counts > 1].min()
            found = np.flatnonzero(self.colours == cell)
            self._freeze(found, np.arange(len(found)), found, "its units are tied to one another out of order")
        ends = [self.colours[np.array([run[side][0] for run in ties], dtype=np.int64)] for side in (0, 1)]
        joined = components(len(self.counts), *ends)
        bundle = np.where(self.moves, joined[self.colours], -1)
        unit = np.full(self.facts.size, -1)
        sizes = np.zeros(int(joined.max(initial=-1)) + 1, dtype=np.int64)
        order = moving[np.argsort(bundle[moving], kind="stable")]
        borders = np.flatnonzero(np.diff(bundle[order])) + 1
        for members in np.split(order, borders):
            if len(members):
                ranks = np.unique(whole[members], return_inverse=True)[1].reshape(-1)
                unit[members] = ranks
                sizes[bundle[members[0]]] = ranks.max() + 1
        return unit, bundle, sizes

    def _maps(self) -> Maps:
        maps: Maps = {}
        for child, parent in self.runs:
            lower, upper = int(self.bundle[child[0]]), int(self.bundle[parent[0]])
            if lower == upper:
                continue
            block = np.empty(self.sizes[lower], dtype=np.int64)
            block[self.unit[child]] = self.unit[parent]
            known = maps.setdefault(lower, {}).setdefault(upper, block)
            if not np.array_equal(known, block):
                self._freeze_bundle(
                    upper, self._blocks_above(upper, maps), lower, "its units lie in blocks in two ways"
                )
        return maps

    def forest(self) -> Forest:
        """Check that blocks nest one level deep, and build the forest."""
        self._chains()
        pairs = {lower: self._product(lower) for lower in sorted(self.maps)}
        rest = [lower for lower, factors in pairs.items() if factors is None]
        for lower in rest:
            self._crossings(lower)
        for lower in rest:
            self._depth(lower)
        parent = {lower: next(iter(self.maps[lower].items())) for lower in rest if self.maps[lower]}
        products = {lower: factors for lower, factors in pairs.items() if factors is not None and self.matters[lower]}
        kept = self.matters.copy()
        for factors in products.values():
            kept[[factor for factor, _ in factors]] = True
        for lower, (upper, _) in parent.items():
            kept[upper] |= kept[lower]
        bundle = np.where(self.moves & kept[self.bundle], self.bundle, -1)
        nested = {lower: found for lower, found in parent.items() if kept[lower]}
        return Forest(self.sizes, bundle, self.unit, self.colours, nested, products, self.facts.frozen)

    def _chains(self) -> None:
        """State the nesting of blocks that determine other blocks: they lie in them, or are the same."""
        derived: dict[tuple[int, int], Atoms] = {}
        for found in self.maps.values():
            for first, f in found.items():
                for second, g in found.items():
                    if first == second or second in self.maps.get(first, {}) or (first, second) in derived:
                        continue
                    pairs = np.unique(np.stack([f, g]), axis=1)
                    if pairs.shape[1] == self.sizes[first]:
                        derived[first, second] = pairs[1]
        if derived:
            self._relate([(self._face(low), self._face(high)[block]) for (low, high), block in derived.items()])

    def _product(self, lower: int) -> tuple[Factor, Factor] | None:
        """The two bundles whose pairs of units these units are, the bundle on a parameter axis last; otherwise None.

        Each pair that shares a block must occur once. If no bundle represents the blocks yet, one is added first.
        """
        found = self.maps[lower]
        above = {upper for middle in found for upper in self.maps.get(middle, {})}
        factors = sorted((factor for factor in found if factor not in above), key=lambda one: (self.matters[one], one))
        if len(factors) != 2 or any(lower in blocks for blocks in self.maps.values()):
            return None
        first, second = factors
        pairs = np.unique(np.stack([found[first], found[second]]), axis=1)
        joint = components(int(self.sizes[first] + self.sizes[second]), pairs[0], self.sizes[first] + pairs[1])
        blocks = (joint[: self.sizes[first]], joint[self.sizes[first] :])
        count = int(joint.max()) + 1
        even = all(np.ptp(np.bincount(block)) == 0 for block in blocks)
        whole = even and pairs.shape[1] * count == self.sizes[first] * self.sizes[second]
        if not whole or pairs.shape[1] < self.sizes[lower]:
            return None
        if count > 1 and not self._share(factors, joint):
            if self.matters[lower]:
                added = [self.facts.size + block for block in blocks]
                self._relate([(self._face(factor), above) for factor, above in zip(factors, added, strict=True)], count)
            return None
        uppers = [self.maps.get(factor, {}) for factor in factors]
        if any(len(found) != (count > 1) or any(map(self.maps.get, found)) for found in uppers):
            return None  # a spec cannot express blocks of these
        return (first, found[first]), (second, found[second])

    def _share(self, factors: list[int], joint: Atoms) -> bool:
        """Whether a bundle represents exactly these blocks."""
        known = [self.maps.get(factor, {}) for factor in factors]
        for upper in known[0].keys() & known[1].keys():
            blocks = np.concatenate([each[upper] for each in known])
            if np.unique(np.stack([blocks, joint]), axis=1).shape[1] == joint.max() + 1 == self.sizes[upper]:
                return True
        return False

    def _crossings(self, lower: int) -> None:
        found = sorted(self.maps[lower].items())
        for index, (first, f) in enumerate(found):
            for second, g in found[:index]:
                if second in self.maps.get(first, {}) or first in self.maps.get(second, {}):
                    continue
                pairs = np.unique(np.stack([f, g]), axis=1)
                grid = pairs.shape[1] == self.sizes[first] * self.sizes[second]
                if grid and not self.matters[lower]:
                    continue  # every pair occurs once, on no parameter axis: both may move
                joint = components(int(self.sizes[first] + self.sizes[second]), pairs[0], self.sizes[first] + pairs[1])
                options = [(first, joint[: self.sizes[first]]), (second, joint[self.sizes[first] :])]
                chosen = min(options, key=lambda option: _freedom(option[1]))
                self._freeze_bundle(*chosen, lower, "its units lie in blocks that cross")

    def _depth(self, lower: int) -> None:
        for middle, block in self.maps[lower].items():
            for upper, outer in self.maps.get(middle, {}).items():
                if self.matters[lower]:
                    whole = np.zeros(self.sizes[upper], dtype=np.int64)
                    options = [(upper, whole), (middle, outer), (lower, block)]
                    chosen = min(options, key=lambda option: _freedom(option[1]))
                    self._freeze_bundle(*chosen, lower, "its blocks lie in larger blocks")

    def _blocks_above(self, bundle: int, maps: Maps) -> Atoms:
        above = maps.get(bundle, {})
        if not above:
            return np.zeros(self.sizes[bundle], dtype=np.int64)
        return max(above.values(), key=lambda block: int(block.max()))

    # ------------------------------------------------------------------------------------------------- more facts

    def _freeze_bundle(self, bundle: int, block: Atoms, lower: int, reason: str) -> None:
        """Freeze the rank of a bundle's units in their blocks, so that a spec can express the units of `lower`."""
        members = np.flatnonzero(self.bundle == bundle)
        cell = members[self.colours[members] == self.colours[members].min()]
        held = np.flatnonzero(self.bundle == lower)
        self._freeze(cell, occurrence(block)[self.unit[cell]], held, f"{reason}: only some of their orders are used")

    def _freeze(self, classes: Atoms, ranks: Atoms, held: Atoms, reason: str) -> None:
        marks = self.facts.marks.copy()
        marks[classes] = mix(marks[classes], -(2**41), ranks)
        raise _Unsettled(replace(self.facts, marks=marks, frozen=(*self.facts.frozen, (held, reason))))

    def _relate(self, pairs: list[tuple[Atoms, Atoms]], added: int = 0) -> None:
        """State that the first classes of each pair lie in the second, `added` of which are new classes."""
        facts = self.facts
        kinds = [
            np.broadcast_to(mix(-(2**42), len(facts.kinds), number).view(np.int64), len(below))
            for number, (below, _) in enumerate(pairs)
        ]
        raise _Unsettled(
            replace(
                facts,
                size=facts.size + added,
                marks=np.concatenate([facts.marks, np.repeat(mix(-(2**43)), added)]),
                kinds=np.concatenate([facts.kinds, *kinds]),
                children=np.concatenate([facts.children, *(below for below, _ in pairs)]),
                parents=np.concatenate([facts.parents, *(above for _, above in pairs)]),
            )
        )

    def _face(self, bundle: int) -> Atoms:
        """One class per unit of a bundle, in the order of its units."""
        members = np.flatnonzero(self.bundle == bundle)
        cell = members[self.colours[members] == self.colours[members].min()]
        face: Atoms = cell[np.argsort(self.unit[cell])]
        return face


def _freedom(block: Atoms) -> float:
    """Logarithm of the number of permutations inside blocks, given the block of every unit."""
    return float(sum(lgamma(count + 1) for count in np.bincount(block)))
