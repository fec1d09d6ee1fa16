"""Small specs written by hand: one for every way in which a tensor can move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise

import torch
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.problem import Problem
from c2m3_fl.core.spec import Axis, Group, Params, PermutationSpec, Segment, TensorSpec
from c2m3_fl.core.starts import start_point
from c2m3_fl.core.universe import Point, Universe


def on(group: str, size: int, *, inner: int = 1, offset: int = 0) -> Axis:
    return (Segment.contiguous(group, size, inner=inner, offset=offset),)


def mlp(*widths: int) -> PermutationSpec:
    """Linear layers with biases: every inner layer has a group on each axis."""
    last = len(widths) - 2
    groups = {f"h{layer}": Group(width) for layer, width in enumerate(widths[1:-1])}
    tensors = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
        rows = on(f"h{layer}", fan_out) if layer < last else ()
        columns = on(f"h{layer - 1}", fan_in) if layer > 0 else ()
        tensors[f"{layer}.weight"] = TensorSpec((fan_out, fan_in), (rows, columns))
        tensors[f"{layer}.bias"] = TensorSpec((fan_out,), (rows,))
    return PermutationSpec(groups, tensors)


def convolutional() -> PermutationSpec:
    """Convolutions, a flatten, BatchNorm statistics and an integer counter."""
    groups = {"c1": Group(4), "c2": Group(5)}
    tensors = {
        "conv1.weight": TensorSpec((4, 2, 3, 3), (on("c1", 4), (), (), ())),
        "bn1.running_mean": TensorSpec((4,), (on("c1", 4),), buffer=True),
        "bn1.num_batches_tracked": TensorSpec((), (), buffer=True),
        "conv2.weight": TensorSpec((5, 4, 3, 3), (on("c2", 5), on("c1", 4), (), ())),
        "fc.weight": TensorSpec((3, 20), ((), on("c2", 5, inner=4))),
        "fc.bias": TensorSpec((3,), ((),)),
    }
    return PermutationSpec(groups, tensors)


def recurrent() -> PermutationSpec:
    """Gates stacked on one axis, and the same group on both axes of one tensor."""
    gates = Segment("h", torch.arange(8).reshape(2, 4).T.numpy().copy())
    tensors = {
        "weight_ih": TensorSpec((8, 3), ((gates,), ())),
        "weight_hh": TensorSpec((8, 4), ((gates,), on("h", 4))),
        "bias": TensorSpec((8,), ((gates,),)),
        "out": TensorSpec((2, 4), ((), on("h", 4))),
    }
    return PermutationSpec({"h": Group(4)}, tensors)


def concatenated() -> PermutationSpec:
    """Two segments and coordinates that never move on one axis, as in a DenseNet."""
    both = (*on("a", 3, offset=1), *on("b", 2, inner=2, offset=4))
    tensors = {
        "first": TensorSpec((3, 4), (on("a", 3), ())),
        "second": TensorSpec((4, 4), (on("b", 2, inner=2), ())),
        "joint": TensorSpec((9, 9), (both, both)),
    }
    return PermutationSpec({"a": Group(3), "b": Group(2)}, tensors)


def attention() -> PermutationSpec:
    """Three heads whose inner dimensions may be permuted head by head."""
    groups = {"head": Group(3), "qk": Group(6, parent="head"), "vo": Group(6, parent="head")}
    tensors = {
        "q": TensorSpec((6, 5), (on("qk", 6), ())),
        "k": TensorSpec((6, 5), (on("qk", 6), ())),
        "v": TensorSpec((6, 5), (on("vo", 6), ())),
        "o": TensorSpec((5, 6), ((), on("vo", 6))),
        "temperature": TensorSpec((3,), (on("head", 3),)),
        "mix": TensorSpec((6, 6), (on("qk", 6), on("vo", 6))),
    }
    return PermutationSpec(groups, tensors)


def shared_keys(blocks: int) -> PermutationSpec:
    """Three query heads to a key head: rows and columns whose units and whose slots move."""
    parent = "keys" if blocks > 1 else None
    groups = {"keys": Group(blocks)} if parent else {}
    groups |= {"query": Group(3 * blocks, parent), "qk": Group(2 * blocks, parent), "vo": Group(4 * blocks, parent)}
    rows = Segment("query", Segment.contiguous("query", 3 * blocks, inner=2, offset=1).positions, slots="qk")
    columns = Segment("query", Segment.contiguous("query", 3 * blocks, inner=4).positions, slots="vo")
    tensors = {
        "q": TensorSpec((1 + 6 * blocks, 5), ((rows,), ())),  # one row stays
        "k": TensorSpec((2 * blocks, 5), (on("qk", 2 * blocks), ())),
        "v": TensorSpec((4 * blocks, 5), (on("vo", 4 * blocks), ())),
        "o": TensorSpec((5, 12 * blocks), ((), (columns,))),
        "temperature": TensorSpec((3 * blocks,), (on("query", 3 * blocks),)),
    }
    return PermutationSpec(groups, tensors)


def grouped() -> PermutationSpec:
    """A grouped convolution between two nested groups, and a depthwise one."""
    groups = {"block": Group(2), "in": Group(4, parent="block"), "out": Group(6, parent="block")}
    tensors = {
        "before": TensorSpec((4, 3), (on("in", 4), ())),
        "grouped": TensorSpec((6, 2, 3), (on("out", 6), on("in", 4), ()), diagonal=2),
        "depthwise": TensorSpec((6, 1, 3), (on("out", 6), on("out", 6), ()), diagonal=6),
        "one_row": TensorSpec((2, 2, 3), (on("block", 2), on("in", 4), ()), diagonal=2),
        "after": TensorSpec((2, 6), ((), on("out", 6))),
    }
    return PermutationSpec(groups, tensors)


def bilinear() -> PermutationSpec:
    """Three grouped axes on one tensor."""
    tensors = {
        "x": TensorSpec((3, 4), (on("a", 3), ())),
        "y": TensorSpec((4, 4), (on("b", 4), ())),
        "core": TensorSpec((2, 3, 4), (on("c", 2), on("a", 3), on("b", 4))),
        "out": TensorSpec((3, 2), ((), on("c", 2))),
    }
    return PermutationSpec({"a": Group(3), "b": Group(4), "c": Group(2)}, tensors)


ALL = {
    "mlp": mlp(3, 5, 4, 2),
    "convolutional": convolutional(),
    "recurrent": recurrent(),
    "concatenated": concatenated(),
    "attention": attention(),
    "grouped-query": shared_keys(2),
    "multi-query": shared_keys(1),
    "grouped": grouped(),
    "bilinear": bilinear(),
}


def draw(spec: PermutationSpec, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Normal parameters; integers for counters."""
    return {
        name: torch.randint(9, tensor.shape, generator=generator)
        if name.endswith("num_batches_tracked")
        else torch.randn(tensor.shape, generator=generator, dtype=dtype)
        for name, tensor in spec.tensors.items()
    }


def draws(
    spec: PermutationSpec, count: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [draw(spec, generator, dtype) for _ in range(count)]


def planted(
    spec: PermutationSpec, count: int, noise: float, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Noisy copies of one network, every copy but the first in an order of its own, and their maps back to it."""
    generator = torch.Generator().manual_seed(seed)
    base = draw(spec, generator, dtype)
    copies = [
        {
            name: value + noise * torch.randn(value.shape, generator=generator, dtype=dtype)
            for name, value in base.items()
        }
        for _ in range(count)
    ]
    perms = [permutation.identity(spec), *(permutation.random(spec, generator) for _ in range(count - 1))]
    nodes = [permutation.apply(spec, perm, node) for perm, node in zip(perms, copies, strict=True)]
    return nodes, [permutation.invert(perm) for perm in perms]


def same(left: Params, right: Params) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def at_matrices(problem: Problem, matrices: Mapping[str, Tensor]) -> Universe:
    """The universe with every node, as it came, at doubly stochastic matrices of shape (nodes, size, size)."""
    still = start_point(problem, "identity", None)
    nodes = {i: {name: each[i] for name, each in matrices.items()} for i in range(problem.count)}
    return Universe(problem, Point(still.frames, nodes))


def matrices_at(universe: Universe) -> dict[str, Tensor]:
    """Where the nodes of a universe stand, as matrices of shape (nodes, size, size) for the nodes as they came."""
    found = {}
    for name, frames in universe.problem.frames.items():
        eye = torch.eye(frames.shape[1]).to(universe.problem.like)
        found[name] = torch.stack([universe.matrix(i, name) @ eye[frame] for i, frame in enumerate(frames)])
    return found


def autograd(problem: Problem, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of the agreement of the nodes as they came, by products of which torch keeps track."""
    leaves = {name: each.clone().requires_grad_() for name, each in matrices.items()}
    total, weights = torch.zeros((), dtype=torch.float64), problem.weights
    for term in problem.terms:
        there = term.value
        for axis, group in enumerate(term.groups):
            rows = there.movedim(term.dim(axis), 1)
            there = (leaves[group] @ rows.flatten(2)).view_as(rows).movedim(1, term.dim(axis))
        mean = torch.einsum("n,n...->...", weights, there)
        total = total + 0.5 * (mean.square().sum() - torch.einsum("n,n...->", weights.square(), there.square()))
    slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, slopes, strict=True))


def pairwise_agreement(
    spec: PermutationSpec, nodes: Sequence[Params], perms: Sequence[Permutation], weights: Sequence[float]
) -> float:
    """The definition: the sum over all pairs of nodes and all matched tensors, in float64."""
    mapped = [permutation.apply(spec, perm, node) for perm, node in zip(perms, nodes, strict=True)]
    return sum(
        weights[i] * weights[j] * float((mapped[i][name].double() * mapped[j][name].double()).sum())
        for i, j in combinations(range(len(nodes)), 2)
        for name, tensor in spec.tensors.items()
        if not tensor.buffer
    )
