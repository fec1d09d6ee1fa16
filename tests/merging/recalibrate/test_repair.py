from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.errors import CalibrationError, ConfigError, ParamsError, TraceError, WeightsError
from c2m3_fl.merging.merge import merge
from c2m3_fl.merging.recalibrate.repair import repair
from c2m3_fl.merging.recalibrate.targets import mean_targets, output_moments
from c2m3_fl.network.calibration import load_batches
from c2m3_fl.network.moments import Moments
from c2m3_fl.network.operators import Kind
from c2m3_fl.network.program import export_batches, feeding
from tests.merging.networks import CALIBRATION, NETWORKS, lively, nodes, outputs

WEIGHTS = [1.0, 3.0, 2.0]


def _moments(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, Moments]:
    batches = load_batches(CALIBRATION)
    with torch.no_grad():
        return output_moments(export_batches(model, batches), batches, params)


@pytest.mark.parametrize("network", NETWORKS)
def test_repaired_moments_equal_their_targets(network: str) -> None:
    model, endpoints = nodes(network, 3, torch.float64)
    calibration = [batch.double() for batch in CALIBRATION]
    repaired = repair(model, weighted_mean(endpoints, WEIGHTS), endpoints, calibration, weights=WEIGHTS)
    batches = load_batches(calibration)
    with torch.no_grad():
        programs = export_batches(model, batches)
        found = output_moments(programs, batches, repaired.state_dict)
        wanted = [output_moments(programs, batches, endpoint) for endpoint in endpoints]
    targets = mean_targets(wanted, torch.tensor(WEIGHTS, dtype=torch.float64) / sum(WEIGHTS))
    done = {each.operator: each.action for each in repaired.report.operators}
    assert "mean and spread" in done.values()
    for name, action in done.items():
        if action in ("mean and spread", "spread only: no bias"):
            torch.testing.assert_close(found[name].std, targets[name].std, rtol=1e-9, atol=1e-12)
        if action == "mean and spread":
            torch.testing.assert_close(found[name].mean, targets[name].mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("network", NETWORKS)
def test_repairing_identical_nodes_changes_no_weight(network: str) -> None:
    model, (node,) = nodes(network, 1)
    repaired = repair(model, node, [node] * 3, CALIBRATION).state_dict
    if network != "batch norm":  # whose running statistics are estimated from the calibration data
        assert all(torch.equal(repaired[name], node[name]) for name in node)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_architecture_and_everything_given_stay_as_they_are(network: str) -> None:
    model, endpoints = nodes(network, 2)
    before, kept = copy.deepcopy(model.state_dict()), copy.deepcopy(endpoints)
    calibration = [batch.clone() for batch in CALIBRATION]
    merged = weighted_mean(endpoints)
    repaired = repair(model, merged, endpoints, calibration).state_dict
    assert [(name, value.shape, value.dtype) for name, value in repaired.items()] == [
        (name, value.shape, value.dtype) for name, value in before.items()
    ]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(torch.equal(a[name], b[name]) for a, b in zip(endpoints, kept, strict=True) for name in a)
    assert all(torch.equal(a, b) for a, b in zip(calibration, CALIBRATION, strict=True))


@pytest.mark.parametrize("network", NETWORKS)
def test_the_order_of_endpoints_does_not_matter_to_a_bit(network: str) -> None:
    model, endpoints = nodes(network, 3)
    merged = weighted_mean(endpoints)
    one = repair(model, merged, endpoints, CALIBRATION, weights=WEIGHTS).state_dict
    other = repair(model, merged, endpoints[::-1], CALIBRATION, weights=WEIGHTS[::-1]).state_dict
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_batch_norm_statistics_are_those_of_all_calibration_inputs() -> None:
    model, endpoints = nodes("batch norm", 2)
    repaired = repair(model, weighted_mean(endpoints), endpoints, CALIBRATION).state_dict
    inputs = nn.functional.conv2d(torch.cat(CALIBRATION), repaired["stem.weight"], padding=1)
    torch.testing.assert_close(repaired["norm.running_mean"], inputs.mean((0, 2, 3)))
    torch.testing.assert_close(repaired["norm.running_var"], inputs.var((0, 2, 3)))
    assert torch.equal(repaired["norm.num_batches_tracked"], weighted_mean(endpoints)["norm.num_batches_tracked"])


def test_batches_that_run_again_from_the_start_give_the_same_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    model, endpoints = nodes("cnn", 2)
    merged = weighted_mean(endpoints)
    at_once = repair(model, merged, endpoints, CALIBRATION).state_dict
    monkeypatch.setattr("c2m3_fl.merging.recalibrate.targets._BUDGET", 0)
    again = repair(model, merged, endpoints, CALIBRATION).state_dict
    assert all(torch.equal(at_once[name], again[name]) for name in at_once)


def test_without_bias_only_the_spread_is_repaired_and_the_report_says_so() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6, bias=False), nn.Tanh(), nn.Linear(6, 3))
    endpoints = [{name: v + seed for name, v in model.state_dict().items()} for seed in (0, 1)]
    report = repair(model, weighted_mean(endpoints), endpoints, CALIBRATION).report
    assert [each.action for each in report.operators] == ["spread only: no bias", "mean and spread"]


def test_dead_channels_keep_their_scale() -> None:
    model, endpoints = nodes("mlp", 2)
    for node in endpoints:
        node["1.weight"][3] = 0
        node["1.bias"][3] = -1
    merged = weighted_mean(endpoints)
    repaired = repair(model, merged, endpoints, CALIBRATION)
    assert repaired.report.operators[0].dead == 1
    assert torch.equal(repaired.state_dict["1.weight"][3], merged["1.weight"][3])
    assert all(bool(torch.isfinite(value).all()) for value in repaired.state_dict.values())


def test_a_constant_network_survives() -> None:
    model, endpoints = nodes("cnn", 2)
    silent = [{name: torch.zeros_like(value) for name, value in node.items()} for node in endpoints]
    repaired = repair(model, weighted_mean(silent), silent, CALIBRATION).state_dict
    assert all(value.eq(0).all() for value in repaired.values())


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.first = nn.Linear(192, 6)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.first(images.flatten(1)))
        result: Tensor = self.twice(torch.relu(self.twice(hidden))) * self.scale
        return result


def test_shared_parameters_are_left_alone_and_reported() -> None:
    torch.manual_seed(0)
    endpoints = [_Tied().state_dict() for _ in range(2)]
    merged = weighted_mean(endpoints)
    repaired = repair(_Tied(), merged, endpoints, CALIBRATION)
    skipped = dict(repaired.report.skipped)
    assert skipped["twice.weight"] == skipped["twice.bias"] == "shared by several operators"
    assert "aten.mul" in skipped["scale"]
    assert torch.equal(repaired.state_dict["twice.weight"], merged["twice.weight"])
    assert not torch.equal(repaired.state_dict["first.weight"], merged["first.weight"])


def test_weights_decide_the_targets() -> None:
    model, endpoints = nodes("mlp", 2)
    repaired = repair(model, endpoints[0], endpoints, CALIBRATION, weights=[1, 0]).state_dict
    for name in repaired:
        torch.testing.assert_close(repaired[name], endpoints[0][name])


def test_repair_brings_a_collapsed_network_closer_to_its_endpoint() -> None:
    model, (node,) = nodes("cnn", 1)
    collapsed = {name: value * 0.5 for name, value in node.items()}
    inputs = CALIBRATION[0]
    repaired = repair(model, collapsed, [node], CALIBRATION).state_dict
    wanted = outputs(model, node, inputs)
    torch.testing.assert_close(outputs(model, repaired, inputs), wanted, rtol=1e-3, atol=1e-4)
    assert (outputs(model, collapsed, inputs) - wanted).abs().max() > 0.1


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.linear(images.flatten(1))
        return hidden if float(hidden.sum()) > 0 else -hidden


def test_what_does_not_fit_is_refused_by_name() -> None:
    model, endpoints = nodes("mlp", 2)
    merged = weighted_mean(endpoints)
    with pytest.raises(ParamsError, match="endpoints: got none"):
        repair(model, merged, [], CALIBRATION)
    with pytest.raises(ParamsError, match=r"endpoint 1: keys differ .* missing \['1.weight'\]"):
        repair(model, merged, [merged, {n: v for n, v in merged.items() if n != "1.weight"}], CALIBRATION)
    with pytest.raises(ParamsError, match=r"merged: '1.bias' has shape \(3,\), expected \(16,\)"):
        repair(model, {**merged, "1.bias": torch.zeros(3)}, endpoints, CALIBRATION)
    with pytest.raises(ParamsError, match=r"endpoint 0: '1.bias' holds NaN"):
        repair(model, merged, [{**merged, "1.bias": torch.full((16,), torch.nan)}], CALIBRATION)
    with pytest.raises(WeightsError):
        repair(model, merged, endpoints, CALIBRATION, weights=[1, -1])
    with pytest.raises(CalibrationError, match="empty"):
        repair(model, merged, endpoints, [])
    with pytest.raises(CalibrationError, match=r"batch 0 cannot be fed .* of shape \(2, 7\)"):
        repair(model, merged, endpoints, [torch.randn(2, 7)])
    with pytest.raises(CalibrationError, match=r"batch 1 cannot be fed .* torch.float64 .* tensors are torch.float32"):
        repair(model, merged, endpoints, [CALIBRATION[0], CALIBRATION[0].double()])
    with pytest.raises(ParamsError, match=r"endpoint 0: '1.weight' is of type torch.float64, expected torch.float32"):
        repair(model, merged, [{name: value.double() for name, value in merged.items()}], CALIBRATION)
    branching = _Branching()
    with pytest.raises(TraceError, match="cannot trace _Branching"):
        repair(branching, branching.state_dict(), [branching.state_dict()], CALIBRATION)


class _Tokens(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Embedding(7, 4), nn.Linear(4, 3))


def test_a_value_that_the_network_cannot_take_is_blamed_on_its_batch() -> None:
    model = _Tokens()
    data = [torch.tensor([[0, 1, 6]]), torch.tensor([[0, 1, 7]])]  # of one shape and type: only the value differs
    with pytest.raises(CalibrationError, match=r"calibration batch 1 .*index out of range"):
        repair(model, model.state_dict(), [model.state_dict()], data)


def test_a_lack_of_memory_is_not_blamed_on_the_batch() -> None:
    (batch,) = load_batches(CALIBRATION[:1])
    with pytest.raises(torch.OutOfMemoryError), feeding(batch, {}):
        raise torch.OutOfMemoryError("no room")


def test_every_kind_of_operator_is_found() -> None:
    batches = load_batches(CALIBRATION[:1])
    kinds = {op.kind for build in NETWORKS.values() for op in export_batches(build(), batches)[0].operators}
    assert kinds == set(Kind)


def test_a_norm_over_other_channels_leaves_its_feeder_to_be_repaired() -> None:
    """Behind nn.Linear, BatchNorm1d takes axis 1 of three, while the layer's channels are the last."""
    model = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(7, 2)).eval()
    endpoints = [lively(model, seed) for seed in range(2)]
    inputs = torch.randn(40, 5, 4, generator=torch.Generator().manual_seed(0))
    report = repair(model, weighted_mean(endpoints), endpoints, [inputs]).report
    assert [each.module for each in report.operators] == ["0", "1", "3"]
    report = merge(model, endpoints, calibration=[inputs], recalibrate="auto").report.recalibration
    assert report is not None


def test_feeders_of_a_norm_that_cannot_be_estimated_again_are_repaired() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(4, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
            self.last = nn.Linear(6, 2)

        def forward(self, rows: Tensor) -> Tensor:
            rows = torch.relu(self.norm(self.a(rows)))
            logits: Tensor = self.last(torch.relu(self.norm(self.b(rows))))
            return logits

    model = Twice().eval()
    endpoints = [lively(model, seed) for seed in range(2)]
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    report = repair(model, weighted_mean(endpoints), endpoints, [inputs]).report
    assert [each.module for each in report.operators] == ["a", "b", "last"]
    assert dict(report.skipped)["norm.weight"] == "shared by several operators"


class Product(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(4, 6), nn.Parameter(torch.randn(shape))

    def forward(self, rows: Tensor) -> Tensor:
        return torch.relu(self.first(rows)) @ self.weight


@pytest.mark.parametrize("shape", [(6,), (3, 6, 6)])
@pytest.mark.parametrize("recalibrate", ["repair", "refit"])
@pytest.mark.parametrize("method", ["c2m3", "activations"])
def test_products_without_channels_of_their_own_are_left_alone(
    method: str, recalibrate: str, shape: tuple[int, ...]
) -> None:
    model = Product(shape).eval()
    endpoints = [{name: value + seed for name, value in model.state_dict().items()} for seed in (0, 1)]
    inputs = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    done = merge(model, endpoints, method=method, calibration=[inputs[:6], inputs[6:]], recalibrate=recalibrate)
    assert done.report.recalibration is not None
    assert "has no channels" in dict(done.report.recalibration.skipped)["weight"]
    with pytest.raises(ConfigError, match="cannot be mapped linearly"):
        merge(model, endpoints, method="cca", calibration=[inputs])
