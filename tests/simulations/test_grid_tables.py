from __future__ import annotations

from dataclasses import replace

from simulations.grid_tables import markdown, page
from simulations.ledger import Measurement, Record

ABOUT = {
    "name": "small",
    "title": "A small one",
    "measured": {"from": "2026-01-02 03:04:05", "to": "2026-01-03 03:04:05"},
    "seconds": 600,
    "machine": {"cores": 2},
    "design": {
        "axes": {"start": {"shared": {}, "own": {}}},
        "baseline": "fedavg",
        "judged": "c2m3",
        "drawn": ["fedavg"],
    },
}


def _measured(start, seed, method, accuracy, loss=1.0):
    return Measurement({"start": start}, seed, method, (0.1, accuracy), (2.0, loss), (0.25, 0.75), 0.5)


RECORD = Record(
    ABOUT,
    (
        *(_measured("own", seed, "fedavg", 0.4) for seed in (0, 1)),
        *(_measured("own", seed, "c2m3", 0.6 + 0.2 * seed) for seed in (0, 1)),
        *(_measured("shared", seed, "fedavg", 0.4) for seed in (0, 1)),
        *(_measured("shared", seed, "c2m3", 0.3, None) for seed in (0, 1)),
        *(_measured("own", seed, "fedadam", 0.55) for seed in (0, 1)),
    ),
)


def _rows(start, text=None):
    return [line for line in (text or markdown(RECORD)).splitlines() if line.startswith(f"| {start} |")]


def test_a_table_shows_mean_and_spread_over_seeds():
    assert _rows("own")[0] == "| own | 0.400 ± 0.000 | 0.700 ± 0.141 |"


def test_the_rule_is_shown_cell_by_cell_with_what_breaks_it():
    assert "| shared | -0.100 | -0.100 | not finite | no: mean, seed, loss |" in markdown(RECORD)
    assert "| own | +0.300 | +0.200 | 1.000 | yes |" in markdown(RECORD)
    assert "holds on 1 of 2" in markdown(RECORD)


def test_gains_are_paired_with_their_interval_and_the_least():
    _, table = markdown(RECORD).split(
        "Gain over FedAvg, paired: mean over seeds ± its 95 % interval (least of all seeds):"
    )
    assert (
        _rows("own", table)[0] == "| own | +0.300 ± 1.271 (+0.200) |"
    )  # .2 and .4; Student's t with one degree: 12.71
    single = tuple(each for each in RECORD.measurements if each.seed == 0)
    assert "| own | +0.200 (+0.200) |" in markdown(replace(RECORD, measurements=single))


def test_methods_of_some_cells_have_a_table_of_their_own():
    text = markdown(RECORD)
    assert "FedAdam" not in text.split("some cells only")[0]
    accuracy, gain = _rows("own", text.split("some cells only")[1])
    assert accuracy == "| own | 0.550 ± 0.000 |"
    assert gain == "| own | +0.150 ± 0.000 (+0.150) |"  # .55 against FedAvg's .4, from both seeds


def test_an_experiment_of_the_baseline_alone_has_no_gains():
    alone = tuple(each for each in RECORD.measurements if each.method == "fedavg")
    text = markdown(replace(RECORD, measurements=alone))
    assert "Gain over" not in text
    assert _rows("own", text)[0] == "| own | 0.400 ± 0.000 |"


def test_gains_of_methods_of_some_cells_are_paired_with_the_seeds_that_both_have():
    single = tuple(each for each in RECORD.measurements if (each.method, each.seed) != ("fedadam", 1))
    _, text = markdown(replace(RECORD, measurements=single)).split(
        "Their gain over FedAvg, paired: mean over seeds ± its 95 % interval (least of all seeds):"
    )
    assert _rows("own", text) == ["| own | +0.150 (+0.150) |"]
    assert not _rows("shared", text)


AROUND = (
    "Gain of C2M3 over the strategy that it wraps, paired: mean over seeds ± its 95 % interval (least of all seeds):"
)


def test_c2m3_around_a_strategy_is_paired_with_that_strategy():
    around = tuple(_measured("own", seed, "c2m3-fedadam", 0.5 - 0.02 * seed) for seed in (0, 1))
    text = markdown(replace(RECORD, measurements=RECORD.measurements + around))
    before, table = text.split(AROUND)
    # .50 and .48 against FedAdam's .55, and against FedAvg's .4; Student's t with one degree of freedom: 12.71
    assert table.strip().splitlines()[0] == "| start | C2M3 (FedAdam) |"
    assert _rows("own", table) == ["| own | -0.060 ± 0.127 (-0.070) |"]
    assert _rows("own", before)[-1] == "| own | +0.150 ± 0.000 (+0.150) | +0.090 ± 0.127 (+0.080) |"


def test_without_c2m3_around_a_strategy_of_the_record_there_is_no_such_table():
    rotating = _measured("own", 0, "c2m3-rotations", 0.5)
    assert AROUND not in markdown(RECORD)
    assert AROUND not in markdown(replace(RECORD, measurements=(*RECORD.measurements, rotating)))


def test_a_table_says_seeds_date_cores_and_command():
    caption = markdown(RECORD).splitlines()[0]
    for part in ("A small one", "Seeds 0, 1; 2026-01-03; 2 cores;", "c2m3-fl experiment small --draw"):
        assert part in caption


def test_a_caption_counts_what_every_machine_measured_and_which_entries_lack_seeds():
    first, *rest = RECORD.measurements
    mixed = replace(RECORD, measurements=(replace(first, place="16 cores, torch 2.11.0"), *rest[:-1]))
    caption = markdown(mixed).splitlines()[0]
    assert "16 cores, torch 2.11.0 (1 measurements), 2 cores (8 measurements)" in caption
    assert "Seeds 0, 1 (all of them in 4 of 5 entries, a single one where there is no ±); " in caption


def test_a_page_takes_the_table_between_its_marks_and_nothing_else_changes():
    text = "before\n<!-- results: small -->\nold\n<!-- end: small -->\nafter\n"
    once = page(text, "small", "| new |\n")
    assert once == "before\n<!-- results: small -->\n\n| new |\n\n<!-- end: small -->\nafter\n"
    assert page(once, "small", "| new |\n") == once
    assert page(text, "other", "| new |\n") == text
