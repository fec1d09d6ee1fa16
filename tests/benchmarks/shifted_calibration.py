"""Recalibration with calibration data that are not what the nodes were trained on.

    python -m tests.benchmarks.shifted_calibration [--redraw]     table and record (needs C2M3_DATA)

One merge of clients with starts of their own, of the experiments `digits` and `cifar10`, each client trained for five
epochs. The record is ``c2m3_fl/flower/results/shifted_calibration.json``; ``--redraw`` prints its table.
`merging_table` has the same rows for larger networks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from c2m3_fl import flower
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.merging.recalibrate.auto import Auto
from c2m3_fl.merging.recalibrate.setting import Setting
from c2m3_fl.merging.reports import Recalibrated
from c2m3_fl.symmetry.discover import permutation_spec
from simulations.client_app import Assignment, own_start, train_locally
from simulations.data import federated_data
from simulations.design import load_design
from simulations.models import build_model
from tests.benchmarks.merging_cases import CASES, Case, Trained, accuracy
from tests.benchmarks.merging_rows import RECALIBRATIONS, Row, merged_setting, own_moments
from tests.benchmarks.records import read_record, write_record

RESULTS = Path(flower.__file__).parent / "results" / "shifted_calibration.json"
COMMAND = "python -m tests.benchmarks.shifted_calibration"
NETWORKS = {"digits": "MLP, digits", "cifar10": "LeNet, CIFAR-10"}
SEEDS = {"digits": (0, 1, 2), "cifar10": (0,)}
PARTITIONS = ("IID", "Dirichlet .1")
EPOCHS = 5


def shifted(found: Trained) -> dict[str, Tensor]:
    """Calibration inputs that are not, or not all, what the nodes were trained on."""
    own = torch.cat(found.calibration)
    generator = torch.Generator().manual_seed(0)
    labels = torch.from_numpy(found.data.train.labels[found.data.calibration_rows])
    foreign = "mnist-iid" if own.shape[1] == 3 else "cifar-iid"
    other = torch.cat(trained_calibration(CASES[foreign]))[: len(own)].mean(1, keepdim=True)
    blur = torch.ones(own.shape[1], 1, 5, 5) / 25
    low, high = own.min(), own.max()
    pixels = torch.randperm(own[0, 0].numel(), generator=generator)
    return {
        "own": own,
        "100 inputs": own[:100],
        "three classes": own[labels < 3],
        "blurred": nn.functional.conv2d(own, blur, padding=2, groups=own.shape[1]),
        "one class": own[labels == labels.mode().values],
        "mirrored": own.flip(-1),
        "colours swapped": own.flip(1),
        "turned": own.rot90(1, (-2, -1)),
        "brighter": (own + own.std()).clamp(low, high),
        "half contrast": own.mean() + (own - own.mean()) / 2,
        "inverted": low + high - own,
        "pixels shuffled": own.flatten(2)[..., pixels].reshape(own.shape),
        "noisy": own + torch.randn(own.shape, generator=generator),
        "noise": torch.randn(own.shape, generator=generator),
        "other data": nn.functional.interpolate(other, own.shape[-1]).expand(-1, own.shape[1], -1, -1).contiguous(),
    }


def trained_calibration(case: Case) -> list[Tensor]:
    """Calibration batches of a case."""
    return federated_data(case.settings).calibration


def shift_rows(case: Case, seed: int, found: Trained, spec: PermutationSpec) -> Iterator[Row]:
    """REPAIR, refit and auto with shifted calibration data."""
    _, settings = merged_setting(found, spec, own_moments(case, found))
    for name, inputs in shifted(found).items():
        setting = settings(list(torch.split(inputs, 250)))
        yield Row(case.title, seed, f"{name}: C2M3", accuracy(found.model, setting.merged, found.test), 0.0)
        kept: dict[str, Recalibrated] = {}

        def keeping(column: str, setting: Setting, kept: dict[str, Recalibrated] = kept) -> Recalibrated:
            if column not in kept:
                kept[column] = RECALIBRATIONS[column](setting)
            return kept[column]

        auto = Auto(repair=partial(keeping, "+ REPAIR"), refit=partial(keeping, "+ refit"))
        for column, recalibrate in (("+ REPAIR", auto.repair), ("+ refit", auto.refit), ("+ auto", auto)):
            done = recalibrate(setting)
            decision = done.report.decision
            note = "" if decision is None else f"{decision.chosen}, shift {decision.shift:.2f}: {decision.reason}"
            score = accuracy(found.model, done.state_dict, found.test)
            yield Row(case.title, seed, f"{name}: {column}", score, done.report.seconds, note)


def federations() -> Iterator[tuple[Case, Trained]]:
    """Clients with starts of their own, after their local training."""
    for name, title in NETWORKS.items():
        cells = {cell.labels["partition"]: cell for cell in load_design(name).cells if cell.labels["start"] == "own"}
        for partition in PARTITIONS:
            for seed in SEEDS[name]:
                settings = replace(cells[partition].settings, seed=seed, local_epochs=EPOCHS)
                data = federated_data(settings)
                starts = [own_start(settings, client) for client in range(settings.clients)]
                nodes = [
                    train_locally(Assignment(settings, client, 1, start, 0.0))[0] for client, start in enumerate(starts)
                ]
                model = build_model(settings, data.shape, data.classes, 0).eval()
                weights = [float(len(data.training_share(client))) for client in range(settings.clients)]
                found = Trained(model, nodes, weights, data.calibration, data.held_out, data)
                yield Case(settings, False, f"{title}, {partition}"), found


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Accuracy in percent, mean over seeds, and the shift, least and largest, as markdown tables."""
    found: dict[str, dict[str, dict[str, list[Mapping[str, Any]]]]] = {}
    for row in rows:
        kind, column = row["column"].split(": ")
        found.setdefault(row["case"], {}).setdefault(kind, {}).setdefault(column, []).append(row)
    columns = ("C2M3", "+ REPAIR", "+ refit", "+ auto")
    lines = []
    for case, kinds in found.items():
        lines += [f"\n{case}:\n", "| calibration | " + " | ".join(columns) + " | shift | it did |"]
        lines.append("| --- |" + " ---: |" * (len(columns) + 1) + " --- |")
        for kind, here in kinds.items():
            means = [f"{100 * fmean(row['accuracy'] for row in here[column]):.1f}" for column in columns]
            notes = [row["note"].split(":")[0].split(", shift ") for row in here["+ auto"]]
            shifts, did = [float(shift) for _, shift in notes], dict.fromkeys(name for name, _ in notes)
            lines.append(
                f"| {kind} | {' | '.join(means)} | {min(shifts):.2f} to {max(shifts):.2f} | {', '.join(did)} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redraw", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.redraw:
        print(table(read_record(RESULTS)["rows"]))
        return
    rows = []
    for case, found in federations():
        spec = permutation_spec(found.model, found.calibration[0][:2])
        rows += [asdict(row) for row in shift_rows(case, case.settings.seed, found, spec)]
        print(case.title, case.settings.seed, flush=True)
    write_record(RESULTS, COMMAND, {"seeds": SEEDS, "epochs": EPOCHS}, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
