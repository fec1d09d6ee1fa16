"""A candidate replaces the aggregate only by evidence that no single voter can make."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from c2m3_fl.errors import CalibrationError
from c2m3_fl.merging.evaluate.decide import Vote, decide, judge_by_labels
from c2m3_fl.network.calibration import load_batches
from c2m3_fl.network.program import export_batches

NAMES = ("aggregate", "head", "refit")


def votes(*losses, weights=None):
    """One vote per row of losses, which name the candidates in order."""
    weights = weights or [1.0] * len(losses)
    return [Vote(dict(zip(NAMES, row, strict=False)), weight) for row, weight in zip(losses, weights, strict=True)]


def test_the_candidate_of_largest_robust_gain_replaces_the_aggregate():
    verdict = decide(NAMES, votes((2.0, 1.0, 0.5), (2.0, 1.5, 2.4), (2.0, 1.2, 0.2)), "loss")
    assert verdict.chosen == "head"
    gains = {each.name: (each.gain, each.robust_gain) for each in verdict.candidates}
    # head gains 1, .5, .8: without the first .65 is left; refit gains 1.5, -.4, 1.8: without the third .55
    assert gains["head"] == pytest.approx((2.3 / 3, 0.65))
    assert gains["refit"] == pytest.approx((2.9 / 3, 0.55))


def test_a_voter_moves_no_bound_of_the_others_gains_or_weights():
    """Else a tiny gain, or a tiny weight, makes a large loss of another voter count less."""
    gains = [0.1, 0.1, 1.0, 1.0, -4.0]
    for more, weights in (([], None), ([1e-6], None), ([0.1], [1.0] * 5 + [1e-6])):
        verdict = decide(NAMES[:2], votes(*((2.0, 2.0 - gain) for gain in [*gains, *more]), weights=weights), "loss")
        assert verdict.chosen == "aggregate", more
    losses, weights = [(2.0, 1.9), (2.0, 1.9), (2.0, 2.1)], [1.0, 1.0, 15.0]
    for more in ([], [1e-6]):
        cast = votes(*losses, *((2.0, 1.9) for _ in more), weights=[*weights, *more])
        assert decide(NAMES[:2], cast, "loss").chosen == "aggregate"


def test_without_a_gain_the_aggregate_stays():
    verdict = decide(NAMES, votes((1.0, 1.1, 1.0), (1.0, 0.9, 1.0), (1.0, 1.0, 1.0)), "loss")
    assert (verdict.chosen, verdict.judged) == ("aggregate", True)


@pytest.mark.parametrize("lie", [(1e300, -1e300), (0.0, -1e300), (1e308, -1e308), (1e6, 0.0)])
@pytest.mark.parametrize("weight", [1.0, 2.0**53, 1e-300, 1.7e308])
def test_one_of_three_voters_cannot_install_what_the_others_lose_by(lie, weight):
    verdict = decide(NAMES[:2], votes((1.0, 1.2), (1.0, 1.1), lie, weights=[10, 20, weight]), "loss")
    assert verdict.chosen == "aggregate"


@pytest.mark.parametrize("weight", [1.0, 2.0**53])
def test_one_of_three_voters_can_veto(weight):
    honest = [(2.0, 1.0), (2.0, 1.0)]
    assert decide(NAMES[:2], votes(*honest, (2.0, 1.0)), "loss").chosen == "head"
    assert decide(NAMES[:2], votes(*honest, (0.0, 1e300), weights=[1, 1, weight]), "loss").chosen == "aggregate"


@given(
    honest=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100), st.floats(0.1, 10)), min_size=1, max_size=6),
    lie=st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
    weight=st.floats(min_value=1e-300, allow_infinity=False),
)
def test_whatever_one_voter_says_a_candidate_by_which_each_of_the_others_loses_is_not_installed(honest, lie, weight):
    rows = [(min(one, other), max(one, other)) for one, other, _ in honest]
    verdict = decide(NAMES[:2], votes(*rows, lie, weights=[*(each[2] for each in honest), weight]), "loss")
    assert verdict.chosen == "aggregate"


def test_two_voters_must_both_gain_and_one_decides_nothing():
    assert decide(NAMES[:2], votes((2.0, 1.0), (2.0, 1.9)), "loss").chosen == "head"
    assert decide(NAMES[:2], votes((2.0, 1.0), (2.0, 2.1)), "loss").chosen == "aggregate"
    alone = decide(NAMES[:2], votes((2.0, 1.0)), "loss")
    assert (alone.chosen, alone.judged) == ("aggregate", False)
    assert "at least 2" in alone.reason


@pytest.mark.parametrize("honest", [2, 3, 9])
def test_a_candidate_whose_loss_is_infinite_at_one_voter_is_refused(honest):
    verdict = decide(NAMES[:2], votes(*[(2.0, 1.0)] * honest, (2.0, math.inf)), "loss")
    assert verdict.chosen == "aggregate"
    head = verdict.candidates[1]
    assert (head.voters, head.loss) == (honest + 1, pytest.approx(1.0))
    assert head.gain == pytest.approx((honest - 10) / (honest + 1))  # ten times the median size of the others' gains


def test_an_aggregate_whose_loss_is_infinite_is_replaced_if_no_single_voter_says_so():
    assert decide(NAMES[:2], votes((math.inf, 1.0), (math.inf, 2.0), (math.inf, 3.0)), "loss").chosen == "head"
    assert decide(NAMES[:2], votes((math.inf, 1.0), (1.0, 1.1), (1.0, 1.1)), "loss").chosen == "aggregate"


@pytest.mark.parametrize("honest", [2, 3, 4, 9])
@pytest.mark.parametrize("lie", [(0.0, -1e300), (-1e300, -1e301), (1e-9, -1.0)])
def test_one_voter_cannot_make_the_least_gain_smaller(honest, lie):
    """Half a hundredth of the loss is not enough."""
    verdict = decide(NAMES[:2], votes(*[(1.0, 0.995)] * honest, lie), "loss")
    assert verdict.chosen == "aggregate"


def test_the_reason_names_the_gain_that_a_candidate_needs():
    verdict = decide(NAMES[:2], votes((2.0, 1.99), (2.0, 1.99), (2.0, 1.99)), "loss")
    assert verdict.reason == (
        "no candidate lowers 'loss' of 'aggregate' by more than 0.02 whichever voter is left out (best: 'head', 0.01)"
    )


def test_two_infinite_losses_say_nothing():
    verdict = decide(NAMES[:2], votes((2.0, 1.0), (2.0, 1.0), (math.inf, math.inf)), "loss")
    assert (verdict.chosen, verdict.candidates[1].voters) == ("head", 2)


def test_a_voter_counts_only_where_it_answered_for_both():
    partial = [Vote({"head": -1e9}, 1.0), Vote({"aggregate": 1e9}, 1.0)]
    verdict = decide(NAMES[:2], [*votes((1.0, 1.1), (1.0, 1.1)), *partial], "loss")
    assert verdict.chosen == "aggregate"
    assert verdict.candidates[1].voters == 2
    assert verdict.candidates[1].gain == pytest.approx(-0.1)


def test_weights_count_up_to_ten_times_their_median():
    verdict = decide(NAMES[:2], votes((1.0, 0.5), (1.0, 0.5), (1.0, 1.5), weights=[1, 1, 10**9]), "loss")
    assert verdict.candidates[1].gain == pytest.approx((0.5 + 0.5 - 10 * 0.5) / 12)


def test_the_order_of_the_voters_changes_no_bit():
    rows = [(2.0 + 0.1 * index, 1.3 ** (index - 3), 0.7) for index in range(7)]
    weights = [1.0 + index / 3 for index in range(7)]
    forward = decide(NAMES, votes(*rows, weights=weights), "loss")
    assert decide(NAMES, votes(*rows[::-1], weights=weights[::-1]), "loss") == forward


def labelled(count=400):
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return load_batches([(inputs, (inputs[:, 0] > 0).long())])


def test_labelled_data_choose_the_better_network_and_keep_the_aggregate_where_the_gain_is_chance():
    batches, model = labelled(), nn.Linear(4, 2)
    programs = export_batches(model, batches)
    good = {"weight": torch.tensor([[-3.0, 0, 0, 0], [3.0, 0, 0, 0]]), "bias": torch.zeros(2)}
    blind = {name: torch.zeros_like(value) for name, value in good.items()}
    verdict = judge_by_labels(programs, {"aggregate": blind, "head": good}, batches)
    assert verdict.chosen == "head"
    assert verdict.candidates[0].loss == pytest.approx(math.log(2))  # of two classes at even odds
    assert judge_by_labels(programs, {"aggregate": good, "head": blind}, batches).chosen == "aggregate"
    assert judge_by_labels(programs, {"aggregate": good, "head": good}, batches).chosen == "aggregate"


def test_of_two_candidates_that_lower_the_loss_on_labelled_data_the_one_that_lowers_it_more_is_chosen():
    batches, model = labelled(), nn.Linear(4, 2)
    good = {"weight": torch.tensor([[-3.0, 0, 0, 0], [3.0, 0, 0, 0]]), "bias": torch.zeros(2)}
    blind, mild = ({name: factor * value for name, value in good.items()} for factor in (0, 1 / 3))
    for found in ({"mild": mild, "good": good}, {"good": good, "mild": mild}):
        verdict = judge_by_labels(export_batches(model, batches), {"aggregate": blind, **found}, batches)
        assert all(each.robust_gain > 0 for each in verdict.candidates[1:])
        assert verdict.chosen == "good"


def test_data_without_labels_cannot_judge():
    model, batches = nn.Linear(4, 2), load_batches([torch.zeros(8, 4)])
    with pytest.raises(CalibrationError, match="has no labels"):
        judge_by_labels(export_batches(model, batches), {"aggregate": model.state_dict()}, batches)
