"""Small networks with orthogonal groups, written by hand: their specs, and what they compute."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, relu

from c2m3_fl.core.spec import Axis, Group, Params, PermutationSpec, TensorSpec
from tests.core.networks import on
from tests.core.networks import shared_keys as permuted_shared_keys

INPUTS, CLASSES = 4, 3


def _linear(name: str, rows: int, columns: int, out: Axis, into: Axis) -> dict[str, TensorSpec]:
    return {f"{name}.weight": TensorSpec((rows, columns), (out, into)), f"{name}.bias": TensorSpec((rows,), (out,))}


def attention(width: int = 6, heads: int = 2, hidden: int = 8, blocks: int = 1) -> PermutationSpec:
    """A pre-norm transformer whose norms were folded: a stream, heads that hold two rotations, and hidden units."""
    groups = {"stream": Group(width, kind="centred")}
    stream = on("stream", width)
    tensors = _linear("embed", width, INPUTS, stream, ())
    for number in range(blocks):
        end = str(number) if blocks > 1 else ""
        head, qk, vo, units = (f"{name}{end}" for name in ("head", "qk", "vo", "hidden"))
        groups |= {head: Group(heads), qk: Group(width, head, "orthogonal"), vo: Group(width, head, "orthogonal")}
        groups[units] = Group(hidden)
        for name, group in (("q", qk), ("k", qk), ("v", vo)):
            tensors |= _linear(f"{name}{end}", width, width, on(group, width), stream)
        tensors |= _linear(f"o{end}", width, width, stream, on(vo, width))
        tensors |= _linear(f"up{end}", hidden, width, on(units, hidden), stream)
        tensors |= _linear(f"down{end}", width, hidden, stream, on(units, hidden))
    return PermutationSpec(groups, tensors | _linear("out", CLASSES, width, (), stream))


def attend(params: Params, inputs: Tensor, heads: int = 2, blocks: int = 1) -> Tensor:
    """The output of `attention` for inputs of shape (batch, steps, INPUTS), shape (batch, CLASSES)."""

    def linear(name: str, values: Tensor) -> Tensor:
        return values @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    flow = linear("embed", inputs)
    for number in range(blocks):
        end = str(number) if blocks > 1 else ""
        seen = layer_norm(flow, flow.shape[-1:])
        q, k, v = (linear(name + end, seen).reshape(*seen.shape[:2], heads, -1).transpose(1, 2) for name in "qkv")
        mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        flow = flow + linear(f"o{end}", mixed.transpose(1, 2).flatten(2))
        flow = flow + linear(f"down{end}", relu(linear(f"up{end}", layer_norm(flow, flow.shape[-1:]))))
    return linear("out", layer_norm(flow, flow.shape[-1:]).mean(1))


def factorised() -> PermutationSpec:
    """A linear layer in three factors between units: two spaces of any rotation, one of them inside an axis."""
    groups = {"a": Group(5), "r": Group(3, kind="orthogonal"), "s": Group(4, kind="orthogonal")}
    tensors = {
        **_linear("first", 5, 6, on("a", 5), ()),
        "down": TensorSpec((4, 5), (on("r", 3, offset=1), on("a", 5))),
        "core": TensorSpec((4, 3), (on("s", 4), on("r", 3))),
        "up": TensorSpec((2, 8), ((), on("s", 4, inner=2))),
    }
    return PermutationSpec(groups, tensors)


def recurrent() -> PermutationSpec:
    """A linear recurrence: one space on both axes of a tensor."""
    tensors = {
        "in": TensorSpec((5, 3), (on("h", 5), ())),
        "step": TensorSpec((5, 5), (on("h", 5), on("h", 5))),
        "out": TensorSpec((2, 5), ((), on("h", 5))),
    }
    return PermutationSpec({"h": Group(5, kind="orthogonal")}, tensors)


def shared_keys() -> PermutationSpec:
    """Heads that share keys and values: what rotates is inside the slots of other units."""
    spec = permuted_shared_keys(2)
    qk, vo = Group(4, "keys", "centred"), Group(8, "keys", "orthogonal")
    return replace(spec, groups={**spec.groups, "qk": qk, "vo": vo})


ROTATING = {
    "attention": attention(),
    "factorised": factorised(),
    "recurrent": recurrent(),
    "shared keys": shared_keys(),
}


def draw(spec: PermutationSpec, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random parameters."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator, dtype=dtype) for name, tensor in spec.tensors.items()}
