"""REPAIR and refit on every family of networks that symmetry tracing knows."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.core.spec import floating
from c2m3_fl.errors import ConfigError
from c2m3_fl.merging.align.methods import METHODS
from c2m3_fl.merging.merge import merge
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.merging.recalibrate.repair import Repair
from c2m3_fl.merging.recalibrate.setting import Setting, prepare
from c2m3_fl.merging.recalibrate.targets import output_moments
from tests.symmetry.families import SMALL, build, traced

RECALIBRATIONS = {"repair": Repair(), "closed form": Repair(closed_form=True), "refit": Refit()}
RECURRENT = ("lstm", "gru", "rnn")
Batch = tuple[Tensor, ...]


def _drawn(inputs: Batch, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(each.shape, generator=generator, dtype=torch.float64)
        if each.is_floating_point()
        else torch.randint(int(each.max()) + 1, each.shape, generator=generator)
        for each in inputs
    )


@cache
def _setting(family: str) -> tuple[nn.Module, tuple[dict[str, Tensor], ...], list[Batch], Setting]:
    """Three random members of a family in float64, their mean, and six batches."""
    example = SMALL[family][1]
    inputs = example if isinstance(example, tuple) else (example,)
    model = build(family).double()
    nodes = tuple(
        {name: value.detach() for name, value in build(family, seed).double().state_dict().items()} for seed in range(3)
    )
    batches = [_drawn(inputs, seed) for seed in range(6)]
    setting = prepare(model, weighted_mean(nodes), nodes, batches, example_inputs=inputs)
    return model, nodes, batches, setting


@pytest.mark.parametrize("kind", RECALIBRATIONS)
@pytest.mark.parametrize("family", SMALL)
def test_every_parameter_is_corrected_or_reported_with_a_reason(family: str, kind: str) -> None:
    _, _, _, setting = _setting(family)
    done = RECALIBRATIONS[kind](setting)
    reasons = dict(done.report.skipped)
    assert all(reasons.values())
    for name in floating(setting.merged):
        found, before = done.state_dict[name], setting.merged[name]
        assert (found.shape, found.dtype) == (before.shape, before.dtype)
        assert bool(torch.isfinite(found).all())
        assert torch.equal(found, before) or name not in reasons
    operators = setting.programs[0].operators
    corrected = {name for each in operators for name in (each.weight, each.bias, each.mean, each.variance)}
    corrected |= {alias for name in corrected for alias in setting.programs[0].aliases.get(name, ())}
    assert set(floating(setting.merged)) - corrected == set(reasons)


@pytest.mark.parametrize("kind", ["repair", "refit"])
@pytest.mark.parametrize("family", SMALL)
def test_corrected_moments_equal_their_targets(family: str, kind: str) -> None:
    _, _, _, setting = _setting(family)
    done = RECALIBRATIONS[kind](setting)
    with torch.no_grad():
        found = output_moments(setting.programs, setting.batches, done.state_dict)
    actions = {each.operator: each for each in done.report.operators}
    assert actions
    for name, report in actions.items():
        target, moments = setting.targets[name], found[name]
        if not report.action.startswith(("mean", "spread")) or report.dead:
            continue
        assert torch.allclose(moments.std, target.std, rtol=1e-6, atol=1e-9)
        if report.action == "mean and spread":
            assert torch.allclose(moments.mean, target.mean, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", SMALL)
def test_refit_leaves_no_operator_with_a_larger_held_out_error(family: str) -> None:
    fits = [each.fit for each in Refit()(_setting(family)[3]).report.operators if each.fit is not None]
    assert fits
    assert all(math.isfinite(fit.error) and fit.error <= fit.error_before for fit in fits)


@pytest.mark.parametrize("kind", ["repair", "refit"])
@pytest.mark.parametrize("family", SMALL)
def test_identical_nodes_leave_nothing_to_correct(family: str, kind: str) -> None:
    _, (node, *_), _, setting = _setting(family)
    alone = replace(setting, merged=node, endpoints=(node,) * 3)
    done = RECALIBRATIONS[kind](alone).state_dict
    if not any(
        each.mean for each in setting.programs[0].operators
    ):  # running statistics are those of the calibration data, and what follows them is
        assert all(torch.equal(done[name], value) for name, value in node.items())


@pytest.mark.parametrize("family", [name for name in SMALL if any(kind in name for kind in RECURRENT)])
def test_recurrent_weights_are_reported_and_left_alone(family: str) -> None:
    _, _, _, setting = _setting(family)
    reasons = [reason for name, reason in setting.programs[0].skipped.items() if "weight_hh" in name]
    assert reasons
    assert all("recurrent gates" in reason for reason in reasons)


@pytest.mark.slow  # all of them together
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("family", SMALL)
def test_every_method_takes_every_family_or_says_why_not(family: str) -> None:
    found, example = traced(family), SMALL[family][1]
    inputs = example if isinstance(example, tuple) else (example,)
    nodes = [build(family, seed).state_dict() for seed in range(2)]
    merged, refused = {}, {}
    for method in METHODS:
        options: dict[str, Any] = {"spec": found.spec, "example_inputs": inputs, "calibration": [inputs]}
        try:
            merged[method] = merge(found.network, nodes, method=method, recalibrate="none", **options).state_dict
        except ConfigError as error:
            refused[method] = str(error)
    assert set(refused) <= {"activations", "activations-universe", "cca"}
    assert all("use a method" in reason for reason in refused.values())
    for params in merged.values():
        assert all(bool(torch.isfinite(params[name]).all()) for name in floating(params))
