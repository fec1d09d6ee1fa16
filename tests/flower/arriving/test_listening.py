"""Replies are heard of while the grid waits for the others, whatever the grid, and the grid stays as it is."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.grid.inmemory_grid import InMemoryGrid

from c2m3_fl.flower.arriving.listening import Listening
from c2m3_fl.flower.serial_grid import SerialGrid
from simulations.partition_grid import PartitionGrid


class Trickling(SerialGrid):
    """Delivers one reply a pull, in the loop of Flower's own grids; without `last` the last one never comes."""

    def __init__(self, app: ClientApp, nodes: int, *, last: bool = True) -> None:
        super().__init__(app, nodes)
        self.last = last

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        waiting = sorted(message_ids)[: None if self.last else -1]
        return super().pull_messages(waiting[:1])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        ids = set(self.push_messages(messages))
        end = time.time() + (timeout if timeout is not None else 0.0)
        found: list[Message] = []
        while timeout is None or time.time() < end:
            arrived = list(self.pull_messages(ids))
            found.extend(arrived)
            ids.difference_update(message.metadata.reply_to_message_id for message in arrived)
            if not ids:
                break
            time.sleep(0.01)
        return found


class Sealed(SerialGrid):
    """Does not let anybody replace its methods, nor look at its attributes."""

    __slots__ = ("hidden",)

    def __getattribute__(self, name):
        if name == "__dict__":
            raise AttributeError(name)
        return super().__getattribute__(name)


class Direct(SerialGrid):
    """Neither pushes nor pulls."""

    def send_and_receive(self, messages, *, timeout=None):
        return [self._answer(message) for message in messages]


def echo() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: object) -> Message:
        return Message(RecordDict({"arrays": ArrayRecord()}), reply_to=message)

    return app


def asked(grid, nodes=3, **options):
    return list(
        grid.send_and_receive([Message(RecordDict(), node, "train") for node in range(1, nodes + 1)], **options)
    )


@pytest.mark.parametrize("make", [SerialGrid, Trickling])
def test_every_message_is_heard_of_once_and_the_grid_is_left_as_it_was(make):
    grid, heard = make(echo(), 3), []
    before = dict(vars(grid))
    listening = Listening(grid, heard.append)
    replies = asked(grid)
    assert [id(each) for each in heard] == [id(each) for each in replies]
    listening.close()
    asked(grid)
    assert len(heard) == 3
    assert vars(grid).keys() == before.keys()


@pytest.mark.parametrize("engine", [HttpGrid, InMemoryGrid])
def test_the_loops_of_flowers_engines_are_listened_to(engine, monkeypatch):
    """The grids of the SuperLink and of the simulation engine, over messages that a serial one carries."""
    serial = SerialGrid(echo(), 3)

    class Carried(engine):
        pull_interval = 0.0

        def __init__(self) -> None:
            pass

        def push_messages(self, messages):
            return serial.push_messages(messages)

        def pull_messages(self, message_ids):
            return list(serial.pull_messages(sorted(message_ids)[:1]))

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    grid, heard = Carried(), []
    listening = Listening(grid, heard.append)
    replies = asked(grid)
    assert len(replies) == 3
    assert [id(each) for each in heard] == [id(each) for each in replies]
    listening.close()
    assert len(asked(grid, 2)) == 2
    assert len(heard) == 3


def test_replies_are_heard_of_before_the_last_one_comes():
    grid, heard = Trickling(echo(), 3), []
    pulled = []
    Listening(grid, lambda message: heard.append((message, len(pulled))))
    pull = grid.pull_messages

    def counted(message_ids):
        found = pull(message_ids)
        pulled.extend(found)
        return found

    grid.pull_messages = counted
    asked(grid)
    assert [before for _, before in heard] == [0, 1, 2]


def test_a_grid_that_holds_another_one_is_listened_to_there():
    heard = []
    grid = PartitionGrid(SerialGrid(echo(), 2), 4)
    listening = Listening(grid, heard.append)
    assert len(asked(grid, 4)) == 4
    assert len(heard) == 4
    listening.close()


@pytest.mark.parametrize("make", [Sealed, Direct])
def test_a_grid_that_cannot_be_listened_to_works_as_ever(make):
    heard = []
    grid = make(echo(), 3)
    listening = Listening(grid, heard.append)
    assert len(asked(grid)) == 3
    assert not heard
    listening.close()


def test_what_hearing_raises_reaches_nobody():
    def hear(message: Message) -> None:
        raise RuntimeError("broken")

    grid = SerialGrid(echo(), 3)
    Listening(grid, hear)
    assert len(asked(grid)) == 3


def test_a_timeout_ends_the_wait_as_ever():
    grid, heard = Trickling(echo(), 3, last=False), []
    Listening(grid, heard.append)
    started = time.monotonic()
    assert len(asked(grid, timeout=0.2)) == 2
    assert 0.2 <= time.monotonic() - started < 2
    assert len(heard) == 2


def test_whoever_replaces_the_method_after_us_keeps_it():
    grid = SerialGrid(echo(), 1)
    listening = Listening(grid, lambda message: None)
    grid.pull_messages = theirs = lambda message_ids: []
    listening.close()
    assert grid.pull_messages is theirs


def test_a_method_is_replaced_once_however_many_listen_and_put_back_after_the_last():
    """Two strategies that train two parts of a network over one grid: rounds that overlap add no layer."""
    grid, first, second = SerialGrid(echo(), 3), [], []
    attributes = vars(grid).keys()
    one = Listening(grid, first.append)
    method = grid.pull_messages
    for _ in range(3):
        other = Listening(grid, second.append)
        one.close()
        one = Listening(grid, first.append)
        assert grid.pull_messages is method
        other.close()
    asked(grid)
    assert (len(first), len(second)) == (3, 0)
    one.close()
    assert vars(grid).keys() == attributes
