from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from c2m3_fl.core.spec import Group, PermutationSpec, Pin, Segment, TensorSpec
from c2m3_fl.core.spec_json import from_json, save_spec, to_json
from c2m3_fl.errors import SpecError
from tests.core.networks import ALL


@pytest.mark.parametrize("spec", ALL.values(), ids=ALL)
def test_json_and_back_is_the_identity(spec: PermutationSpec) -> None:
    assert from_json(to_json(spec)) == spec


def test_documents_of_the_first_format_are_read() -> None:
    spec = ALL["attention"]
    assert from_json(to_json(spec).replace("permutation spec 2", "permutation spec 1")) == spec


def test_file_and_back_is_the_identity(tmp_path: Path) -> None:
    spec = PermutationSpec({}, {}, (Pin("a", 1, "reason", "aten.sort", "layers.0"),))
    save_spec(spec, tmp_path / "spec.json")
    assert from_json((tmp_path / "spec.json").read_text(encoding="utf-8")) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a permutation spec: Expecting"),
        ("[]", "format 'list'"),
        ('{"format": "other"}', "format 'other'"),
        ('{"format": "c2m3-fl permutation spec 1"}', "malformed entry .KeyError: 'groups'"),
    ],
)
def test_other_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        from_json(text)


def tiny(**tensor: object) -> str:
    """A document of one group of two units on one tensor."""
    entry = {"shape": [2], "axes": [[{"group": "a", "inner": 1, "offset": 0}]]} | tensor
    groups = {"a": {"size": 2, "parent": None}}
    return json.dumps({"format": "c2m3-fl permutation spec 2", "groups": groups, "tensors": {"w": entry}, "pins": []})


HUGE = 1_000_000_000
MALFORMED = {
    "a huge group": (tiny().replace('"size": 2', f'"size": {HUGE}'), "describes 1,000,000,000 units"),
    "a huge axis": (tiny(shape=[HUGE]), "axes of 1,000,000,000 coordinates in all, expected at most 33,554,432"),
    "a huge diagonal": (tiny(shape=[2, 2], diagonal=HUGE), "axes of 4,000,000,000 coordinates"),
    "a huge inner": (tiny().replace('"inner": 1', f'"inner": {HUGE}'), "has 2,000,000,000 coordinates, its axis has 2"),
    "a huge offset": (tiny().replace('"offset": 0', f'"offset": {HUGE}'), "ends at 1,000,000,002, its axis at 2"),
    "a negative offset": (tiny().replace('"offset": 0', '"offset": -1'), "has offset -1, expected a whole number"),
    "a size that is text": (tiny().replace('"size": 2', '"size": "2"'), "has size '2', expected a whole number"),
    "a size that is a fraction": (tiny().replace('"size": 2', '"size": 2.0'), "has size 2.0, expected a whole number"),
    "a size that is no number": (tiny().replace('"size": 2', '"size": NaN'), "has size nan, expected a whole number"),
    "a negative side": (tiny(shape=[-2]), "has a side of -2, expected a whole number"),
    "a shape that is text": (tiny(shape="2"), "has a side of '2'"),
    "groups that are a list": (tiny().replace('{"a": {"size": 2, "parent": null}}', "[]"), "malformed entry"),
    "a parent that is a list": (tiny().replace("null", "[]"), r"has parent \[\], expected a name"),
    "an axis too many": (tiny(axes=[[], []]), "'w' has 1 axes, the document describes 2"),
    "positions beyond int64": (tiny(axes=[[{"group": "a", "inner": 1, "positions": [0, 10**30]}]]), "malformed entry"),
    "positions that are text": (tiny(axes=[[{"group": "a", "inner": 1, "positions": "x"}]]), "malformed entry"),
    "pins that are a number": (tiny().replace('"pins": []', '"pins": 5'), "malformed entry"),
    "another group": (tiny(axes=[[{"group": "b", "inner": 1, "positions": [0]}]]), "names the group 'b'"),
    "nested 200,000 deep": ("[" * 200_000, "not a permutation spec: maximum recursion"),
    "a number of 5,000 digits": (tiny().replace("2,", "2" * 5000 + ",", 1), "not a permutation spec"),
}


@pytest.mark.parametrize(("text", "message"), MALFORMED.values(), ids=MALFORMED)
def test_sizes_and_types_are_checked_before_memory_is_taken(text: str, message: str) -> None:
    tracemalloc.start()
    with pytest.raises(SpecError, match=message):
        from_json(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000  # bytes; the first document asks for 8e9


def test_the_document_that_the_others_are_made_of_is_read() -> None:
    assert from_json(tiny()).groups == {"a": Group(2)}


def test_segments_of_no_length_are_refused() -> None:
    spec = PermutationSpec({"a": Group(2)}, {"w": TensorSpec((2,), ((Segment.contiguous("a", 2),),))})
    with pytest.raises(SpecError, match="group 'a' has inner 0, expected a whole number"):
        from_json(to_json(spec).replace('"inner":1', '"inner":0'))


def test_contradictory_document_is_refused() -> None:
    text = to_json(PermutationSpec({}, {})).replace('"groups":{}', '"groups":{"a":{"size":2,"parent":"b"}}')
    with pytest.raises(SpecError, match="its parent 'b'"):
        from_json(text)
