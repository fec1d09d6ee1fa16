from __future__ import annotations

import numpy as np
import pytest
import torch

from c2m3_fl.core.describe import coverage
from c2m3_fl.core.permutation import apply
from c2m3_fl.core.spec import Group, PermutationSpec, Pin, Segment, TensorSpec
from tests.core.networks import ALL, mlp, on


@pytest.mark.parametrize("spec", ALL.values(), ids=ALL)
def test_coverage_is_the_share_of_entries_that_cyclic_shifts_move(spec: PermutationSpec) -> None:
    """Shifting every group by one moves every entry that lies on a permuted coordinate, and no other."""
    numbered = {
        name: torch.arange(int(np.prod(tensor.shape))).reshape(tensor.shape) for name, tensor in spec.tensors.items()
    }
    perm = {name: torch.arange(group.size).roll(1) for name, group in spec.groups.items()}
    for name, group in spec.groups.items():
        if group.parent is not None:
            outer, block = perm[group.parent], group.size // spec.groups[group.parent].size
            perm[name] = (outer[:, None] * block + torch.arange(block).roll(1)).reshape(-1)
    moved = apply(spec, perm, numbered)
    parameters = [name for name, tensor in spec.tensors.items() if not tensor.buffer]
    changed = sum(int((moved[name] != numbered[name]).sum()) for name in parameters)
    assert coverage(spec) == pytest.approx(changed / sum(numbered[name].numel() for name in parameters))


def test_nothing_moves_in_a_spec_without_groups() -> None:
    assert coverage(PermutationSpec({}, {"w": TensorSpec((2, 3), ((), ()))})) == 0
    assert coverage(PermutationSpec({}, {})) == 1


def test_one_group_is_not_plural() -> None:
    spec = PermutationSpec({"h": Group(2)}, {"w": TensorSpec((2,), ((Segment.contiguous("h", 2),),))})
    assert str(spec).startswith("1 group; ")


def test_print_shows_groups_members_and_share() -> None:
    text = str(mlp(3, 5, 4, 2))
    assert text.startswith(
        "2 groups; permutations move 95.83 % of 54 parameters".replace("95.83", f"{100 * 52 / 54:.2f}")
    )
    assert "h1          4  1.weight:0, 1.bias:0, 2.weight:1" in text


def test_print_shows_nested_groups_below_their_blocks() -> None:
    spec = PermutationSpec({"heads": Group(2), "inner": Group(6, "heads")}, {"w": TensorSpec((6,), (on("inner", 6),))})
    lines = str(spec).splitlines()
    assert lines[3].split(maxsplit=2) == ["heads", "2", "(blocks of inner)"]
    assert lines[4].split() == ["inner", "2x3", "w:0"]


def test_print_shows_every_pin_with_its_reason_operator_and_module() -> None:
    pins = (
        Pin("a.weight", 1, "network input"),
        Pin("b.weight", 0, "no rule for aten.sort", "aten.sort", "b"),
        Pin("c.weight", 0, "no rule for aten.sort", "aten.sort", "other.place"),
    )
    spec = PermutationSpec(
        {}, {name: TensorSpec((2, 2), ((), ())) for name in ("a.weight", "b.weight", "c.weight")}, pins
    )
    text = str(spec)
    assert "pinned: network input\n  a.weight:1" in text
    assert "pinned: no rule for aten.sort (aten.sort)\n  b.weight:0; c.weight:0 in other.place" in text


def test_interleaved_positions_count() -> None:
    segment = Segment("g", np.array([[0, 3], [1, 4]]))
    spec = PermutationSpec({"g": Group(2)}, {"w": TensorSpec((6,), ((segment,),))})
    assert coverage(spec) == pytest.approx(4 / 6)
