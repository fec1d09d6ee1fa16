"""Columns that nothing permutes count by products alone: fewer of them give the same match."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from c2m3_fl.core import Group, PermutationSpec, Segment, TensorSpec, join, match, problem
from c2m3_fl.core.condensed import condensed
from c2m3_fl.core.terms import Term, compile_terms
from tests.core.networks import planted

VOCABULARY, UNITS = 400, 6


def _text(kind: str = "permutation") -> PermutationSpec:
    """An embedding, a layer behind it and a head."""
    units, hidden = (Segment.contiguous("e", UNITS),), (Segment.contiguous("h", 5),)
    tensors = {
        "embedding": TensorSpec((VOCABULARY, UNITS), ((), units)),
        "layer": TensorSpec((5, UNITS), (hidden, units)),
        "head": TensorSpec((3, 5), ((), hidden)),
    }
    return PermutationSpec({"e": Group(UNITS, kind=kind), "h": Group(5)}, tensors)


def _products(value: Tensor) -> Tensor:
    """Inner products of rows of different nodes, (nodes, units, nodes, units)."""
    found = torch.einsum("iur,jvr->iujv", value.double(), value.double())
    each = torch.arange(len(value))
    found[each, :, each] = 0
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["apart", "alike", "dead units", "large", "small", "zero"])
def test_products_of_different_nodes_stay_and_columns_go(case: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(3, UNITS, VOCABULARY, generator=generator, dtype=dtype)
    if case == "alike":
        value = value[:1] + 1e-3 * value
    elif case == "dead units":
        value[1, 2] = value[2, 0] = 0
    value = value * {"large": 1e12, "small": 1e-12, "zero": 0.0}.get(case, 1.0)
    term = Term(("e",), value)
    fewer = condensed(term)
    assert fewer.value.shape == (3, UNITS, 3 * UNITS)
    assert fewer.value.dtype == dtype
    norms = value.double().square().sum(2).sqrt()
    scale = norms[:, :, None, None] * norms
    error = (_products(fewer.value) - _products(value)).abs()
    assert bool((error <= 1e-5 * scale).all())
    assert term.value is value


@pytest.mark.parametrize("kind", ["permutation", "orthogonal"])
def test_a_match_is_the_same_with_all_columns(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = _text(kind)
    nodes, _ = planted(spec, 4, 0.5, seed=1)
    found = match(spec, nodes)
    seen = []
    monkeypatch.setattr(problem, "condensed", lambda term: seen.append(condensed(term)) or term)
    whole = match(spec, nodes)
    assert [each.value.shape[-1] for each in seen if each.groups == ("e",)] == [4 * UNITS]
    for one, other in zip(found.permutations, whole.permutations, strict=True):
        torch.testing.assert_close(one["h"], other["h"], rtol=0, atol=0)
        torch.testing.assert_close(one["e"], other["e"], rtol=0, atol=0 if kind == "permutation" else 1e-4)
    assert found.objectives[-1] == pytest.approx(whole.objectives[-1], rel=1e-6)
    assert found.gap == pytest.approx(whole.gap, abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((3, UNITS, 4 * 3 * UNITS - 1), ("e",)),  # too few columns
        ((33, 2, VOCABULARY), ("e",)),  # too many nodes
        ((1, UNITS, VOCABULARY), ("e",)),  # nothing to agree with
        ((2, UNITS, VOCABULARY, 5), ("e", "h")),  # two groups
    ],
)
def test_terms_that_would_not_gain_stay(shape: tuple[int, ...], groups: tuple[str, ...]) -> None:
    term = Term(groups, torch.ones(shape))
    assert condensed(term) is term


def test_values_whose_products_overflow_stay() -> None:
    term = Term(("e",), torch.full((2, UNITS, VOCABULARY), 1e30))
    assert condensed(term) is term


def test_a_node_that_joins_is_compared_in_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = _text()
    nodes, _ = planted(spec, 3, 0.1, seed=2)
    monkeypatch.setattr(problem, "condensed", lambda _term: pytest.fail("a node that joins few passes are made of"))
    joined = join(spec, nodes[0], [nodes[1]])
    assert len(joined.permutations) == 1
    assert {term.groups for term in compile_terms(spec, nodes)} == {("e",), ("e", "h"), ("h",)}
