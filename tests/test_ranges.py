"""Every number that an options object takes is checked where it enters."""

from __future__ import annotations

import math
import re
from dataclasses import fields

import numpy as np
import pytest

from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.judging.judge import ClientJudge
from c2m3_fl.flower.options import Options
from c2m3_fl.flower.queries.head import Head
from c2m3_fl.flower.queries.refit import ClientRefit, RegMean
from c2m3_fl.flower.queries.repair import ClientStatistics
from c2m3_fl.merging.recalibrate.refit import Refit

WRONG = (
    math.nan,
    math.inf,
    -math.inf,
    -1,
    -0.5,
    "many",
    "",
    (),
    [],
    (math.nan,),
    (math.inf,),
    (-1.0,),
    (0.0,),
    ("a",),
    b"1",
)
KINDS = (ClientRefit, RegMean, Head, ClientStatistics, ClientJudge, Refit)
NUMERIC = [(kind, field.name) for kind in KINDS for field in fields(kind)]
SEARCH = ("min_replies", "memory", "max_steps", "tolerance", "max_seconds", "memory_limit")


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
@pytest.mark.parametrize(("kind", "name"), NUMERIC, ids=lambda value: getattr(value, "__name__", value))
def test_a_wrong_value_of_any_option_is_an_error_that_names_it(kind, name, wrong):
    if name == "key" and wrong == "many":
        assert ClientJudge(key=wrong).key == "many"  # the name of a metric
        return
    with pytest.raises(ConfigError, match=rf"{name} is {quoted(wrong)}, expected "):
        kind(**{name: wrong})


@pytest.mark.parametrize("wrong", [math.nan, -1, "many", (), [1]], ids=repr)
@pytest.mark.parametrize("name", SEARCH)
def test_a_wrong_limit_of_a_strategy_is_an_error_that_names_it(name, wrong):
    with pytest.raises(ConfigError, match=rf"{name} is {quoted(wrong)}, expected "):
        Options(**{name: wrong})


@pytest.mark.parametrize("wrong", [True, False])
@pytest.mark.parametrize("name", ["positions", "max_bytes", "seed", "timeout", "exchanges", "holdout", "sketch"])
def test_truth_values_are_no_numbers(name, wrong):
    with pytest.raises(ConfigError, match=f"{name} is {wrong}, expected"):
        ClientRefit(**{name: wrong})


def test_numbers_of_numpy_and_lists_of_strengths_are_taken():
    found = ClientRefit(positions=np.int64(64), timeout=np.float32(5), strengths=[np.float64(0.5), 1])
    assert (found.positions, found.timeout, list(found.strengths)) == (64, 5.0, [0.5, 1])
    assert ClientJudge(fraction=1, least=np.int32(2)).sample(range(9), 1)
    assert Refit(strengths=(1,), floor=0).floor == 0
    assert ClientRefit(seed=10**400).seed == 10**400


def quoted(value):
    return re.escape(repr(value))
