"""What the matcher refuses, and how the error names it."""

from __future__ import annotations

import pytest
import torch

from c2m3_fl.core.match import match
from c2m3_fl.errors import ConfigError, ParamsError, SpecError, WeightsError
from tests.core.networks import (
    draws,
    mlp,
)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"nodes": []}, ParamsError, "got none"),
        ({"weights": [1.0]}, WeightsError, "got 1, expected one for each of the 2 nodes"),
        ({"weights": [0.0, 0.0]}, WeightsError, "all zero"),
        ({"start": "middle"}, ConfigError, "start is 'middle', expected one of"),
        ({"start": [{}]}, ConfigError, "holds 1 permutations, expected one for each of the 2 nodes"),
        ({"start": [{}, {}]}, SpecError, r"start\[0\]: has groups"),
        ({"max_steps": -1}, ConfigError, "max_steps is -1"),
        ({"tolerance": float("nan")}, ConfigError, "tolerance is nan"),
        ({"together": 0}, ConfigError, "together is 0, expected how many nodes step at once"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    spec = mlp(2, 3, 2)
    with pytest.raises(error, match=message):
        match(spec, **{"nodes": draws(spec, 2), **change})


def test_nodes_that_are_not_finite_or_do_not_fit_are_refused():
    spec = mlp(2, 3, 2)
    good, bad = draws(spec, 2)
    bad["1.weight"][0, 0] = float("nan")
    with pytest.raises(ParamsError, match=r"node 1: '1.weight' has 1 values that are NaN or infinite"):
        match(spec, [good, bad])
    with pytest.raises(ParamsError, match="node 1: keys differ"):
        match(spec, [good, {}])


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([torch.nn.Linear(2, 3)], r"node 0: is a Linear, expected a state dict; pass model.state_dict\(\)"),
        ({"0.weight": torch.zeros(3, 2)}, "node 0: is a str, expected a state dict"),
        ([{name: value.numpy() for name, value in draws(mlp(2, 3, 2), 1)[0].items()}], "'0.weight' is a ndarray"),
    ],
)
def test_what_is_no_state_dict_is_refused(nodes, message):
    with pytest.raises(ParamsError, match=message):
        match(mlp(2, 3, 2), nodes)


@pytest.mark.parametrize(("to", "source"), [(0, 7), (2, 0), (-1, 0)])
def test_a_map_between_nodes_that_do_not_exist_is_refused(to, source):
    found = match(mlp(2, 3, 2), draws(mlp(2, 3, 2), 2))
    with pytest.raises(ConfigError, match=rf"between\({to}, {source}\): the 2 nodes have the numbers 0 to 1"):
        found.between(to, source)
