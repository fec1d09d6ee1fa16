from __future__ import annotations

import pytest

from c2m3_fl.flower.queries.refit import ClientRefit
from simulations import pooled_refit
from tests.flower.federation import digits, mlp, pooled
from tests.flower.queries.refits import NODES, WEIGHTS, convolutional, networks, outputs, refit


@pytest.mark.parametrize("make", [mlp, convolutional])
def test_it_is_the_refit_by_clients_who_answer_with_exact_sums(monkeypatch, make):
    monkeypatch.setattr(pooled_refit, "_POSITIONS", 10**6)
    expected, merged = refit(make, ClientRefit(double=True, positions=10**6))
    rows = [range(100 * client, 100 * client + len(images)) for client, images in enumerate(pooled(NODES))]
    shares = [tuple(each[part] for each in digits()) for part in rows]  # labels say, too, which images are held out
    weights = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    found = pooled_refit.refit(make(), merged, networks(make)[0], shares, weights)
    one, other, before = (outputs(make, each, digits()[0]) for each in (found, expected.state_dict, merged))
    assert (one - other).norm() <= 1e-5 * other.norm()
    assert (before - other).norm() > 0.1 * other.norm()
