"""The data model refuses what contradicts itself, and says where."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from c2m3_fl.core.spec import Axis, Group, PermutationSpec, Segment, TensorSpec, floating
from c2m3_fl.errors import ParamsError, SpecError
from tests.core.networks import attention, convolutional, draws, mlp, on


def slotted(slots: str) -> Axis:
    return (Segment("g", np.arange(6).reshape(3, 2), slots),)


@pytest.mark.parametrize(
    ("groups", "tensor", "message"),
    [
        ({"g": Group(0)}, None, "'g' has 0 units"),
        ({"g": Group(4, parent="p")}, None, "parent 'p' is not among the groups"),
        ({"p": Group(3), "g": Group(4, parent="p")}, None, "4 units do not divide into the 3 blocks"),
        ({"q": Group(2), "p": Group(4, "q"), "g": Group(8, "p")}, None, "itself nested"),
        ({"g": Group(3)}, TensorSpec((4,), (on("h", 4),)), "names a group that the spec does not have"),
        ({"g": Group(3)}, TensorSpec((4,), (on("g", 4),)), "'w' axis 0 has 4 units, expected 3"),
        ({"g": Group(3)}, TensorSpec((3,), (on("g", 3, offset=1),)), "reaches beyond the 3 coordinates"),
        ({"g": Group(3)}, TensorSpec((4,), ((*on("g", 3), *on("g", 3, offset=1)),)), "coordinate 1 belongs to two"),
        ({"g": Group(3)}, TensorSpec((3, 2), (on("g", 3),)), "has 2 axes, the spec describes 1"),
        ({"g": Group(3)}, TensorSpec((3, 2), (on("g", 3), ()), diagonal=2), "has no 2 diagonal blocks"),
        ({"g": Group(3)}, TensorSpec((6,), (slotted("h"),)), "slots are units of 'h', expected another group"),
        ({"g": Group(3)}, TensorSpec((6,), (slotted("g"),)), "slots are units of 'g', expected another group"),
        ({"g": Group(3), "h": Group(3)}, TensorSpec((6,), (slotted("h"),)), "2 slots per unit, expected the 3 units"),
        (
            {"p": Group(2), "g": Group(3), "h": Group(4, "p")},
            TensorSpec((6,), (slotted("h"),)),
            "slots are units of 'h', which lies in other blocks",
        ),
    ],
)
def test_contradictions_are_refused(groups, tensor, message):
    with pytest.raises(SpecError, match=message):
        PermutationSpec(groups, {} if tensor is None else {"w": tensor})


def test_members_roots_and_children_cover_the_spec():
    spec = attention()
    assert spec.roots == ("head",)
    assert spec.children("head") == ("qk", "vo")
    assert spec.members("vo") == (("v", 0), ("o", 1), ("mix", 1))
    assert sum(len(spec.members(group)) for group in spec.groups) == sum(
        len(list(tensor.segments)) for tensor in spec.tensors.values()
    )


def test_contiguous_positions_follow_the_flatten():
    segment = Segment.contiguous("c", 2, inner=3, offset=1)
    assert segment.positions.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert (segment.size, segment.inner) == (2, 3)
    assert segment == Segment("c", np.arange(1, 7).reshape(2, 3))
    assert segment != Segment.contiguous("d", 2, inner=3, offset=1)
    assert hash(segment) == hash(Segment("c", np.arange(1, 7).reshape(2, 3)))


def test_params_are_checked_key_by_key_and_shape_by_shape():
    spec = mlp(2, 3, 2)
    (node,) = draws(spec, 1)
    spec.check(node)
    with pytest.raises(ParamsError, match=r"missing \['0.bias'\]"):
        spec.check({name: value for name, value in node.items() if name != "0.bias"})
    with pytest.raises(ParamsError, match=r"unexpected \['more'\]"):
        spec.check({**node, "more": torch.zeros(1)})
    with pytest.raises(ParamsError, match=r"reply: '0.bias' has shape \(2,\), expected \(3,\)"):
        spec.check({**node, "0.bias": torch.zeros(2)}, "reply")


def test_only_floating_tensors_are_named_floating():
    (node,) = draws(convolutional(), 1)
    assert floating(node) == [name for name in node if name != "bn1.num_batches_tracked"]
