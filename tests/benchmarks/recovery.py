"""Recovery of random permutations: the smallest torchvision member of every family and permuted copies of it.

    python -m tests.benchmarks.recovery [NETWORK ...] [--seeds 20] [--start auto]

prints a markdown table and writes ``results/recovery.json``. A seed draws the weights of the network (torchvision's own
initialisation; a weight that it sets to zero is drawn too) and the permutation of its copy. A copy is recovered when
the agreement found is that of the identity alignment, a network's with itself, to 1e-5; its outputs are then compared
with those of the average of both.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

from c2m3_fl.cli.files import build_classifier
from c2m3_fl.cli.zoo import example_image
from c2m3_fl.core.averaging import weighted_mean
from c2m3_fl.core.match import match
from c2m3_fl.core.permutation import apply, random
from c2m3_fl.core.spec import PermutationSpec
from c2m3_fl.core.starts import StartName
from c2m3_fl.symmetry.discover import permutation_spec
from tests.symmetry.families import ZOO

RESULTS = Path("results") / "recovery.json"
RECOVERED = 1 - 1e-5  # of the agreement of a network with itself


@dataclass(frozen=True)
class Row:
    """One copy: what share of the whole agreement was found, how the outputs differ, seconds of the match."""

    network: str
    seed: int
    share: float
    difference: float
    seconds: float

    @property
    def recovered(self) -> bool:
        """Whether the copy was brought back."""
        return self.share >= RECOVERED


def recover(network: nn.Module, spec: PermutationSpec, image: torch.Tensor, seed: int, start: StartName) -> Row:
    """Match a network with a permuted copy, and compare it with the average of both, in the network's own order."""
    params = {name: value.detach().clone() for name, value in network.state_dict().items()}
    copy = apply(spec, random(spec, torch.Generator().manual_seed(seed)), params)
    begin = time.process_time()
    found = match(spec, [params, copy], start=start)
    seconds = time.process_time() - begin
    whole = sum(float(params[n].double().square().sum()) for n, tensor in spec.tensors.items() if not tensor.buffer)
    back = apply(spec, found.between(0, 1), copy)
    with torch.inference_mode():
        expected = network(image)
        merged = functional_call(network, weighted_mean([params, back], None), image)
    difference = float((merged - expected).abs().max() / expected.abs().max())
    return Row(type(network).__name__, seed, 4 * found.objectives[-1] / whole, difference, seconds)


def rows(name: str, seeds: int, start: StartName) -> Iterator[Row]:
    """Every seed of one network; it is traced once."""
    image, spec = example_image(name), None
    for seed in range(seeds):
        torch.manual_seed(seed)
        network = build_classifier(name).eval()
        for weight in network.parameters():
            if weight.ndim > 1 and not weight.any():  # a head of zeros, as ViT's, would make all outputs alike
                nn.init.normal_(weight, std=0.02)
        spec = spec or permutation_spec(network, image)
        yield Row(**{**asdict(recover(network, spec, image, seed, start)), "network": name})


def table(found: list[Row]) -> str:
    """Markdown: one line per network."""
    lines = ["| network | recovered | smallest share | largest change of outputs | seconds |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for name in dict.fromkeys(row.network for row in found):
        own = [row for row in found if row.network == name]
        changes = [row.difference for row in own if row.recovered]
        lines.append(
            f"| {name} | {sum(row.recovered for row in own)} of {len(own)} | {min(row.share for row in own):.6f} "
            f"| {max(changes, default=float('nan')):.0e} | {sum(row.seconds for row in own) / len(own):.1f} |"
        )
    return "\n".join([*lines, f"\nrecovered: {sum(row.recovered for row in found)} of {len(found)}"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Recovery of random permutations of torchvision's classifiers.")
    parser.add_argument("networks", nargs="*", help="torchvision classifiers; the smallest of every family by default")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--start", default="auto", help="where the search starts; see match")
    arguments = parser.parse_args()
    found: list[Row] = []
    RESULTS.parent.mkdir(exist_ok=True)
    for name in arguments.networks or ZOO:
        found += rows(name, arguments.seeds, arguments.start)
        RESULTS.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
        print(table([row for row in found if row.network == name]).splitlines()[2], flush=True)
    print("\n" + table(found))


if __name__ == "__main__":
    main()
