from __future__ import annotations

import numpy as np
import pytest

from c2m3_fl.errors import ConfigError, DataError
from simulations.settings import Settings
from simulations.sources import open_source
from simulations.text import ALPHABET, WINDOW, divide, read_text

LINE = "To be, or not to be, that is the question:"


@pytest.fixture(autouse=True)
def _fresh():
    open_source.cache_clear()
    yield
    open_source.cache_clear()


def _file(folder, speeches):
    path = folder / "shakespeare" / "input.txt"
    path.parent.mkdir()
    path.write_text("\n\n".join(f"{speaker}:\n{text}" for speaker, text in speeches))
    return path


def _said(tokens):
    return "".join(ALPHABET[token] for token in tokens)


def test_windows_and_what_follows_are_the_speakers_own_lines_in_order(tmp_path):
    file = _file(tmp_path, [("Hamlet", LINE), ("Ophelia", "Good my lord, how does your honour?"), ("Hamlet", "Well.")])
    train = read_text(file, "train", "C2M3_DATA")
    hamlet = train.speakers == 0
    text = f"{LINE}\nWell."  # nine tenths of two lines are both
    for window, following, start in zip(train.windows[hamlet], train.following[hamlet], range(0, 99, 10), strict=False):
        assert _said(window) == text[start : start + WINDOW]
        assert ALPHABET[following] == text[start + WINDOW]
    assert hamlet.sum() == 3
    assert (train.speakers == 1).sum() == 2


def test_the_last_tenth_of_a_speakers_lines_is_for_testing_alone(tmp_path):
    file = _file(tmp_path, [("Hamlet", "\n".join(f"{letter}: {LINE}" for letter in "ABCDEFGHIJ"))])
    train, test = (read_text(file, split, "C2M3_DATA") for split in ("train", "test"))
    assert "J: " in "".join(map(_said, test.windows))
    assert "J: " not in "".join(map(_said, train.windows))
    assert "I: " in "".join(map(_said, train.windows))


def test_the_plays_are_a_data_set_by_name(tmp_path, monkeypatch):
    _file(tmp_path, [("Hamlet", LINE)])
    monkeypatch.setenv("C2M3_DATA", str(tmp_path))
    source = open_source("shakespeare", "train")
    assert source.raw(np.array([1])).shape == (1, WINDOW)
    assert source.owners.tolist() == [0, 0, 0]


@pytest.mark.parametrize("missing", ["file", "variable"])
def test_plays_that_are_missing_say_where_they_were_looked_for(tmp_path, monkeypatch, missing):
    monkeypatch.setenv("C2M3_DATA", str(tmp_path))
    if missing == "variable":
        monkeypatch.delenv("C2M3_DATA")
    looked = "C2M3_DATA is not set" if missing == "variable" else rf"{tmp_path}/shakespeare/input.txt does not exist"
    with pytest.raises(DataError, match=rf"{looked}; set C2M3_DATA to a folder that holds shakespeare/input.txt"):
        open_source("shakespeare", "train")


def test_another_character_and_a_speech_without_a_speaker_are_refused(tmp_path):
    file = _file(tmp_path, [("Hamlet", LINE + "é")])
    with pytest.raises(DataError, match=r"input.txt has the character 'é', expected one of"):
        read_text(file, "train", "C2M3_DATA")
    file.write_text(f"Hamlet:\n{LINE}\n\nWell.")
    with pytest.raises(DataError, match=r"a speech that begins with 'Well\.', expected a speaker and a colon"):
        read_text(file, "train", "C2M3_DATA")


OWNERS = np.repeat(np.arange(6), [10, 4, 10, 10, 10, 9])


def _settings(**options):
    return Settings(data="shakespeare", model="lstm", **{"clients": 3, "partition": "speakers", **options})


def test_clients_are_speakers_with_equal_shares_and_the_server_has_others():
    parts, calibration, test = divide(OWNERS, OWNERS, _settings(train_size=30, calibration_size=9), seed=1)
    speakers = [set(OWNERS[part]) for part in parts]
    assert [len(part) for part in parts] == [10, 10, 10]
    assert all(len(each) == 1 for each in speakers)
    assert len(set.union(*speakers)) == 3
    assert set(OWNERS[test]) == set.union(*speakers)
    assert not set(OWNERS[calibration]) & set.union(*speakers)
    assert len(calibration) == 9


def test_iid_clients_are_dealt_the_same_windows():
    speakers, *_ = divide(OWNERS, OWNERS, _settings(train_size=30), seed=1)
    dealt, *_ = divide(OWNERS, OWNERS, _settings(train_size=30, partition="iid"), seed=1)
    assert sorted(np.concatenate(dealt)) == sorted(np.concatenate(speakers))
    assert all(len(set(OWNERS[part])) > 1 for part in dealt)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"partition": "dirichlet"}, "partition is 'dirichlet', expected 'speakers' or 'iid'"),
        ({"train_size": 33}, "clients is 3, but only 0 speakers have 11 windows"),
        ({"train_size": 8, "clients": 4, "late_clients": 0}, None),
        ({"train_size": 40, "clients": 4}, "clients is 4, but only 4 speakers have 10 windows"),
    ],
)
def test_what_text_cannot_be_divided_into_is_said(options, said):
    if said is None:
        assert len(divide(OWNERS, OWNERS, _settings(**options), seed=0)[0]) == 4
        return
    with pytest.raises(ConfigError, match=said):
        divide(OWNERS, OWNERS, _settings(**options), seed=0)
