"""Definitions of experiments: one TOML file under ``simulations/experiments/`` each, checked when it is read.

A design is a product of axes (start, partition, local epochs, …), each level of which changes some settings; every
cell of the product runs the same methods from the same seeds.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from c2m3_fl.errors import ConfigError
from simulations.settings import TITLES, Settings, Value, check_choice

FOLDER = Path(__file__).parent / "experiments"

Labels = Mapping[str, str]  # a cell's level on every axis
Where = Mapping[str, tuple[str, ...]]  # selected levels by axis; of axes that are missing, all levels

_KEYS = ("title", "seeds", "methods", "baseline", "judged", "drawn", "settings", "axes", "also", "quick")
_QUICK = ("seeds", "methods", "settings", "where")


@dataclass(frozen=True)
class Also:
    """Methods that run only on some cells."""

    methods: tuple[str, ...]
    where: Where


@dataclass(frozen=True)
class Cell:
    """One federation of an experiment.

    Attributes
    ----------
    labels : mapping of str to str
        Its level on every axis.
    settings : Settings
        All its settings except the seed and the method.
    methods : tuple of str
        The strategies that run on it from every seed.
    """

    labels: Labels
    settings: Settings
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Design:
    """One experiment.

    Attributes
    ----------
    name : str
        Name of its file, without suffix.
    title : str
        Title in tables and pictures.
    seeds : tuple of int
        Every cell runs from each of these.
    methods : tuple of str
        Names of `simulations.settings.TITLES`; they run on every cell.
    baseline, judged : str
        The acceptance rule compares the second method with the first.
    drawn : tuple of str
        The methods in the picture.
    settings : mapping
        Run-config keys that all cells share.
    axes : mapping
        By axis, its levels; by level, the run-config keys that it sets.
    also : tuple of Also
        Further methods of some cells.
    where : mapping
        The cells that run; all cells if it is empty.
    """

    name: str
    title: str
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    baseline: str
    judged: str
    drawn: tuple[str, ...]
    settings: Mapping[str, Value]
    axes: Mapping[str, Mapping[str, Mapping[str, Value]]]
    also: tuple[Also, ...] = ()
    where: Where = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*self.methods, *(name for each in self.also for name in each.methods)):
            check_choice(f"experiment {self.name!r}: method", name, tuple(TITLES))
        for key, names in (("baseline", (self.baseline,)), ("judged", (self.judged,)), ("drawn", self.drawn)):
            known = (*self.methods, *(name for each in self.also for name in each.methods if key == "drawn"))
            for name in names:
                check_choice(f"experiment {self.name!r}: {key}", name, known)
        for where in (self.where, *(each.where for each in self.also)):
            for axis, levels in where.items():
                check_choice(f"experiment {self.name!r}: axis", axis, tuple(self.axes))
                for level in levels:
                    check_choice(f"experiment {self.name!r}: level of axis {axis!r}", level, tuple(self.axes[axis]))
        if not self.cells:
            raise ConfigError(f"experiment {self.name!r} has no cell: an axis has no level, or 'where' leaves none")

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The product of the axes, in their order."""
        found = []
        for levels in product(*self.axes.values()):
            labels = dict(zip(self.axes, levels, strict=True))
            if not _within(labels, self.where):
                continue
            changes = [self.axes[axis][level] for axis, level in labels.items()]
            merged = {key: value for part in (self.settings, *changes) for key, value in part.items()}
            settings = Settings.from_run_config(merged)
            more = [name for each in self.also if _within(labels, each.where) for name in each.methods]
            found.append(Cell(labels, settings, tuple(dict.fromkeys([*self.methods, *more]))))
        return tuple(found)


def _within(labels: Labels, where: Where) -> bool:
    return all(labels[axis] in levels for axis, levels in where.items())


def names() -> tuple[str, ...]:
    """Names of all experiments."""
    return tuple(sorted(file.stem for file in FOLDER.glob("*.toml")))


def load_design(name: str, *, quick: bool = False, seeds: Sequence[int] = ()) -> Design:
    """The experiment of that name.

    Parameters
    ----------
    name : str
        File in `FOLDER`, without its suffix.
    quick : bool
        Whether to apply its table ``quick``, which reduces it.
    seeds : sequence of int
        Seeds that replace those of the file.

    Raises
    ------
    ConfigError
        For an unknown name, and for unknown, missing or wrongly typed entries of the file.
    """
    check_choice("experiment", name, names())
    return read_design(name, (FOLDER / f"{name}.toml").read_text(), quick=quick, seeds=seeds)


def read_design(name: str, text: str, *, quick: bool = False, seeds: Sequence[int] = ()) -> Design:
    """The experiment that a text in TOML describes; see `load_design`."""
    try:
        read = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"experiment {name!r} is not TOML: {error}") from error
    reader = _Reader(f"experiment {name!r}", read, _KEYS)
    methods = reader.strings("methods")
    design = Design(
        name=name,
        title=reader.string("title"),
        seeds=reader.integers("seeds"),
        methods=methods,
        baseline=reader.string("baseline"),
        judged=reader.string("judged"),
        drawn=reader.strings("drawn") if "drawn" in read else methods,
        settings=reader.values("settings"),
        axes={axis: _levels(reader.who, axis, reader.table("axes")) for axis in reader.table("axes")},
        also=tuple(_also(reader.who, entry) for entry in read.get("also", [])),
    )
    if quick:
        design = _reduced(design, _Reader(f"{reader.who}: quick", reader.table("quick"), _QUICK))
    return replace(design, seeds=tuple(dict.fromkeys(seeds))) if seeds else design


def _reduced(design: Design, quick: _Reader) -> Design:
    methods = quick.strings("methods") if "methods" in quick.read else design.methods
    also = () if "methods" in quick.read else design.also
    known = (*methods, *(name for each in also for name in each.methods))
    return replace(
        design,
        name=f"{design.name}-quick",
        title=f"{design.title}; reduced",
        seeds=quick.integers("seeds") if "seeds" in quick.read else design.seeds,
        methods=methods,
        drawn=tuple(name for name in design.drawn if name in known),
        settings={**design.settings, **(quick.values("settings") if "settings" in quick.read else {})},
        also=also,
        where=_where(quick.who, quick.read.get("where", {})),
    )


def _also(who: str, entry: object) -> Also:
    reader = _Reader(f"{who}: also", entry, ("methods", "where"))
    return Also(reader.strings("methods"), _where(reader.who, reader.read.get("where", {})))


def _where(who: str, read: object) -> Where:
    reader = _Reader(f"{who}: where", read, ())
    return {axis: reader.strings(axis) for axis in reader.read}


def _levels(who: str, axis: str, read: Mapping[str, object]) -> Mapping[str, Mapping[str, Value]]:
    levels = _Reader(f"{who}: axis {axis!r}", read[axis], ())
    return {level: levels.values(level) for level in levels.read}


class _Reader:
    """A TOML table with typed access to its entries; empty `keys` allow any key."""

    def __init__(self, who: str, read: object, keys: Sequence[str]) -> None:
        if not isinstance(read, Mapping):
            raise ConfigError(f"{who} is {read!r}, expected a table")
        self.who = who
        self.read: Mapping[str, object] = read
        for key in read if keys else ():
            check_choice(f"{who}: key", key, keys)

    def string(self, key: str) -> str:
        value = self._need(key)
        if not isinstance(value, str):
            raise ConfigError(f"{self.who}: {key} is {value!r}, expected a string")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        return tuple(each for each in self._list(key, str, "strings") if isinstance(each, str))

    def integers(self, key: str) -> tuple[int, ...]:
        return tuple(each for each in self._list(key, int, "integers") if isinstance(each, int))

    def table(self, key: str) -> Mapping[str, object]:
        value = self._need(key)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.who}: {key} is {value!r}, expected a table")
        return value

    def values(self, key: str) -> Mapping[str, Value]:
        table = self.table(key)
        for name, value in table.items():
            if not isinstance(value, str | int | float):
                raise ConfigError(f"{self.who}: {key}.{name} is {value!r}, expected a string or a number")
        return {name: value for name, value in table.items() if isinstance(value, str | int | float)}

    def _list(self, key: str, kind: type, kinds: str) -> list[object]:
        value = self._need(key)
        if not isinstance(value, list) or not value or not all(type(each) is kind for each in value):
            raise ConfigError(f"{self.who}: {key} is {value!r}, expected a list of {kinds}, at least one")
        return value

    def _need(self, key: str) -> object:
        if key not in self.read:
            raise ConfigError(f"{self.who} has no {key!r}")
        return self.read[key]
