"""The group of permutations and rotations that a spec allows: identity, inverse, composition, action on params.

A permutation maps every group to an index tensor of shape ``(size,)``. Acting on a tensor gathers,
``w[perm]``; in matrix form ``matrix[u, perm[u]] = 1`` and ``matrix @ w`` is the same thing. Node i's
permutation takes its units *into* the universe, so ``perm[u]`` is the unit of node i that sits at
place u of the universe (the published paper's P is the transpose of ours).

An orthogonal group has the matrix itself instead of an index, in float64 and of shape ``(size, size)`` (`rotation`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from c2m3_fl.core.rotation import (
    check_matrix,
    displacement,
    identity_matrix,
    is_identity_matrix,
    random_matrix,
    rotate,
)
from c2m3_fl.core.spec import Axis, Params, PermutationSpec, TensorSpec
from c2m3_fl.errors import ParamsError, SpecError

Permutation = Mapping[str, Tensor]

_HOME = 1e-9  # how far a coordinate may be from home after a cycle of rotations and still count as home


def identity(spec: PermutationSpec) -> dict[str, Tensor]:
    """The permutation that moves nothing."""
    return {
        name: identity_matrix(group.size) if group.orthogonal else torch.arange(group.size)
        for name, group in spec.groups.items()
    }


def random(spec: PermutationSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """A uniformly drawn permutation; nested groups move inside the blocks of their parents."""
    perm = {
        name: random_matrix(spec.groups[name], None, generator)
        if spec.groups[name].orthogonal
        else torch.randperm(spec.groups[name].size, generator=generator)
        for name in spec.roots
    }
    for name, group in spec.groups.items():
        if group.parent is not None and group.orthogonal:
            perm[name] = random_matrix(group, perm[group.parent], generator)
        elif group.parent is not None:
            outer = perm[group.parent]
            block = group.size // len(outer)
            inner = torch.stack([torch.randperm(block, generator=generator) for _ in outer])
            perm[name] = (outer[:, None] * block + inner).reshape(-1)
    return {name: perm[name] for name in spec.groups}


def invert(perm: Permutation) -> dict[str, Tensor]:
    """Inverse: ``compose(perm, invert(perm))`` is the identity."""
    return {name: torch.argsort(index) if index.ndim == 1 else index.T.contiguous() for name, index in perm.items()}


def compose(outer: Permutation, inner: Permutation) -> dict[str, Tensor]:
    """Composition: ``apply(outer, apply(inner, w)) = apply(compose(outer, inner), w)``."""
    return {name: inner[name][index] if index.ndim == 1 else index @ inner[name] for name, index in outer.items()}


def between(to: Permutation, source: Permutation) -> dict[str, Tensor]:
    """The map from node `source` to node `to`, through the universe: ``P_to^T P_source``."""
    return compose(invert(to), source)


def is_identity(perm: Permutation) -> bool:
    """Whether nothing moves."""
    return not moving(perm)


def moving(perm: Permutation) -> list[str]:
    """The groups in which something moves."""
    if all(index.device.type == "cpu" for index in perm.values()):
        return [name for name, index in perm.items() if not stays(index)]
    found = [name for name, index in perm.items() if index.ndim > 1 and not stays(index)]
    flat = {name: index for name, index in perm.items() if index.ndim == 1}
    if flat:  # one look at the device for all of them
        parts = torch.split(torch.cat(list(flat.values())).cpu(), [len(index) for index in flat.values()])
        found += [name for name, part in zip(flat, parts, strict=True) if not stays(part)]
    return [name for name in perm if name in found]


def stays(index: Tensor) -> bool:
    """Whether nothing moves in one group."""
    if index.ndim > 1:
        return is_identity_matrix(index)
    return torch.equal(index, torch.arange(len(index), device=index.device))


def share_moved(perm: Permutation) -> float:
    """Share of all units, over all groups, that the permutation moves; 0 for a spec without groups.

    A rotation counts by half its squared distance from the identity: of a permutation, the number of units moved.
    """
    moved = sum(
        float(displacement(index, torch.eye(len(index), dtype=index.dtype, device=index.device)))
        if index.ndim > 1
        else int((index != torch.arange(len(index), device=index.device)).sum())
        for index in perm.values()
    )
    return min(moved / max(1, sum(len(index) for index in perm.values())), 1.0)


def cycle_error(perms: Sequence[Permutation]) -> int:
    """Number of units that do not return home around the cycle ``0 → 1 → … → 0``; zero by construction."""
    error = 0
    for name, index in perms[0].items():
        home = torch.arange(len(index)) if index.ndim == 1 else identity_matrix(len(index))
        around = {name: home}
        for source, target in zip(perms, [*perms[1:], perms[0]], strict=True):
            around = compose(between({name: target[name].cpu()}, {name: source[name].cpu()}), around)
        away = around[name] != home if index.ndim == 1 else ((around[name] - home).abs() > _HOME).any(1)
        error += int(away.sum())
    return error


def validate(spec: PermutationSpec, perm: Permutation, who: str = "permutation") -> None:
    """Raise `SpecError` unless `perm` is a permutation that the spec allows."""
    if set(perm) != set(spec.groups):
        raise SpecError(f"{who}: has groups {sorted(perm)}, expected {sorted(spec.groups)}")
    for name, group in spec.groups.items():
        outer = None if group.parent is None else perm[group.parent].cpu()
        if group.orthogonal:
            check_matrix(group, perm[name], outer, f"{who}: group {name!r}")
            continue
        index = perm[name].cpu()
        if index.shape != (group.size,) or not torch.equal(index.sort().values, torch.arange(group.size)):
            raise SpecError(f"{who}: group {name!r} is no permutation of its {group.size} units")
        if outer is not None:
            block = group.size // len(outer)
            if not torch.equal(index // block, outer.repeat_interleave(block)):
                raise SpecError(f"{who}: group {name!r} tears apart the blocks of its parent {group.parent!r}")


def apply(spec: PermutationSpec, perm: Permutation, params: Params) -> dict[str, Tensor]:
    """Act on every tensor: the same function of the inputs, its units in another order.

    Parameters
    ----------
    spec : PermutationSpec
        The symmetries of the network.
    perm : mapping of str to Tensor
        For every group an index tensor of shape (size,), or a matrix.
    params : mapping of str to Tensor
        The state dict; not mutated. Tensors that nothing moves are returned as they are.

    Raises
    ------
    ParamsError
        When the state dict or the permutation is not one of this spec.
    """
    _check_keys("permutation", perm, spec.groups)
    _check_keys("state dict", params, spec.tensors)
    return {name: apply_to_tensor(spec.tensors[name], perm, value) for name, value in params.items()}


class Moved(Mapping[str, Tensor]):
    """The same as `apply`, with every tensor computed when it is asked for: of many networks one tensor at a time.

    Parameters
    ----------
    spec, perm, params
        See `apply`.
    """

    def __init__(self, spec: PermutationSpec, perm: Permutation, params: Params) -> None:
        self._spec, self._perm, self._params = spec, perm, params

    def __getitem__(self, name: str) -> Tensor:
        return apply_to_tensor(self._spec.tensors[name], self._perm, self._params[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


def _check_keys(what: str, given: object, expected: Mapping[str, object]) -> None:
    if isinstance(given, Mapping) and set(given) <= set(expected):
        return
    found = f"keys such as {next(iter(given), None)!r}" if isinstance(given, Mapping) else f"a {type(given).__name__}"
    raise ParamsError(
        f"the {what} is not of this spec: got {found}, expected such as {next(iter(expected), None)!r}; "
        "the order is apply(spec, permutation, state_dict)"
    )


def apply_to_tensor(tensor: TensorSpec, perm: Permutation, value: Tensor) -> Tensor:
    """Act on one tensor of shape `tensor.shape`; rotations are computed in float64."""
    if tensor.diagonal > 1:
        return _apply_to_diagonal(tensor, perm, value)
    for dim, axis in enumerate(tensor.axes):
        if axis:
            value = value.index_select(dim, axis_index(axis, tensor.length(dim), perm).to(value.device))
    names = {group for _, segment in tensor.segments for group in segment.groups}
    turning = {name: perm[name] for name in names if perm[name].ndim > 1 and not stays(perm[name])}
    if not turning:
        return value
    if not value.is_floating_point():
        raise ParamsError(f"a tensor of {value.dtype} and shape {tuple(value.shape)} cannot rotate; pin its axes")
    wide = value.double()
    for dim, segment in tensor.segments:
        wide = rotate(wide, dim, segment, turning)
    return wide.to(value.dtype)


def axis_index(axis: Axis, length: int, perm: Permutation) -> Tensor:
    """Gather index of a whole axis, shape (length,); coordinates that rotate stay in order."""
    index = torch.arange(length)
    for segment in axis:
        positions = torch.from_numpy(segment.positions)
        order = perm[segment.group]
        source = positions if order.ndim > 1 else positions[order.cpu()]
        if segment.slots and perm[segment.slots].ndim == 1:
            inside = perm[segment.slots].cpu().reshape(-1, segment.inner) % segment.inner  # the order in every block
            source = source.gather(1, inside.repeat_interleave(segment.size // len(inside), dim=0))
        index[positions] = source
    return index


def _apply_to_diagonal(tensor: TensorSpec, perm: Permutation, value: Tensor) -> Tensor:
    """Act on the diagonal blocks of a block-diagonal tensor: every block of rows has columns of its own."""
    rows, columns, *rest = (axis_index(axis, tensor.length(dim), perm) for dim, axis in enumerate(tensor.axes))
    height, width = tensor.shape[:2]
    row_block = torch.arange(height) // (height // tensor.diagonal)
    source = columns.reshape(tensor.diagonal, width)[row_block]
    if not torch.equal(source // width, row_block[rows][:, None].expand_as(source)):
        raise SpecError("the rows and columns of a block-diagonal tensor move to different blocks; nest both groups")
    moved = value.index_select(0, rows.to(value.device))
    gather = (source % width).to(value.device).reshape(height, width, *(1,) * (value.ndim - 2))
    moved = moved.gather(1, gather.expand_as(moved))
    for dim, index in enumerate(rest, start=2):
        moved = moved.index_select(dim, index.to(value.device))
    return moved
