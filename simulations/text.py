"""Shakespeare's plays, character by character: windows of every speaker's lines, and the character that follows.

The benchmark of LEAF (Caldas et al. 2018), whose clients are speakers, on the extract "tiny Shakespeare".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from c2m3_fl.errors import ConfigError, DataError
from simulations.settings import Settings

Indices = npt.NDArray[np.int64]
Division = tuple[tuple[Indices, ...], Indices, Indices]  # rows of the clients, of the server, and of the test split

ALPHABET = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
WINDOW = 20  # characters that a network reads; LEAF has 80

_STRIDES = {"train": 10, "test": 5}  # characters between the windows of a speaker
_TRAINED = 0.9  # share of a speaker's lines, the first ones, that are for training
_SMALLEST = 100  # windows of a client, where `train-size` does not say how many it has


@dataclass(frozen=True)
class Text:
    """Windows of one split.

    Attributes
    ----------
    windows : ndarray of int64, shape (windows, WINDOW)
        Places in `ALPHABET`.
    following : ndarray of int64, shape (windows,)
        The character after each window.
    speakers : ndarray of int64, shape (windows,)
        Who says it: the place of the speaker in the order of their first speeches.
    """

    windows: Indices
    following: Indices
    speakers: Indices


def read_text(file: Path | None, split: str, environment: str) -> Text:
    """One split of the plays in a file: the first nine tenths of every speaker's lines, or the last tenth.

    Parameters
    ----------
    file : Path or None
        Speeches between empty lines, each headed by its speaker and a colon. None where no folder is known.
    split : str
        ``"train"`` or ``"test"``.
    environment : str
        The environment variable that names the folder, for the error.

    Raises
    ------
    DataError
        When there is no such file, a speech has no speaker, or a character is not in `ALPHABET`.
    """
    if file is None or not file.is_file():
        where = f"{file} does not exist" if file else f"{environment} is not set"
        raise DataError(
            f"data set 'shakespeare' was not found: {where}; set {environment} to a folder that holds "
            "shakespeare/input.txt, speeches between empty lines, each headed by its speaker and a colon"
        )
    places = {character: place for place, character in enumerate(ALPHABET)}
    parts: list[tuple[Indices, Indices, Indices]] = []
    for speaker, lines in enumerate(_lines(file).values()):
        first = round(_TRAINED * len(lines))
        said = "\n".join(lines[:first] if split == "train" else lines[first:])
        unknown = sorted(set(said) - set(places))
        if unknown:
            raise DataError(f"{file} has the character {unknown[0]!r}, expected one of {ALPHABET!r}")
        tokens = np.array([places[character] for character in said], dtype=np.int64)
        starts = np.arange(0, len(tokens) - WINDOW, _STRIDES[split])
        rows = starts[:, None] + np.arange(WINDOW)
        parts.append((tokens[rows], tokens[starts + WINDOW], np.full(len(starts), speaker)))
    windows, following, speakers = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Text(windows, following, speakers)


def _lines(file: Path) -> dict[str, list[str]]:
    """Every speaker's lines, in the order in which they are said."""
    said: dict[str, list[str]] = {}
    for speech in file.read_text(encoding="utf-8").split("\n\n"):
        speaker, *lines = speech.strip("\n").split("\n")
        if speaker and not speaker.endswith(":"):
            raise DataError(f"{file} has a speech that begins with {speaker[:40]!r}, expected a speaker and a colon")
        if speaker:
            said.setdefault(speaker.removesuffix(":"), []).extend(lines)
    return said


def divide(train: Indices, test: Indices, settings: Settings, seed: int) -> Division:
    """Speakers as clients.

    The seed draws the clients from the speakers with enough windows. With ``train-size`` every client has its equal
    share of that many windows, its first ones; otherwise all of its windows. The server has windows of other speakers,
    and models are tested on the clients' own last lines. The partition ``"iid"`` deals the clients' windows at random,
    in the same numbers.

    Parameters
    ----------
    train, test : ndarray of int64
        The speaker of every window.
    settings : Settings
        Clients, partition and sizes.
    seed : int
        Of the draws.

    Raises
    ------
    ConfigError
        For another partition, or when too few speakers have enough windows.
    """
    if settings.partition not in ("speakers", "iid"):
        raise ConfigError(f"partition is {settings.partition!r}, expected 'speakers' or 'iid' with data 'shakespeare'")
    generator = np.random.default_rng(seed)
    wanted = settings.train_size // settings.clients or _SMALLEST
    counts = np.bincount(train)
    enough = np.flatnonzero(counts >= wanted)
    if len(enough) <= settings.clients:
        raise ConfigError(
            f"clients is {settings.clients}, but only {len(enough)} speakers have {wanted} windows, and the server "
            "needs speakers of its own; lower clients or train-size"
        )
    chosen = generator.permutation(enough)[: settings.clients]
    parts = [np.flatnonzero(train == speaker) for speaker in chosen]
    if settings.train_size:
        parts = [part[:wanted] for part in parts]
    if settings.partition == "iid":
        dealt = generator.permutation(np.concatenate(parts))
        parts = [np.sort(part) for part in np.split(dealt, np.cumsum([len(part) for part in parts])[:-1])]
    others = generator.permutation(np.flatnonzero(~np.isin(train, chosen)))
    tested = generator.permutation(np.flatnonzero(np.isin(test, chosen)))
    return tuple(parts), others[: settings.calibration_size], tested[: settings.test_size or None]
