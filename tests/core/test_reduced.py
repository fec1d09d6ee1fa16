"""Potentials found on an accelerator leave the answers of assignment problems alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from c2m3_fl.core import assignment, potentials, reduced
from c2m3_fl.core.assignment import assignment_pool, oracle
from c2m3_fl.core.spec import Group, PermutationSpec
from c2m3_fl.errors import ParamsError

KINDS = {
    "unrelated": lambda size, draws: draws.standard_normal((size, size)),
    "nearly still": lambda size, draws: 3 * np.eye(size) + draws.standard_normal((size, size)),
    "still": lambda size, draws: 99 * np.eye(size) + draws.standard_normal((size, size)),
    "planted": lambda size, draws: 5 * np.eye(size)[draws.permutation(size)] + draws.standard_normal((size, size)),
    "flat": lambda size, draws: np.ones((size, size)),
    "tiny": lambda size, draws: 1e-41 * draws.standard_normal((size, size)),
}


def gains(kind: str, dtype: torch.dtype, size: int = 40, count: int = 3) -> Tensor:
    draws = np.random.default_rng(0)
    return torch.from_numpy(np.stack([KINDS[kind](size, draws) for _ in range(count)])).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_reduced_costs_have_the_answers_of_the_gains(kind: str, dtype: torch.dtype) -> None:
    each = gains(kind, dtype)
    for (name, node), cost in reduced.reduced_costs({"g": each}, ["g"]).items():
        gain = each[node].double().numpy()
        answer = np.arange(len(gain)) if cost is None else linear_sum_assignment(cost)[1]
        assert name == "g"
        assert cost is None or cost.dtype == each.numpy().dtype
        best = gain[linear_sum_assignment(-gain)].sum()
        slack = 1e-12 if dtype == torch.float64 else 1e-6
        assert gain[np.arange(len(gain)), answer].sum() >= best - slack * np.abs(gain).sum(1).max()
        assert (cost is None) == (kind in ("still", "flat"))


@pytest.mark.parametrize("kind", KINDS)
def test_potentials_are_those_of_the_cpu(kind: str) -> None:
    each = gains(kind, torch.float64)
    for row, gain in enumerate(each.numpy()):
        for one, other in (("sinkhorn", potentials.sinkhorn), ("centred", potentials.centred)):
            for found, expected in zip(getattr(reduced, one)(each), other(gain), strict=True):
                np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-9, atol=1e-9 * np.abs(gain).max())


def test_an_oracle_on_an_accelerator_is_the_one_on_the_cpu(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of three sizes, of which the smallest goes to the CPU as it is."""
    monkeypatch.setattr(assignment, "LEAST", 20)
    monkeypatch.setattr(reduced, "_AT_A_TIME", 4 * 30**2)  # four problems of size 30, two of size 40
    sizes = {"a": 30, "b": 40, "c": 30, "d": 8}
    spec = PermutationSpec({name: Group(size) for name, size in sizes.items()}, {})
    functionals = {name: gains("unrelated", torch.float64, size) for name, size in sizes.items()}
    functionals["c"] = gains("nearly still", torch.float64, 30)
    functionals["c"][1] = gains("still", torch.float64, 30)[0]
    with assignment_pool() as pool:
        expected = oracle(spec, functionals, pool)
        found = oracle(spec, {name: gain.to(device) for name, gain in functionals.items()}, pool)
    for name, index in expected.items():
        assert found[name].device.type == device.type
        assert torch.equal(found[name].cpu(), index)


def test_functionals_that_overflow_are_refused() -> None:
    each = gains("unrelated", torch.float32)
    each[1, 2, 3] = torch.inf
    with pytest.raises(ParamsError, match="the agreement overflows"):
        reduced.reduced_costs({"g": each}, ["g"])
