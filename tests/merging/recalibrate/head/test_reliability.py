"""Likelihoods and calibration errors add up over examples and clients; the temperature minimises the pooled one."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from c2m3_fl.errors import ParamsError
from c2m3_fl.merging.recalibrate.head.fit import TEMPERATURES
from c2m3_fl.merging.recalibrate.head.reliability import Reliability, pool_reliability, quality


def scored(count=90, seed=0, sharpness=3.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    scores = torch.randn(count, 4, generator=generator) + 1.5 * functional.one_hot(labels, 4)
    return sharpness * scores, labels


def test_parts_combine_to_the_whole():
    scores, labels = scored()
    whole = Reliability.of(scores, labels, TEMPERATURES)
    parts = Reliability.of(scores[:30], labels[:30], TEMPERATURES)
    parts = parts.combine(Reliability.of(scores[30:], labels[30:], TEMPERATURES))
    for name, value in vars(whole).items():
        torch.testing.assert_close(vars(parts)[name], value)


def test_the_likelihood_is_cross_entropy_at_every_temperature():
    scores, labels = scored()
    found = Reliability.of(scores, labels, TEMPERATURES)
    for temperature, nll in zip(TEMPERATURES, found.nll, strict=True):
        assert float(nll / found.count) == pytest.approx(
            float(functional.cross_entropy(scores.double() / temperature, labels))
        )


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy():
    scores = torch.log(torch.tensor([[0.8, 0.2]] * 10, dtype=torch.float64))
    found = Reliability.of(scores, torch.tensor([0] * 5 + [1] * 5), (1.0,))
    assert float(found.ece) == pytest.approx(0.3)  # .8 confident, half of them right


def test_the_temperature_minimises_the_pooled_likelihood_on_the_grid():
    parts = [scored(60 + 20 * seed, seed) for seed in range(3)]
    pooled = pool_reliability([Reliability.of(*part, TEMPERATURES) for part in parts], 4)
    scores, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    losses = {t: float(functional.cross_entropy(scores.double() / t, labels)) for t in TEMPERATURES}
    found = quality(pooled, TEMPERATURES)
    assert found.temperature == min(losses, key=losses.__getitem__)
    assert found.temperature > 1
    assert found.nll_tempered == pytest.approx(min(losses.values()))
    assert found.nll == pytest.approx(losses[1.0])
    assert found.accuracy == pytest.approx(float((scores.argmax(1) == labels).double().mean()))
    assert found.ece_tempered < found.ece


def test_clients_in_any_order_give_the_same_bits():
    parts = [Reliability.of(*scored(60 + 20 * seed, seed), TEMPERATURES) for seed in range(4)]
    for equally in (False, True):
        one, other = (pool_reliability(each, 4, equally=equally) for each in (parts, parts[::-1]))
        assert all(torch.equal(vars(one)[name], vars(other)[name]) for name in vars(one))


@pytest.mark.parametrize("equally", [False, True])
def test_one_client_with_all_labels_wrong_and_a_huge_claim_does_not_make_the_temperature_useless(equally):
    parts = [Reliability.of(*scored(200, seed), TEMPERATURES) for seed in range(4)]
    honest = pool_reliability(parts, 4, equally=equally)
    scores, labels = scored(200, 9)
    claim = Reliability.of(scores, (labels + 1) % 4, TEMPERATURES).scaled(2.0**40)
    claim.check(TEMPERATURES, 4)
    found = quality(pool_reliability([*parts, claim], 4, equally=equally), TEMPERATURES).temperature
    at = float(honest.nll[TEMPERATURES.index(found)] / honest.count)
    best = quality(honest, TEMPERATURES).nll_tempered
    assert best < at < math.log(4)  # that of scores that know nothing


def test_a_likelihood_that_no_scores_have_is_refused():
    sums = Reliability.of(*scored(), TEMPERATURES)
    nll = torch.full_like(sums.nll, 1e300)
    nll[0] = 0.0
    with pytest.raises(ParamsError, match="not convex"):
        Reliability(nll, sums.members, sums.confidence, sums.correct).check(TEMPERATURES, 4)


@pytest.mark.parametrize(
    ("name", "value"), [("nll", float("nan")), ("nll", -1.0), ("members", -1.0), ("correct", 1e9), ("confidence", 1e9)]
)
def test_sums_that_no_examples_have_are_refused(name, value):
    sums = Reliability.of(*scored(), TEMPERATURES)
    sums.check(TEMPERATURES, 4)
    vars(sums)[name][-1] = value
    with pytest.raises(ParamsError, match="sums of scores"):
        sums.check(TEMPERATURES, 4)


def test_clients_whose_classes_are_easy_leave_the_temperature_to_the_one_whose_classes_are_not():
    # label skew: most clients make no mistake at any temperature, and the fifth one does
    easy = [(50.0 * functional.one_hot(scored(100, seed)[1], 4).double(), scored(100, seed)[1]) for seed in range(4)]
    hard = scored(100, 9)
    parts = [Reliability.of(*each, TEMPERATURES) for each in (*easy, hard)]
    found = quality(pool_reliability(parts, 4), TEMPERATURES)
    alone = quality(Reliability.of(*hard, TEMPERATURES), TEMPERATURES)
    assert found.temperature == pytest.approx(alone.temperature, rel=0.5)
