"""The strategies of the comparisons and the experiments: one function per name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, FedProx, Strategy
from torch import nn

from c2m3_fl.flower.queries.refit import ClientRefit, RegMean
from c2m3_fl.flower.strategy import C2M3
from c2m3_fl.merging.align.base import Method
from c2m3_fl.merging.align.cca import CCA
from c2m3_fl.merging.align.methods import ActivationMatching, GitReBasin, Mean, MergeMany
from simulations.data import FederatedData
from simulations.distillation import FedDF
from simulations.peers import AlignedBy, FisherAverage, Merged
from simulations.settings import ON_CLIENTS, ON_SERVER, TITLES, check_choice
from simulations.simulated_server import SimulatedServer
from simulations.task_vectors import TaskAverage, Ties


def fedavg(server: SimulatedServer) -> FedAvg:
    """McMahan et al. 2017."""
    return FedAvg(**server.everyone)


def fedavgm(server: SimulatedServer) -> FedAvgM:
    """Server momentum: Hsu et al. 2019."""
    return FedAvgM(**server.everyone, server_momentum=0.5)


def fedadam(server: SimulatedServer) -> FedAdam:
    """Adam on the server: Reddi et al. 2021."""
    return FedAdam(**server.everyone, eta=0.01)


def fedprox(server: SimulatedServer) -> FedProx:
    """A penalty on the distance from the received model: Li et al. 2020."""
    return FedProx(**server.everyone, proximal_mu=0.1)


def fedmedian(server: SimulatedServer) -> FedMedian:
    """Coordinate-wise median: Yin et al. 2018."""
    return FedMedian(**server.everyone)


def feddf(server: SimulatedServer) -> FedDF:
    """Distil the clients' ensemble into their average: Lin et al. 2020."""
    return FedDF(model=server.model, inputs=server.calibration, steps=100, **server.everyone)


def fisher(server: SimulatedServer) -> FisherAverage:
    """Parameters weighted by the clients' Fisher information: Matena and Raffel 2022."""
    return FisherAverage(**server.everyone)


def task_average(server: SimulatedServer) -> TaskAverage:
    """The plain mean of task vectors: Ilharco et al. 2023."""
    return TaskAverage(**server.everyone)


def ties(server: SimulatedServer) -> Ties:
    """Task vectors, trimmed and averaged where signs agree: Yadav et al. 2023."""
    return Ties(**server.everyone)


def regmean(server: SimulatedServer) -> AlignedBy:
    """RegMean without alignment: Jin et al. 2023."""
    return _then_clients(server, Mean(), recalibrate=RegMean())


def c2m3_regmean(server: SimulatedServer) -> C2M3:
    """RegMean in the universe."""
    return _asking(server, recalibrate=RegMean())


def mean(server: SimulatedServer, correction: str) -> Strategy:
    """FedAvg without alignment, then a correction."""
    return _corrected(server, Mean(), correction)


def git_rebasin(server: SimulatedServer, correction: str = "none") -> Strategy:
    """Weight matching of every reply with one of them: Ainsworth et al. 2023, algorithm 1."""
    return _corrected(server, GitReBasin(), correction)


def mergemany(server: SimulatedServer, correction: str = "none") -> Strategy:
    """Weight matching of every reply with the mean of the others: Ainsworth et al. 2023, algorithm 2."""
    return _corrected(server, MergeMany(), correction)


def activation_matching(server: SimulatedServer, correction: str = "none") -> Strategy:
    """Every reply's units matched with those of one reply by their correlation: Li et al. 2015."""
    return _corrected(server, ActivationMatching(), correction)


def cca_merge(server: SimulatedServer, correction: str = "none") -> Strategy:
    """CCA Merge, linear maps in place of permutations: Horoi et al. 2024."""
    return _corrected(server, CCA(), correction)


def _corrected(server: SimulatedServer, method: Method, correction: str) -> Strategy:
    """A method of alignment, then a correction on the server's images or by what clients answer."""
    if correction in ("none", *ON_SERVER):
        options = {"calibration": server.calibration, "recalibrate": correction, **server.everyone}
        return Merged(model=server.model, method=method, **options)
    return _then_clients(server, method, **_ASKED[correction])


def _then_clients(server: SimulatedServer, method: Method, **options: Any) -> AlignedBy:  # noqa: ANN401  # C2M3's own
    """A method of alignment, then what C2M3 asks the clients, without a judge."""
    given = {"calibration": server.calibration, "device": server.device, "judge": None, **options}
    return AlignedBy(fedavg(server), model=server.model, method=method, **given)


def c2m3(server: SimulatedServer) -> C2M3:
    """Alignment alone: the server has no data, nothing is recalibrated."""
    return _asking(server, head=None)


def c2m3_default(server: SimulatedServer) -> C2M3:
    """C2M3 with its default options."""
    return _deploying(server)


def c2m3_default_without_data(server: SimulatedServer) -> C2M3:
    """C2M3 with its default options; the server has no data."""
    return _asking(server, judge="auto")


def c2m3_rotations(server: SimulatedServer) -> C2M3:
    """Alignment alone, by rotations where linear operators alone read a group."""
    return _asking(server, head=None, rotations=True)


def c2m3_rotations_default(server: SimulatedServer) -> C2M3:
    """C2M3 with its default options, by rotations."""
    return _deploying(server, rotations=True)


def c2m3_batchnorm(server: SimulatedServer) -> C2M3:
    """BatchNorm's statistics measured on the server's images, deployed."""
    return _deploying(server, recalibrate="batchnorm", feedback="never")


def c2m3_repair(server: SimulatedServer) -> C2M3:
    """REPAIR on the server's images, deployed."""
    return _deploying(server, recalibrate="repair", feedback="never")


def c2m3_refit(server: SimulatedServer) -> C2M3:
    """Refit on the server's images, deployed."""
    return _deploying(server, recalibrate="refit", feedback="never")


def c2m3_head(server: SimulatedServer) -> C2M3:
    """The last layer fitted to the clients' labels, deployed; the server has no data."""
    return _asking(server, head="labels")


def c2m3_client_refit(server: SimulatedServer) -> C2M3:
    """Refit from the clients' own data, deployed; the server has no data."""
    return _asking(server, recalibrate=ClientRefit())


def c2m3_client_refit_head(server: SimulatedServer) -> C2M3:
    """Both: refit from the clients' data, then the head from their labels."""
    return _asking(server, recalibrate=ClientRefit(), head="labels")


def c2m3_judged(server: SimulatedServer) -> C2M3:
    """Both as candidates, which the clients compare with the aggregate on held-out images."""
    return _asking(server, recalibrate=ClientRefit(), head="labels", judge="clients")


def c2m3_repair_fed_back(server: SimulatedServer) -> C2M3:
    """REPAIR on the server's images; clients train the repaired model."""
    return _deploying(server, recalibrate="repair", feedback="always")


def c2m3_refit_fed_back(server: SimulatedServer) -> C2M3:
    """Refit on the server's images; clients train the refit model."""
    return _deploying(server, recalibrate="refit", feedback="always")


def c2m3_repair_moved(server: SimulatedServer) -> C2M3:
    """REPAIR on the server's images; clients train the repaired model after rounds in which many units moved."""
    return _deploying(server, recalibrate="repair", feedback="moved")


def _asking(server: SimulatedServer, **options: Any) -> C2M3:  # noqa: ANN401  # C2M3's own
    """C2M3 that asks the clients in the last round; the server has no data."""
    given = {"judge": None, "device": server.device, "example_inputs": server.calibration[0][:2], **options}
    return C2M3(fedavg(server), model=server.model, **given)


def _deploying(
    server: SimulatedServer,
    around: Callable[[SimulatedServer], Strategy] = fedavg,
    **options: Any,  # noqa: ANN401  # C2M3's own
) -> C2M3:
    """C2M3 around a strategy, with the server's images."""
    return C2M3(around(server), model=server.model, calibration=server.calibration, device=server.device, **options)


def c2m3_fedavgm(server: SimulatedServer) -> C2M3:
    """The default around FedAvgM."""
    return _deploying(server, fedavgm)


def c2m3_fedadam(server: SimulatedServer) -> C2M3:
    """The default around FedAdam."""
    return _deploying(server, fedadam)


def c2m3_fedmedian(server: SimulatedServer) -> C2M3:
    """The default around FedMedian."""
    return _deploying(server, fedmedian)


def c2m3_fedprox(server: SimulatedServer) -> C2M3:
    """The default around FedProx."""
    return _deploying(server, fedprox)


_ASKED: Mapping[str, Mapping[str, Any]] = {  # options of C2M3 for the corrections by what clients answer
    "client-refit": {"recalibrate": ClientRefit()},
    "head": {"head": "labels"},
    "client-refit+head": {"recalibrate": ClientRefit(), "head": "labels"},
}

STRATEGIES: Mapping[str, Callable[[SimulatedServer], Strategy]] = {
    "fedavg": fedavg,
    "fedavgm": fedavgm,
    "fedadam": fedadam,
    "fedprox": fedprox,
    "fedmedian": fedmedian,
    "feddf": feddf,
    "fisher": fisher,
    "regmean": regmean,
    "task-average": task_average,
    "ties": ties,
    "c2m3": c2m3,
    "c2m3+default": c2m3_default,
    "c2m3-rotations": c2m3_rotations,
    "c2m3-rotations+default": c2m3_rotations_default,
    "c2m3+default-without-data": c2m3_default_without_data,
    "c2m3+batchnorm": c2m3_batchnorm,
    "c2m3+repair": c2m3_repair,
    "c2m3+refit": c2m3_refit,
    "c2m3+head": c2m3_head,
    "c2m3+client-refit": c2m3_client_refit,
    "c2m3+client-refit+head": c2m3_client_refit_head,
    "c2m3+regmean": c2m3_regmean,
    "c2m3+judged": c2m3_judged,
    "c2m3+repair-fed-back": c2m3_repair_fed_back,
    "c2m3+refit-fed-back": c2m3_refit_fed_back,
    "c2m3+repair-moved": c2m3_repair_moved,
    "c2m3-fedavgm": c2m3_fedavgm,
    "c2m3-fedadam": c2m3_fedadam,
    "c2m3-fedprox": c2m3_fedprox,
    "c2m3-fedmedian": c2m3_fedmedian,
    **{f"fedavg+{name}": partial(mean, correction=name) for name in (*ON_SERVER, *ON_CLIENTS)},
    **{
        base if name == "none" else f"{base}+{name}": partial(function, correction=name)
        for base, function in (
            ("git-rebasin", git_rebasin),
            ("mergemany", mergemany),
            ("activations", activation_matching),
            ("cca", cca_merge),
        )
        for name in ("none", *ON_SERVER, *(() if base == "cca" else ON_CLIENTS))
    },
}


def build_strategy(
    name: str,
    model: nn.Module,
    data: FederatedData,
    *,
    clients: int = 0,
    participation: float = 1.0,
    device: torch.device | None = None,
) -> Strategy:
    """The strategy `name`, one of `STRATEGIES`, for a federation; `ConfigError` for another name.

    `clients` is the number of clients in round 1 (by default all that have data), `participation` the share of them
    that train in a round, `device` where C2M3 computes (by default CUDA where there is a device).
    """
    check_choice("strategy", name, tuple(TITLES))
    return STRATEGIES[name](SimulatedServer(model, data.calibration, clients or len(data.parts), participation, device))
