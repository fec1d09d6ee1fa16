"""Activations of units on calibration data, and the maps between nodes that fit them: permutations and CCA.

For permutations, activations are the outputs of operators, before any nonlinearity, standardised per channel; the units
of a group are compared on all operators whose output channels belong to the group. Rotations do not commute with a
scale per channel: coordinates that rotate are divided by their mean spread. For linear maps, the inputs of all
operators that read the group, after the nonlinearity, are used as well, and nothing is standardised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from c2m3_fl.core.assignment import assignment_pool, oracle
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.places import permute
from c2m3_fl.core.spec import Axis, Params, PermutationSpec
from c2m3_fl.errors import ConfigError
from c2m3_fl.network.calibration import Batch
from c2m3_fl.network.operators import OUTPUT_AXIS, Operator
from c2m3_fl.network.program import Program, Walk
from c2m3_fl.network.rows import output_rows, sample_positions

_POSITIONS = 4096  # drawn per operator and batch
_CONSTANT = 1e-9  # a layer whose spread, relative to the other node's, is smaller varies by rounding alone
_ROUNDS = 50  # limit of passes of the universe-wide search, which converges after a few

Features = dict[str, Tensor]  # per group, shape (samples, units)


def unit_features(
    spec: PermutationSpec, programs: Sequence[Program], batches: Sequence[Batch], params: Params
) -> Features:
    """Standardised outputs of every group's units on the calibration data, shape (samples, units) per group.

    Coordinates of an orthogonal group have one scale together.

    Parameters
    ----------
    spec : PermutationSpec
        The network's symmetries.
    programs : sequence of Program
        The exported network, one entry per batch.
    batches : sequence of Batch
        Calibration data.
    params : mapping of str to Tensor
        State dict of the network.

    Raises
    ------
    ConfigError
        When a group is on no operator's output channels, so that its activations cannot be compared.
    """
    shown = []
    for axis, output in _values(spec, programs, batches, params, reads=False):
        spread = output.std(0, correction=0)
        for segment in axis:
            if spec.groups[segment.group].orthogonal:
                positions = torch.from_numpy(segment.positions.ravel()).to(spread.device)
                spread[positions] = spread[positions].square().mean().sqrt()
        shown.append((axis, (output - output.mean(0)) / torch.where(spread > 0, spread, 1.0)))
    return _by_group(spec, shown)


def two_sided_features(
    spec: PermutationSpec, programs: Sequence[Program], batches: Sequence[Batch], params: Params
) -> Features:
    """Outputs and inputs of every group's units, centred but not standardised, shape (samples, units) per group.

    A permutation commutes with the nonlinearity between the output of one operator and the input of the next; a linear
    map does not, so it is fitted to both. It does not commute with a scale per unit either, so nothing is standardised.
    Rows are divided by the square root of their number: products of features are then sums of covariances, one per
    operator, side and slot of the units.

    Parameters
    ----------
    spec, programs, batches, params
        As for `unit_features`.

    Raises
    ------
    ConfigError
        When no operator makes or reads the units of some group.
    """
    shown = [
        (axis, (value - value.mean(0)) / len(value) ** 0.5)
        for axis, value in _values(spec, programs, batches, params, reads=True)
    ]
    return _by_group(spec, shown)


def match_to(spec: PermutationSpec, reference: Features, features: Features) -> Permutation:
    """The permutation (or rotation) of each group under which units correlate best with the reference's.

    Parameters
    ----------
    spec : PermutationSpec
        The network's symmetries.
    reference : Features
        Features that units are matched to.
    features : Features
        Features of the node.
    """
    gains = {
        name: (reference[name].T @ features[name])[None].cpu()
        if name in features
        else torch.zeros(1, group.size, group.size, dtype=torch.float64)  # blocks are matched by the units inside them
        for name, group in spec.groups.items()
    }
    with assignment_pool() as pool:
        return {name: rows[0] for name, rows in oracle(spec, gains, pool).items()}


def match_all(spec: PermutationSpec, features: Sequence[Features], weights: Sequence[float]) -> tuple[Permutation, ...]:
    """Permutations into one universe: each node in turn matched to the weighted sum of the others, to a fixed point.

    The first node's order of units is the universe's; the sum of all pairs' correlations never falls.

    Parameters
    ----------
    spec : PermutationSpec
        The network's symmetries.
    features : sequence of Features
        One entry per node.
    weights : sequence of float
        The nodes' averaging weights.
    """
    perms = [match_to(spec, features[0], each) for each in features]
    total = {
        name: sum(
            (
                weight * _moved(each[name], perm[name])
                for each, perm, weight in zip(features, perms, weights, strict=True)
            ),
            torch.zeros_like(features[0][name]),
        )
        for name in features[0]
    }
    for _ in range(_ROUNDS):
        changed = False
        for index in range(1, len(features)):
            own, weight = features[index], weights[index]
            others = {name: total[name] - weight * _moved(own[name], perms[index][name]) for name in own}
            found = match_to(spec, others, own)
            if _score(others, own, found) > _score(others, own, perms[index]):
                perms[index], changed = found, True
                total = {name: others[name] + weight * _moved(own[name], found[name]) for name in own}
        if not changed:
            break
    return tuple(perms)


def canonical_map(reference: Tensor, features: Tensor, regularisation: float) -> Tensor:
    """The linear map that takes units of `features` into the basis of `reference`, by regularised CCA.

    With the whitened cross-covariance ``U S Vᵀ``, the map sends the canonical directions of one side to those of the
    other: ``features @ mapᵀ`` has the reference's basis (Horoi et al. 2024, arXiv 2407.05385, equation 5). If one side
    varies by rounding alone, the map is the identity.

    Parameters
    ----------
    reference : Tensor, shape (samples, units)
        Centred features of the node whose basis is kept.
    features : Tensor, shape (samples, units)
        Centred features of the node that is mapped.
    regularisation : float
        Added to the diagonals of the covariances, as a share of the units' mean variance.
    """
    if hardly_varies(reference, features):
        return torch.eye(reference.shape[1]).to(reference)
    root, unroot = _roots(_regularised(reference, regularisation))
    _, whiten = _roots(_regularised(features, regularisation))
    left, _, right = torch.linalg.svd(unroot @ (reference.T @ features) @ whiten)
    result: Tensor = root @ left @ right @ whiten
    return result


def hardly_varies(reference: Tensor, features: Tensor) -> bool:
    """Whether one node's units vary by rounding alone, relative to the other node's."""
    low, high = sorted((float(reference.norm()), float(features.norm())))
    return low <= _CONSTANT * high


def _regularised(features: Tensor, share: float) -> Tensor:
    """Products of units, with a share of their mean square on the diagonal."""
    products = features.T @ features
    return products + share * products.diagonal().mean() * torch.eye(len(products)).to(products)


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a positive definite matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _moved(features: Tensor, index: Tensor) -> Tensor:
    """Features of units in another order, or rotated, by an index or a matrix that is on the CPU."""
    return permute(features, 1, index.to(features.device))


def _score(others: Mapping[str, Tensor], own: Features, perm: Permutation) -> float:
    return sum(float((others[name] * _moved(own[name], perm[name])).sum()) for name in own)


def _values(
    spec: PermutationSpec, programs: Sequence[Program], batches: Sequence[Batch], params: Params, *, reads: bool
) -> list[tuple[Axis, Tensor]]:
    """Outputs, and with `reads` inputs, of the operators whose channels are units, at drawn positions, in one pass.

    Every entry has the segments of its channels, and one row per position of every batch.
    """
    found: dict[tuple[str, int], tuple[Axis, list[Tensor]]] = {}
    for index, (program, batch) in enumerate(zip(programs, batches, strict=True)):
        walk = Walk(program, params, batch)
        for operator in program.operators:
            if operator.kind not in OUTPUT_AXIS:
                continue
            made = OUTPUT_AXIS[operator.kind]
            for side in (1 - made, made) if reads else (made,):
                axis = spec.tensors[operator.weight].axes[side]
                if axis:
                    value = walk.output(operator) if side == made else _input(walk, operator)
                    rows = output_rows(operator, value, sample_positions(operator, value, _POSITIONS, index))
                    found.setdefault((operator.name, side), (axis, []))[1].append(rows)
    return [(axis, torch.cat(rows).double()) for axis, rows in found.values()]


def _input(walk: Walk, operator: Operator) -> Tensor:
    walk.advance(operator.index)
    result: Tensor = walk.value(operator.input)
    return result


def _by_group(spec: PermutationSpec, shown: Sequence[tuple[Axis, Tensor]]) -> Features:
    """Concatenate the rows of all operators, per group."""
    rows: dict[str, list[Tensor]] = {}
    for axis, values in shown:
        for segment in axis:
            positions = torch.from_numpy(segment.positions).to(values.device)
            units = values[:, positions]
            if segment.slots:  # their order may differ between nodes, so compare their norm
                units = units.norm(dim=2, keepdim=True)
                units -= units.mean(0)
            rows.setdefault(segment.group, []).append(units.transpose(1, 2).reshape(-1, segment.size))
    hidden = [name for name in spec.groups if name not in rows and not spec.children(name)]
    if hidden:
        raise ConfigError(
            f"no operator has the units of group {hidden[0]!r} as its channels, so activations cannot match them; "
            "use a method that compares weights, such as 'c2m3'"
        )
    return {name: torch.cat(rows[name]) for name in spec.groups if name in rows}
