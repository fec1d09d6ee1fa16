"""Tracing finds the groups that a knowledgeable reader expects, in every family."""

from __future__ import annotations

import re

import pytest

from c2m3_fl.core.spec import PermutationSpec
from tests.symmetry.expected import EXPECTED
from tests.symmetry.families import SMALL, traced


def outline(spec: PermutationSpec) -> dict[str, str]:
    """Every group in the words of `EXPECTED`."""
    found = {}
    for name, group in spec.groups.items():
        places = dict.fromkeys(place for place in spec.members(name) if len(spec.tensors[place[0]].shape) > 1)
        held = f" in {group.parent}" if group.parent else ""
        found[name] = " ".join([f"{group.size}{held} =", *(f"{tensor}:{axis}" for tensor, axis in places)])
    return found


def parse(text: str) -> dict[str, str]:
    """Groups by name; indented lines continue the one before."""
    joined = re.sub(r"\s+", " ", text).strip()
    pattern = r"(\S+) (\d+(?: in \S+)? =(?: \S+:\d+)*)"
    return dict(re.findall(pattern, joined))


def test_every_family_is_described() -> None:
    assert set(EXPECTED) == set(SMALL)


@pytest.mark.parametrize("family", EXPECTED)
def test_traced_groups_are_the_expected_ones(family: str) -> None:
    assert outline(traced(family).spec) == parse(EXPECTED[family])


@pytest.mark.parametrize("family", [name for name in SMALL if name.startswith(("grouped-query", "multi-query"))])
def test_queries_move_among_those_that_share_their_key_and_inside_each_as_the_key_does(family: str) -> None:
    spec = traced(family).spec
    (axis,) = (tensor.axes[1] for name, tensor in spec.tensors.items() if name.endswith("attn.o.weight"))
    heads = 3 if family == "multi-query" else 6
    assert [(segment.size, segment.inner, bool(segment.slots)) for segment in axis] == [(heads, 4, True)]
    assert not [pin for pin in spec.pins if "attn" in pin.tensor]
