"""Refit from sketches of rows: fewer bytes than sums, and nearly the sums' result."""

from __future__ import annotations

import torch

from c2m3_fl.flower.incoming.records import to_params
from c2m3_fl.flower.queries.refit import ClientRefit, price, refit_by_clients
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.network.program import export_program
from tests.flower.federation import EXAMPLE, digits, mlp, train
from tests.flower.queries.refits import app_of, outputs

CLIENTS = 5


def wide():
    return mlp(width=256)


def by_class():
    images, labels = (each[:1000] for each in digits())
    return [(images[labels // 2 == part], labels[labels // 2 == part]) for part in range(CLIENTS)]


def score(params):
    images, labels = (each[1200:] for each in digits())
    return float((outputs(wide, params, images).argmax(1) == labels).float().mean())


def test_where_sums_exceed_the_limit_sketches_lose_little_and_leaving_out_loses_much():
    """Two classes a client, one shared start, ten epochs."""
    parts = by_class()
    endpoints = []
    for number, (images, labels) in enumerate(parts):
        model = wide()
        train(model, images, labels, epochs=10, seed=number, rate=0.05)
        endpoints.append({name: value.detach().clone() for name, value in model.state_dict().items()})
    weights = [float(len(images)) for images, _ in parts]
    average = {
        name: sum(w * e[name] for w, e in zip(weights, endpoints, strict=True)) / sum(weights)
        for name in wide().state_dict()
    }
    program = export_program(wide(), EXAMPLE)
    bytes_sent = []

    def weigh(replies):
        records = [each.content["sums"] for each in replies]
        bytes_sent.append(sum(v.numel() * v.element_size() for v in to_params(records[0]).values()))
        return replies

    def refit(**options):
        app = app_of(wide, lambda context: [parts[int(context.node_config["partition-id"])]])
        asked = ClientRefit(first_layer=True, **options)
        bytes_sent.clear()
        grid, ids = SerialGrid(app, CLIENTS, transit=weigh), list(range(1, CLIENTS + 1))
        found = refit_by_clients(asked, grid, ids, program, average, endpoints, weights)
        cost = price(asked, program, average)
        assert sum(bytes_sent) == cost.answered
        return score(found.state_dict), cost

    exact, whole = refit()
    sketched, cheap = refit(max_bytes=360_000, sketch=32)
    left_out, least = refit(max_bytes=360_000, sketch=0)
    assert (whole.sketched, whole.too_large) == ((), ())
    assert (cheap.sketched, cheap.too_large) == (("linear_1", "linear_2"), ())
    assert (least.sketched, least.too_large) == ((), ("linear_1", "linear_2"))
    assert cheap.answered < whole.answered / 3
    assert sketched > exact - 0.06
    assert sketched > left_out + 0.05
    assert torch.isfinite(torch.tensor([exact, sketched, left_out])).all()
