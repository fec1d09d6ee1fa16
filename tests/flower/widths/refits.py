"""Rounds of clients of several widths that are refit by their own data."""

from __future__ import annotations

from flwr.app import ArrayRecord, ConfigRecord
from flwr.clientapp import ClientApp

from c2m3_fl.flower import C2M3, ClientRefit, SerialGrid, answer_statistics
from tests.flower.federation import EXAMPLE, mlp, reply, share
from tests.flower.widths.federation import WIDTHS

ALL = ClientRefit(double=True, first_layer=True, positions=10**6)
EXAMPLES = (10, 20, 30)


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
