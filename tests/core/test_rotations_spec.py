"""Orthogonal groups in a spec: what contradicts itself, as JSON, and in words."""

from __future__ import annotations

import json

import numpy as np
import pytest

from c2m3_fl.core.spec import Group, PermutationSpec, Segment, TensorSpec
from c2m3_fl.core.spec_json import from_json, to_json
from c2m3_fl.errors import SpecError
from tests.core.networks import ALL, mlp, on
from tests.core.rotating import attention


def test_json_and_back_keeps_the_kinds() -> None:
    spec = attention()
    back = from_json(to_json(spec))
    assert back == spec
    assert {name: group.kind for name, group in back.groups.items()} == {
        "stream": "centred",
        "head": "permutation",
        "qk": "orthogonal",
        "vo": "orthogonal",
        "hidden": "permutation",
    }
    assert back.rotations == ("stream", "qk", "vo")


def test_older_readers_do_not_take_rotations_for_permutations() -> None:
    assert json.loads(to_json(attention()))["format"] == "c2m3-fl permutation spec 3"
    assert all(json.loads(to_json(spec))["format"] == "c2m3-fl permutation spec 2" for spec in ALL.values())


def test_a_description_names_the_kinds_where_they_differ() -> None:
    lines = str(attention()).splitlines()
    assert lines[0] == "5 groups (2 nested); permutations and rotations move 99.09 % of 329 parameters"
    assert lines[2].split() == ["group", "units", "kind", "members"]
    assert lines[3].split()[:3] == ["stream", "6", "centred"]
    assert lines[5].split()[:3] == ["qk", "2x3", "orthogonal"]
    assert "kind" not in str(mlp())


@pytest.mark.parametrize(
    ("groups", "tensor", "message"),
    [
        ({"p": Group(2, kind="orthogonal"), "g": Group(4, "p")}, None, "parent 'p' is orthogonal, expected perm"),
        (
            {"g": Group(4, kind="orthogonal"), "h": Group(2)},
            TensorSpec((8,), ((Segment("g", np.arange(8).reshape(4, 2), "h"),),)),
            "its slots cannot be units of 'h'",
        ),
        (
            {"g": Group(4, kind="centred")},
            TensorSpec((4, 2), (on("g", 4), ()), diagonal=2),
            "'w' axis 0 is block-diagonal, where groups permute",
        ),
    ],
)
def test_contradictions_are_refused(groups: dict[str, Group], tensor: TensorSpec | None, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        PermutationSpec(groups, {} if tensor is None else {"w": tensor})


def test_json_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(SpecError, match="of kind 'unitary', expected one of"):
        from_json(to_json(attention()).replace("centred", "unitary"))
