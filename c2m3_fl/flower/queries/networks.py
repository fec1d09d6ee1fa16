"""Networks in queries: whole in the first, afterwards the tensors that have changed since.

A client keeps the networks in its Flower context between the exchanges of one refit. Every query names the digest of
each network: where what a client holds, updated, has another one, it says so and is sent the whole network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor, nn

from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import digest
from c2m3_fl.errors import ParamsError
from c2m3_fl.flower.incoming.records import from_params
from c2m3_fl.flower.queries.answers import read_network

_HELD = "c2m3-network/"  # names of the records in a client's context
_STALE = "c2m3-stale"  # the record by which a client says that it does not hold a network


@dataclass(frozen=True, eq=False)
class Sealed:
    """A network and the digest of its tensors."""

    params: Params
    digest: str

    @classmethod
    def of(cls, params: Params) -> Sealed:
        """The network as it is now, whatever is done to the mapping later."""
        return cls(dict(params), digest(params))

    def changed(self, before: Sealed) -> Params:
        """The tensors that differ from those of an earlier version."""
        return {
            name: value
            for name, value in self.params.items()
            if value is not before.params[name] and not torch.equal(value, before.params[name])
        }


def write_networks(
    networks: Mapping[str, Sealed], held: Mapping[str, Sealed], *, keep: bool
) -> tuple[dict[str, ArrayRecord], dict[str, list[str] | int]]:
    """Records for a query, and what its config must say.

    Parameters
    ----------
    networks : mapping of str to Sealed
        By name.
    held : mapping of str to Sealed
        What the client holds; empty for nothing.
    keep : bool
        Whether the client is to keep the networks for a later query.
    """
    records = {
        name: from_params(network.changed(held[name]) if name in held else network.params)
        for name, network in networks.items()
    }
    digests = [network.digest for network in networks.values()]
    return records, {"networks": list(networks), "digests": digests, "keep": int(keep)}


def receive_networks(network: nn.Module, content: RecordDict, state: RecordDict) -> dict[str, dict[str, Tensor]] | None:
    """A client's networks by name; None where it lacks tensors that were not sent, or holds others.

    Parameters
    ----------
    network : nn.Module
        The architecture.
    content : RecordDict
        The query's.
    state : RecordDict
        The client's context; the networks are put there, or removed where they need not be kept.

    Raises
    ------
    ParamsError
        When a network that was sent whole does not fit the architecture.
    """
    config = content.config_records["config"]
    names, digests = config["networks"], config["digests"]
    assert isinstance(names, list)  # as `write_networks` has it
    assert isinstance(digests, list)
    found: dict[str, dict[str, Tensor]] = {}
    for name, expected in zip(map(str, names), digests, strict=True):
        sent, key = content.array_records[name], _HELD + name
        whole = len(sent) >= len(network.state_dict())
        record = sent if whole else ArrayRecord({**state.array_records.get(key, ArrayRecord()), **sent})
        if key in state:
            del state[key]
        try:
            found[name] = read_network(network, record)
        except ParamsError:
            if whole:
                raise
            return None
        if digest(found[name]) != expected:
            return None
        if config["keep"]:
            state[key] = record
    return found


def stale(message: Message) -> Message:
    """The answer of a client that does not hold a network."""
    return Message(RecordDict({_STALE: ConfigRecord({_STALE: 1})}), reply_to=message)


def is_stale(reply: Message) -> bool:
    """Whether a client says that it does not hold a network."""
    return reply.has_content() and _STALE in reply.content
