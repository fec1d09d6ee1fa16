"""Rows of `merging_table`: recalibration with calibration data that are not what the nodes were trained on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.merging.recalibrate.auto import Auto
from c2m3_fl.merging.recalibrate.setting import Setting
from c2m3_fl.merging.reports import Recalibrated
from tests.benchmarks.merging_cases import CASES, Case, Trained, accuracy
from tests.benchmarks.merging_rows import RECALIBRATIONS, Row, merged_setting, own_moments


def shifted(found: Trained) -> dict[str, Tensor]:
    """Calibration inputs that are not, or not all, what the nodes were trained on."""
    own = torch.cat(found.calibration)
    generator = torch.Generator().manual_seed(0)
    labels = torch.from_numpy(found.data.train.labels[found.data.calibration_rows])
    foreign = "mnist-iid" if own.shape[1] == 3 else "cifar-iid"
    other = torch.cat(trained_calibration(CASES[foreign]))[: len(own)].mean(1, keepdim=True)
    blur = torch.ones(own.shape[1], 1, 5, 5) / 25
    return {
        "own": own,
        "100 inputs": own[:100],
        "three classes": own[labels < 3],
        "blurred": nn.functional.conv2d(own, blur, padding=2, groups=own.shape[1]),
        "noisy": own + torch.randn(own.shape, generator=generator),
        "noise": torch.randn(own.shape, generator=generator),
        "other data": nn.functional.interpolate(other, own.shape[-1]).expand(-1, own.shape[1], -1, -1).contiguous(),
    }


def trained_calibration(case: Case) -> list[Tensor]:
    """Calibration batches of a case."""
    from simulations.data import federated_data

    return federated_data(case.settings).calibration


def shift_rows(case: Case, seed: int, found: Trained, spec: PermutationSpec) -> Iterator[Row]:
    """REPAIR, refit and auto with shifted calibration data."""
    _, settings = merged_setting(found, spec, own_moments(case, found))
    for name, inputs in shifted(found).items():
        setting = settings(list(inputs.split(250)))
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
