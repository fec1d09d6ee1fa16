"""Rounds of clients of several widths that are refit by their own data."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.clientapp import ClientApp
from torch import nn

from c2m3_fl.flower import C2M3, ClientRefit, SerialGrid, answer_statistics
from tests.flower.federation import EXAMPLE, mlp, reply, share
from tests.flower.widths.federation import WIDTHS

ALL = ClientRefit(double=True, first_layer=True, positions=10**6)
EXAMPLES = (10, 20, 30)


def normed(seed=0, width=32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            *(nn.Conv2d(1, width // 4, 3, bias=False), nn.BatchNorm2d(width // 4), nn.ReLU()),
            *(nn.Conv2d(width // 4, width // 4, 3), nn.BatchNorm2d(width // 4, affine=False), nn.ReLU()),
            *(nn.Conv2d(width // 4, width // 4, 3), nn.InstanceNorm2d(width // 4, affine=True)),
            *(nn.Flatten(), nn.Linear(4 * (width // 4), 10)),
        )
        for module in (model[2], model[8]):
            module.weight.data.uniform_(-1, 1)
            module.bias.data.normal_()
    return model


def answering(make=mlp, data=share, app=None):
    """Clients that answer queries about the network of `make`, which may take their partition."""
    app = app or ClientApp()
    answer_statistics(app, model=lambda context: make(), data=data, first_layer=True)
    return app


def federation(make=mlp, inside=None, **options):
    """The strategy, asking in every round unless told otherwise."""
    sizes = [make(0, width) for width in WIDTHS[1:]]
    return C2M3(inside, model=make(), sizes=sizes, **{"example_inputs": EXAMPLE, "deploy": "every", **options})


def one_round(strategy, app, replies, sent, **given):
    """What a round of these replies deploys."""
    return round_of(strategy, app, replies, sent, **given)[0]


def round_of(strategy, app, replies, sent, *, examples=EXAMPLES, transit=None, number=1):
    """What a round of these replies deploys, and its metrics."""
    grid = SerialGrid(app, len(examples), transit=transit)
    list(strategy.configure_train(number, ArrayRecord(sent), ConfigRecord(), grid))
    counted = zip(replies, examples, strict=bool(replies))
    messages = [reply(node, each, examples=count) for node, (each, count) in enumerate(counted, 1)]
    return strategy.aggregate_train(number, messages)
