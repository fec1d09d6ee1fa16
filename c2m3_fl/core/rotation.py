"""Orthogonal matrices of one group: the best one for a gradient, random ones, and how they act on an axis.

A rotation (here any orthogonal matrix) is in matrix form what a permutation is in index form: ``matrix @ w`` takes a
node's coordinates into the universe. A *centred* one fixes the vector of ones. In a nested group it is a matrix over
all units with one orthogonal block in every row and column of blocks, where the matrix of the parent has its ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from c2m3_fl.core.axes import Group, Segment
from c2m3_fl.errors import ParamsError, SpecError

Matrix = npt.NDArray[np.float64]

_ROUNDING = 8  # units of rounding, relative to the norm, below which antisymmetric parts and singular values are zero
_ORTHOGONAL = 1e-6  # how far the entries of P P^T may be from the identity's


def polar(gain: npt.NDArray[Any], centred: bool = False) -> Matrix:
    """The orthogonal matrices P that maximise ``<gain, P>``: the polar factors of linear functionals.

    What a functional does not see, its null space, moves as little as it can; where it is symmetric and positive
    semidefinite up to rounding, the answer is the identity, exactly.

    Parameters
    ----------
    gain : ndarray, shape (..., size, size)
        A stack of functionals.
    centred : bool
        Whether the matrices have to fix the vector of ones.

    Returns
    -------
    ndarray of float64, shape (..., size, size)

    Raises
    ------
    ParamsError
        When a functional is not finite.
    """
    if not np.isfinite(gain).all():
        raise ParamsError("the agreement overflows: the nodes' values are too large for their dtype, scale them down")
    functional = gain.astype(np.float64)
    least = _ROUNDING * float(np.finfo(gain.dtype).eps) * np.linalg.norm(functional, axis=(-2, -1))
    if not centred:
        return _polar(functional, least)[0]
    size = gain.shape[-1]
    if size == 1:
        return np.ones_like(functional)  # nothing but the vector of ones
    others = _apart_from_ones(size)
    inner, still = _polar(others.T @ functional @ others, least)
    found: Matrix = others @ inner @ others.T + 1 / size
    found[still] = np.eye(size)
    return found


def _polar(functional: Matrix, least: npt.NDArray[np.float64]) -> tuple[Matrix, npt.NDArray[np.bool_]]:
    """The polar factors, and which of them are the identity; singular values up to `least` are zero."""
    left, values, right = np.linalg.svd(functional)
    found: Matrix = left @ right
    still = np.zeros(least.shape, dtype=bool)
    for where in np.ndindex(least.shape):
        still[where] = _is_symmetric(functional[where], float(least[where]))
        if still[where]:
            found[where] = np.eye(functional.shape[-1])
        elif values[where][-1] <= least[where]:
            found[where] = _completed(left[where], int((values[where] > least[where]).sum()), right[where])
    return found, still


def _apart_from_ones(size: int) -> Matrix:
    """An orthonormal basis of what is orthogonal to the vector of ones, shape (size, size - 1): a reflection's."""
    mirror = np.full((size, 1), size**-0.5)
    mirror[0] -= 1.0  # between the first axis and the vector of ones
    squared = float((mirror**2).sum())
    reflection = np.eye(size) - (2 / squared if squared > 0 else 0.0) * mirror @ mirror.T
    return np.asarray(reflection[:, 1:])


def _is_symmetric(functional: Matrix, least: float) -> bool:
    """Whether a functional is symmetric and positive semidefinite up to rounding: then the identity is best."""
    if np.abs(functional - functional.T).max() > least:
        return False
    return bool(np.linalg.eigvalsh(functional)[0] >= -least)


def _completed(left: Matrix, rank: int, right: Matrix) -> Matrix:
    """The orthogonal matrix nearest to the identity that takes the first right singular vectors to the left ones."""
    rest, onto = left[:, rank:], right[rank:]
    inner, _, outer = np.linalg.svd(rest.T @ onto.T)
    found: Matrix = left[:, :rank] @ right[:rank] + rest @ (inner @ outer) @ onto
    return found


def spread(outer: npt.NDArray[np.int64], blocks: Matrix) -> Matrix:
    """The matrix of a nested group, of blocks that the parent's permutation pairs; ``blocks[u, outer[u]]`` are used."""
    count, size = len(outer), blocks.shape[-1]
    whole = np.zeros((count, size, count, size))
    whole[np.arange(count), :, outer] = blocks[np.arange(count), outer]
    return whole.reshape(count * size, count * size)


def random_matrix(group: Group, outer: Tensor | None, generator: torch.Generator) -> Tensor:
    """A uniformly drawn matrix of a group, float64; `outer` is the parent's permutation of a nested one."""
    blocks = 1 if outer is None else len(outer)
    size = group.size // blocks
    normal = torch.randn(blocks, size, size, generator=generator, dtype=torch.float64).numpy()
    drawn = polar(normal, group.kind == "centred")
    if outer is None:
        return torch.from_numpy(drawn[0])
    return torch.from_numpy(spread(outer.cpu().numpy(), np.broadcast_to(drawn[:, None], (blocks, blocks, size, size))))


def identity_matrix(size: int) -> Tensor:
    """The matrix that rotates nothing, float64."""
    return torch.eye(size, dtype=torch.float64)


def is_identity_matrix(matrix: Tensor) -> bool:
    """Whether nothing rotates."""
    return torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device))


def displacement(matrix: Tensor, before: Tensor) -> Tensor:
    """Half the squared distance of matrices, shape (..., size, size): for permutations, the number of units moved."""
    return 0.5 * (matrix - before).square().sum((-2, -1), dtype=torch.float64)


def check_matrix(group: Group, matrix: Tensor, outer: Tensor | None, where: str) -> None:
    """Raise `SpecError` unless a matrix is one that the group allows; `outer` is the parent's permutation."""
    if matrix.shape != (group.size, group.size) or not matrix.is_floating_point():
        raise SpecError(
            f"{where} has a {str(matrix.dtype).removeprefix('torch.')} tensor of shape {tuple(matrix.shape)}, expected "
            f"an orthogonal matrix of shape {(group.size, group.size)}"
        )
    wide = matrix.double().cpu()
    apart = float((wide @ wide.T - identity_matrix(group.size)).abs().max())
    if not apart <= _ORTHOGONAL:
        raise SpecError(f"{where} is off by {apart:.1e} from an orthogonal matrix, expected at most {_ORTHOGONAL:.0e}")
    if group.kind == "centred" and not float((wide.sum(1) - 1).abs().max()) <= _ORTHOGONAL * group.size:
        raise SpecError(f"{where} does not fix the vector of ones, which its group's matrices have to")
    if outer is not None:
        count = len(outer)
        blocks = wide.reshape(count, group.size // count, count, -1).abs().amax((1, 3))
        blocks[torch.arange(count), outer.cpu()] = 0
        if float(blocks.max()) > _ORTHOGONAL:
            raise SpecError(f"{where} mixes the blocks of its parent {group.parent!r}")


def rotate(value: Tensor, dim: int, segment: Segment, matrices: Mapping[str, Tensor]) -> Tensor:
    """Rotate the coordinates of a segment along a dimension; the value itself where no group of it rotates.

    Parameters
    ----------
    value : Tensor of float64
        What is rotated; not mutated.
    dim : int
        The dimension that the segment lies on.
    segment : Segment
        Its group rotates, or its slots do.
    matrices : mapping of str to Tensor of float64, shape (size, size)
        The matrices of the groups that rotate.
    """
    positions = torch.from_numpy(segment.positions).to(value.device)
    units = value.index_select(dim, positions.reshape(-1)).movedim(dim, 0)
    if segment.group in matrices:
        turned = matrices[segment.group].to(units) @ units.reshape(segment.size, -1)
    elif segment.slots in matrices:
        matrix, inner = matrices[segment.slots].to(units), segment.inner
        within = matrix.reshape(-1, inner, len(matrix) // inner, inner).sum(2)  # of the block at each place
        turned = within[:, None] @ units.reshape(len(within), -1, inner, units[0].numel())
    else:
        return value
    return value.index_copy(dim, positions.reshape(-1), turned.reshape(units.shape).movedim(0, dim))
