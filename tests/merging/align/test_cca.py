"""CCA Merge: canonical maps between units, and the networks and options that it refuses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl.core.spec import Group, PermutationSpec
from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.align.activations import canonical_map, two_sided_features
from c2m3_fl.merging.align.cca import CCA
from c2m3_fl.merging.merge import merge
from c2m3_fl.merging.recalibrate.shift import channel_moments
from c2m3_fl.network.calibration import load_batches
from c2m3_fl.network.program import export_batches
from tests.merging.networks import CALIBRATION, SEED, lively, nodes, outputs, spec_of


def test_the_canonical_map_undoes_a_linear_one() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    mixing = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    found = canonical_map(reference, reference @ mixing, 0.0)
    torch.testing.assert_close(reference @ mixing @ found.T, reference)


def test_canonical_maps_undo_the_scales_of_units() -> None:
    model, (node,) = nodes("mlp", 1, torch.float64)
    scale = 0.5 + torch.rand(len(node["1.bias"]), generator=SEED(0)).double()
    scaled = {**node, "1.weight": node["1.weight"] * scale[:, None], "1.bias": node["1.bias"] * scale}
    scaled["3.weight"] = node["3.weight"] / scale  # positive scales pass through a ReLU: the same function
    options = {"calibration": [each.double() for each in CALIBRATION], "recalibrate": "none", "spec": spec_of("mlp")}
    merged = merge(model, [node, scaled], method=CCA(regularisation=1e-12), basis=0, **options)
    inputs = CALIBRATION[0].double()
    torch.testing.assert_close(outputs(model, merged.state_dict, inputs), outputs(model, node, inputs))


@pytest.mark.parametrize("dead", [0, 1])
def test_a_layer_that_does_not_vary_is_left_in_its_own_basis(dead: int) -> None:
    """There is nothing to map it by, and a map onto nothing has no inverse."""
    model, params = nodes("mlp", 2)
    still = dict(params[dead])
    first = next(iter(still))
    still[first] = torch.zeros_like(still[first])
    params = [still if index == dead else node for index, node in enumerate(params)]
    merged = merge(model, params, calibration=[CALIBRATION[0]], recalibrate="none", method="cca")
    assert all(bool(torch.isfinite(value).all()) for value in merged.state_dict.values())
    assert any("hardly vary in some network" in note for note in merged.report.notes)


def test_units_are_compared_where_they_are_made_and_where_they_are_read() -> None:
    model, (node,) = nodes("mlp", 1, torch.float64)
    spec, batches = spec_of("mlp"), load_batches([CALIBRATION[0].double()])
    found = two_sided_features(spec, export_batches(model, batches), batches, node)
    made = nn.functional.linear(CALIBRATION[0].double().flatten(1), node["1.weight"], node["1.bias"])
    ((_, segment),) = spec.tensors["1.bias"].segments
    features = found[segment.group]
    wanted = torch.cov(made.T, correction=0) + torch.cov(made.relu().T, correction=0)
    torch.testing.assert_close(features.T @ features, wanted)


class Tied(nn.Module):
    """An embedding that is the last layer, too, of units that a second layer makes and reads."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 6)
        self.inner = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.tokens(tokens)
        return (rows + torch.relu(self.inner(rows))) @ self.tokens.weight.T


class Odd(nn.Module):
    """A weight that is used in a way of its own, between two linear layers."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.weight = nn.Parameter(torch.randn(3, 6, 6) if use == "stacked" else torch.randn(6, 6))
        self.register_buffer("mask", torch.rand(6, 1), persistent=False)
        self.use = use

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.first(rows)
        if self.use == "masked":
            hidden = nn.functional.linear(hidden, self.weight * self.mask)
        elif self.use == "gated":
            hidden = nn.functional.linear(hidden, self.weight * rows.mean())
        elif self.use == "stacked":
            hidden = (hidden @ self.weight).sum(0)
        logits: Tensor = self.last(hidden)
        return logits


ODD: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "tied": (Tied, torch.arange(7)[None]),
    "weight norm": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 2)),
        torch.randn(8, 4),
    ),
    **{use: (partial(Odd, use), torch.randn(8, 4)) for use in ("masked", "gated", "stacked")},
}


@pytest.mark.parametrize("network", ODD)
def test_weights_that_no_linear_map_fits_are_refused(network: str) -> None:
    build, inputs = ODD[network]
    model = build()
    other = {name: value + 0.1 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match="cannot be mapped linearly: use a method of permutations"):
        merge(model, [model.state_dict(), other], calibration=[inputs], method="cca")


def test_moments_that_linear_maps_cannot_carry_are_refused() -> None:
    model, params = nodes("mlp", 2)
    own = [channel_moments(model, node, [CALIBRATION[0]]) for node in params]
    options = {"calibration": [CALIBRATION[0]], "spec": spec_of("mlp"), "recalibrate": "auto"}
    with pytest.raises(ConfigError, match="moments cannot be mapped by the linear maps of method 'cca'"):
        merge(model, params, method="cca", moments=own, **options)


def test_auto_does_not_compare_buffers_with_moments_in_another_basis() -> None:
    model, params = nodes("batch norm", 2)
    options = {"calibration": [CALIBRATION[0]], "spec": spec_of("batch norm"), "recalibrate": "auto"}
    report = merge(model, params, method="cca", **options).report.recalibration
    assert report is not None
    assert report.decision is not None
    assert report.decision.shift is None


def test_tied_names_stay_tied() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
            self.also, self.again = self.first, self.norm

        def forward(self, rows: Tensor) -> Tensor:
            logits: Tensor = self.last(torch.relu(self.again(self.also(rows))))
            return logits

    model = Twins().eval()
    others = [lively(model, seed) for seed in range(2)]
    for node in others:
        node |= {name.replace("also", "first"): value for name, value in node.items()}
        node |= {name.replace("again", "norm"): value for name, value in node.items()}
    inputs = torch.randn(40, 4, generator=SEED(0))
    for recalibrate in ("none", "batchnorm", "repair"):
        found = merge(model, others, calibration=[inputs], method="cca", recalibrate=recalibrate).state_dict
        for name, value in found.items():
            twin = name.replace("first", "also").replace("norm", "again")
            assert torch.equal(found[twin], value), name


@pytest.mark.parametrize("value", [0, -0.5, float("nan"), float("inf"), "a", None, True])
def test_regularisations_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"regularisation is .*, expected a number above 0"):
        CCA(regularisation=value)


def test_cca_says_where_linear_maps_are_no_symmetry() -> None:
    spec = spec_of("mlp")
    heads = {"head": Group(2), "inner": Group(4, parent="head")}  # sit on no tensor, so the spec still holds
    nested = PermutationSpec({**spec.groups, **heads}, spec.tensors)
    model, params = nodes("mlp", 2)
    with pytest.raises(ConfigError, match="inside the blocks of 'head' only"):
        merge(model, params, spec=nested, method=CCA(), calibration=CALIBRATION)
