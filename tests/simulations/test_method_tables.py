from __future__ import annotations

from dataclasses import replace

from simulations import method_pictures
from simulations.grid_tables import markdown
from simulations.ledger import Measurement, Record

ABOUT = {
    "name": "small",
    "title": "A small one",
    "measured": {"from": "2026-01-02 03:04:05", "to": "2026-01-03 03:04:05"},
    "seconds": 600,
    "machine": {"cores": 2},
    "design": {
        "axes": {"start": {"own": {}, "shared": {}}, "clients": {"5": {}}, "skew": {"none": {}, "much": {}}},
        "baseline": "fedavg",
        "judged": "c2m3",
        "drawn": ["fedavg", "c2m3"],
    },
}


def _measured(start, skew, seed, method, accuracy):
    cell = {"start": start, "clients": "5", "skew": skew}
    more = {"calibration_error": (0.25,), "server_seconds": 1.5, "down": 2_000_000, "up": 3_000_000}
    return Measurement(cell, seed, method, (accuracy,), (2.0,), (0.2, 0.4), 0.6, **more)


RECORD = Record(
    ABOUT,
    tuple(
        _measured(start, skew, seed, method, accuracy + gain * seed)
        for start in ("own", "shared")
        for skew in ("none", "much")
        for method, accuracy, gain in (("fedavg", 0.3, 0.0), ("c2m3", 0.4, 0.2))
        for seed in (0, 1)
        if (start, method) != ("shared", "c2m3")
    ),
)
OWN, SHARED = markdown(RECORD).split("**start shared**")


def test_methods_are_rows_and_federations_columns_and_the_best_is_bold():
    assert "| method | clients 5, skew none | clients 5, skew much |" in OWN
    assert "| FedAvg | 0.300 ± 0.000 | 0.300 ± 0.000 |" in OWN
    assert "| C2M3 | **0.500 ± 0.141** | **0.500 ± 0.141** |" in OWN


def _with_partitions(accuracies):
    """A record of two seeds: by clients and partition, the accuracy of FedAvg; C2M3 has .1 more, the second seed .2."""
    axes = {"start": {"own": {}}, "clients": {"5": {}, "10": {}}, "partition": {"IID": {}, "skewed": {}}}
    return Record(
        {**ABOUT, "design": {**ABOUT["design"], "axes": axes}},
        tuple(
            replace(
                _measured("own", "", seed, method, accuracy + more + 0.2 * seed),
                cell={"start": "own", "clients": clients, "partition": partition},
            )
            for (clients, partition), accuracy in accuracies.items()
            for seed in (0, 1)
            for method, more in (("fedavg", 0.0), ("c2m3", 0.1))
            if (clients, seed, method) != ("10", 1, "c2m3")
        ),
    )


def test_three_axes_begin_with_means_that_keep_start_and_partition_apart_from_seeds_that_are_whole():
    found = {("5", "IID"): 0.1, ("5", "skewed"): 0.2, ("10", "IID"): 0.3, ("10", "skewed"): 0.6}
    table = markdown(_with_partitions(found)).split("**start own**")[0]
    assert "Accuracy on average over clients:\n\n| method | own, IID | own, skewed |\n" in table
    assert "| FedAvg | **0.300 ± 0.141** | **0.500 ± 0.141** |" in table  # of .2 and .4, and of .4 and .6
    assert "| C2M3 | **0.300** | **0.500** |" in table  # of the first seed alone: the second lacks ten clients
    assert "| *ensemble* | 0.600 ± 0.000 | 0.600 ± 0.000 |" in table


def test_two_axes_have_no_means_and_no_whole_seed_an_empty_one():
    assert "on average over" not in markdown(RECORD).replace("On average over these federations", "")
    record = _with_partitions({("5", "IID"): 0.1, ("10", "IID"): 0.6})
    torn = tuple(each for each in record.measurements if (each.cell["clients"], each.seed) in {("5", 0), ("10", 1)})
    table = markdown(Record(record.about, torn))
    assert "| method | own, IID |\n| --- | ---: |\n| FedAvg |  |\n| C2M3 |  |\n| *mean client* |  |" in table


def test_the_clients_alone_have_their_rows():
    assert "| *mean client* | 0.300 ± 0.000 |" in OWN
    assert "| *best client* | 0.400 ± 0.000 |" in OWN
    assert "| *ensemble* | 0.600 ± 0.000 |" in OWN


def test_text_has_a_table_of_perplexities_whose_least_is_bold():
    about = {**ABOUT, "design": {**ABOUT["design"], "settings": {"data": "shakespeare"}}}
    losses = {"fedavg": 2.0, "c2m3": 1.0}
    found = tuple(replace(each, loss=(losses[each.method],)) for each in RECORD.measurements if each.seed == 0)
    _, table = markdown(Record(about, found)).split("**start shared**")[0].split("Perplexity of a character:")
    assert "| FedAvg | 7.389 | 7.389 |\n| C2M3 | **2.718** | **2.718** |" in table
    assert "Perplexity" not in OWN


def test_gains_are_paired_by_seed_and_have_the_interval_of_student():
    # gains .1 and .3: mean .2, standard error .1, and 12.706 is the 97.5 % quantile with one degree of freedom
    assert "| C2M3 | +0.200 ± 1.271 | 2.00 | 0.250 | 1.5 | 2.00 | 3.00 |" in OWN


def test_a_method_that_did_not_run_has_no_row():
    assert "C2M3" not in SHARED
    assert "**0.300 ± 0.000**" in SHARED


def test_old_records_without_costs_have_dashes():
    old = Record(ABOUT, (Measurement(RECORD.measurements[0].cell, 0, "fedavg", (0.3,), (2.0,), (0.2,), 0.6),))
    assert "| FedAvg |  | 2.00 | – |" in markdown(old)


def test_the_picture_has_a_panel_for_every_table(tmp_path):
    method_pictures.draw(RECORD, tmp_path / "small.png")
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")
