"""The oracle against brute force, and the proof that the identity is best."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from c2m3_fl.core import permutation
from c2m3_fl.core.assignment import assign, assign_nested, oracle
from c2m3_fl.core.spec import Group, PermutationSpec
from tests.core.networks import attention

square = st.integers(1, 5).flatmap(lambda n: hnp.arrays(np.float64, (n, n), elements=st.floats(-4, 4, width=16)))


def worth(gain, index):
    return gain[np.arange(len(gain)), list(index)].sum()


@given(square)
def test_assignment_is_the_best_of_all_permutations(gain):
    best = max(worth(gain, index) for index in permutations(range(len(gain))))
    assert np.isclose(worth(gain, assign(gain)), best)


def test_nested_assignment_is_the_best_of_the_wreath_product():
    # 3 heads of 2 units and two children: 3! (2! 2!)^3 = 384 permutations, all tried.
    generator = np.random.default_rng(0)
    for _ in range(20):
        gain = generator.normal(size=(3, 3))
        children = {"qk": generator.normal(size=(6, 6)), "vo": generator.normal(size=(6, 6))}
        outer, inner = assign_nested(gain, children)
        found = worth(gain, outer) + sum(worth(children[name], inner[name]) for name in children)
        best = max(
            worth(gain, heads)
            + sum(
                sum(
                    max(worth(child[2 * h : 2 * h + 2, 2 * to : 2 * to + 2], order) for order in permutations(range(2)))
                    for h, to in enumerate(heads)
                )
                for child in children.values()
            )
            for heads in permutations(range(3))
        )
        assert np.isclose(found, best)
        spec = attention()
        perm = {"head": torch.from_numpy(outer), **{name: torch.from_numpy(index) for name, index in inner.items()}}
        permutation.validate(spec, perm)


def test_the_size_of_the_pool_changes_nothing():
    spec = PermutationSpec({"a": Group(7), "b": Group(30)}, {})
    generator = torch.Generator().manual_seed(0)
    gains = {name: torch.randn(5, group.size, group.size, generator=generator) for name, group in spec.groups.items()}
    answers = []
    for workers in (1, 4):
        with ThreadPoolExecutor(workers) as pool:
            answers.append(oracle(spec, gains, pool))
    for name in spec.groups:
        assert torch.equal(answers[0][name], answers[1][name])
        assert answers[0][name].shape == (5, spec.groups[name].size)
