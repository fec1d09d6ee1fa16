"""Methods that map units linearly: CCA Merge."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl.core.spec import Group, PermutationSpec
from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.activations import canonical_map, two_sided_features
from c2m3_fl.merging.linear_maps import folded, mapped, normalised, reading_axes, seen_through, spread_again
from c2m3_fl.merging.merge import merge
from c2m3_fl.merging.methods import CCA
from c2m3_fl.merging.recalibrate import Recalibration
from c2m3_fl.merging.refit import Refit
from c2m3_fl.merging.repair import Repair
from c2m3_fl.merging.setting import Setting, prepare
from c2m3_fl.merging.shift import channel_moments
from c2m3_fl.models.calibration import load_batches
from c2m3_fl.models.program import Walk, trace, trace_batches
from c2m3_fl.models.symmetry import permutation_spec
from tests.merging.networks import CALIBRATION, nodes, outputs
from tests.merging.test_merge import SEED, spec_of


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


def test_units_are_compared_where_they_are_made_and_where_they_are_read() -> None:
    model, (node,) = nodes("mlp", 1, torch.float64)
    spec, batches = spec_of("mlp"), load_batches([CALIBRATION[0].double()])
    found = two_sided_features(spec, trace_batches(model, batches), batches, node)
    made = nn.functional.linear(CALIBRATION[0].double().flatten(1), node["1.weight"], node["1.bias"])
    ((_, segment),) = spec.tensors["1.bias"].segments
    features = found[segment.group]
    wanted = torch.cov(made.T, correction=0) + torch.cov(made.relu().T, correction=0)
    torch.testing.assert_close(features.T @ features, wanted)


class Linears(nn.Module):
    """Every kind of operator that makes and reads units, and nothing that a linear map does not pass through."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 6)
        self.places = nn.Parameter(torch.randn(5, 6))
        self.mix = nn.Parameter(torch.randn(6, 4))
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.up = nn.ConvTranspose1d(6, 3, 2)
        self.head = nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = (self.tokens(tokens) + self.places) @ self.mix
        rows = self.up(self.conv(rows.transpose(1, 2))).transpose(1, 2)
        logits: Tensor = self.head(rows)
        return logits


def linears() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Linears().double().eval(), torch.randint(7, (8, 5), generator=SEED(0))


def drawn(spec: PermutationSpec, seed: int) -> dict[str, Tensor]:
    generator = SEED(seed)
    return {
        name: torch.randn(group.size, group.size, generator=generator, dtype=torch.float64)
        for name, group in spec.groups.items()
    }


def test_maps_and_their_inverses_cancel_in_a_linear_network() -> None:
    model, inputs = linears()
    spec, program = permutation_spec(model, inputs), trace(model, (inputs,))
    maps = drawn(spec, 0)
    node = model.state_dict()
    moved = mapped(spec, maps, node, reading_axes(spec, program))
    assert all(not torch.equal(moved[name], value) for name, value in node.items() if name != "head.bias")
    torch.testing.assert_close(outputs(model, moved, inputs), outputs(model, node, inputs))


class Tied(nn.Module):
    """An embedding that is the last layer, too, of units that a second layer makes and reads."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 6)
        self.inner = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.tokens(tokens)
        return (rows + torch.relu(self.inner(rows))) @ self.tokens.weight.T


@pytest.mark.parametrize("network", [Tied, lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))])
def test_weights_that_no_linear_map_fits_are_refused(network: Callable[[], nn.Module]) -> None:
    last = network()
    model = last if isinstance(last, Tied) else nn.Sequential(nn.Embedding(7, 6), last, nn.ReLU(), nn.Linear(6, 2))
    tokens = torch.randint(7, (8, 5), generator=SEED(0))
    other = {name: value + 0.1 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match="so no linear map fits it: use a method of permutations"):
        merge(model, [model.state_dict(), other], calibration=[tokens], method="cca")


def test_outputs_are_seen_as_the_mapped_network_would_have_them_if_it_were_linear() -> None:
    model, inputs = linears()
    spec = permutation_spec(model, inputs)
    batches = load_batches([inputs])
    (program,) = trace_batches(model, batches)
    maps = drawn(spec, 0)
    view = seen_through(spec, maps)
    moved = mapped(spec, maps, model.state_dict(), reading_axes(spec, program))
    with torch.no_grad():
        here, there = (Walk(program, params, batches[0]) for params in (model.state_dict(), moved))
        for operator in program.operators:
            torch.testing.assert_close(view(operator, here.output(operator)), there.output(operator))


@pytest.mark.parametrize("recalibration", [Repair(), Refit()])
def test_recalibration_aims_at_what_the_nodes_themselves_compute(recalibration: Recalibration) -> None:
    """A node of which the average was a linear map comes back where the map left its function behind."""
    model, (node,) = nodes("mlp", 1, torch.float64)
    spec, batches = spec_of("mlp"), [each.double() for each in CALIBRATION]
    maps = {name: torch.eye(len(each)).double() + 0.1 * each for name, each in drawn(spec, 0).items()}
    program = trace(model.double(), (batches[0],))
    moved = mapped(spec, maps, node, reading_axes(spec, program))
    views = [seen_through(spec, maps)]
    wanted = outputs(model, node, batches[0])

    def off(setting: Setting) -> float:
        return float((outputs(model, recalibration(setting).state_dict, batches[0]) - wanted).square().mean())

    itself = off(prepare(model, moved, [node], batches, views=views))
    assert itself < 0.9 * off(prepare(model, moved, [moved], batches))


def test_moments_that_linear_maps_cannot_carry_are_refused() -> None:
    model, params = nodes("mlp", 2)
    own = [channel_moments(model, node, [CALIBRATION[0]]) for node in params]
    options = {"calibration": [CALIBRATION[0]], "spec": spec_of("mlp"), "recalibrate": "auto"}
    with pytest.raises(ConfigError, match="moments cannot follow the linear maps of method 'cca'"):
        merge(model, params, method="cca", moments=own, **options)


def test_auto_does_not_compare_buffers_with_moments_in_another_basis() -> None:
    model, params = nodes("batch norm", 2)
    options = {"calibration": [CALIBRATION[0]], "spec": spec_of("batch norm"), "recalibrate": "auto"}
    report = merge(model, params, method="cca", **options).report.recalibration
    assert report is not None
    assert report.decision is not None
    assert report.decision.shift is None
    assert report.method != "refit"


def test_linear_maps_pass_through_batch_norm() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double().eval()
    generator = torch.Generator().manual_seed(0)
    node = {
        name: value if value.dtype == torch.int64 else 0.5 + torch.rand(value.shape, generator=generator).double()
        for name, value in model.state_dict().items()
    }
    node["1.weight"][2] *= -1
    inputs = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    spec = permutation_spec(model, inputs)
    program = trace(model, (inputs,))
    pairs = normalised(program)
    maps = {name: torch.randn(6, 6, generator=generator, dtype=torch.float64) for name in spec.groups}
    given = folded(pairs, node)
    moved = mapped(spec, maps, given, reading_axes(spec, program))
    spread_again(pairs, spec, maps, given, moved)
    wanted = outputs(model, node, inputs)
    torch.testing.assert_close(outputs(model, given, inputs), wanted)
    torch.testing.assert_close(outputs(model, moved, inputs), wanted)


def test_cca_says_where_linear_maps_are_no_symmetry() -> None:
    spec = spec_of("mlp")
    heads = {"head": Group(2), "inner": Group(4, parent="head")}  # sit on no tensor, so the spec still holds
    nested = PermutationSpec({**spec.groups, **heads}, spec.tensors)
    model, params = nodes("mlp", 2)
    with pytest.raises(ConfigError, match="inside the blocks of 'head' only"):
        merge(model, params, spec=nested, method=CCA(), calibration=CALIBRATION)
