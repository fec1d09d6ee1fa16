"""The figures of the C2M3 paper (Crisostomi et al. 2024), on perceptrons that were trained on digits.

    python -m tests.benchmarks.figures             tables, ``simulations/results/figures.json`` and its picture
    python -m tests.benchmarks.figures --redraw    tables and picture of that record

Networks from different seeds, each trained on all images (scikit-learn's digits, 64-W-W-10, W = 32 times a width, Adam,
ten epochs), merged with equal weights: barriers of pairs and of many, two to twenty networks, widths and depths, starts
of the search, what random orders change, and the error around cycles of three. Several seeds are several sets of
networks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

import torch

from c2m3_fl import merge
from c2m3_fl.core import permutation
from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.core.match import match
from c2m3_fl.core.pairwise import merge_many, pairwise_matching, weight_matching
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.merging.evaluate.barrier import pairwise_barriers, simplex
from c2m3_fl.symmetry.discover import permutation_spec
from simulations.settings import Settings
from tests.benchmarks.figures_picture import draw, tables
from tests.benchmarks.merging_cases import Case, Trained, accuracy, trained
from tests.benchmarks.quality import agreement
from tests.benchmarks.records import read_record, write_record

RESULTS = Path("simulations/results/figures.json")
COMMAND = "python -m tests.benchmarks.figures"
SETTINGS = Settings(
    data="digits",
    clients=5,
    partition="iid",
    hidden_widths="32,32",
    local_epochs=10,
    optimiser="adam",
    learning_rate=2e-3,
    calibration_size=300,
)
COUNTS = (2, 3, 5, 8, 12, 20)
WIDTHS = {"½": 16, "1": 32, "2": 64, "4": 128, "8": 256}
DEPTHS = (1, 2, 3, 5, 8)
ORDERS = 8  # random orders, or draws of a noisy start

Matcher = Callable[[PermutationSpec, Sequence[Params]], Sequence[Permutation]]
MATCHERS: Mapping[str, Matcher] = {
    "no match": lambda spec, nodes: [permutation.identity(spec)] * len(nodes),
    "Git Re-Basin": pairwise_matching,
    "MergeMany": merge_many,
    "C2M3": lambda spec, nodes: match(spec, nodes).permutations,
}


@dataclass(frozen=True)
class Row:
    """One number of one figure: `x` is the place on its axis, `series` the curve."""

    figure: str
    seed: int
    x: str
    series: str
    value: float


def networks(seed: int, **changes: object) -> tuple[Trained, PermutationSpec]:
    """Trained networks, and their symmetries."""
    found = trained(Case(replace(SETTINGS, seed=seed, **changes), True, "digits"))  # type: ignore[arg-type]  # any settings
    return found, permutation_spec(found.model, found.calibration[0][:4])


def aligned(
    spec: PermutationSpec, nodes: Sequence[Params], perms: Sequence[Permutation]
) -> list[dict[str, torch.Tensor]]:
    """The networks in one basis."""
    return [permutation.apply(spec, perm, node) for perm, node in zip(perms, nodes, strict=True)]


def mean_accuracy(found: Trained, nodes: Sequence[Params]) -> float:
    """Accuracy of the plain mean."""
    return accuracy(found.model, weighted_mean(nodes, [1.0] * len(nodes)), found.test)


def barriers(seed: int) -> Iterator[Row]:
    """Loss barriers on test images: over all pairs, and of the mean of all five networks."""
    found, spec = networks(seed)
    data = [(found.test.inputs, found.test.labels)]
    for name, matcher in MATCHERS.items():
        nodes = aligned(spec, found.nodes, matcher(spec, found.nodes))
        lines = pairwise_barriers(found.model, nodes, data, points=5)
        yield Row("barrier", seed, "pairs", name, fmean(line.loss_barrier for line in lines.values()))
        yield Row("barrier", seed, "five", name, simplex(found.model, nodes, data).loss_barrier)


def numbers(seed: int) -> Iterator[Row]:
    """Accuracy of the mean of two to twenty networks, and after REPAIR."""
    everything, spec = networks(seed, clients=max(COUNTS))
    for count in COUNTS:
        found = replace(everything, nodes=everything.nodes[:count])
        singles = [accuracy(found.model, node, found.test) for node in found.nodes]
        yield Row("number", seed, str(count), "mean network", fmean(singles))
        for name, matcher in MATCHERS.items():
            yield Row(
                "number",
                seed,
                str(count),
                name,
                mean_accuracy(found, aligned(spec, found.nodes, matcher(spec, found.nodes))),
            )
        repaired = merge(found.model, found.nodes, spec=spec, calibration=found.calibration, recalibrate="repair")
        yield Row("number", seed, str(count), "C2M3 + REPAIR", accuracy(found.model, repaired.state_dict, found.test))


def sizes(seed: int) -> Iterator[Row]:
    """Accuracy by width, with two hidden layers, and by depth, with width 32; five networks each."""
    shapes = {("width", name): f"{width},{width}" for name, width in WIDTHS.items()}
    shapes |= {("depth", str(depth)): ",".join(["32"] * depth) for depth in DEPTHS}
    for (figure, x), widths in shapes.items():
        found, spec = networks(seed, hidden_widths=widths)
        singles = [accuracy(found.model, node, found.test) for node in found.nodes]
        yield Row(figure, seed, x, "mean network", fmean(singles))
        for name, matcher in MATCHERS.items():
            yield Row(
                figure, seed, x, name, mean_accuracy(found, aligned(spec, found.nodes, matcher(spec, found.nodes)))
            )
        for suffix in ("repair", "refit"):
            merged = merge(found.model, found.nodes, spec=spec, calibration=found.calibration, recalibrate=suffix)
            title = f"C2M3 + {'REPAIR' if suffix == 'repair' else suffix}"
            yield Row(figure, seed, x, title, accuracy(found.model, merged.state_dict, found.test))


def starts(seed: int) -> Iterator[Row]:
    """Agreement relative to the default's and accuracy of the mean, by start; Sinkhorn noise: mean over draws."""
    found, spec = networks(seed)
    best = agreement(spec, found.nodes, match(spec, found.nodes).permutations)
    for start in ("auto", "identity", "barycentre", "sinkhorn"):
        draws = range(ORDERS if start == "sinkhorn" else 1)
        perms = [
            match(spec, found.nodes, start=start, generator=torch.Generator().manual_seed(draw)).permutations  # type: ignore[arg-type]  # a name
            for draw in draws
        ]
        shares = [agreement(spec, found.nodes, each) / best for each in perms]
        scores = [mean_accuracy(found, aligned(spec, found.nodes, each)) for each in perms]
        yield Row("start", seed, start, "agreement / default's", fmean(shares))
        yield Row("start", seed, start, "accuracy of the mean", fmean(scores))


def orders(seed: int) -> Iterator[Row]:
    """Accuracy of the mean after what a method leaves to chance: its reference, or the order of visits or networks."""
    found, spec = networks(seed)
    for order in range(ORDERS):
        generator = torch.Generator().manual_seed(order)
        places = torch.randperm(len(found.nodes), generator=generator).tolist()
        nodes = [found.nodes[place] for place in places]
        drawn: Mapping[str, Sequence[Permutation]] = {
            "Git Re-Basin, reference": pairwise_matching(spec, nodes),
            "MergeMany, order of visits": merge_many(spec, nodes, generator=generator),
            "C2M3, order of networks": match(spec, nodes).permutations,
        }
        for name, perms in drawn.items():
            yield Row("order", seed, str(order), name, mean_accuracy(found, aligned(spec, nodes, perms)))


def cycles(seed: int) -> Iterator[Row]:
    """Share of units that do not come back to themselves around a cycle of three networks, mean over cycles."""
    found, spec = networks(seed)
    joint, matched, pairs = merge_many(spec, found.nodes), match(spec, found.nodes), {}
    for i, j in combinations(range(len(found.nodes)), 2):
        pairs[i, j] = weight_matching(spec, found.nodes[i], found.nodes[j])
        pairs[j, i] = weight_matching(spec, found.nodes[j], found.nodes[i])
    both: Mapping[str, Callable[[int, int], Permutation]] = {
        "Git Re-Basin, pair by pair": lambda i, j: pairs[i, j],
        "MergeMany": lambda i, j: permutation.between(joint[i], joint[j]),
        "C2M3": matched.between,
    }
    for name, between in both.items():
        errors = [
            astray(spec, [between(i, j), between(j, k), between(k, i)])
            for i, j, k in combinations(range(len(found.nodes)), 3)
        ]
        yield Row("cycle", seed, "three", name, fmean(errors))


def astray(spec: PermutationSpec, around: Sequence[Permutation]) -> float:
    """Share of units that three permutations, the last applied first, do not bring back."""
    first, second, third = around
    back = permutation.compose(first, permutation.compose(second, third))
    wrong = [int((back[name] != torch.arange(group.size)).sum()) for name, group in spec.groups.items()]
    return sum(wrong) / sum(group.size for group in spec.groups.values())


FIGURES = (barriers, numbers, sizes, starts, orders, cycles)


def main() -> None:
    """Measure, write, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="rows of other seeds stay in the record"
    )
    parser.add_argument("--redraw", action="store_true", help="tables and picture of the record, measuring nothing")
    options = parser.parse_args()
    if not options.redraw:
        torch.set_num_threads(1)
        found = []
        for seed in options.seeds:
            for figure in FIGURES:
                found += [asdict(row) for row in figure(seed)]
                print(seed, figure.__name__, flush=True)
        earlier = read_record(RESULTS)["rows"] if RESULTS.is_file() else []
        found += [row for row in earlier if row["seed"] not in options.seeds]
        rows = sorted(found, key=lambda row: row["seed"])
        configuration = {
            "seeds": list(dict.fromkeys(row["seed"] for row in rows)),
            "settings": asdict(SETTINGS),
            "counts": COUNTS,
            "widths": WIDTHS,
            "depths": DEPTHS,
            "orders": ORDERS,
            "threads": 1,
        }
        write_record(RESULTS, COMMAND, configuration, rows)
    rows = read_record(RESULTS)["rows"]
    draw(rows, RESULTS.with_suffix(".png"))
    print(tables(rows))


if __name__ == "__main__":
    main()
