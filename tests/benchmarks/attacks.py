"""What three hostile clients of ten do to Flower's strategies, to the same in the universe, and who is named.

python -m tests.benchmarks.attacks            writes c2m3_fl/flower/results/attacks.json: a quarter of an hour alone
python -m tests.benchmarks.attacks --seeds 2  the first two seeds: those that the record lacks are added to it
python -m tests.benchmarks.attacks --table    measures nothing

All of them write what the record says into the page.

Digits, one round; independent starts and a shared one. One match serves all strategies of a case: all
clients claim the same number of examples, so it does not depend on the strategy.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy

from c2m3_fl.core.spec import Params
from c2m3_fl.core.state_dicts import digest
from c2m3_fl.flower.aligning.aligner import Aligner
from c2m3_fl.flower.round_match import RoundMatch
from c2m3_fl.flower.strategy import C2M3
from simulations.grid_tables import page
from tests.benchmarks.records import read_record, write_record
from tests.flower.federation import EXAMPLE, accuracy, digits, mlp, reply, send
from tests.flower.hostile import (
    ATTACKS,
    CLIENTS,
    HOSTILE,
    STRATEGIES,
    TARGET,
    WIDTH,
    Setting,
    attacked,
    federation,
    triggered,
)

RECORD, PAGE = Path("c2m3_fl/flower/results/attacks.json"), Path("c2m3_fl/flower/README.md")
COMMAND = "python -m tests.benchmarks.attacks"
WAYS = ("plain", "universe", "dropping")
STARTS = {True: "independent", False: "shared"}
TITLES = {"independent": "Independent starts", "shared": "A shared start"}


class OneMatch(Aligner):
    """Repeats its last match where it is given the same replies."""

    _last: tuple[list[str], RoundMatch] | None = None

    def align(
        self, nodes: Sequence[int], params: Sequence[Params], weights: Sequence[float], sent: Params
    ) -> RoundMatch:
        """The match of these replies."""
        key = [digest(each) for each in (*params, sent)]
        if self._last is None or self._last[0] != key:
            self._last = key, super().align(nodes, params, weights, sent)
        return self._last[1]


@dataclass(frozen=True)
class Bench:
    """Every strategy plain, in the universe, and in it without outliers; the latter two share an aligner."""

    strategies: Mapping[str, Mapping[str, Strategy]]

    @staticmethod
    def build() -> Bench:
        """Make all of them once."""
        wrap = partial(
            C2M3, model=mlp(0, WIDTH), example_inputs=EXAMPLE, recalibrate="none", memory=0, diagnostics=True
        )
        found: dict[str, dict[str, Strategy]] = {}
        shared: Aligner | None = None
        for name, make in STRATEGIES.items():
            found[name] = {"plain": make(), "universe": wrap(make()), "dropping": wrap(make(), outliers="drop")}
            for ours in list(found[name].values())[1:]:
                assert isinstance(ours, C2M3)
                shared = shared or _one_match(ours.setup.aligner)
                object.__setattr__(ours.setup, "aligner", shared)
        return Bench(found)


def _one_match(aligner: Aligner) -> Aligner:
    return OneMatch(
        aligner.spec,
        mode="joint",
        basis="global",
        memory=0,
        device=aligner.device,
        max_steps=aligner.max_steps,
        tolerance=aligner.tolerance,
    )


def run_case(bench: Bench, setting: Setting, attack: str) -> dict[str, Any]:
    """Accuracies of all strategies, the success of the backdoor, and who was named."""
    each = federation(setting)
    parties = attacked(each, attack)
    row: dict[str, Any] = {"start": STARTS[setting.independent], "seed": setting.seed, "attack": attack}
    row |= {"accuracy": {}, "backdoor": {}}
    for name, ways in bench.strategies.items():
        row["accuracy"][name], row["backdoor"][name] = {}, {}
        for way, strategy in ways.items():
            if way == "dropping" and not row["named"]["honest"] + row["named"]["hostile"]:
                row["accuracy"][name][way] = row["accuracy"][name]["universe"]
                row["backdoor"][name][way] = row["backdoor"][name]["universe"]
                continue
            send(strategy, each.sent)
            arrays, metrics = strategy.aggregate_train(1, [reply(node, own) for node, own in enumerate(parties)])
            assert arrays is not None
            assert metrics is not None
            row["accuracy"][name][way] = round(accuracy(lambda: mlp(0, WIDTH), arrays), 4)
            row["backdoor"][name][way] = round(success(arrays), 4)
            if name == "FedAvg" and way == "universe":
                flags = metrics["c2m3-node-outlier"]
                named = {node for node, flag in zip(metrics["c2m3-nodes"], flags, strict=True) if flag}  # type: ignore[arg-type]  # lists
                row["named"] = {
                    "honest": len([node for node in named if node < CLIENTS - HOSTILE or attack == "none"]),
                    "hostile": len([node for node in named if node >= CLIENTS - HOSTILE and attack != "none"]),
                }
    return row


def success(arrays: ArrayRecord) -> float:
    """Share of the test images of other classes that the trigger makes the target."""
    model = mlp(0, WIDTH)
    model.load_state_dict(arrays.to_torch_state_dict())
    data, labels = (each[1200:] for each in digits())
    with torch.no_grad():
        found = model(triggered(data[labels != TARGET])).argmax(1)
    return float((found == TARGET).float().mean())


def measure(out: Path, seeds: Sequence[int], starts: Sequence[bool]) -> None:
    """All cases that the record does not hold yet; it is written after every seed of a start."""
    bench, rows = Bench.build(), read_record(out)["rows"] if out.exists() else []
    for independent in starts:
        for seed in seeds:
            if (STARTS[independent], seed) in {(row["start"], row["seed"]) for row in rows}:
                continue
            rows += [run_case(bench, Setting(independent, seed), attack) for attack in ATTACKS]
            write_record(out, COMMAND, {"clients": CLIENTS, "hostile": HOSTILE}, rows)
            print(STARTS[independent], seed, flush=True)


def report(record: Mapping[str, Any]) -> str:
    """What the page says of a record: seeds, honest replies that were named, tables."""
    rows = record["rows"]
    seeds = sorted({row["seed"] for row in rows})
    honest = sum(row["named"]["honest"] for row in rows)
    total = sum(CLIENTS if row["attack"] == "none" else CLIENTS - HOSTILE for row in rows)
    number = "One seed" if len(seeds) == 1 else f"Means of {len(seeds)} seeds"
    when = f"{number}, {record['date']}, {record['machine']['cores']} cores"
    where = f"[record](results/attacks.json), `{COMMAND} --seeds {len(seeds)}`"
    lines = [f"{when} ({where}). Honest replies that were named: {honest} of {total}."]
    for start, title in TITLES.items():
        of = [row for row in rows if row["start"] == start]
        if of:
            lines += ["", f"{title}:", "", *_table(of)]
    return "\n".join([*lines, ""])


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| attack | " + " | ".join(STRATEGIES) + " | hostile named |",
        "| --- |" + " --- |" * len(STRATEGIES) + " ---: |",
    ]
    for attack in ATTACKS:
        found = [row for row in rows if row["attack"] == attack]
        cells = [_cell(found, "accuracy", name) for name in STRATEGIES]
        named = f"{sum(row['named']['hostile'] for row in found)}/{HOSTILE * len(found)}" if attack != "none" else ""
        lines.append(f"| {attack} | " + " | ".join(cells) + f" | {named} |")
    for attack in (each for each in ATTACKS if each.startswith("backdoor")):
        found = [row for row in rows if row["attack"] == attack]
        cells = [_cell(found, "backdoor", name) for name in STRATEGIES]
        lines.append(f"| success of the {attack} | " + " | ".join(cells) + " | |")
    return lines


def _cell(rows: Sequence[Mapping[str, Any]], kind: str, name: str) -> str:
    means = [f"{fmean(row[kind][name][way] for row in rows):.2f}" for way in WAYS]
    return " → ".join(text[1:] if text.startswith("0") else text for text in means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the tables of the record")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", choices=("", *STARTS.values()), help="one of the starts")
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    if not options.table:
        measure(options.out, range(options.seeds), [each for each in STARTS if options.only in ("", STARTS[each])])
    found = report(read_record(options.out))
    if options.out == RECORD:
        PAGE.write_text(page(PAGE.read_text(), "attacks", found))
    print(found)


if __name__ == "__main__":
    main()
