"""Rotations as a group of symmetries: how they act, how they compose, and the oracle that finds the best one."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.assignment import assign_nested, assignment_pool, oracle
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.rotation import polar
from c2m3_fl.core.spec import Group, Params, PermutationSpec, TensorSpec
from c2m3_fl.errors import ParamsError, SpecError
from tests.core.networks import on
from tests.core.rotating import ROTATING, attend, attention, draw

each_spec = pytest.mark.parametrize("spec", ROTATING.values(), ids=ROTATING)


def drawn(spec: PermutationSpec, seed: int) -> dict[str, Tensor]:
    return permutation.random(spec, torch.Generator().manual_seed(seed))


def apart(one: Params | Permutation, other: Params | Permutation) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_rotated_network_computes_the_same(heads: int, blocks: int) -> None:
    spec = attention(6, heads, 8, blocks)
    params = draw(spec, 0)
    inputs = torch.randn(5, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moved = permutation.apply(spec, drawn(spec, 2), params)
    assert apart(moved, params) > 1
    there, here = (attend(each, inputs, heads, blocks) for each in (moved, params))
    torch.testing.assert_close(there, here, rtol=1e-11, atol=1e-11)


def test_a_rotation_that_moves_the_vector_of_ones_is_no_symmetry_of_a_layer_norm() -> None:
    spec, params = attention(), draw(attention(), 0)
    free = permutation.random(PermutationSpec({"stream": Group(6, kind="orthogonal")}, {}), torch.Generator())
    inputs = torch.randn(5, 7, 4, dtype=torch.float64)
    moved = permutation.apply(spec, {**permutation.identity(spec), **free}, params)
    assert float((attend(moved, inputs) - attend(params, inputs)).abs().max()) > 0.1


@each_spec
def test_drawn_rotations_are_of_the_spec(spec: PermutationSpec) -> None:
    for seed in range(5):
        permutation.validate(spec, drawn(spec, seed))


@each_spec
def test_group_axioms(spec: PermutationSpec) -> None:
    params, first, second = draw(spec, 0), drawn(spec, 1), drawn(spec, 2)
    one_by_one = permutation.apply(spec, second, permutation.apply(spec, first, params))
    assert apart(one_by_one, permutation.apply(spec, permutation.compose(second, first), params)) < 1e-12
    home = permutation.compose(first, permutation.invert(first))
    assert apart(home, permutation.identity(spec)) < 1e-12
    assert (
        apart(permutation.apply(spec, permutation.invert(first), permutation.apply(spec, first, params)), params)
        < 1e-12
    )


@each_spec
def test_the_identity_returns_the_tensors_themselves(spec: PermutationSpec) -> None:
    params, still = draw(spec, 0, torch.float32), permutation.identity(spec)
    moved = permutation.apply(spec, still, params)
    assert all(moved[name] is params[name] or torch.equal(moved[name], params[name]) for name in params)
    assert permutation.is_identity(still)
    assert permutation.share_moved(still) == 0


@each_spec
def test_norms_do_not_change(spec: PermutationSpec) -> None:
    params = draw(spec, 0)
    moved = permutation.apply(spec, drawn(spec, 1), params)
    for name, value in params.items():
        assert float(moved[name].norm()) == pytest.approx(float(value.norm()), rel=1e-12)


def test_a_permutation_in_matrix_form_moves_what_the_index_does() -> None:
    index = torch.tensor([2, 0, 3, 1, 4])
    rotating = PermutationSpec({"g": Group(5, kind="orthogonal")}, {"w": TensorSpec((3, 5), ((), on("g", 5)))})
    moving = PermutationSpec({"g": Group(5)}, rotating.tensors)
    params = draw(moving, 0)
    matrix = torch.eye(5, dtype=torch.float64)[index]
    assert (
        apart(permutation.apply(rotating, {"g": matrix}, params), permutation.apply(moving, {"g": index}, params))
        < 1e-15
    )
    assert permutation.share_moved({"g": matrix}) == pytest.approx(permutation.share_moved({"g": index}))


def bad_matrices() -> list[tuple[str, Tensor, str]]:
    skew = torch.eye(6, dtype=torch.float64)
    skew[0, 1] = 0.01
    stream = drawn(PermutationSpec({"g": Group(6, kind="orthogonal")}, {}), 0)["g"]
    return [
        ("qk", torch.arange(6), "has a int64 tensor of shape .6,., expected an orthogonal matrix of shape .6, 6."),
        ("qk", skew, "off by 1.0e-02 from an orthogonal matrix"),
        ("stream", stream, "does not fix the vector of ones"),
        ("vo", stream, "mixes the blocks of its parent 'head'"),
    ]


@pytest.mark.parametrize(("name", "matrix", "message"), bad_matrices())
def test_other_matrices_are_refused(name: str, matrix: Tensor, message: str) -> None:
    spec = attention()
    with pytest.raises(SpecError, match=message):
        permutation.validate(spec, {**permutation.identity(spec), name: matrix}, "start[0]")


def test_integer_tensors_do_not_rotate() -> None:
    spec = PermutationSpec({"g": Group(2, kind="orthogonal")}, {"w": TensorSpec((2,), (on("g", 2),))})
    with pytest.raises(ParamsError, match=r"int64 and shape \(2,\) cannot rotate"):
        permutation.apply(spec, drawn(spec, 0), {"w": torch.arange(2)})


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_no_rotation_is_better_than_the_polar_factor(size: int, centred: bool) -> None:
    spec = PermutationSpec({"g": Group(size, kind="centred" if centred else "orthogonal")}, {})
    gain = np.random.default_rng(size).normal(size=(size, size))
    best = polar(gain, centred)
    permutation.validate(spec, {"g": torch.from_numpy(best)})
    assert all((gain * drawn(spec, seed)["g"].numpy()).sum() <= (gain * best).sum() + 1e-12 for seed in range(50))
    if not centred:
        assert (gain * best).sum() == pytest.approx(np.linalg.svd(gain)[1].sum())


@pytest.mark.parametrize("size", [2, 8, 40])
def test_singular_values_that_fade_into_rounding_leave_the_vector_of_ones_fixed(size: int) -> None:
    spec = PermutationSpec({"g": Group(size, kind="centred")}, {})
    for seed in range(10):
        left, right = np.linalg.qr(np.random.default_rng(seed).normal(size=(2, size, size)))[0]
        best = polar(left * 10.0 ** np.linspace(0, -20, size) @ right, centred=True)
        permutation.validate(spec, {"g": torch.from_numpy(best)})
        np.testing.assert_allclose(best.sum(1), 1, atol=1e-12)


def test_procrustes() -> None:
    left, right = np.random.default_rng(0).normal(size=(2, 7, 4))
    np.testing.assert_allclose(polar(left.T @ right), orthogonal_procrustes(right, left)[0].T, atol=1e-12)


@pytest.mark.parametrize("centred", [False, True])
def test_a_symmetric_positive_semidefinite_gradient_moves_nothing(centred: bool) -> None:
    for seed in range(5):
        rows = np.random.default_rng(seed).normal(size=(6, 3)).astype(np.float32)  # of rank three
        assert np.array_equal(polar(rows @ rows.T, centred), np.eye(6))
    assert np.array_equal(polar(np.zeros((3, 3)), centred), np.eye(3))
    assert not np.array_equal(polar(-np.eye(3), centred), np.eye(3))


def test_what_the_gradient_does_not_see_stays_in_place() -> None:
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    gain = np.zeros((5, 5))
    gain[:2, :2] = turn
    expected = np.eye(5)
    expected[:2, :2] = turn
    np.testing.assert_allclose(polar(gain), expected, atol=1e-15)


def test_the_signs_of_singular_vectors_do_not_matter() -> None:
    """Nearby gradients have nearby answers, whatever the signs that LAPACK chose."""
    gain = np.random.default_rng(1).normal(size=(8, 8))
    np.testing.assert_allclose(polar(gain), polar(gain + 1e-12), atol=1e-10)
    assert np.array_equal(polar(gain), polar(gain.copy()))
    np.testing.assert_array_equal(polar(np.stack([gain, -gain]))[0], polar(gain))


def test_heads_are_paired_by_the_nuclear_norms_of_their_blocks() -> None:
    heads, size = 4, 3
    generator = np.random.default_rng(0)
    own, qk, vo = generator.normal(size=(heads, heads)), *generator.normal(size=(2, heads * size, heads * size))
    groups = {"qk": Group(12, "head", "orthogonal"), "vo": Group(12, "head", "orthogonal")}
    outer, inner = assign_nested(own, {"qk": qk, "vo": vo}, groups)

    def worth(order: tuple[int, ...]) -> float:
        blocks = [each[3 * u : 3 * u + 3, 3 * v : 3 * v + 3] for u, v in enumerate(order) for each in (qk, vo)]
        pairs = sum(own[u, v] for u, v in enumerate(order))
        return float(pairs + sum(np.linalg.svd(block)[1].sum() for block in blocks))

    orders = list(permutations(range(heads)))
    assert tuple(outer) == max(orders, key=worth)
    total = own[np.arange(heads), outer].sum() + (qk * inner["qk"]).sum() + (vo * inner["vo"]).sum()
    assert total == pytest.approx(max(map(worth, orders)))


@each_spec
def test_the_oracle_answers_with_elements_of_the_spec(spec: PermutationSpec) -> None:
    generator = torch.Generator().manual_seed(0)
    gains = {name: torch.randn(2, each.size, each.size, generator=generator) for name, each in spec.groups.items()}
    with assignment_pool() as pool:
        found = oracle(spec, gains, pool)
    for node in range(2):
        permutation.validate(spec, {name: rows[node] for name, rows in found.items()})


def test_gradients_that_overflow_are_refused() -> None:
    with pytest.raises(ParamsError, match="the agreement overflows"):
        polar(np.full((2, 2), np.inf))
