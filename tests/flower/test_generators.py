"""What is drawn inside disturbs nobody outside, and calibration data are the same in every process."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch.utils.data import DataLoader

from c2m3_fl.flower.generators import global_states, set_global_states, undisturbed
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import digits, mlp


def drawn():
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()  # noqa: NPY002  # these are tested


def test_global_generators_go_on_from_where_they_were():
    drawn()  # NumPy keeps every second normal number
    states = global_states()
    first = drawn()
    set_global_states(states)
    assert drawn() == first


def test_what_is_drawn_inside_disturbs_nobody_outside():
    states = global_states()
    expected = drawn()
    set_global_states(states)
    with undisturbed(seed=1):
        inside = drawn()
    assert drawn() == expected
    with undisturbed(seed=1):
        assert drawn() == inside


def test_a_shuffling_loader_gives_every_process_the_same_calibration_data():
    loader = DataLoader(digits()[0][:100], batch_size=50, shuffle=True)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(C2M3(model=mlp(), calibration=loader).setup.data.batches)
        assert torch.initial_seed() == seed
    assert all(torch.equal(one.inputs[0], other.inputs[0]) for one, other in zip(*found, strict=True))
    assert not torch.equal(found[0][0].inputs[0], digits()[0][:50])
