"""State dicts as wholes: compared, digested, put in order, moved, checked."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.errors import ParamsError

_AT_A_TIME = 1 << 20  # elements whose squares are added up in their own precision


def same(one: Params, other: Params) -> bool:
    """Whether two state dicts are equal, bit for bit."""
    return all(torch.equal(one[name], other[name]) for name in one)


def to_device(params: Params, device: torch.device) -> dict[str, Tensor]:
    """The state dict on a device, without gradients."""
    return {name: value.detach().to(device) for name, value in params.items()}


def check_finite(params: Params, who: str = "") -> None:
    """Raise `ParamsError` naming the first floating tensor that holds NaN or an infinity."""
    for name, value in params.items():
        if not value.is_floating_point() or math.isfinite(float(value.sum())):
            continue  # a finite sum has finite terms; one that is not may still have overflowed
        if not bool(torch.isfinite(value).all()):
            count = int((~torch.isfinite(value)).sum())
            prefix = f"{who}: " if who else ""
            raise ParamsError(f"{prefix}{name!r} has {count} values that are NaN or infinite, expected finite numbers")


def norm(params: Params) -> float:
    """Norm of all floating tensors together; of any size that double precision holds."""
    return math.hypot(*(_size(value) for value in params.values() if value.is_floating_point()))


def _size(value: Tensor) -> float:
    """Norm of a tensor: at single precision, ten times as fast, unless squares overflow or vanish there."""
    flat = value.detach().reshape(-1).to(torch.promote_types(value.dtype, torch.float32))
    single = math.sqrt(sum(float(part.dot(part)) for part in torch.split(flat, _AT_A_TIME)))
    return single if 0 < single < math.inf else float(torch.linalg.vector_norm(value, dtype=torch.float64))


def digest(params: Params) -> str:
    """Digest of a state dict's content; the same for equal tensors under equal names."""
    state = hashlib.sha256()
    for name in sorted(params):
        value = params[name]
        state.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        state.update(_bytes(value))
    return state.hexdigest()


def ordering_digest(params: Params) -> str:
    """Digest of a state dict's content that sorts by the floating tensors first.

    Counters of batches change nothing that is computed, and strategies round their mean differently: they decide the
    order only of networks that agree in everything else.
    """
    floating = {name: value for name, value in params.items() if value.is_floating_point()}
    return digest(floating) + digest({name: params[name] for name in params.keys() - floating.keys()})


def order_by_weight(nodes: Sequence[Params], weights: Tensor) -> list[int]:
    """Indices of the nodes, the heaviest first, ties by their `ordering_digest`.

    Independent of the order in which the nodes came in: sums of floats depend on their order, and so would
    everything that is made of them. For networks that share a basis.
    """
    digests = [ordering_digest(node) for node in nodes]
    return sorted(range(len(nodes)), key=lambda index: (-float(weights[index]), digests[index]))


def order_by_units(
    spec: PermutationSpec, nodes: Sequence[Params], weights: Tensor, start: Sequence[Permutation] | None = None
) -> tuple[int, ...]:
    """Indices of the nodes, sorted by a checksum that does not depend on the order of their units either.

    For networks that are to be matched: permuting a node's units leaves its place unchanged. Only nodes that the
    checksum cannot tell apart are sorted by their bytes.
    """
    keys = [
        (*(_checksum(node[name]) for name in spec.tensors), float(w)) for node, w in zip(nodes, weights, strict=True)
    ]
    twins = {key for key, count in Counter(keys).items() if count > 1}

    def key(index: int) -> tuple[tuple[float, ...], str]:
        if keys[index] not in twins:
            return keys[index], ""
        state = hashlib.sha256()
        for name in spec.tensors:
            state.update(_bytes(nodes[index][name]))
        if start is not None:
            for name in spec.groups:
                state.update(_bytes(start[index][name]))
        return keys[index], state.hexdigest()

    return tuple(sorted(range(len(nodes)), key=key))


def _checksum(value: Tensor) -> int:
    """Sum of the values' bit patterns, modulo a power of two: exact, so it does not depend on their order."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(value.element_size(), torch.int64)
    bits = value.detach().contiguous().view(width)
    return int(bits.sum(dtype=torch.int64 if bits.element_size() < 4 else width))


def _bytes(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
