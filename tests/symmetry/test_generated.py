"""Networks nobody wrote: the rules alone are exact on them."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from c2m3_fl.network.calibration import as_inputs
from c2m3_fl.symmetry.discover import derive
from c2m3_fl.symmetry.proof import Prover
from tests.symmetry.generated import networks


def _invariant(network: nn.Module, inputs: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same'")
        spec, _ = derive(network, as_inputs(inputs))
        assert not [pin for pin in spec.pins if "no rule" in pin.reason]
        prover = Prover(network, as_inputs(inputs))
        for name in [None, *spec.groups]:
            chosen = None if name is None else [name]
            assert prover.error(spec, chosen) < 1e-9, f"{name} of\n{spec}"
            assert prover.hidden_error(spec, chosen) < 1e-9, f"inside, {name} of\n{spec}"


_SETTINGS = settings(deadline=None, print_blob=True, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@settings(_SETTINGS, max_examples=8)
@given(made=st.booleans().flatmap(lambda image: networks(image=image)))
def test_rules_are_exact_on_generated_networks(made: tuple[nn.Module, Tensor]) -> None:
    _invariant(*made)


@pytest.mark.slow
@settings(_SETTINGS, max_examples=80)
@given(made=st.booleans().flatmap(lambda image: networks(image=image)))
def test_rules_are_exact_on_many_generated_networks(made: tuple[nn.Module, Tensor]) -> None:
    _invariant(*made)
