"""Replies that passed every check, and those that did not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from logging import WARNING
from typing import Generic, TypeVar

from flwr.supercore import log

from c2m3_fl.core.spec import Params
from c2m3_fl.errors import ParamsError
from c2m3_fl.flower.incoming.carried import Carried
from c2m3_fl.flower.incoming.client_text import shown

Source = TypeVar("Source")

_NAMED = 10  # nodes in one line of the log


@dataclass(frozen=True, eq=False)
class Decoded:
    """The arrays of a reply that passed every check of its values.

    Attributes
    ----------
    params : Carried
        The tensors, in the order of the model that was sent out.
    digest : str
        Their `ordering_digest`.
    size : float
        Their norm.
    cast : frozenset of str
        Tensors that came in another floating precision and were cast to the model's.
    """

    params: Carried
    digest: str
    size: float
    cast: frozenset[str]


@dataclass(frozen=True, eq=False)
class Reply(Generic[Source]):
    """A reply that passed every check.

    Attributes
    ----------
    node : int
        Who sent it.
    params : mapping of str to Tensor
        Its tensors, in the order of the model that was sent out.
    weight : float
        Its averaging weight, positive.
    content : str
        Digest of the tensors, and the metrics: replies are ordered by it.
    source : Message or legacy result
        The reply as Flower delivered it, its arrays under the model's names.
    cast : frozenset of str
        Tensors that came in another floating precision and were cast to the model's.
    replaced : frozenset of str
        Tensors that are the model's own instead of what came.
    size : float, optional
        Its norm, where that is known.
    """

    node: int
    params: Params
    weight: float
    content: str
    source: Source
    cast: frozenset[str] = frozenset()
    replaced: frozenset[str] = frozenset()
    size: float | None = None

    def as_it_came(self, name: str) -> bool:
        """Whether the array in `source` is this reply's tensor of that name."""
        return name not in self.cast and name not in self.replaced


@dataclass(frozen=True)
class Dropped:
    """A reply that cannot be used, and why: one printable line.

    `passing` says that the next round may be free of it: see `TransientError`.
    """

    node: int
    reason: str
    passing: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", shown(self.reason))


@dataclass(frozen=True, eq=False)
class Sorted(Generic[Source]):
    """The replies of a round.

    Attributes
    ----------
    replies : tuple of Reply
        The usable ones, in stable order.
    dropped : tuple of Dropped
        The others.
    seconds : float
        Of the check.
    not_averaged : int
        Metric values that were NaN or infinite, and are left out of the averages.
    """

    replies: tuple[Reply[Source], ...]
    dropped: tuple[Dropped, ...]
    seconds: float
    not_averaged: int = 0


class TransientError(ParamsError):
    """A fault of one round's values or of a node, and not of what the client's app does in every round."""


def fault_of(node: int, error: Exception) -> Dropped:
    """A reply that cannot be used: the reason in our own words, or whatever reading it raised."""
    if isinstance(error, ParamsError):
        return Dropped(node, str(error), isinstance(error, TransientError))
    return Dropped(node, f"the reply cannot be read: {type(error).__name__}: {error}")


def report_unanswered(what: str, failed: Mapping[int, str]) -> None:
    """Log whose answers to a query cannot be used, once for all nodes with one reason.

    Parameters
    ----------
    what : str
        What was asked for.
    failed : mapping of int to str
        Nodes and reasons.
    """
    for reason in dict.fromkeys(failed.values()):
        nodes = [str(node) for node, each in failed.items() if each == reason]
        more = f" and {len(nodes) - _NAMED} others" if len(nodes) > _NAMED else ""
        who = f"node{'s' if len(nodes) > 1 else ''} {', '.join(nodes[:_NAMED])}{more}"
        log(WARNING, "\t> no %s from %s: %s", what, who, reason)


def report_dropped(dropped: Iterable[Dropped]) -> None:
    """Log every dropped reply with its reason."""
    for each in dropped:
        log(WARNING, "\t> dropped the reply of node %d: %s", each.node, each.reason)
