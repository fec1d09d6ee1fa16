"""What clients are asked: roles, sizes, exchanges, residual additions."""

from __future__ import annotations

import torch
from torch import nn

from c2m3_fl.merging.recalibrate.from_clients.plan import Role, norm_behind, plan_gram, plan_refit, skip_beside
from c2m3_fl.network.program import export_program
from tests.merging.networks import NETWORKS, images


def planned(network, **options):
    model = NETWORKS[network]().eval()
    program = export_program(model, (images(4, 0),))
    limits = {"exchanges": None, "width": 4, "max_bytes": 10**9, "first_layer": True, **options}
    return program, plan_refit(program, model.state_dict(), **limits)


def test_exchanges_hold_all_operators_in_forward_order_and_evenly_many():
    _, alone = planned("layer norm")
    places = [step.place for exchange in alone.exchanges for step in exchange]
    assert places == sorted(places)
    for count in (1, 2, 3, 100):
        _, plan = planned("layer norm", exchanges=count)
        assert [step.place for exchange in plan.exchanges for step in exchange] == places
        lengths = [len(exchange) for exchange in plan.exchanges]
        assert len(lengths) == min(count, len(places))
        assert max(lengths) - min(lengths) <= 1


def test_the_largest_operators_are_left_out_until_the_rest_is_within_the_limit():
    _, whole = planned("mlp")
    fits = {step.place: step.size for exchange in whole.exchanges for step in exchange}
    program, plan = planned("mlp", max_bytes=sum(fits.values()) - 1)
    largest = max(fits, key=fits.__getitem__)
    assert plan.too_large == (program.operators[largest].name,)
    roles = {step.place: step.role for exchange in plan.exchanges for step in exchange}
    assert roles[largest] is Role.MOMENTS
    assert all(role is Role.FIT for place, role in roles.items() if place != largest)
    assert plan_gram(program, NETWORKS["mlp"]().state_dict(), width=4, max_bytes=0, first_layer=True).exchanges == ()


def test_within_the_limit_no_operator_is_left_out_that_a_sketch_can_answer_and_no_sketch_is_asked_that_is_not_needed():
    program, whole = planned("mlp")
    fits = {step.place: step.size for exchange in whole.exchanges for step in exchange}
    largest = max(fits, key=fits.__getitem__)
    _, plan = planned("mlp", max_bytes=sum(fits.values()) - 1, sketch=4)
    assert (plan.sketched, plan.too_large) == ((program.operators[largest].name,), ())
    sketches = {step.place: step.sketch for exchange in plan.exchanges for step in exchange}
    assert sketches == {place: 4 if place == largest else 0 for place in fits}
    _, every = planned("mlp", max_bytes=plan.size // 100, sketch=4)
    assert every.sketched == ()
    _, none = planned("mlp", max_bytes=sum(fits.values()) - 1, sketch=10**6)
    assert (none.sketched, none.too_large) == ((), plan.sketched), "a sketch of many rows is no smaller"


def test_a_convolution_and_the_batch_norm_behind_it_are_asked_about_once():
    program, plan = planned("batch norm")
    asked = {step.place for exchange in plan.exchanges for step in exchange}
    for place, operator in enumerate(program.operators):
        norm = norm_behind(program, operator)
        if norm is not None:
            assert place in asked
            assert program.operators.index(norm) not in asked


class Added(nn.Module):
    """Two branches into one sum; the shortcut is computed last, or there is none."""

    def __init__(self, shortcut, in_place):
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(192, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.short = nn.Linear(8, 8) if shortcut else None
        self.in_place = in_place

    def forward(self, x):
        before = torch.relu(self.stem(x.flatten(1)))
        out = self.branch(before)
        skip = before if self.short is None else self.short(before)
        out = out.add_(skip) if self.in_place else out + skip
        return self.head(torch.relu(out))


def test_the_summand_that_is_computed_last_may_aim_at_the_sum():
    for in_place in (False, True):
        for shortcut, expected in ((False, ["branch"]), (True, ["short"])):
            program = export_program(Added(shortcut, in_place).eval(), (images(4, 0),))
            found = [each.module.rpartition(".")[2] for each in program.operators if skip_beside(program, each)]
            assert found == expected
