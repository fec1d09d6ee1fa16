"""Replies are heard of as the grid pulls them, while it waits for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from logging import DEBUG

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore import log

Hear = Callable[[Message], None]
Pull = Callable[[Iterable[str]], Iterable[Message]]


class Listening:
    """Hands every message that a grid pulls to a function, until it is closed.

    Flower's `Grid.send_and_receive` pulls what has arrived every few seconds, and returns when all has. The method that
    it pulls with is replaced on the grid itself, and on the grids that it holds, so whatever loop an engine or a grid
    of one's own has stays as it is, timeouts and faults included. Of a grid whose methods cannot be replaced, or that
    does not pull, nothing is heard.

    Parameters
    ----------
    grid : Grid
        The clients.
    hear : callable
        Takes a message; what it raises is logged.
    """

    def __init__(self, grid: Grid, hear: Hear) -> None:
        self._hear: Hear | None = hear
        self._closing: list[Callable[[], None]] = []
        for each in _grids(grid, set()):
            try:
                self._listen(vars(each), each.pull_messages)
            except Exception as error:  # a grid of one's own, which must not end the run
                log(DEBUG, "replies of %s are read when all have arrived: %s", type(each).__name__, error)

    def _listen(self, attributes: dict[str, object], pull: Pull) -> None:
        def heard(message_ids: Iterable[str]) -> list[Message]:
            messages = list(pull(message_ids))
            for message in messages:
                self._tell(message)
            return messages

        before = attributes.get("pull_messages")
        attributes["pull_messages"] = heard
        self._closing.append(partial(_restore, attributes, heard, before))

    def _tell(self, message: Message) -> None:
        if self._hear is None:
            return
        try:
            self._hear(message)
        except Exception as error:  # the same reply is read again when all have arrived, and its fault is named then
            log(DEBUG, "a reply was not read as it arrived: %s", error)

    def close(self) -> None:
        """Hear nothing any more, and leave the grid as it was."""
        self._hear = None
        for restore in self._closing:
            restore()
        self._closing.clear()


def _grids(grid: object, seen: set[int]) -> Iterator[Grid]:
    """A grid and those that it holds."""
    if isinstance(grid, Grid) and id(grid) not in seen:
        seen.add(id(grid))
        yield grid
        for each in list(getattr(grid, "__dict__", {}).values()):
            yield from _grids(each, seen)


def _restore(attributes: dict[str, object], ours: object, before: object) -> None:
    if attributes.get("pull_messages") is not ours:
        return  # somebody replaced it again
    if before is None:
        del attributes["pull_messages"]
    else:
        attributes["pull_messages"] = before
