"""Replies are heard of as the grid pulls them, while it waits for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from logging import DEBUG

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore import log

_PULL = "pull_messages"

Hear = Callable[[Message], None]
Pull = Callable[[Iterable[str]], Iterable[Message]]


class Listening:
    """Hands every message that a grid pulls to a function, until it is closed.

    Flower's `Grid.send_and_receive` pulls what has arrived every few seconds, and returns when all has. The method that
    it pulls with is replaced on the grid itself, and on the grids that it holds, so whatever loop an engine or a grid
    of one's own has stays as it is, timeouts and faults included. A method is replaced once, however many listen, and
    is put back when nobody does. Of a grid whose methods cannot be replaced, or that does not pull, nothing is heard.

    Parameters
    ----------
    grid : Grid
        The clients.
    hear : callable
        Takes a message; what it raises is logged.
    """

    def __init__(self, grid: Grid, hear: Hear) -> None:
        self._replaced: list[tuple[dict[str, object], _Heard]] = []
        self._hear = hear
        for each in _grids(grid, set()):
            try:
                self._listen(vars(each), each.pull_messages)
            except Exception as error:  # a grid of one's own, which must not end the run
                log(DEBUG, "replies of %s are read when all have arrived: %s", type(each).__name__, error)

    def _listen(self, attributes: dict[str, object], pull: Pull) -> None:
        heard = pull if isinstance(pull, _Heard) else _Heard(pull, attributes.get(_PULL))
        attributes[_PULL] = heard
        heard.hearers.append(self._tell)
        self._replaced.append((attributes, heard))

    def _tell(self, message: Message) -> None:
        try:
            self._hear(message)
        except Exception as error:  # the same reply is read again when all have arrived, and its fault is named then
            log(DEBUG, "a reply was not read as it arrived: %s", error)

    def close(self) -> None:
        """Hear nothing any more, and leave the grid as it was unless others listen."""
        for attributes, heard in self._replaced:
            heard.hearers.remove(self._tell)
            if not heard.hearers and attributes.get(_PULL) is heard:
                heard.restore(attributes)
        self._replaced.clear()


class _Heard:
    """The method in place of a grid's own: pulls with that one, and tells those who listen.

    Parameters
    ----------
    pull : callable
        The grid's own method.
    before : object
        The grid's own attribute of that name; None where the method is its class's.
    """

    def __init__(self, pull: Pull, before: object) -> None:
        self._pull, self._before = pull, before
        self.hearers: list[Hear] = []

    def __call__(self, message_ids: Iterable[str]) -> list[Message]:
        messages = list(self._pull(message_ids))
        for message in messages:
            for hear in list(self.hearers):
                hear(message)
        return messages

    def restore(self, attributes: dict[str, object]) -> None:
        if self._before is None:
            del attributes[_PULL]
        else:
            attributes[_PULL] = self._before


def _grids(grid: object, seen: set[int]) -> Iterator[Grid]:
    """A grid and those that it holds."""
    if isinstance(grid, Grid) and id(grid) not in seen:
        seen.add(id(grid))
        yield grid
        for each in list(getattr(grid, "__dict__", {}).values()):
            yield from _grids(each, seen)
