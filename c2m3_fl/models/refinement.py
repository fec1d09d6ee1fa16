"""Which units play the same role: colour refinement of the facts that tracing found.

Ties merge atoms into *classes*. Classes get the colour of what they are (the axes they lie on, pinned or not), then
repeatedly of what they are related to, until nothing splits any further. Classes of one colour form a *cell*.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from c2m3_fl.models.structure import Atoms, Structure

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Facts:
    """Facts about classes instead of atoms.

    Attributes
    ----------
    classes : ndarray, shape (atoms,)
        The class of every atom.
    size : int
        Number of classes.
    marks : ndarray of uint64, shape (size,)
        A hash of what each class is by itself.
    kinds, children, parents : ndarray, shape (relations,)
        Class `children[i]` lies in block `parents[i]`; `kinds[i]` tells the statements of one operator, and the
        occurrences of a repeated unit within it, from others.
    frozen : tuple of (ndarray, str)
        Classes that lost freedom because no spec expresses it, and what they lost.
    """

    classes: Atoms
    size: int
    marks: Hashes
    kinds: Atoms
    children: Atoms
    parents: Atoms
    frozen: tuple[tuple[Atoms, str], ...] = ()


def scramble(values: npt.NDArray[np.int64] | Hashes) -> Hashes:
    """Well-mixed 64-bit hashes (the finaliser of splitmix64), the same on every machine."""
    x = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Hashes = x ^ (x >> np.uint64(31))
    return mixed


def components(size: int, first: Atoms, second: Atoms) -> Atoms:
    """Connected components, shape (size,), numbered in the order of their first member."""
    graph = coo_array((np.ones(len(first), dtype=bool), (first, second)), shape=(size, size))
    labels = connected_components(graph, directed=False)[1].astype(np.int64)
    return renumber(labels)


def renumber(labels: Atoms) -> Atoms:
    """The same partition, its parts numbered in the order of their first member."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    numbered: Atoms = rank[inverse.reshape(-1)]
    return numbered


def occurrence(values: Atoms) -> Atoms:
    """How often each entry has occurred before."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    counts = np.diff(np.r_[starts, len(values)])
    seen = np.empty(len(values), dtype=np.int64)
    seen[order] = np.arange(len(values)) - np.repeat(starts, counts)
    return seen


def collect(structure: Structure) -> Facts:
    """Merge tied atoms into classes and restate every fact about them."""
    pairs = [np.concatenate(side) for side in zip(*structure.ties, strict=True)] if structure.ties else None
    first, second = pairs if pairs else (np.empty(0, np.int64), np.empty(0, np.int64))
    classes = components(structure.size, first, second)
    size = int(classes.max(initial=-1)) + 1
    marks = np.zeros(size, dtype=np.uint64)
    sets = {np.sort(classes[atoms]).tobytes(): atoms for atoms in structure.sets.values()}
    for seed, atoms in enumerate([*structure.places().values(), *sets.values()]):
        np.add.at(marks, classes[atoms], scramble(np.array([seed])))
    for atoms, _ in structure.pins:
        pinned = np.unique(classes[atoms])
        marks[pinned] = scramble(pinned + np.int64(2**40))
    kinds, children, parents = _relations(structure, classes)
    return Facts(classes, size, marks, kinds, children, parents)


def _relations(structure: Structure, classes: Atoms) -> tuple[Atoms, Atoms, Atoms]:
    seen: set[bytes] = set()
    kinds, children, parents = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    kind = 0
    for lower, upper in structure.relations:
        child, parent = classes[lower], classes[upper]
        key = np.concatenate([child, parent]).tobytes()
        if key in seen:
            continue
        seen.add(key)
        slot = occurrence(child)
        kinds.append(kind + slot)
        children.append(child)
        parents.append(parent)
        kind += int(slot.max(initial=0)) + 1
    return np.concatenate(kinds), np.concatenate(children), np.concatenate(parents)


def refine(facts: Facts) -> Atoms:
    """Stable colours of all classes, shape (size,), numbered in the order of the first class that has them."""
    colours = renumber(facts.marks.view(np.int64))
    kinds = scramble(facts.kinds)
    while True:
        hashes = scramble(colours)
        update = scramble(hashes + np.uint64(1))
        np.add.at(update, facts.children, scramble(kinds ^ hashes[facts.parents]))
        np.add.at(update, facts.parents, scramble((kinds + np.uint64(7)) ^ hashes[facts.children]))
        finer = renumber(update.view(np.int64))
        if finer.max(initial=-1) == colours.max(initial=-1):
            return finer
        colours = finer
