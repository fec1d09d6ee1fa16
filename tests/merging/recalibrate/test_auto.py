from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from c2m3_fl.core import permutation
from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.errors import CalibrationError, ParamsError
from c2m3_fl.merging.merge import merge
from c2m3_fl.merging.recalibrate.auto import Auto, judge
from c2m3_fl.merging.recalibrate.held_out import held_out
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.merging.recalibrate.repair import Repair
from c2m3_fl.merging.recalibrate.setting import Setting, prepare
from c2m3_fl.merging.recalibrate.shift import channel_moments, shift, with_own_moments
from c2m3_fl.merging.reports import Recalibrated, RecalibrationReport
from c2m3_fl.symmetry.discover import permutation_spec
from tests.merging.networks import CALIBRATION, SEED, images, lively, nodes, outputs, spec_of

FOREIGN = [10 + 5 * torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(9))]


def test_without_evidence_auto_repairs_and_says_why() -> None:
    model, params = nodes("mlp", 2)
    setting = prepare(model, weighted_mean(params), params, CALIBRATION)
    done = Auto()(setting)
    assert done.report.method == "repair"
    assert done.report.decision is not None
    assert "give labels, or each node's channel_moments" in done.report.decision.reason
    repaired = Repair()(setting).state_dict
    assert all(torch.equal(done.state_dict[name], repaired[name]) for name in repaired)


@pytest.mark.parametrize(("calibration", "method"), [(CALIBRATION, "refit"), (FOREIGN, "repair")])
def test_own_moments_decide_whether_refit_is_trusted(calibration: list[Tensor], method: str) -> None:
    model, (node,) = nodes("mlp", 1)
    params = [node, {name: value + 0.2 * torch.randn(value.shape, generator=SEED(1)) for name, value in node.items()}]
    moments = [channel_moments(model, each, [images(200, 7)]) for each in params]
    options = {"spec": spec_of("mlp"), "recalibrate": "auto", "moments": moments}
    report = merge(model, params, calibration=calibration, **options).report.recalibration  # type: ignore[arg-type]  # a dict of options
    assert report is not None
    assert report.decision is not None
    assert report.method == report.decision.chosen == method
    assert report.decision.shift is not None
    assert ("beyond" in report.decision.reason) == (method == "repair")


def test_own_moments_move_with_their_nodes() -> None:
    model, (node,) = nodes("cnn", 1)
    spec = spec_of("cnn")
    twin = permutation.apply(spec, permutation.random(spec, SEED(3)), node)
    other = {name: value + 0.1 * torch.randn(value.shape, generator=SEED(4)) for name, value in twin.items()}
    moments = [channel_moments(model, each, CALIBRATION) for each in (node, other)]
    options = {"spec": spec, "recalibrate": "auto", "moments": moments}
    report = merge(model, [node, other], calibration=CALIBRATION, **options).report  # type: ignore[arg-type]  # a dict of options
    assert report.recalibration is not None
    assert report.recalibration.decision is not None
    assert report.recalibration.decision.shift == pytest.approx(0, abs=1e-5)


def test_batch_norm_carries_its_own_moments() -> None:
    model, params = nodes("batch norm", 2)
    merged = weighted_mean(params)
    found = shift(prepare(model, merged, params, CALIBRATION))
    assert found is not None
    assert found > 0.5  # its running statistics were drawn at random
    assert shift(prepare(*[nodes("mlp", 1)[0]], *_plain("mlp"), CALIBRATION)) is None


def _plain(network: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    _, params = nodes(network, 2)
    return weighted_mean(params), params


def test_moments_of_another_network_are_refused() -> None:
    model, _ = nodes("mlp", 1)
    with pytest.raises(ParamsError, match="params: keys differ"):
        channel_moments(model, {}, [CALIBRATION[0]])


def test_moments_that_do_not_fit_are_refused() -> None:
    model, params = nodes("mlp", 2)
    options = {"spec": spec_of("mlp"), "calibration": CALIBRATION, "recalibrate": "auto"}
    with pytest.raises(CalibrationError, match="got 1, expected one for each of 2 nodes"):
        merge(model, params, moments=[{}], **options)  # type: ignore[arg-type]  # a dict of options
    with pytest.raises(CalibrationError, match=r"moments of node . lack operator 'linear'"):
        merge(model, params, moments=[{}, {}], **options)  # type: ignore[arg-type]  # a dict of options


def test_labels_decide_and_ties_go_to_the_safest() -> None:
    model, params = nodes("mlp", 2)
    merged = weighted_mean(params)
    labels = [outputs(model, params[0], batch).argmax(1) for batch in CALIBRATION]
    setting = prepare(model, merged, params, list(zip(CALIBRATION, labels, strict=True)))
    decision = judge(setting, {"merged": merged, "node": params[0], "again": params[0]})
    assert decision.chosen == "node"
    assert [each.accuracy for each in decision.candidates][1:] == [1.0, 1.0]
    assert "100.0% of the labelled" in decision.reason


def test_with_labels_auto_takes_the_most_accurate_candidate() -> None:
    model, params = nodes("cnn", 2)
    labels = [outputs(model, params[0], batch).argmax(1) for batch in CALIBRATION]
    setting = prepare(model, weighted_mean(params), params, list(zip(CALIBRATION, labels, strict=True)))
    decision = Auto()(setting).report.decision
    assert decision is not None
    scores = {each.name: each.accuracy for each in decision.candidates}
    assert set(scores) == {"none", "repair", "refit"}
    assert scores[decision.chosen] == max(score for score in scores.values() if score is not None)


def test_without_labels_agreement_with_the_ensemble_decides() -> None:
    model, params = nodes("mlp", 2)
    setting = prepare(model, weighted_mean(params), [params[0]], CALIBRATION)
    decision = judge(setting, {"other": params[1], "endpoint": params[0]})
    assert decision.chosen == "endpoint"
    assert decision.candidates[1].agreement == 1.0
    assert decision.candidates[1].accuracy is None


def test_a_shift_that_only_one_node_sees_does_not_count() -> None:
    model, (node,) = nodes("mlp", 1)
    params = [
        {name: value + 0.05 * torch.randn(value.shape, generator=SEED(seed)) for name, value in node.items()}
        for seed in range(6)
    ]
    merged, mine = weighted_mean(params), torch.cat(CALIBRATION)
    spec = spec_of("mlp")
    moves = [permutation.identity(spec)] * 6

    def measured(own: list[Tensor]) -> float:
        moments = [channel_moments(model, each, [data]) for each, data in zip(params, own, strict=True)]
        found = shift(with_own_moments(prepare(model, merged, params, CALIBRATION), spec, moves, moments))
        assert found is not None
        return found

    skewed = [mine + 0.7 * torch.randn(mine.shape[1:], generator=SEED(20 + seed)) for seed in range(6)]
    together = [mine + 0.7 * torch.randn(mine.shape[1:], generator=SEED(20))] * 6
    assert measured([mine] * 6) == pytest.approx(0, abs=1e-3)
    assert measured(skewed) < 0.5 * measured(together)


def test_offsets_that_oppose_each_other_do_not_hide_inputs_of_another_range() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    params, mine = model.state_dict(), torch.randn(200, 6, generator=SEED(20))
    mine -= mine.mean(0)
    spec = permutation_spec(model, (mine,))
    moments = [channel_moments(model, params, [mine + offset]) for offset in (-20, 20)]
    setting = prepare(model, params, [params] * 2, [255 * mine])
    found = shift(with_own_moments(setting, spec, [permutation.identity(spec)] * 2, moments))
    assert found is not None
    assert found > 0.9 * math.log(255), "the stretch that both nodes share"


def test_repair_is_held_back_where_a_safer_network_agrees_more_with_the_ensemble() -> None:
    model, params = nodes("mlp", 2)
    merged = weighted_mean(params)
    broken = Recalibrated(
        {name: torch.zeros_like(value) for name, value in merged.items()}, RecalibrationReport("broken")
    )
    setting = prepare(model, params[0], [params[0]] * 2, CALIBRATION, plain=merged)
    done = Auto(repair=lambda _: broken)(setting)
    assert done.report.method == "none"
    assert done.report.decision is not None
    assert "REPAIR was held back" in done.report.decision.reason
    assert [each.name for each in done.report.decision.candidates] == ["plain", "none", "repair"]


def test_with_labels_the_plain_result_is_a_candidate() -> None:
    model, (one, other) = nodes("mlp", 2)
    data = [(batch, outputs(model, one, batch).argmax(1)) for batch in CALIBRATION]
    setting = prepare(model, other, [other, other], data, plain=one)
    done = Auto()(setting)
    assert done.report.method == "plain"
    assert all(torch.equal(done.state_dict[name], one[name]) for name in one)


def test_batch_norm_statistics_alone_are_a_candidate() -> None:
    model, params = nodes("batch norm", 2)
    decision = Auto()(prepare(model, weighted_mean(params), params, CALIBRATION)).report.decision
    assert decision is not None
    assert "batchnorm" in [each.name for each in decision.candidates]


def test_labels_that_are_no_classes_of_the_network_are_refused() -> None:
    model, params = nodes("mlp", 2)
    labels = torch.arange(32) % 5 + 7
    with pytest.raises(CalibrationError, match="labels from 7 to 11, expected class indices from 0 to 4"):
        merge(model, params, calibration=[(CALIBRATION[0], labels)], recalibrate="auto")


@pytest.mark.parametrize(
    ("rest", "what"),
    [(torch.zeros(32), r"torch.float32 of shape \(32,\)"), (torch.zeros(9).long(), r"torch.int64 of"), (3, "int")],
)
def test_what_is_not_taken_for_labels_is_named(rest: object, what: str) -> None:
    model, params = nodes("mlp", 2)
    done = merge(model, params, calibration=[(CALIBRATION[0], rest)], recalibrate="auto").report.recalibration
    assert done is not None
    assert done.decision is not None
    assert re.search(f"the element after the inputs, {what}", done.decision.reason)


def test_refit_is_judged_on_inputs_that_it_was_not_fitted_to() -> None:
    """A fit that interpolates 40 labelled inputs in 64 dimensions is perfect on them and at chance elsewhere."""
    model = torch.nn.Linear(64, 5)
    node = lively(model, 0)
    inputs = torch.randn(40, 64, generator=SEED(1))
    labels = outputs(model, node, inputs).argmax(1)
    labels[::4] = (labels[::4] + 1) % 5  # the node is right on three quarters
    setting = prepare(model, node, [node], [(inputs, labels)])
    fitted: list[int] = []

    def interpolate(given: Setting) -> Recalibrated:
        (batch,), kept = given.batches, torch.ones(40, dtype=torch.bool)
        if given.left_out:
            kept = ~given.left_out[0]
        fitted.append(int(kept.sum()))
        goal = torch.nn.functional.one_hot(labels[kept], 5).float()
        weight = torch.linalg.lstsq(batch.inputs[0][kept], goal).solution.T
        return Recalibrated({"weight": weight, "bias": torch.zeros(5)}, RecalibrationReport("interpolated"))

    assert judge(setting, {"none": node, "refit": interpolate(setting).state_dict}).chosen == "refit"
    decision = Auto(refit=interpolate)(setting).report.decision
    assert decision is not None
    assert decision.chosen != "refit"
    assert fitted == [40, 32]
    assert (decision.candidates[-1].accuracy or 0.0) < 0.6
    assert "8 labelled calibration inputs that were left out of its fit" in decision.reason


def test_a_refit_that_generalises_is_fitted_to_all_inputs() -> None:
    model, params = nodes("mlp", 1)
    broken = {**params[0], "5.weight": torch.zeros(5, 12)}
    labels = [outputs(model, params[0], batch).argmax(1) for batch in CALIBRATION]
    setting = prepare(model, broken, params, list(zip(CALIBRATION, labels, strict=True)))
    done = Auto()(setting)
    assert done.report.method == "refit"
    whole = Refit()(setting).state_dict
    assert all(torch.equal(done.state_dict[name], whole[name]) for name in whole)
    masks = held_out(setting.batches, 5)
    without = Refit()(setting.leaving_out(masks)).state_dict
    assert not torch.equal(without["5.weight"], whole["5.weight"])


def test_few_labelled_inputs_leave_refit_out() -> None:
    model, params = nodes("mlp", 2)
    few = CALIBRATION[0][:5]
    done = Auto()(prepare(model, weighted_mean(params), params, [(few, torch.zeros(5, dtype=torch.long))]))
    assert done.report.decision is not None
    assert {each.name for each in done.report.decision.candidates} == {"none", "repair"}
    assert "refit needs at least 6 labelled inputs" in done.report.decision.reason
