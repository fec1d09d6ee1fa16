"""Clients of several widths in the legacy dialect."""

from __future__ import annotations

from threading import Barrier

import pytest
from flwr.common import FitRes, GetPropertiesRes, ndarrays_to_parameters
from flwr.server.client_manager import SimpleClientManager

from c2m3_fl.errors import ConfigError
from c2m3_fl.flower import ClientRefit, LegacyC2M3, width_of
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


def test_clients_are_asked_for_their_width_at_the_same_time():
    together = Barrier(3, timeout=5)  # broken where they are asked one after another

    class Waits(Sized):
        def get_properties(self, ins, timeout, group_id):
            together.wait()
            return super().get_properties(ins, timeout, group_id)

    strategy = _strategy()
    _sent(strategy, [Waits(index, width) for index, width in enumerate(WIDTHS)], parameters_of(mlp().state_dict()))
    assert dict(strategy.server.resizing.places) == {0: 0, 1: 1, 2: 2}


def test_a_client_that_failed_is_asked_again_and_sent_its_new_width():
    strategy, start = _strategy(), parameters_of(mlp().state_dict())
    proxies = [Sized(index, width) for index, width in enumerate((32, 16, 16))]
    chosen = {proxy.cid: ins for proxy, ins in _sent(strategy, proxies, start)}
    again = Sized(1, 8)
    results = [(proxy, FitRes(OK, chosen[proxy.cid].parameters, 10, {})) for proxy in (proxies[0], proxies[2])]
    strategy.aggregate_fit(1, results, [RuntimeError("the client was started again")])
    assert strategy.server.resizing.doubted == {1}
    sent = dict(_sent(strategy, [proxies[0], again, proxies[2]], strategy.trajectory))
    assert again.make().load_state_dict(params_of(sent[again].parameters, again.make().state_dict()))
    assert dict(strategy.server.resizing.places) == {0: 0, 1: 2, 2: 1}


def test_a_deployed_model_at_a_width_fits_that_width():
    start = parameters_of(mlp().state_dict())
    small = mlp(0, 8)
    assert small.load_state_dict(params_of(_strategy().at_width(start, 1), small.state_dict()))
    with pytest.raises(ConfigError, match="size is 2, expected one of 2 sizes"):
        _strategy().at_width(start, 2)


def test_a_refit_from_clients_needs_a_grid():
    with pytest.raises(ConfigError, match="the legacy dialect has no grid to ask them"):
        LegacyC2M3(model=mlp(), sizes=[mlp(0, 16)], example_inputs=EXAMPLE, recalibrate=ClientRefit())
