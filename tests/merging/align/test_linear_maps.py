"""Methods that map units linearly: CCA Merge."""

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
from c2m3_fl.merging.align.linear_maps import folded, mapped, normalised, reading_axes, seen_through, spread_again
from c2m3_fl.merging.merge import merge
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.merging.recalibrate.repair import Repair
from c2m3_fl.merging.recalibrate.setting import Setting, prepare
from c2m3_fl.merging.recalibrate.shift import channel_moments
from c2m3_fl.merging.recalibrate.short_names import Recalibration
from c2m3_fl.network.calibration import load_batches
from c2m3_fl.network.program import Walk, export_batches, export_program
from c2m3_fl.symmetry.discover import permutation_spec
from tests.merging.networks import CALIBRATION, lively, nodes, outputs
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


class Linears(nn.Module):
    """Every kind of operator that makes and reads units, and nothing that a linear map does not pass through."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(5, 3))
        self.project = nn.Linear(3, 6)
        self.tokens = nn.Embedding(7, 6)
        self.places = nn.Parameter(torch.randn(5, 6))
        self.mix = nn.Parameter(torch.randn(6, 4))
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.up = nn.ConvTranspose1d(6, 3, 2)
        self.head = nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.tokens(tokens) + self.places + self.project(self.queries)
        rows = rows @ self.mix
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
    spec, program = permutation_spec(model, inputs), export_program(model, (inputs,))
    maps = drawn(spec, 0)
    node = model.state_dict()
    moved = mapped(spec, maps, node, reading_axes(spec, program), program)
    assert all(
        not torch.equal(moved[name], value) for name, value in node.items() if name not in ("head.bias", "queries")
    )
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
    with pytest.raises(ConfigError, match="so no linear map fits it: use a method of permutations"):
        merge(model, [model.state_dict(), other], calibration=[inputs], method="cca")


def test_outputs_are_seen_as_the_mapped_network_would_have_them_if_it_were_linear() -> None:
    model, inputs = linears()
    spec = permutation_spec(model, inputs)
    batches = load_batches([inputs])
    (program,) = export_batches(model, batches)
    maps = drawn(spec, 0)
    view = seen_through(spec, maps)
    moved = mapped(spec, maps, model.state_dict(), reading_axes(spec, program), program)
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
    program = export_program(model.double(), (batches[0],))
    moved = mapped(spec, maps, node, reading_axes(spec, program), program)
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


class Product(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, rows: Tensor) -> Tensor:
        return torch.addmm(self.bias, rows, self.weight)


def normed(kind: str, inner: int) -> tuple[nn.Module, Tensor]:
    """Linear operators with a BatchNorm behind the second; `inner` units before it, six behind."""
    if kind == "transposed":
        layers = [nn.Conv1d(4, inner, 3), nn.ConvTranspose1d(inner, 6, 2), nn.BatchNorm1d(6), nn.Conv1d(6, 3, 1)]
    else:
        second = Product(inner, 6) if kind == "product" else nn.Linear(inner, 6)
        layers = [nn.Linear(4, inner), second, nn.BatchNorm1d(6), nn.Linear(6, 3)]
    inputs = torch.randn((20, 4, 5) if kind == "transposed" else (20, 4), generator=SEED(0), dtype=torch.float64)
    return nn.Sequential(*layers).double().eval(), inputs


@pytest.mark.parametrize("inner", [5, 6])
@pytest.mark.parametrize("kind", ["linear", "product", "transposed"])
def test_linear_maps_pass_through_batch_norm(kind: str, inner: int) -> None:
    model, inputs = normed(kind, inner)
    generator = SEED(1)
    node = {
        name: value if value.dtype == torch.int64 else 0.5 + torch.rand(value.shape, generator=generator).double()
        for name, value in model.state_dict().items()
    }
    node["2.weight"][2] *= -1
    spec, program = permutation_spec(model, inputs), export_program(model, (inputs,))
    pairs, maps = normalised(program), drawn(spec, 2)
    given = folded(program, pairs, node)
    moved = mapped(spec, maps, given, reading_axes(spec, program), program)
    spread_again(program, pairs, moved)
    wanted = outputs(model, node, inputs)
    torch.testing.assert_close(outputs(model, given, inputs), wanted)
    torch.testing.assert_close(outputs(model, moved, inputs), wanted)


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


def test_norms_without_scales_are_seen_in_the_basis() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3)).double().eval()
    inputs = torch.randn(20, 4, generator=SEED(0), dtype=torch.float64)
    spec, (program,) = permutation_spec(model, inputs), export_batches(model, load_batches([inputs]))
    (batch,) = load_batches([inputs])
    maps = drawn(spec, 0)
    norm = next(each for each in program.operators if each.mean)
    value = Walk(program, model.state_dict(), batch).output(norm)
    torch.testing.assert_close(seen_through(spec, maps)(norm, value), value @ next(iter(maps.values())).T)


def test_scales_of_norms_are_mapped_as_spreads() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double().eval()
    inputs = torch.randn(20, 4, generator=SEED(0), dtype=torch.float64)
    spec, program = permutation_spec(model, inputs), export_program(model, (inputs,))
    turned = {name: -torch.eye(group.size, dtype=torch.float64) for name, group in spec.groups.items()}
    node = {**model.state_dict(), "1.weight": torch.linspace(-1, 2, 6, dtype=torch.float64)}
    moved = mapped(spec, turned, node, reading_axes(spec, program), program)
    torch.testing.assert_close(moved["1.weight"], node["1.weight"])  # a unit that changes its sign keeps its scale
    torch.testing.assert_close(outputs(model, moved, inputs), outputs(model, node, inputs))


@pytest.mark.parametrize("value", [0, -0.5, float("nan"), float("inf"), "a", None, True])
def test_regularisations_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"regularisation is .*, expected a number above 0"):
        CCA(regularisation=value)


def test_deep_networks_are_walked_without_recursion() -> None:
    model = nn.Sequential(*(layer for _ in range(400) for layer in (nn.Linear(4, 4), nn.ReLU())))
    inputs = torch.zeros(1, 4)
    spec = permutation_spec(model, inputs)
    assert set(reading_axes(spec, export_program(model, (inputs,))).values()) == {1}


def test_cca_says_where_linear_maps_are_no_symmetry() -> None:
    spec = spec_of("mlp")
    heads = {"head": Group(2), "inner": Group(4, parent="head")}  # sit on no tensor, so the spec still holds
    nested = PermutationSpec({**spec.groups, **heads}, spec.tensors)
    model, params = nodes("mlp", 2)
    with pytest.raises(ConfigError, match="inside the blocks of 'head' only"):
        merge(model, params, spec=nested, method=CCA(), calibration=CALIBRATION)
