"""The proof sees wrong permutations where outputs alone would hide them, and says how far it sees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from c2m3_fl import merge
from c2m3_fl.core.spec import Group, PermutationSpec, Segment
from c2m3_fl.errors import SpecError
from c2m3_fl.network.calibration import as_inputs
from c2m3_fl.symmetry.accept import unseen
from c2m3_fl.symmetry.discover import check_invariance, permutation_spec, require_invariance
from c2m3_fl.symmetry.proof import Prover
from tests.symmetry.families import noise


class Gated(nn.Module):
    """A residual branch, half ReLU and half tanh, behind a gate that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.up, self.down, self.gate = nn.Linear(8, 12), nn.Linear(12, 8), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.up(x)
        h = torch.cat([h[:, :6].relu(), h[:, 6:].tanh()], 1)
        return self.head(x + self.gate * self.down(h))


class ScaledConv(nn.Conv2d):
    """Scaled weight standardisation."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__(ins, outs, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(outs, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        scale = torch.rsqrt((var * self.weight[0].numel()).clamp_min(1e-4)) * self.gain
        return functional.conv2d(x, (self.weight - mean) * scale, self.bias, padding=1)


class NormFree(nn.Module):
    """Residual blocks without normalisation: weights are standardised, branches start at zero."""

    def __init__(self, width: int = 6, blocks: int = 3) -> None:
        super().__init__()
        self.stem, self.head = ScaledConv(3, width), nn.Linear(width, 2)
        self.first = nn.ModuleList(ScaledConv(width, width) for _ in range(blocks))
        self.second = nn.ModuleList(ScaledConv(width, width) for _ in range(blocks))
        self.gains = nn.ParameterList(torch.zeros(()) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for first, second, gain in zip(self.first, self.second, self.gains, strict=True):
            x = x + 0.2 * gain * second(first(x.relu()).relu())
        return self.head(x.relu().mean((2, 3)))


class Branches(nn.Module):
    """A block of RepVGG: a 3x3 convolution, a 1x1 convolution and the identity, each with statistics of its own."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(ins, outs, 3, padding=1, bias=False), nn.Conv2d(ins, outs, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outs) for _ in range(3 if ins == outs else 2))
        for norm in self.norms:
            norm.running_var.uniform_(1, 1e4)  # statistics that do not fit the signal: it fades
            norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.wide(x), self.narrow(x), x]
        return torch.stack([norm(part) for norm, part in zip(self.norms, parts, strict=False)]).sum(0).relu()


def rep_net() -> nn.Module:
    blocks = [Branches(3, 6), Branches(6, 6), Branches(6, 6), Branches(6, 8), Branches(8, 8)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def made(build: type[nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def left_behind(spec: PermutationSpec, group: str, tensor: str, axis: int) -> PermutationSpec:
    """The same spec without the units of a group on one axis."""
    old = spec.tensors[tensor]
    kept = tuple(segment for segment in old.axes[axis] if group not in segment.groups)
    axes = (*old.axes[:axis], kept, *old.axes[axis + 1 :])
    return replace(spec, tensors={**spec.tensors, tensor: replace(old, axes=axes)})


def test_halves_behind_a_closed_gate_are_two_groups() -> None:
    spec = permutation_spec(made(Gated), noise(3, 4))
    assert {name: group.size for name, group in spec.groups.items()} == {"stem": 8, "up": 6, "up#2": 6}


def test_one_group_for_both_halves_is_refused() -> None:
    network = made(Gated)
    spec = permutation_spec(network, noise(3, 4))
    units = (Segment.contiguous("up", 12),)
    tensors = dict(spec.tensors)
    for tensor, axis in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1)):
        old = tensors[tensor]
        tensors[tensor] = replace(old, axes=(*old.axes[:axis], units, *old.axes[axis + 1 :]))
    wrong = PermutationSpec({"stem": Group(8), "up": Group(12)}, tensors)
    with pytest.raises(SpecError, match=r"groups \['up'\] change the outputs"):
        require_invariance(network, wrong, noise(3, 4))


@pytest.mark.parametrize("build", [NormFree, rep_net])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_every_carrier_left_behind_is_noticed_where_signals_fade(build: type[nn.Module], seed: int) -> None:
    network, images = made(build, seed), noise(2, 3, 8, 8)
    spec = permutation_spec(network, images)
    prover = Prover(network, as_inputs(images), seed=seed)
    assert not prover.fails(spec)
    assert not unseen(spec, [prover])
    for name in spec.groups:
        for tensor, axis in spec.members(name):
            assert prover.fails(left_behind(spec, name, tensor, axis), [name]), (name, tensor, axis)


def test_merge_refuses_a_wrong_spec_behind_a_closed_gate() -> None:
    network, images = made(NormFree), noise(2, 3, 8, 8)
    wrong = left_behind(permutation_spec(network, images), "first.1", "second.1.weight", 1)
    states = [made(NormFree, seed).state_dict() for seed in (1, 2)]
    with pytest.raises(SpecError, match=r"groups \['first.1'\]"):
        merge(network, states, spec=wrong, example_inputs=images)


def test_power_is_reported_per_group() -> None:
    network = made(Gated)
    found = check_invariance(network, permutation_spec(network, noise(3, 4)), noise(3, 4))
    assert found < 1e-9
    assert set(found.power) == {"stem", "up", "up#2"}
    assert min(found.power.values()) > 1e-7


class Idle(nn.Module):
    """A branch whose operand is always zero: only for lack of large inputs, or whatever the inputs are."""

    def __init__(self, whatever: bool) -> None:
        super().__init__()
        self.whatever = whatever
        self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(x)
        return self.d(self.a(x) + self.c(h * 0 if self.whatever else (h - 100).relu()))


def test_a_branch_that_the_inputs_do_not_reach_is_proven_with_its_operands_turned() -> None:
    assert set(permutation_spec(Idle(whatever=False), noise(3, 4)).groups) == {"a", "b"}


def test_a_group_that_nothing_shows_is_pinned_with_that_reason() -> None:
    spec = permutation_spec(Idle(whatever=True), noise(3, 4))
    places = {(pin.tensor, pin.axis) for pin in spec.pins if pin.reason == "cannot be proven with these inputs"}
    assert {("c.weight", 0), ("c.weight", 1)} <= places  # no output depends on this weight


def test_a_slope_for_negatives_behind_a_relu_costs_nothing() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.PReLU(6), nn.Linear(6, 2))
    assert permutation_spec(network, noise(3, 4)).members("0")[2] == ("2.weight", 0)
