from __future__ import annotations

from pathlib import Path

import pytest

from c2m3_fl.core.spec import Group, PermutationSpec, Pin, Segment, TensorSpec
from c2m3_fl.core.spec_json import from_json, load_spec, save_spec, to_json
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
    assert load_spec(tmp_path / "spec.json") == spec


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


def test_segments_of_no_length_are_refused() -> None:
    spec = PermutationSpec({"a": Group(2)}, {"w": TensorSpec((2,), ((Segment.contiguous("a", 2),),))})
    with pytest.raises(SpecError, match="group 'a' has inner 0, expected a whole number"):
        from_json(to_json(spec).replace('"inner":1', '"inner":0'))


def test_contradictory_document_is_refused() -> None:
    text = to_json(PermutationSpec({}, {})).replace('"groups":{}', '"groups":{"a":{"size":2,"parent":"b"}}')
    with pytest.raises(SpecError, match="its parent 'b'"):
        from_json(text)
