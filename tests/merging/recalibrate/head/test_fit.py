"""The head is the ridge classifier on pooled features, however the labels are spread over the clients."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn

from c2m3_fl.errors import CalibrationError, ConfigError
from c2m3_fl.merging.recalibrate.head.fit import FitHead, fit_head
from c2m3_fl.merging.recalibrate.head.label_sums import pool_sums, read_sums, write_sums
from c2m3_fl.merging.recalibrate.setting import prepare
from tests.merging.recalibrate.head.labelled import PARTITIONS, digits, features, network, partition, sums

STRENGTHS = (1e-4, 1e-2, 1.0)


def ridge(rows, strength, bias=True):
    """scikit-learn's, whose penalty is not relative to the inputs: alpha = count · strength · mean variance."""
    inputs, targets = features(rows), nn.functional.one_hot(digits()[1][rows], 10).double()
    scale = float((inputs.var(0, correction=0) if bias else inputs.square().mean(0)).mean())
    model = Ridge(alpha=len(rows) * strength * scale, fit_intercept=bias).fit(inputs.numpy(), targets.numpy())
    return torch.tensor(model.coef_).T, torch.tensor(model.intercept_)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", PARTITIONS)
def test_the_head_of_any_partition_is_the_ridge_classifier_on_pooled_features(kind, bias):
    parts = partition(kind, digits()[1])
    fitted = fit_head(pool_sums([sums(rows, bias) for rows in parts]), STRENGTHS, bias=bias)
    weight, intercept = ridge(torch.cat(parts), fitted.fit.strength, bias)
    assert relative(fitted.layer.weight, weight) < 1e-8
    assert not bias or relative(fitted.layer.bias, intercept) < 1e-8
    assert bias or not fitted.layer.bias.any()


@pytest.mark.parametrize("strength", STRENGTHS)
def test_partitions_of_the_same_examples_give_the_same_head(strength):
    heads = []
    for kind in ("iid", "two classes"):
        pooled = pool_sums([sums(rows) for rows in partition(kind, digits()[1])])
        heads.append(fit_head(pooled, (strength,), bias=True).layer)
    assert relative(heads[0].weight, heads[1].weight) < 1e-8


def test_clients_in_any_order_give_the_same_bits():
    answers = [sums(rows) for rows in partition("dirichlet", digits()[1])]
    for equally in (False, True):
        one, other = (
            fit_head(pool_sums(each, equally=equally), STRENGTHS, bias=True).layer for each in (answers, answers[::-1])
        )
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.bias, other.bias)


def test_equal_weights_make_a_client_count_the_same_whatever_its_number_of_examples():
    small, large = torch.arange(100), torch.arange(100, 1300)
    pooled = pool_sums([sums(small), sums(large)], equally=True)
    once, twelve_times = sums(large), sums(small).scaled(12.0)
    expected = twelve_times.combine(once)
    torch.testing.assert_close(pooled.total.gram, expected.total.gram)
    torch.testing.assert_close(pooled.total.cross, expected.total.cross)


def test_a_client_counts_at_most_ten_times_the_median():
    parts = [sums(torch.arange(first, first + 40)) for first in (0, 40, 80)]
    claimed = sums(torch.arange(200, 240)).scaled(1e12)
    pooled = pool_sums([*parts, claimed])
    assert pooled.count == pytest.approx(3 * 40 + 400)


def test_sums_survive_the_wire():
    there = sums(torch.arange(50)).train
    back = read_sums(write_sums(there, "train"), "train")
    for name in ("x", "r", "xx", "xr", "rr"):
        torch.testing.assert_close(getattr(back, name), getattr(there, name), rtol=1e-12, atol=1e-12)
    assert back.count == there.count


def setting(model=None, labels=None, count=400):
    data, known = digits()
    model = model or network()
    known = known if labels is None else labels
    params = model.state_dict()
    return prepare(model, params, [params], list(zip(data[:count].split(100), known[:count].split(100), strict=True)))


def test_on_the_server_labelled_data_fit_the_head_and_nothing_else_changes():
    found = FitHead()(setting())
    given = network().state_dict()
    assert [name for name, value in found.state_dict.items() if not torch.equal(value, given[name])] == [
        "2.weight",
        "2.bias",
    ]
    head = found.report.head
    assert head.after.accuracy > 0.8 > 0.3 > head.before.accuracy
    assert head.after.nll_tempered < head.after.nll
    data, labels = (each[400:] for each in digits())
    model = network()
    model.load_state_dict(found.state_dict)
    with torch.no_grad():
        scores = model(data)
    assert float((scores.argmax(1) == labels).float().mean()) > 0.8
    assert float(nn.functional.cross_entropy(scores, labels)) < 1.0


def test_labels_that_the_features_do_not_predict_give_no_head():
    noise = torch.randint(0, 10, (1300,), generator=torch.Generator().manual_seed(0))
    with pytest.raises(CalibrationError, match="no better than the class shares"):
        FitHead(strengths=(1e-6,))(setting(labels=noise))


def test_labels_that_are_missing_or_out_of_range_are_named():
    model = network()
    params = model.state_dict()
    with pytest.raises(CalibrationError, match="has no labels"):
        FitHead()(prepare(model, params, [params], [digits()[0][:100]]))
    with pytest.raises(CalibrationError, match="labels from 0 to 10, expected class indices from 0 to 9"):
        FitHead()(setting(labels=digits()[1].clamp_min(1) * 0 + torch.arange(1300) % 11))


@pytest.mark.parametrize("wrong", [{"strengths": ()}, {"strengths": (0.0,)}, {"temperatures": (0.5,)}, {"holdout": 1}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        FitHead(**wrong)
