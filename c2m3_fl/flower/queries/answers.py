"""What all of a client's answers to the server's queries share: its data, and the traced network."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn
from torch.func import functional_call

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import CalibrationError
from c2m3_fl.flower.incoming.records import schema_of_params, to_params
from c2m3_fl.merging.recalibrate.setting import check_params
from c2m3_fl.network.calibration import Batch, Calibration, load_batches
from c2m3_fl.network.calls import tensors_in
from c2m3_fl.network.copying import private_copy
from c2m3_fl.network.program import Program, Walk, export_program

_ROUNDING = 1e-5  # of the largest output: other kernels for the same network differ by less


def read_data(network: nn.Module, data: Calibration, min_examples: int) -> tuple[Batch, ...]:
    """A client's own data, if there are enough of them.

    Parameters
    ----------
    network : nn.Module
        The architecture.
    data : iterable of batches
        The client's own.
    min_examples : int
        With fewer examples the client does not answer.

    Raises
    ------
    CalibrationError
        When there are too few, or they are malformed; the server receives the reason in an error reply.
    """
    batches = load_batches(data, model=network, device="cpu")  # where the network of a query is
    count = sum(len(batch.inputs[0]) for batch in batches)
    if count < min_examples:
        raise CalibrationError(f"the client has {count} examples, and answers with at least {min_examples}")
    return batches


def read_network(network: nn.Module, record: ArrayRecord) -> dict[str, Tensor]:
    """The state dict that a query carries.

    Raises
    ------
    ParamsError
        When it does not fit the client's network.
    """
    params = to_params(record, schema_of_params(network.state_dict()), "query")
    check_params(network, params, "query")
    return params


class Traced:
    """Programs of earlier queries, because tracing takes longer than running.

    They are looked up by the name of the network's class, tensors and inputs, which do not say what a network does with
    them; so one is used again only where it gives the outputs that the network gives.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Program] = {}

    def __call__(self, network: nn.Module, params: Params, batches: Sequence[Batch]) -> list[Program]:
        """The traced network for every batch."""
        kind_of = type(network)  # a class of its own for every choice of outputs
        looks = (
            kind_of.__module__,
            kind_of.__qualname__,
            *((name, value.dtype, value.shape) for name, value in params.items()),
        )
        proven: dict[Hashable, Program] = {}
        for batch in batches:
            kind = (batch.shapes, batch.types)
            if kind in proven:
                continue
            known = self._known.get((looks, kind))
            if known is None or not _computes(known, network, params, batch):
                known = self._known[looks, kind] = export_program(network, batch)
            proven[kind] = known
        return [proven[batch.shapes, batch.types] for batch in batches]


def _computes(program: Program, network: nn.Module, params: Params, batch: Batch) -> bool:
    """Whether a program gives a network's outputs, up to rounding."""
    network = private_copy(network).eval()
    # tied weights are one tensor in a network, and two where its state dict came over the wire
    expected = list(tensors_in(functional_call(network, dict(params), *batch.call, tie_weights=False)))
    found = list(tensors_in(Walk(program, params, batch).finish()))
    return len(found) == len(expected) and all(map(_alike, found, expected))


def _alike(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return torch.allclose(
        found, expected, rtol=0, atol=_ROUNDING * float(expected.abs().amax() if len(expected) else 0)
    )
