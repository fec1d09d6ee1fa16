"""What strategies remember from round to round, as arrays and JSON.

A strategy may say so itself, with ``state_dict`` and ``load_state_dict`` as C2M3 does. Of any other, and of what a
subclass of C2M3 adds, the attributes are kept whose content changed since the strategy was made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from logging import WARNING
from typing import Any

from flwr.serverapp.strategy import Strategy
from flwr.supercore import log

from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.resuming.encoding import Arrays, Node, Stateful, UnsavableError, decode, encode
from c2m3_fl.flower.strategy import C2M3
from c2m3_fl.flower.wrapped import chain


class Kept:
    """The state of a strategy and of those that it wraps.

    Parameters
    ----------
    strategy : Strategy
        As it was made: what changes from now on is kept.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self._made = [
            {name: (value, _digest(*_encoded(value))) for name, value in _attributes(each).items()}
            for each in chain(strategy)
        ]
        self._said: set[tuple[int, str]] = set()

    def capture(self) -> tuple[Arrays, list[dict[str, Any]]]:
        """What changed: the arrays, and notes in JSON that say how to put them back."""
        arrays: Arrays = {}
        notes = []
        for place, (each, made) in enumerate(zip(chain(self.strategy), self._made, strict=True)):
            note: dict[str, Any] = {"class": type(each).__qualname__, "attributes": {}, "unsaved": []}
            if isinstance(each, Stateful):
                note["state"], found = _encoded(each.state_dict())
                arrays |= {f"{place}//{key}": value for key, value in found.items()}
            for name, value in _attributes(each).items():
                node, found = _encoded(value)
                before, digest = made.get(name, (None, ""))
                if isinstance(node, UnsavableError):
                    if value is not before or isinstance(value, Iterator):
                        note["unsaved"].append(name)
                        self._say(place, name, value, node)
                elif _digest(node, found) != digest:
                    note["attributes"][name] = node
                    arrays |= {f"{place}/{name}/{key}": part for key, part in found.items()}
            notes.append(note)
        return arrays, notes

    def restore(self, arrays: Arrays, notes: list[dict[str, Any]]) -> None:
        """Put back what `capture` found.

        Raises
        ------
        ConfigError
            When the strategies are not those that were captured.
        """
        classes = [type(each).__qualname__ for each in chain(self.strategy)]
        expected = [each["class"] for each in notes]
        if classes != expected:
            raise ConfigError(f"the checkpoint is of strategies {expected}, these are {classes}; use another folder")
        for place, (each, note) in enumerate(zip(chain(self.strategy), notes, strict=True)):
            if isinstance(each, Stateful):
                each.load_state_dict(decode(note["state"], _part(arrays, f"{place}//")))
            for name, node in note["attributes"].items():
                where, there = f"{type(each).__name__}.{name}", getattr(each, name, None)
                setattr(each, name, decode(node, _part(arrays, f"{place}/{name}/"), there, where))
            for name in note["unsaved"]:
                log(WARNING, "%s.%s was not saved: it begins anew", type(each).__name__, name)

    def _say(self, place: int, name: str, value: object, error: UnsavableError) -> None:
        if (place, name) not in self._said:
            self._said.add((place, name))
            text = "checkpoint: attribute %r of type %s is not saved (%s): a resumed run begins without it"
            log(WARNING, text, name, type(value).__name__, error)


def _attributes(strategy: Strategy) -> dict[str, Any]:
    """The attributes that are kept: those of a strategy that says itself what it remembers are not."""
    if isinstance(strategy, C2M3):
        return {name: value for name, value in vars(strategy).items() if name not in strategy.own_names}
    if isinstance(strategy, Stateful):
        return {}
    return {
        name: value for name, value in vars(strategy).items() if not isinstance(value, Strategy) or name != "strategy"
    }


def _encoded(value: object) -> tuple[Node | UnsavableError, Arrays]:
    arrays: Arrays = {}
    try:
        return encode(value, arrays), arrays
    except UnsavableError as error:
        return error, {}
    except Exception as error:  # a state dict of the user's own, which must not end the run
        return UnsavableError(f"{type(error).__name__}: {error}"), {}


def _digest(node: Node | UnsavableError, arrays: Arrays) -> str:
    if isinstance(node, UnsavableError):
        return ""
    state = hashlib.sha256(json.dumps(node).encode())
    for value in arrays.values():
        state.update(value.tobytes())
    return state.hexdigest()


def _part(arrays: Mapping[str, Any], prefix: str) -> Arrays:
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
