"""Label sums that no data have are refused; those that do not fit the others' are named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from c2m3_fl.errors import ParamsError
from c2m3_fl.merging.recalibrate.head.checks import check_label_sums, outlying
from c2m3_fl.merging.recalibrate.head.label_sums import one_hot_sums
from tests.merging.recalibrate.head.labelled import PARTITIONS, digits, partition, sums


@pytest.mark.parametrize("kind", PARTITIONS)
def test_honest_clients_are_neither_refused_nor_left_out(kind):
    answers = [sums(rows) for rows in partition(kind, digits()[1])]
    for answer in answers:
        check_label_sums(answer.train)
        check_label_sums(answer.held_out)
    assert outlying(answers) == {}


def parts(seed=0):
    found = sums(torch.arange(60)).train
    return found.xx[0].clone(), found.xr[0].clone(), found.r[0].clone()


def test_negative_numbers_of_examples_are_refused():
    gram, by_class, classes = parts()
    classes[0], classes[1] = -classes[0], classes[1] + 2 * classes[0]
    with pytest.raises(ParamsError, match="fewer than none"):
        check_label_sums(one_hot_sums(gram, by_class, classes))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    for place in (0, 1):
        given = list(parts())
        given[place][0, 0] = value
        with pytest.raises(ParamsError, match="finite"):
            check_label_sums(one_hot_sums(*given))


def test_more_examples_than_floats_can_count_are_refused():
    gram, by_class, classes = parts()
    with pytest.raises(ParamsError, match="examples"):
        check_label_sums(one_hot_sums(gram, by_class, classes * 2.0**53))


def test_second_moments_that_are_not_positive_semidefinite_are_refused():
    gram, by_class, classes = parts()
    with pytest.raises(ParamsError, match="negative"):
        check_label_sums(one_hot_sums(-gram, by_class, classes))
    with pytest.raises(ParamsError, match="positive semidefinite"):  # class means larger than the inputs' squares allow
        check_label_sums(one_hot_sums(gram, 10 * by_class, classes))


def test_inputs_of_a_class_without_examples_are_refused():
    gram, by_class, classes = parts()
    classes[1] += classes[0]
    classes[0] = 0
    with pytest.raises(ParamsError, match="class without examples"):
        check_label_sums(one_hot_sums(gram, by_class, classes))


@pytest.mark.parametrize("kind", PARTITIONS)
@pytest.mark.parametrize("scale", [3.0, 1e6, 1e37])
def test_inputs_of_another_size_are_left_out(kind, scale):
    rows = partition(kind, digits()[1])
    answers = [sums(each) for each in rows]
    liar = answers[2]
    scaled = [
        one_hot_sums(scale**2 * side.xx[0], scale * side.xr[0], side.r[0]) for side in (liar.train, liar.held_out)
    ]
    answers[2] = replace(liar, train=scaled[0], held_out=scaled[1])
    check_label_sums(answers[2].train)
    assert set(outlying(answers)) == {2}


def test_labels_at_odds_with_all_others_are_left_out():
    rows, labels = partition("iid", digits()[1]), digits()[1]
    answers = [sums(each) for each in rows]
    answers[1] = sums(rows[1], labels=(labels + 1) % 10)
    found = outlying(answers)
    assert set(found) == {1}
    assert "class means" in found[1]
    assert set(outlying(answers[:3])) == {1}


def test_of_two_clients_whose_labels_are_at_odds_neither_is_left_out():
    rows, labels = partition("iid", digits()[1])[:2], digits()[1]
    assert outlying([sums(rows[0]), sums(rows[1], labels=(labels + 1) % 10)]) == {}
