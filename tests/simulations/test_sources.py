from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torchvision
from PIL import Image

from c2m3_fl.errors import DataError
from simulations.sources import KINDS, open_source


@pytest.fixture(autouse=True)
def _fresh():
    open_source.cache_clear()
    yield
    open_source.cache_clear()


def _encoded(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return {"bytes": stream.getvalue(), "path": None}


def _write(folder, split, images, labels, names=("image", "label")):
    folder.mkdir(parents=True, exist_ok=True)
    columns = {names[0]: [_encoded(image) for image in images], names[1]: labels}
    parquet.write_table(pa.table(columns), folder / f"{split}.parquet")


def test_digits_are_all_there_and_split_for_good():
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert len(train.labels) + len(test.labels) == 1797
    assert set(train.labels) == set(test.labels) == set(range(10))
    pixels = train.raw(np.arange(len(train.labels)))
    assert pixels.shape == (1437, 8, 8, 1)
    assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize(("shape", "names"), [((6, 6), ("image", "label")), ((6, 6, 3), ("img", "fine_label"))])
def test_parquet_gives_back_what_was_encoded(tmp_path, monkeypatch, shape, names):
    images = np.random.default_rng(0).integers(0, 256, size=(5, *shape), dtype=np.uint8)
    _write(tmp_path / "mnist", "test", images, [3, 1, 4, 1, 5], names)
    monkeypatch.setenv("C2M3_DATA", str(tmp_path))
    source = open_source("mnist", "test")
    assert source.labels.tolist() == [3, 1, 4, 1, 5]
    rows = np.array([4, 0, 2])
    assert np.array_equal(source.raw(rows), images[rows].reshape(3, 6, 6, -1))


def test_parquet_without_an_image_column_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mnist").mkdir()
    parquet.write_table(pa.table({"picture": [1], "label": [1]}), tmp_path / "mnist" / "train.parquet")
    monkeypatch.setenv("C2M3_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"train.parquet has columns \['picture', 'label'\]"):
        open_source("mnist", "train")


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.torchvision])
def test_a_missing_data_set_says_where_it_was_looked_for(tmp_path, monkeypatch, name):
    def refuse(*_args, **_options):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, KINDS[name].torchvision, refuse)
    monkeypatch.setenv("C2M3_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        open_source(name, "train")
    for said in (repr(name), str(tmp_path / name / "train.parquet"), "no route to host", "set C2M3_DATA"):
        assert said in str(caught.value)


def test_torchvision_is_asked_where_there_is_no_parquet(tmp_path, monkeypatch):
    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)

    class Loaded:
        def __init__(self, root, train, split, download):
            assert (root, train, split, download) == (str(tmp_path), False, "balanced", True)
            self.data, self.targets = images, [46, 0]

    monkeypatch.setattr(torchvision.datasets, "EMNIST", Loaded)
    monkeypatch.setenv("C2M3_DATA", str(tmp_path))
    source = open_source("emnist", "test")
    assert source.labels.tolist() == [46, 0]
    assert np.array_equal(source.raw(np.array([1]))[0, :, :, 0], images[1].T)  # EMNIST is stored transposed
