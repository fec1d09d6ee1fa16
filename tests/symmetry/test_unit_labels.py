"""Labels follow the entries of tensors: layout rules against torch's own operators, on labels as data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from c2m3_fl.symmetry.colour_refinement import collect, components, occurrence, renumber
from c2m3_fl.symmetry.facts import Structure
from c2m3_fl.symmetry.labels import Labels, project, support
from c2m3_fl.symmetry.reshape_labels import concatenate, reshape, stack
from c2m3_fl.symmetry.unit_labels import combine, einsum, expand, permute, reduce, select, take


def channels(structure: Structure, *shape: int, dim: int = 1) -> Labels:
    """A tensor whose units lie on one dimension; everything else is ordered."""
    atoms = structure.fresh(*(size if place == dim else 1 for place, size in enumerate(shape)))
    return Labels(shape, (atoms,), frozenset(place for place in range(len(shape)) if place != dim))


def full(x: Labels) -> torch.Tensor:
    """The only factor of a tensor, one atom per entry."""
    assert len(x.factors) == 1
    return torch.from_numpy(np.broadcast_to(x.factors[0], x.shape).copy())


@pytest.mark.parametrize(
    ("shape", "target"),
    [
        ((2, 3, 4, 5), (2, 60)),
        ((2, 6, 4), (2, 2, 3, 4)),
        ((2, 6, 4), (12, 4)),
        ((2, 6, 4), (2, 3, 8)),
        ((2, 6, 1, 4), (2, 6, 4)),
        ((2, 6), (1, 2, 1, 6, 1)),
        ((4, 6, 5), (8, 15)),
        ((3, 4, 2), (2, 12)),
    ],
)
def test_reshape_moves_labels_like_entries(shape: tuple[int, ...], target: tuple[int, ...]) -> None:
    structure = Structure()
    x = channels(structure, *shape)
    assert torch.equal(full(reshape(structure, x, target)), full(x).reshape(target))


def test_flatten_and_back_is_the_identity() -> None:
    structure = Structure()
    x = channels(structure, 2, 6, 4, 5)
    back = reshape(structure, reshape(structure, x, (2, 120)), x.shape)
    assert np.array_equal(back.factors[0], x.factors[0])
    assert structure.size == 6


def test_reshape_of_untouched_dimensions_keeps_factors_small() -> None:
    structure = Structure()
    x = channels(structure, 4, 9, 6, dim=2)
    assert reshape(structure, x, (36, 6)).factors[0].shape == (1, 6)


@given(order=st.permutations(range(4)))
def test_permute_moves_labels_like_entries(order: list[int]) -> None:
    structure = Structure()
    x = channels(structure, 2, 3, 4, 5, dim=2)
    assert torch.equal(full(permute(x, order)), full(x).permute(*order))


def test_take_and_select_move_labels_like_entries() -> None:
    structure = Structure()
    x = channels(structure, 2, 6, 3)
    index = np.array([5, 0, 0, 2])
    assert torch.equal(full(take(structure, x, 1, index)), full(x)[:, torch.from_numpy(index)])
    assert torch.equal(full(select(structure, x, 0, 1)), full(x)[1])


def test_one_unit_selected_is_told_from_the_rest() -> None:
    """The result depends on this very unit: it may no longer be exchanged with another."""
    structure = Structure()
    x = Labels((6,), (structure.axis("w", 0, 6),))
    select(structure, x, 0, 3)
    colours = collect(structure).marks
    assert len(np.unique(colours)) == 2


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3), dim=st.integers(0, 2))
def test_concatenation_along_units_moves_labels_like_entries(sizes: list[int], dim: int) -> None:
    structure = Structure()
    pieces = [channels(structure, *(size if place == dim else 2 for place in range(3)), dim=dim) for size in sizes]
    if any(size > 1 for size in sizes):
        joined = concatenate(structure, [x for x, size in zip(pieces, sizes, strict=True) if size > 1], dim)
        assert torch.equal(full(joined), torch.cat([full(x) for x, n in zip(pieces, sizes, strict=True) if n > 1], dim))


def test_stacked_tensors_keep_their_own_units() -> None:
    structure = Structure()
    pieces = [channels(structure, 2, 5) for _ in range(3)]
    joined = stack(structure, pieces, 0)
    assert joined.shape == (3, 2, 5)
    for place, x in enumerate(pieces):
        assert torch.equal(full(select(structure, joined, 0, place)), full(x))


def test_operands_that_meet_are_tied() -> None:
    structure = Structure()
    x, weight = channels(structure, 2, 5), Labels((5,), (structure.fresh(5),))
    found = combine(structure, x, weight)
    assert collect(structure).classes.max() + 1 == 5
    assert support(found.factors[0]) == {1}


def test_broadcast_operand_is_no_constraint() -> None:
    structure = Structure()
    combine(structure, channels(structure, 2, 5), Labels((1,)))
    assert not structure.ties
    assert not structure.pins


def test_ordered_operand_pins() -> None:
    structure = Structure()
    combine(structure, channels(structure, 2, 5), Labels.ordered((5,)))
    assert [len(atoms) for atoms, _ in structure.pins] == [5]


def test_sum_inside_blocks_leaves_the_blocks() -> None:
    structure = Structure()
    x = Labels((3, 4), (structure.fresh(3, 4),))
    found = reduce(structure, x, [1])
    children, parents = structure.relations[0]
    assert found.factors[0].shape == (3,)
    assert np.array_equal(parents.reshape(3, 4), np.repeat(found.factors[0], 4).reshape(3, 4))
    assert np.array_equal(children, np.arange(12))


def test_projection_is_made_once() -> None:
    structure = Structure()
    factor = structure.fresh(3, 4)
    assert np.array_equal(project(structure, factor, [0]), project(structure, factor, [0]))
    assert structure.size == 12 + 3


def test_contraction_ties_what_it_sums_over() -> None:
    structure = Structure()
    x, rows, columns = structure.fresh(1, 4), structure.fresh(5, 1), structure.fresh(1, 4)
    found = einsum(structure, ["bi", "oi"], "bo", [Labels((2, 4), (x,)), Labels((5, 4), (rows, columns))])
    assert np.array_equal(found.factors[0].ravel(), rows.ravel())
    facts = collect(structure)
    assert np.array_equal(facts.classes[x.ravel()], facts.classes[columns.ravel()])


def test_expanded_dimension_carries_no_units() -> None:
    structure = Structure()
    x = expand(channels(structure, 1, 5), (7, 5))
    assert support(x.factors[0]) == {1}


# -------------------------------------------------------------------------------------------------------- refinement


@given(values=st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_occurrence_counts_earlier_equals(values: list[int]) -> None:
    expected = [values[:place].count(value) for place, value in enumerate(values)]
    assert occurrence(np.array(values)).tolist() == expected


@given(values=st.lists(st.integers(-9, 9), min_size=1, max_size=12))
def test_renumbering_keeps_the_partition_in_order_of_appearance(values: list[int]) -> None:
    found = renumber(np.array(values))
    assert found.tolist() == [list(dict.fromkeys(values)).index(value) for value in values]


def test_components_are_numbered_by_their_first_member() -> None:
    assert components(5, np.array([4, 3]), np.array([1, 0])).tolist() == [0, 1, 2, 0, 1]
