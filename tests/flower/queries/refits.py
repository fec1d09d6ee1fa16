"""Networks, and their refit by clients in a federation of three."""

from __future__ import annotations

import torch
from flwr.clientapp import ClientApp
from torch import nn

from c2m3_fl.flower.queries.moments import answer_statistics
from c2m3_fl.flower.queries.refit import ClientRefit, refit_by_clients
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.network.program import export_program
from tests.flower.federation import EXAMPLE, mlp, share

NODES, WEIGHTS = 3, [1.0, 2.0, 3.0]
ALL = ClientRefit(double=True, first_layer=True, positions=10**6)


def app_of(make=mlp, data=share, **limits):
    app = ClientApp()
    answer_statistics(app, model=lambda context: make(), data=data, **{"first_layer": True, **limits})
    return app


def convolutional(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, groups=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, 10),
        )


def normed(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            *(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5, affine=False), nn.ReLU()),
            *(nn.Flatten(), nn.LayerNorm(80), nn.Linear(80, 10)),
        )
        model[2].weight.data.uniform_(-1, 1)
        model[2].bias.data.normal_()
    return model


def statistical(seed=0):
    """BatchNorms that read the network's input, and behind an activation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _with_own_statistics(
            nn.Sequential(
                *(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 24), nn.ReLU()),
                *(nn.BatchNorm1d(24), nn.Linear(24, 10)),
            )
        )


def pooling(seed=0):
    """A BatchNorm behind pooled channels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _with_own_statistics(
            nn.Sequential(
                *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 6, 3), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(54, 10)),
            )
        )


def _with_own_statistics(model):
    for layer in model:
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.2, 0.2)
            layer.running_var.uniform_(0.5, 2)
    return model


def dropping(seed=0):
    """With dropout, and in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 32), nn.Dropout(0.3), nn.ReLU()),
            nn.Linear(32, 10),
        )


def networks(make, alike=False):
    endpoints = [dict(make(0 if alike else seed).state_dict()) for seed in range(NODES)]
    share_of = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    merged = {
        name: sum(part * each[name].double() for part, each in zip(share_of, endpoints, strict=True)).to(value.dtype)
        if value.is_floating_point() and not alike
        else value
        for name, value in endpoints[0].items()
    }
    return endpoints, merged


def refit(make, options=ALL, *, app=None, transit=None, alike=False, nodes=NODES, **keywords):
    endpoints, merged = networks(make, alike)
    grid = SerialGrid(app or app_of(make), NODES, transit=transit)
    program = export_program(make().eval(), EXAMPLE)
    ids = list(range(1, nodes + 1))
    return refit_by_clients(options, grid, ids, program, merged, endpoints[:nodes], WEIGHTS[:nodes], **keywords), merged


def outputs(make, params, data):
    model = make().eval()
    with torch.no_grad():
        return torch.func.functional_call(model, dict(params), (data,))
