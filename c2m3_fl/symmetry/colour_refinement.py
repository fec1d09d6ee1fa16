"""Which units play the same role: colour refinement of the facts that tracing found.

Ties merge atoms into *classes*. The *role* of an atom within its class is the axis it comes from and its rank there;
it becomes the slot of a spec's segment. Exchanging two classes moves atoms to atoms of the same role. Two classes
therefore start with the same colour only if all facts about them agree, role by role. Colours are then refined along
relations until no colour splits. Classes of one colour form a *cell*.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from c2m3_fl.symmetry.facts import Atoms, Structure

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
        A hash of the facts about each class alone.
    kinds, children, parents : ndarray, shape (relations,)
        Class `children[i]` lies in block `parents[i]`; `kinds[i]` numbers the statement and the roles.
    frozen : tuple of (ndarray, str)
        Classes whose freedom was reduced because no spec expresses it, and the reason.
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


def mix(*values: npt.NDArray[np.int64] | Hashes | int) -> Hashes:
    """One hash of several numbers, in their order; arrays broadcast."""
    mixed = np.zeros(1, dtype=np.uint64)
    for value in values:
        mixed = scramble(mixed ^ scramble(np.atleast_1d(np.asarray(value))))
    return mixed


def collect(structure: Structure) -> Facts:
    """Merge tied atoms into classes and restate every fact about them."""
    kinds, first, second = _flat(structure.ties)
    classes = tied(structure)
    roles = _roles(structure, classes)
    marks = np.zeros(int(classes.max(initial=-1)) + 1, dtype=np.uint64)
    np.add.at(marks, classes, mix(roles))
    np.add.at(marks, classes[first], mix(kinds, roles[first], roles[second]))
    for number, atoms in enumerate(structure.sets.values()):
        np.add.at(marks, classes[atoms], mix(-1 - number, roles[atoms]))
    for atoms, _ in structure.pins:
        pinned = np.unique(classes[atoms])
        marks[pinned] = mix(-(2**40), pinned)
    return Facts(classes, len(marks), marks, *_relations(structure, classes, roles))


def tied(structure: Structure) -> Atoms:
    """The class of every atom: tied atoms are one class."""
    return components(structure.size, *_flat(structure.ties)[1:])


def _flat(statements: list[tuple[Atoms, Atoms]]) -> tuple[Atoms, Atoms, Atoms]:
    """Number of the statement, and both its sides, of all statements one after another."""
    empty = np.empty(0, np.int64)
    first, second = (np.concatenate([empty, *(pair[side] for pair in statements)]) for side in (0, 1))
    lengths = np.array([len(pair[0]) for pair in statements], dtype=np.int64)
    return np.repeat(np.arange(len(statements)), lengths), first, second


def _roles(structure: Structure, classes: Atoms) -> Hashes:
    """Hash, shape (atoms,), of where each atom comes from and of its rank there among the atoms of its class."""
    origins = np.searchsorted(np.array(structure.starts), np.arange(structure.size), side="right")
    rank = occurrence(classes * (len(structure.starts) + 1) + origins)
    return mix(origins, rank)


def _relations(structure: Structure, classes: Atoms, roles: Hashes) -> tuple[Atoms, Atoms, Atoms]:
    numbers, children, parents = _flat(structure.relations)
    if not len(numbers):
        return numbers, children, parents
    pairs = np.unique(np.stack([numbers, children, parents]), axis=1)  # blocks repeat along broadcast dimensions
    numbers, children, parents = pairs
    slots = occurrence(numbers * structure.size + children)
    kinds = mix(numbers, slots, roles[children], roles[parents])
    return kinds.view(np.int64), classes[children], classes[parents]


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
