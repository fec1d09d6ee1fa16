"""How high the agreement gets, and how well the mean then classifies: the solver, the yardstick and other matchers.

    python -m tests.benchmarks.quality [CASE ...] [--seeds N] [--out FOLDER]        adds to FOLDER/quality.json
    python -m tests.benchmarks.quality --draw c2m3_fl/core/results/quality.json     the tables of a record

The second writes the tables into c2m3_fl/core/README.md, and the paper's main table into simulations/README.md.

Networks trained on digits from different seeds, merged by their plain mean, so nothing after the match hides it, and
with REPAIR. The objectives are relative to those of the published algorithm on the same nodes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean as mean

import torch

import c2m3_fl.core
import simulations
from c2m3_fl.core import permutation
from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.core.match import match
from c2m3_fl.core.pairwise import merge_many, pairwise_matching
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.running import RunningUniverse
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.merging.recalibrate.repair import Repair
from c2m3_fl.merging.recalibrate.setting import prepare
from c2m3_fl.symmetry.discover import permutation_spec
from simulations.grid_tables import page
from simulations.settings import Settings, check_choice
from tests.benchmarks.merging_cases import Case, accuracy, trained
from tests.benchmarks.published import published_match
from tests.benchmarks.records import read_record, write_record

PAGE = Path(simulations.__file__).parent / "README.md"
CORE_PAGE = Path(c2m3_fl.core.__file__).parent / "README.md"
RECORD = CORE_PAGE.parent / "results" / "quality.json"

Matcher = Callable[[PermutationSpec, Sequence[Params]], Sequence[Permutation]]

_MLP = Settings(data="digits", model="mlp", hidden_widths="128,128", clients=5, partition="iid", local_epochs=10)
_RESNET = replace(
    _MLP, model="resnet20-ln", clients=3, batch_size=32, local_epochs=8, optimiser="adam", learning_rate=1e-3
)
_VGG = replace(_RESNET, model="vgg16", image_size=32, width=0.125, local_epochs=20)
CASES = {
    "mlp": Case(_MLP, True, "digits, MLP 128-128, 5 models"),
    "cnn": Case(replace(_MLP, model="cnn", width=0.5), True, "digits, CNN 16-32, 5 models"),
    "resnet20": Case(_RESNET, True, "digits, ResNet20 LayerNorm, 3 models"),
    "resnet20-bn": Case(replace(_RESNET, model="resnet20-bn"), True, "digits, ResNet20 BatchNorm, 3 models"),
    "vgg16": Case(_VGG, True, "digits, VGG16 of an eighth of the width, 3 models", torch.channels_last),
}

_SMALL = ("mlp", "cnn")  # cheap to train, and their agreements spread by more than what is asked of their mean

MATCHERS: dict[str, Matcher] = {
    "published": lambda spec, nodes: published_match(spec, nodes).permutations,
    "C2M3 (default)": lambda spec, nodes: match(spec, nodes).permutations,
    "from the identity": lambda spec, nodes: match(spec, nodes, start="identity").permutations,
    "from the barycentre": lambda spec, nodes: match(spec, nodes, start="barycentre").permutations,
    "all nodes at once": lambda spec, nodes: match(spec, nodes, together=None).permutations,
    "without polish": lambda spec, nodes: match(spec, nodes, polish=False).permutations,
    "every tensor weighted alike (`balance=True`)": lambda spec, nodes: match(spec, nodes, balance=True).permutations,
    "MergeMany": merge_many,
    "pairwise, to the first": pairwise_matching,
    "unmatched": lambda spec, nodes: [permutation.identity(spec)] * len(nodes),
}


def agreement(spec: PermutationSpec, nodes: Sequence[Params], perms: Sequence[Permutation]) -> float:
    """The objective of any permutations."""
    total, share = RunningUniverse(spec), 1 / len(nodes)
    for node, perm in zip(nodes, perms, strict=True):
        total.add(node, perm, share)
    return total.agreement(nodes, [share] * len(nodes))


def measure(case: Case) -> dict[str, tuple[float, ...]]:
    """Per matcher: objective relative to the published one's, accuracy of the mean and with REPAIR, CPU seconds."""
    found = trained(case)
    spec = permutation_spec(found.model, found.calibration[0][:2])
    rows: dict[str, tuple[float, ...]] = {}
    for name, matcher in MATCHERS.items():
        start = time.process_time()
        perms = matcher(spec, found.nodes)
        seconds = time.process_time() - start
        aligned = [permutation.apply(spec, perm, node) for perm, node in zip(perms, found.nodes, strict=True)]
        plain = weighted_mean(aligned, [1.0] * len(aligned))
        repaired = Repair()(prepare(found.model, plain, aligned, found.calibration)).state_dict
        merged = [accuracy(found.model, state, found.test) for state in (plain, repaired)]
        rows[name] = agreement(spec, found.nodes, perms), *merged, seconds
    best = rows["published"][0]
    singles = [accuracy(found.model, node, found.test) for node in found.nodes]
    shares = {name: (value / best, *rest) for name, (value, *rest) in rows.items()}
    return {**shares, "mean endpoint": (math.nan, mean(singles), mean(singles), 0.0)}


def row(name: str, values: Sequence[Sequence[float]]) -> str:
    """One line of the markdown table."""
    numbers = torch.tensor(values, dtype=torch.float64)
    (share, *merged, seconds), (spread, *deviations, _) = numbers.mean(0).tolist(), numbers.std(0).tolist()
    agreed = "–" if math.isnan(share) else f"{share:.4f} ± {spread:.4f}"
    accuracies = [f"{value:.3f} ± {deviation:.3f}" for value, deviation in zip(merged, deviations, strict=True)]
    return f"| {name} | {agreed} | {' | '.join(accuracies)} | {seconds:.2f} |"


def table(rows: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> str:
    """Markdown, one table per case."""
    lines = []
    for name, found in rows.items():
        lines += [
            f"{CASES[name].title}, {len(found['published'])} sets:",
            "",
            "| | agreement / published | accuracy of the mean | with REPAIR | CPU s |",
        ]
        lines += [
            "| --- | ---: | ---: | ---: | ---: |",
            *(row(matcher, values) for matcher, values in found.items()),
            "",
        ]
    return "\n".join(lines)


_METHODS = {  # of the paper's main table
    "unmatched": "plain mean",
    "pairwise, to the first": "Git Re-Basin, to the first",
    "MergeMany": "MergeMany",
    "published": "C2M3, the published algorithm",
    "C2M3 (default)": "C2M3",
}


def main_table(rows: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> str:
    """Markdown: accuracies of the mean network, and of every method's mean without and with REPAIR, by family."""

    def cell(values: Sequence[Sequence[float]], place: int) -> str:
        numbers = torch.tensor(values, dtype=torch.float64)[:, place]
        return f"{float(numbers.mean()):.3f} ± {float(numbers.std()):.3f}"

    titles = [
        f"{CASES[name].title.removeprefix('digits, ')}, {len(found['published'])} sets" for name, found in rows.items()
    ]
    lines = [f"| method | {' | '.join(titles)} |", "| --- |" + " ---: |" * len(titles)]
    lines.append(f"| *mean network* | {' | '.join(cell(found['mean endpoint'], 1) for found in rows.values())} |")
    for name, title in _METHODS.items():
        for place, more in ((1, ""), (2, " + REPAIR")):
            lines.append(f"| {title}{more} | {' | '.join(cell(found[name], place) for found in rows.values())} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument(
        "--seeds",
        type=int,
        help="sets of every case, for a table only; the record has 15 of small networks, 5 of deep ones",
    )
    parser.add_argument("--draw", action="store_true", help="write the tables of the record instead of measuring")
    options = parser.parse_args()
    for name in options.cases:
        check_choice("case", name, tuple(CASES))
    torch.set_num_threads(1)
    rows: dict[str, dict[str, list[tuple[float, ...]]]] = read_record(RECORD)["rows"] if RECORD.exists() else {}
    configuration = {
        "columns": ["agreement / published", "accuracy of the mean", "with REPAIR", "CPU seconds of one thread"],
        "cases": {name: {"title": case.title, "settings": asdict(case.settings)} for name, case in CASES.items()},
    }
    for name in () if options.draw else options.cases:
        sets = options.seeds or (15 if name in _SMALL else 5)
        seeds = [measure(CASES[name].seeded(seed)) for seed in range(sets)]
        rows[name] = {matcher: [found[matcher] for found in seeds] for matcher in seeds[0]}
        rows = {known: rows[known] for known in CASES if known in rows}
        if options.seeds is None:
            write_record(RECORD, "python -m tests.benchmarks.quality", configuration, rows)
    print(table(rows))
    if options.seeds is not None:
        return
    CORE_PAGE.write_text(page(CORE_PAGE.read_text(), "other-matchers", table(rows)))
    PAGE.write_text(page(PAGE.read_text(), "main-table", main_table(rows)))


if __name__ == "__main__":
    main()
