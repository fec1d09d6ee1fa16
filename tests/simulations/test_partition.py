from __future__ import annotations

import numpy as np
import pytest

from c2m3_fl.errors import ConfigError
from simulations.partition import partition
from simulations.settings import Settings

LABELS = np.random.default_rng(0).integers(0, 10, size=1000)


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_every_image_belongs_to_exactly_one_client(kind):
    parts = partition(LABELS, Settings(partition=kind, clients=7), seed=0)
    assert len(parts) == 7
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(LABELS)))


def test_iid_clients_differ_by_at_most_one_image():
    sizes = [len(part) for part in partition(LABELS, Settings(partition="iid", clients=7), seed=0)]
    assert max(sizes) - min(sizes) <= 1


def test_pathological_clients_hold_the_classes_they_were_given_and_share_no_image():
    settings = Settings(partition="pathological", clients=10, classes_per_client=3)
    parts = partition(LABELS, settings, seed=0)
    assert [len(np.unique(LABELS[part])) for part in parts] == [3] * 10
    joined = np.concatenate(parts)
    assert len(np.unique(joined)) == len(joined)


def test_a_smaller_alpha_concentrates_the_labels():
    def largest_share(alpha: float) -> float:
        parts = partition(LABELS, Settings(partition="dirichlet", alpha=alpha, clients=5), seed=0)
        return float(np.mean([np.bincount(LABELS[part]).max() / len(part) for part in parts]))

    assert largest_share(0.1) > 2 * largest_share(100.0)


def test_shards_leave_no_class_out_and_give_every_client_few():
    labels = np.repeat(np.arange(10), 130)
    parts = partition(labels, Settings(partition="shards", clients=5), seed=0)
    assert sorted(np.concatenate(parts)) == list(range(1300))
    assert [len(np.unique(labels[part])) for part in parts] == [2] * 5


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological", "shards"])
def test_the_seed_decides(kind):
    settings = Settings(partition=kind)
    first, again = (partition(LABELS, settings, seed=5) for _ in range(2))
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    if kind != "iid":  # contiguous shares of images that are shuffled before
        other = partition(LABELS, settings, seed=6)
        assert any(not np.array_equal(one, two) for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings(clients=600), "clients is 600, too many for 1000 training images"),
        (Settings(partition="pathological", classes_per_client=11), "classes-per-client is 11, the data have 10"),
        (Settings(partition="dirichlet", alpha=1e-3, clients=200), "partition 'dirichlet' of 1000 images failed"),
    ],
)
def test_a_partition_that_cannot_be_made_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        partition(LABELS, settings, seed=0)
