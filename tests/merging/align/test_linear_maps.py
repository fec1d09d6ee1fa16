"""Linear maps of units: where they cancel, how outputs are seen through them, and what follows them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.merging.align.linear_maps import folded, mapped, normalised, reading_axes, seen_through, spread_again
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.merging.recalibrate.repair import Repair
from c2m3_fl.merging.recalibrate.setting import Setting, prepare
from c2m3_fl.merging.recalibrate.short_names import Recalibration
from c2m3_fl.network.calibration import load_batches
from c2m3_fl.network.program import Walk, export_batches, export_program
from c2m3_fl.symmetry.discover import permutation_spec
from tests.merging.networks import CALIBRATION, SEED, nodes, outputs, spec_of


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


@pytest.mark.slow
def test_deep_networks_are_walked_without_recursion() -> None:
    model = nn.Sequential(*(layer for _ in range(400) for layer in (nn.Linear(4, 4), nn.ReLU())))
    inputs = torch.zeros(1, 4)
    spec = permutation_spec(model, inputs)
    assert set(reading_axes(spec, export_program(model, (inputs,))).values()) == {1}
