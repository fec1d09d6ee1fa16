"""Open questions about merging, each answered on small networks by one table.

    python -m tests.benchmarks.questions [QUESTION ...]    tables and ``simulations/results/questions.json``
    python -m tests.benchmarks.questions --redraw          tables and picture of that record

Questions that are named replace their rows in the record. MNIST and CIFAR-10 need C2M3_DATA.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from c2m3_fl import merge
from c2m3_fl.core import permutation
from c2m3_fl.core.match import match
from c2m3_fl.core.pairwise import merge_many, pairwise_matching
from c2m3_fl.core.permutation import Permutation
from c2m3_fl.core.spec import Params, PermutationSpec
from c2m3_fl.errors import CalibrationError
from c2m3_fl.merging.align.methods import ActivationMatching, CycleConsistent, Mean, Method
from c2m3_fl.merging.evaluate.barrier import simplex
from c2m3_fl.merging.recalibrate.head.fit import FitHead
from c2m3_fl.merging.recalibrate.refit import Refit
from c2m3_fl.symmetry.discover import permutation_spec
from simulations.data import Images, federated_data
from simulations.settings import Settings
from tests.benchmarks.figures import SETTINGS as DIGITS
from tests.benchmarks.figures import aligned, astray, mean_accuracy
from tests.benchmarks.merging_cases import Case, Trained, accuracy, probabilities, trained
from tests.benchmarks.quality import agreement
from tests.benchmarks.questions_picture import draw, tables
from tests.benchmarks.records import read_record, write_record

RESULTS = Path("simulations/results/questions.json")
COMMAND = "python -m tests.benchmarks.questions"
SEEDS = (0, 1, 2)
SKEWED = replace(DIGITS, partition="dirichlet", alpha=0.3)
MNIST = replace(DIGITS, data="mnist", image_size=8, train_size=4000, test_size=2000, local_epochs=5)
CIFAR10 = replace(MNIST, data="cifar10", model="lenet", image_size=0, train_size=10000, local_epochs=10)
CIFAR10 = replace(CIFAR10, hidden_widths="256,256", calibration_size=500)
CIFAR10 = replace(CIFAR10, optimiser="sgd", learning_rate=0.02, momentum=0.9)
NOISE = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
CLASSES = (10, 8, 6, 4, 3, 2)
SHAPES = (("32", 0.0), ("32", 3.0), ("128", 0.0), ("128", 3.0), ("512", 0.0), ("512", 3.0))
AMOUNTS = (10, 20, 50, 100, 300)


@dataclass(frozen=True)
class Row:
    """One number of one answer: a line and a column of its table."""

    question: str
    seed: int
    line: str
    column: str
    value: float


def _trained(settings: Settings, *, whole: bool) -> tuple[Trained, PermutationSpec]:
    found = trained(Case(settings, whole, "questions"))
    return found, permutation_spec(found.model, found.calibration[0][:4])


def _scores(found: Trained, spec: PermutationSpec, test: Images) -> Iterator[tuple[str, float]]:
    """Networks alone, their ensemble, and their merges, on any test images."""
    yield "mean network", fmean(accuracy(found.model, node, test) for node in found.nodes)
    votes = torch.stack([probabilities(found.model, node, test.inputs) for node in found.nodes]).mean(0)
    yield "ensemble", float((votes.argmax(1) == test.labels).double().mean())
    options: dict[str, Any] = {"spec": spec, "calibration": found.calibration, "weights": found.weights}
    for name, method, recalibrate in (
        ("plain mean", Mean(), "none"),
        ("C2M3", CycleConsistent(), "none"),
        ("C2M3 + REPAIR", CycleConsistent(), "repair"),
        ("plain mean + refit", Mean(), Refit(scores=True)),
        ("C2M3 + refit", CycleConsistent(), Refit(scores=True)),
    ):
        merged = merge(found.model, found.nodes, method=method, recalibrate=recalibrate, **options)
        yield name, accuracy(found.model, merged.state_dict, test)


def ablation(seed: int) -> Iterator[Row]:
    """Cycle consistency and Frank-Wolfe, each with and without the other, on five networks of four hidden layers."""
    found, spec = _trained(replace(DIGITS, seed=seed, hidden_widths="32,32,32,32"), whole=True)
    nodes, first = found.nodes, found.nodes[0]
    pairs = [permutation.identity(spec), *(match(spec, [first, node]).between(0, 1) for node in nodes[1:])]
    identity = match(spec, nodes, start="identity")
    drawn: Mapping[str, Sequence[Permutation]] = {
        "to a reference, block ascent (Git Re-Basin)": pairwise_matching(spec, nodes),
        "to a reference, Frank-Wolfe": pairs,
        "universe, block ascent (MergeMany)": merge_many(spec, nodes),
        "universe, block ascent, same start as below": match(spec, nodes, max_steps=0).permutations,
        "universe, Frank-Wolfe from the identity": identity.permutations,
        "universe, Frank-Wolfe (C2M3)": match(spec, nodes).permutations,
    }
    best = agreement(spec, nodes, drawn["universe, Frank-Wolfe (C2M3)"])
    for name, perms in drawn.items():
        yield Row("ablation", seed, name, "agreement / C2M3's", agreement(spec, nodes, perms) / best)
        yield Row("ablation", seed, name, "accuracy of the mean", mean_accuracy(found, aligned(spec, nodes, perms)))
    between = {(i, j): match(spec, [nodes[i], nodes[j]]).between(0, 1) for i, j in combinations(range(5), 2)}
    errors = [
        astray(spec, [between[i, j], between[j, k], permutation.invert(between[i, k])])
        for i, j, k in combinations(range(5), 3)
    ]
    yield Row("ablation", seed, "every pair for itself, Frank-Wolfe", "astray around three", fmean(errors))


def foreign(seed: int) -> Iterator[Row]:
    """MNIST clients (8x8 pixels) on MNIST, on MNIST corrupted, and on scikit-learn's digits."""
    found, spec = _trained(replace(MNIST, seed=seed), whole=False)
    test = found.test
    tests = {
        "MNIST": test,
        "noise": Images(_noise(test.inputs, seed), test.labels),
        "blur": Images(_blur(test.inputs), test.labels),
        "half the contrast": Images(0.5 * test.inputs, test.labels),
        "digits": federated_data(DIGITS).held_out,
    }
    yield from _on_each("foreign", seed, found, spec, tests)


def corrupted(seed: int) -> Iterator[Row]:
    """CIFAR-10 clients on CIFAR-10 and on five of its corruptions (Hendrycks and Dietterich, ICLR 2019)."""
    found, spec = _trained(replace(CIFAR10, seed=seed), whole=False)
    inputs = found.test.inputs
    size = inputs.shape[2:]
    coarse = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(inputs, 2), size)
    tests = {
        "CIFAR-10": inputs,
        "noise": _noise(inputs, seed),
        "blur": _blur(inputs),
        "half the contrast": 0.5 * inputs,
        "brighter": inputs + 1,
        "coarser pixels": coarse,
    }
    shown = {name: Images(values, found.test.labels) for name, values in tests.items()}
    yield from _on_each("corrupted", seed, found, spec, shown)


def _noise(inputs: Tensor, seed: int) -> Tensor:
    return inputs + 0.7 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(seed))


def _blur(inputs: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(inputs, 3, stride=1, padding=1)


def _on_each(
    question: str, seed: int, found: Trained, spec: PermutationSpec, tests: Mapping[str, Images]
) -> Iterator[Row]:
    for name, images in tests.items():
        for line, value in _scores(found, spec, images):
            yield Row(question, seed, line, name, value)


def stability(seed: int) -> Iterator[Row]:
    """Share of units with the default's partner under other starts and weight noise; accuracy of the noiseless mean."""
    found, spec = _trained(replace(DIGITS, seed=seed), whole=True)
    nodes, usual = found.nodes, match(spec, found.nodes)
    drawn: dict[str, list[Sequence[Permutation]]] = {}
    for start in ("identity", "barycentre", "sinkhorn"):
        draws = [torch.Generator().manual_seed(draw) for draw in range(3 if start == "sinkhorn" else 1)]
        drawn[f"start: {start}"] = [match(spec, nodes, start=start, generator=draw).permutations for draw in draws]  # type: ignore[arg-type]  # a name
    merged = merge(found.model, nodes, spec=spec, calibration=found.calibration, start="activations", basis=0)
    assert merged.match is not None
    drawn["start: activations"] = [merged.match.permutations]
    for size in NOISE[1:]:
        draws = [torch.Generator().manual_seed(draw) for draw in range(3)]
        drawn[f"noise: {size:g}"] = [match(spec, _noisy(nodes, size, draw)).permutations for draw in draws]
    for name, several in {"default": [usual.permutations], **drawn}.items():
        same = [same_partners(spec, usual.permutations, perms) for perms in several]
        scores = [mean_accuracy(found, aligned(spec, nodes, perms)) for perms in several]
        yield Row("stability", seed, name, "same partner", fmean(same))
        yield Row("stability", seed, name, "accuracy of the mean", fmean(scores))


def _noisy(nodes: Sequence[Params], size: float, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Gaussian noise of `size` times every tensor's standard deviation."""
    return [
        {
            name: value + size * value.std() * torch.randn(value.shape, generator=generator)
            for name, value in node.items()
        }
        for node in nodes
    ]


def same_partners(spec: PermutationSpec, one: Sequence[Permutation], other: Sequence[Permutation]) -> float:
    """Share of units, over all pairs of networks, whose partner is the same."""
    equal = total = 0
    for i, j in combinations(range(len(one)), 2):
        left, right = permutation.between(one[i], one[j]), permutation.between(other[i], other[j])
        equal += sum(int((left[name] == right[name]).sum()) for name in spec.groups)
        total += sum(group.size for group in spec.groups.values())
    return equal / total


def tasks(seed: int) -> Iterator[Row]:
    """Five clients with fewer and fewer classes each, own starts."""
    for classes in CLASSES:
        settings = replace(DIGITS, seed=seed, partition="pathological", classes_per_client=classes)
        found, spec = _trained(settings if classes < 10 else replace(DIGITS, seed=seed), whole=False)
        for line, value in _scores(found, spec, found.test):
            yield Row("tasks", seed, line, str(classes), value)


def decay(seed: int) -> Iterator[Row]:
    """Accuracy barrier of the mean of five networks, by width and weight decay (AdamW), without and with a match."""
    for width, weight_decay in SHAPES:
        settings = replace(
            DIGITS, seed=seed, hidden_widths=f"{width},{width}", optimiser="adamw", weight_decay=weight_decay, clients=3
        )
        found, spec = _trained(settings, whole=True)
        data = [(found.test.inputs, found.test.labels)]
        moved = aligned(spec, found.nodes, match(spec, found.nodes).permutations)
        column = f"{width}, decay {weight_decay:g}"
        for line, nodes in (("no match", found.nodes), ("C2M3", moved)):
            yield Row("decay", seed, line, column, simplex(found.model, nodes, data).accuracy_barrier)
        yield Row(
            "decay", seed, "mean network", column, fmean(accuracy(found.model, n, found.test) for n in found.nodes)
        )


def calibration(seed: int) -> Iterator[Row]:
    """REPAIR, activation matching and refit with few unlabelled inputs; clients under label skew."""
    found, spec = _trained(replace(SKEWED, seed=seed), whole=False)
    inputs = torch.cat(found.calibration)
    methods: Mapping[str, tuple[Method, Any]] = {
        "C2M3": (CycleConsistent(), "none"),
        "C2M3 + REPAIR": (CycleConsistent(), "repair"),
        "activation matching + REPAIR": (ActivationMatching(), "repair"),
        "C2M3 + refit": (CycleConsistent(), Refit(scores=True)),
    }
    for amount in AMOUNTS:
        for line, (method, recalibrate) in methods.items():
            merged = _merged(found, spec, [inputs[:amount]], method, recalibrate)
            yield Row("calibration", seed, line, str(amount), accuracy(found.model, merged, found.test))


def labels(seed: int) -> Iterator[Row]:
    """The last layer fitted to few labels on the server, after the plain mean and after C2M3; label skew."""
    found, spec = _trained(replace(SKEWED, seed=seed), whole=False)
    inputs = torch.cat(found.calibration)
    known = torch.from_numpy(found.data.train.labels[found.data.calibration_rows])
    for amount in AMOUNTS:
        data = [(inputs[:amount], known[:amount])]
        for line, method in (("plain mean + head", Mean()), ("C2M3 + head", CycleConsistent())):
            try:
                params = _merged(found, spec, data, method, FitHead())
            except CalibrationError:  # too few labels to predict held-out ones: the merge stays as it is
                params = _merged(found, spec, data, method, "none")
            yield Row("labels", seed, line, str(amount), accuracy(found.model, params, found.test))
        unlabelled = _merged(found, spec, [inputs[:amount]], CycleConsistent(), Refit(scores=True))
        yield Row("labels", seed, "C2M3 + refit, no labels", str(amount), accuracy(found.model, unlabelled, found.test))


def _merged(found: Trained, spec: PermutationSpec, data: Any, method: Method, recalibrate: Any) -> Params:
    options: dict[str, Any] = {"spec": spec, "calibration": data, "weights": found.weights}
    return merge(found.model, found.nodes, method=method, recalibrate=recalibrate, **options).state_dict


QUESTIONS: Mapping[str, Callable[[int], Iterator[Row]]] = {
    each.__name__: each for each in (ablation, foreign, corrupted, stability, tasks, decay, calibration, labels)
}


def main() -> None:
    """Measure, write, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", help=f"of {', '.join(QUESTIONS)}; all by default")
    parser.add_argument("--redraw", action="store_true", help="tables and picture of the record, measuring nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in () if options.redraw else options.questions or QUESTIONS:
        found = [asdict(row) for seed in SEEDS for row in QUESTIONS[name](seed)]
        earlier = read_record(RESULTS)["rows"] if RESULTS.is_file() else []
        rows = [row for row in earlier if row["question"] != name] + found
        settings = {
            "digits": asdict(DIGITS),
            "skewed": asdict(SKEWED),
            "mnist": asdict(MNIST),
            "cifar10": asdict(CIFAR10),
        }
        write_record(RESULTS, COMMAND, {"seeds": SEEDS, "settings": settings, "threads": 1}, rows)
        print(name, flush=True)
    rows = read_record(RESULTS)["rows"]
    draw(rows, RESULTS.with_suffix(".png"))
    print(tables(rows))


if __name__ == "__main__":
    main()
