"""From the facts of tracing to a permutation spec: groups, their names and places, and a reason for every pin."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from c2m3_fl.core.axes import Kind
from c2m3_fl.core.spec import Axis, Group, PermutationSpec, Pin, Segment, TensorSpec
from c2m3_fl.symmetry.blocks import Forest, settle
from c2m3_fl.symmetry.colour_refinement import Facts, collect
from c2m3_fl.symmetry.facts import Atoms, AxisKey, Cause, Structure

_ALONE = Cause("no other unit plays the same role")


def build_spec(
    structure: Structure, state: Mapping[str, Tensor], first_name: Mapping[str, str], buffers: frozenset[str]
) -> tuple[PermutationSpec, dict[str, Kind]]:
    """Group interchangeable units; of groups that rotate as well, where rotations are asked for, say so.

    Parameters
    ----------
    structure : Structure
        The facts of tracing. Tied tensors occur under their first name.
    state : mapping of str to Tensor
        The state dict.
    first_name : mapping of str to str
        The first name of every tied tensor.
    buffers : frozenset of str
        Names of the buffers.
    """
    facts = collect(structure)
    on_axis = np.zeros(facts.size, dtype=bool)
    for atoms in structure.places().values():
        on_axis[facts.classes[atoms]] = True
    builder = _Builder(structure, facts, settle(facts, on_axis))
    return builder.spec(state, first_name, buffers), builder.kinds() if structure.folded is not None else {}


class _Builder:
    def __init__(self, structure: Structure, facts: Facts, forest: Forest) -> None:
        self.structure = structure
        self.axes = structure.places()
        self.facts = facts
        self.forest = forest
        self.first = np.full(len(forest.bundle), structure.size)
        for atoms in self.axes.values():
            np.minimum.at(self.first, facts.classes[atoms], atoms)
        self.rank = self._ranks()
        self.names = self._names()
        self.causes = self._causes()
        self.pinned_by = np.full(structure.size, -1)
        for number in reversed(range(len(structure.pins))):
            self.pinned_by[structure.pins[number][0]] = number

    def spec(
        self, state: Mapping[str, Tensor], first_name: Mapping[str, str], buffers: frozenset[str]
    ) -> PermutationSpec:
        """Assemble the spec; tied tensors get the same axes under each of their names."""
        groups = {}
        for bundle, name in self.names.items():
            held = self.forest.parent.get(bundle)
            groups[name] = Group(int(self.forest.sizes[bundle]), self.names[held[0]] if held else None)
        tensors, pins = {}, []
        for name, value in state.items():
            source = first_name.get(name, name)
            axes = tuple(self._axis(source, dim, value) for dim in range(value.ndim))
            diagonal = self.structure.diagonal.get(source, 1) if value.ndim > 1 and axes[1] else 1
            tensors[name] = TensorSpec(tuple(value.shape), axes, name in buffers, diagonal)
            if source == name:
                for dim in range(value.ndim):
                    pins += self._pins(name, dim)
        return PermutationSpec(groups, tensors, tuple(pins))

    def kinds(self) -> dict[str, Kind]:
        """The kinds of the groups whose units are read by linear operators alone."""
        forest = self.forest
        single, pooled = self._bundles(self.structure.single), self._bundles(self.structure.pooled)
        whole = {upper for upper, _ in forest.parent.values()}
        for lower, ((unit, _), (slot, _)) in forest.products.items():
            whole.add(unit)
            single |= {slot} if lower in single else set()
            pooled |= {slot} if lower in pooled else set()
        kinds: dict[str, Kind] = {}
        for bundle, name in self.names.items():
            held = forest.parent.get(bundle)
            size = int(forest.sizes[bundle]) // (int(forest.sizes[held[0]]) if held else 1)
            if bundle not in single | whole and size > 1 + (bundle in pooled):  # two that keep their sum: exchanged
                kinds[name] = "centred" if bundle in pooled else "orthogonal"
        return kinds

    def _bundles(self, found: list[Atoms]) -> set[int]:
        atoms = np.unique(np.concatenate([np.empty(0, np.int64), *found]))
        return set(map(int, np.unique(self.forest.bundle[self.facts.classes[atoms]])))

    # ------------------------------------------------------------------------------------------------------- units

    def _ranks(self) -> dict[int, Atoms]:
        """Rank of every unit in its group: by first coordinate in the state dict, block by block if nested."""
        forest = self.forest
        keys = {}
        for bundle in map(int, np.unique(forest.bundle[forest.bundle >= 0])):
            members = np.flatnonzero(forest.bundle == bundle)
            keys[bundle] = np.full(forest.sizes[bundle], self.structure.size)
            np.minimum.at(keys[bundle], forest.unit[members], self.first[members])
        for lower, factors in forest.products.items():
            for factor, place in factors:
                np.minimum.at(keys[factor], place, keys[lower])
        for lower, (upper, block) in forest.parent.items():
            np.minimum.at(keys[upper], block, keys[lower])
        ranks = {bundle: np.argsort(np.argsort(key, kind="stable")) for bundle, key in keys.items()}
        for lower, (upper, block) in forest.parent.items():
            order = np.lexsort((keys[lower], ranks[upper][block]))
            ranks[lower] = np.argsort(order)
        for lower, ((unit, units), (slot, slots)) in forest.products.items():
            inner = forest.sizes[lower] // forest.sizes[unit]
            ranks[lower] = ranks[unit][units] * inner + ranks[slot][slots] % inner
        return ranks

    def _names(self) -> dict[int, str]:
        """Readable, unique names, in the order of first appearance in the state dict, blocks before their units."""
        place = {key: index for index, key in enumerate(self.axes)}
        holders = {upper for upper, _ in self.forest.parent.values()}
        homes = self._homes(place)
        starts = {bundle: int(self.first[self.forest.bundle == bundle].min()) for bundle in self.rank}
        names: dict[int, str] = {}
        for bundle in sorted(homes, key=lambda one: (place[homes[one]], one not in holders, starts[one])):
            base = _stem(homes[bundle][0]) + (".blocks" if bundle in holders else "")
            taken = sum(name.partition("#")[0] == base for name in names.values())
            names[bundle] = base if not taken else f"{base}#{taken + 1}"
        return names

    def _homes(self, place: Mapping[AxisKey, int]) -> dict[int, AxisKey]:
        """The axis that names each group: the first that computes its units; for blocks, that of the units in them."""
        produced = [key for key in place if key in self.structure.outputs]
        homes: dict[int, AxisKey] = {}
        for key in [*produced, *place]:
            for bundle in map(int, np.unique(self.forest.bundle[self.facts.classes[self.axes[key]]])):
                if bundle >= 0:
                    homes.setdefault(self._factors(bundle)[0], key)
        for (unit, _), (slot, _) in self.forest.products.values():
            homes.setdefault(slot, homes[unit])
        for upper in {upper for upper, _ in self.forest.parent.values()}:
            if homes.get(upper) not in produced:
                held = [homes[lower] for lower, (above, _) in self.forest.parent.items() if above == upper]
                homes[upper] = min(held, key=place.__getitem__)
        return homes

    def _factors(self, bundle: int) -> tuple[int, ...]:
        """The bundles that move the units of a bundle: the two factors of a product, otherwise itself."""
        factors = self.forest.products.get(bundle)
        return (bundle,) if factors is None else (factors[0][0], factors[1][0])

    # -------------------------------------------------------------------------------------------------------- axes

    def _axis(self, tensor: str, dim: int, value: Tensor) -> Axis:
        atoms = self.axes.get((tensor, dim))
        if atoms is None or (dim == 1 and value.shape[1] == 1):
            return ()
        classes = self.facts.classes[atoms]
        bundles = self.forest.bundle[classes]
        segments = []
        for bundle in map(int, dict.fromkeys(bundles[bundles >= 0])):
            places = np.flatnonzero(bundles == bundle)
            members = classes[places]
            cells = self.forest.cell[members]
            begin = {cell: places[cells == cell].min() for cell in np.unique(cells)}
            parts = np.array([begin[cell] for cell in cells])
            order = np.lexsort((places, parts, self.rank[bundle][self.forest.unit[members]]))
            positions = places[order].reshape(self.forest.sizes[bundle], -1)
            names = [self.names[factor] for factor in self._factors(bundle)]
            if len(names) == 1:
                segments.append(Segment(names[0], positions))
            else:
                size = self.forest.sizes[self._factors(bundle)[0]]
                segments += [Segment(names[0], part.reshape(size, -1), names[1]) for part in positions.T]
        return tuple(segments)

    # -------------------------------------------------------------------------------------------------------- pins

    def _causes(self) -> dict[int, Cause]:
        causes: dict[int, Cause] = {}
        for atoms, cause in self.structure.pins:
            for found in np.unique(self.facts.classes[atoms]):
                causes.setdefault(int(found), cause)
        for child, parent in zip(self.facts.children, self.facts.parents, strict=True):
            if int(parent) in causes:
                causes.setdefault(int(child), causes[int(parent)])
        return causes

    def _cause(self, atom: int) -> Cause:
        """Why an atom stays: it was pinned, or a unit tied to it, or its block."""
        own = self.pinned_by[atom]
        if own >= 0:
            cause: Cause = self.structure.pins[own][1]
            return cause
        return self.causes.get(int(self.facts.classes[atom]), _ALONE)

    def _pins(self, tensor: str, dim: int) -> list[Pin]:
        atoms = self.axes.get((tensor, dim), np.empty(0, np.int64))
        classes = self.facts.classes[atoms]
        still = atoms[self.forest.bundle[classes] < 0] if len(atoms) > 1 else atoms[:0]  # a single unit cannot move
        found = dict.fromkeys(self._cause(int(one)) for one in still)
        moving = classes[self.forest.bundle[classes] >= 0]
        found |= dict.fromkeys(Cause(why) for held, why in self.forest.frozen if np.isin(moving, held).any())
        return [Pin(tensor, dim, cause.reason, cause.operator, cause.module) for cause in found]


def _stem(tensor: str) -> str:
    """Name of the layer that a parameter belongs to: ``l1.weight → l1``, ``rnn.weight_ih_l0 → rnn.l0``."""
    module, _, leaf = tensor.rpartition(".")
    for word in ("weight_ih", "weight_hh", "weight_hr", "weight", "bias_ih", "bias_hh", "bias"):
        if leaf.startswith(word) or leaf.endswith("_" + word):
            leaf = leaf.removeprefix(word).removesuffix("_" + word).strip("_")
            break
    return ".".join(part for part in (module, leaf) if part) or tensor
