"""Activations that rotate, and what is refused where a spec rotates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.errors import SpecError
from c2m3_fl.flower.aligning.memory import Memory
from c2m3_fl.merging.align.activations import match_all, match_to
from c2m3_fl.merging.recalibrate.shift import with_own_moments
from c2m3_fl.merging.widths.injections import seats
from tests.core.rotating import attention


def features(spec: PermutationSpec, count: int) -> list[dict[str, Tensor]]:
    """The same activations of every node, in its own coordinates; none of the heads themselves."""
    generator = torch.Generator().manual_seed(0)
    base = {
        name: torch.randn(50, group.size, generator=generator, dtype=torch.float64)
        for name, group in spec.groups.items()
        if not spec.children(name)
    }
    turns = [permutation.random(spec, generator) for _ in range(count)]
    return [
        {name: value @ turn[name].T if turn[name].ndim > 1 else value[:, turn[name]] for name, value in base.items()}
        for turn in turns
    ]


def test_activations_find_the_rotations() -> None:
    spec = attention()
    nodes = features(spec, 4)
    maps = [match_to(spec, nodes[0], each) for each in nodes]
    for found in (maps, match_all(spec, nodes, [0.1, 0.2, 0.3, 0.4])):
        for perm, node in zip(found, nodes, strict=True):
            permutation.validate(spec, perm)
            for name, value in node.items():
                turned = value @ perm[name].T if perm[name].ndim > 1 else value[:, perm[name]]
                torch.testing.assert_close(turned, nodes[0][name])


def test_a_server_remembers_rotations() -> None:
    spec = attention()
    memory, again = Memory(spec), Memory(spec)
    perm = permutation.random(spec, torch.Generator().manual_seed(1))
    memory.remember(7, perm)
    again.load_state_dict(memory.state_dict())
    recalled = again.recall(7)
    assert recalled is not None
    assert all(torch.equal(recalled[name], index) for name, index in perm.items())
    assert {name: index.dtype for name, index in recalled.items()} == {name: i.dtype for name, i in perm.items()}


def test_widths_refuse_rotations() -> None:
    with pytest.raises(SpecError, match="networks of several widths: group 'stream' is centred, expected permutations"):
        seats(attention(), attention())


def test_moments_of_single_channels_refuse_rotations() -> None:
    with pytest.raises(SpecError, match="group 'stream' is centred, expected permutations"):
        with_own_moments(None, attention(), [], [])  # type: ignore[arg-type]  # refused before it is read
