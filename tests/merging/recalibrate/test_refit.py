from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.errors import CalibrationError, ConfigError
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.merging.recalibrate.repair import Repair
from c2m3_fl.merging.recalibrate.setting import Setting, prepare
from tests.merging.networks import CALIBRATION, NETWORKS, nodes, outputs


def _setting(network: str, count: int = 2) -> tuple[nn.Module, Setting, list[dict[str, Tensor]]]:
    model, endpoints = nodes(network, count)
    return model, prepare(model, weighted_mean(endpoints), endpoints, CALIBRATION), endpoints


def _distance(model: nn.Module, params: dict[str, Tensor], endpoints: list[dict[str, Tensor]]) -> float:
    inputs = torch.cat(CALIBRATION)
    mean = torch.stack([outputs(model, endpoint, inputs) for endpoint in endpoints]).mean(0)
    found = outputs(model, params, inputs)
    correlation: Tensor = torch.corrcoef(torch.stack([found.flatten(), mean.flatten()]))[0, 1]
    return 1 - float(correlation)


@pytest.mark.parametrize("network", NETWORKS)
def test_refit_comes_closer_to_the_mean_output_than_repair(network: str) -> None:
    model, setting, endpoints = _setting(network)
    refit, repaired = Refit()(setting).state_dict, Repair()(setting).state_dict
    assert _distance(model, refit, endpoints) < _distance(model, repaired, endpoints)


@pytest.mark.parametrize("network", NETWORKS)
def test_identical_nodes_leave_no_weight_to_fit(network: str) -> None:
    model, (node,) = nodes(network, 1)
    refit = Refit()(prepare(model, node, [node] * 3, CALIBRATION)).state_dict
    if network != "batch norm":  # whose running statistics are estimated from the calibration data
        assert all(torch.equal(refit[name], node[name]) for name in node)


@pytest.mark.parametrize("network", ["cnn", "batch norm"])
def test_shapes_types_and_everything_given_stay_as_they_are(network: str) -> None:
    _, setting, endpoints = _setting(network)
    kept, merged = copy.deepcopy(endpoints), copy.deepcopy(dict(setting.merged))
    refit = Refit()(setting).state_dict
    assert [(n, v.shape, v.dtype) for n, v in refit.items()] == [(n, v.shape, v.dtype) for n, v in merged.items()]
    assert all(torch.equal(setting.merged[name], merged[name]) for name in merged)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(endpoints, kept, strict=True) for name in a)


def test_refit_is_deterministic_and_does_not_care_about_order() -> None:
    model, endpoints = nodes("cnn", 3)
    merged = weighted_mean(endpoints)
    one = Refit(positions=200)(prepare(model, merged, endpoints, CALIBRATION)).state_dict
    other = Refit(positions=200)(prepare(model, merged, endpoints[::-1], CALIBRATION)).state_dict
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_damaged_operator_is_recovered() -> None:
    model, (node,) = nodes("mlp", 1, torch.float64)
    calibration = [torch.randn(400, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)]
    damaged = {**node, "3.weight": node["3.weight"] + 0.5 * torch.randn_like(node["3.weight"])}
    refit = Refit(strengths=(1e-9,))(prepare(model, damaged, [node], calibration)).state_dict
    torch.testing.assert_close(refit["3.weight"], node["3.weight"], rtol=1e-4, atol=1e-5)


def test_the_last_layer_alone_can_be_fitted() -> None:
    _, setting, _ = _setting("mlp")
    report = Refit(final_only=True)(setting).report
    fitted = [each.module for each in report.operators if each.fit is not None]
    assert fitted == ["5"]


def test_class_scores_are_fitted_to_the_mean_probabilities() -> None:
    model, setting, endpoints = _setting("mlp", 3)
    inputs = torch.cat(CALIBRATION)
    mean = torch.stack([outputs(model, endpoint, inputs).softmax(1) for endpoint in endpoints]).mean(0)

    def divergence(scores: bool) -> float:
        logits = outputs(model, Refit(scores=scores)(setting).state_dict, inputs)
        return float(nn.functional.kl_div(logits.log_softmax(1), mean, reduction="batchmean"))

    assert divergence(True) < divergence(False)


def test_labels_say_that_outputs_are_class_scores_and_are_not_read() -> None:
    model, endpoints = nodes("mlp", 3)
    merged = weighted_mean(endpoints)
    labelled = [
        Refit()(prepare(model, merged, endpoints, [(x, torch.full((len(x),), label)) for x in CALIBRATION])).state_dict
        for label in (0, 3)
    ]
    told = Refit(scores=True)(prepare(model, merged, endpoints, CALIBRATION)).state_dict
    assert all(torch.equal(one[name], told[name]) for one in labelled for name in told)


def test_the_report_says_how_well_every_operator_was_fitted() -> None:
    _, setting, _ = _setting("mlp")
    fits = [each.fit for each in Refit()(setting).report.operators if each.fit is not None]
    assert len(fits) == 3
    assert all(fit.error <= fit.error_before for fit in fits)


def test_too_few_inputs_to_hold_any_out_are_refused() -> None:
    model, endpoints = nodes("mlp", 2)
    with pytest.raises(CalibrationError, match="at least 5"):
        Refit()(prepare(model, endpoints[0], endpoints, [CALIBRATION[0][:4]]))


@pytest.mark.parametrize("options", [{"strengths": ()}, {"strengths": (0.1, 0.0)}, {"positions": 4}])
def test_options_that_leave_nothing_to_fit_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least"):
        Refit(**options)
