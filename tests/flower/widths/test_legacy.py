"""Clients of several widths in the legacy dialect."""

from __future__ import annotations

from flwr.common import FitRes, GetPropertiesRes, ndarrays_to_parameters
from flwr.server.client_manager import SimpleClientManager

from c2m3_fl.flower import LegacyC2M3, width_of
from tests.flower.federation import EXAMPLE, mlp
from tests.flower.legacy_federation import OK, Local, parameters_of, params_of
from tests.flower.widths.federation import WIDTHS


class Sized(Local):
    """A client of one width that says so among its properties, unless it is `silent`."""

    def __init__(self, index: int, width: int, *, silent: bool = False) -> None:
        super().__init__(index, 3, lambda seed=0: mlp(seed, width))
        self.silent = silent

    def get_properties(self, ins, timeout, group_id):
        return GetPropertiesRes(OK, {} if self.silent else dict(width_of(self.make())))


def _strategy() -> LegacyC2M3:
    return LegacyC2M3(model=mlp(), sizes=[mlp(0, width) for width in WIDTHS[1:]], example_inputs=EXAMPLE)


def _sent(strategy, proxies, parameters):
    manager = SimpleClientManager()
    for proxy in proxies:
        manager.register(proxy)
    return strategy.configure_fit(1, parameters, manager)


def test_each_client_is_sent_its_own_width_and_unchanged_replies_give_the_model():
    strategy, start = _strategy(), parameters_of(mlp().state_dict())
    proxies = [Sized(index, width) for index, width in enumerate(WIDTHS)]
    chosen = _sent(strategy, proxies, start)
    for proxy, ins in chosen:
        params_of(ins.parameters, proxy.make().state_dict())  # as many
        assert proxy.make().load_state_dict(params_of(ins.parameters, proxy.make().state_dict()))
    results = [(proxy, FitRes(OK, ins.parameters, 10, {})) for proxy, ins in chosen]
    found, metrics = strategy.aggregate_fit(1, results, [])
    assert metrics["c2m3-dropped"] == 0
    like = mlp().state_dict()
    got = params_of(found, like)
    assert max(float((got[name] - value).abs().max()) for name, value in like.items()) < 1e-6


def test_a_silent_client_is_known_by_its_first_reply_and_an_unknown_width_is_dropped():
    strategy, start = _strategy(), parameters_of(mlp().state_dict())
    proxies = [Sized(index, width, silent=True) for index, width in enumerate((32, 16, 11))]
    chosen = _sent(strategy, proxies, start)
    assert all(ins.parameters.tensors == start.tensors for _, ins in chosen)
    results = [(proxy, FitRes(OK, parameters_of(proxy.make(1).state_dict()), 10, {})) for proxy, _ in chosen]
    _, metrics = strategy.aggregate_fit(1, results, [])
    assert metrics["c2m3-dropped"] == 1
    assert dict(strategy.server.resizing.places) == {0: 0, 1: 1}
    garbage = (proxies[1], FitRes(OK, ndarrays_to_parameters([]), 10, {}))
    broken = (proxies[1], FitRes(OK, type(start)([b"garbage"] * len(start.tensors), "numpy.ndarray"), 10, {}))
    _, metrics = strategy.aggregate_fit(2, [garbage, broken], [])
    assert metrics["c2m3-dropped"] == 2
