"""A federation whose aggregates are repaired by what clients measure."""

from __future__ import annotations

from flwr.serverapp.strategy import FedAvg

from c2m3_fl.flower.incoming.records import from_params
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, mlp


def run(grid, rounds=2, **options):
    strategy = C2M3(
        FedAvg(fraction_evaluate=0.0), model=mlp(), example_inputs=EXAMPLE, **{"recalibrate": "repair", **options}
    )
    return strategy.start(grid, from_params(mlp().state_dict()), num_rounds=rounds)
