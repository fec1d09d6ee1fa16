"""The federations of `simulations.examples.language`, as a record and a table.

    python -m tests.benchmarks.language [--redraw]

prints the table of the symmetry page, losses on held-out texts after each round, and writes
``c2m3_fl/symmetry/results/language.json``; ``--redraw`` prints that file's table.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from c2m3_fl import symmetry
from tests.benchmarks.records import read_record, write_record

RESULTS = Path(symmetry.__file__).parent / "results" / "language.json"
COMMAND = "python -m tests.benchmarks.language"
NETWORKS = {"llama": "Llama, 1 layer", "bert with lora": "BERT, 2 layers, LoRA of rank 4"}


def table(losses: Mapping[str, Sequence[float]]) -> str:
    """Markdown: one line per network, one column per strategy."""

    def cell(name: str, strategy: str) -> str:
        return ", ".join(f"{value:.3f}".removeprefix("0") for value in losses[f"{name}, {strategy}"])

    lines = [f"| {title} | {cell(name, 'FedAvg')} | {cell(name, 'C2M3')} |" for name, title in NETWORKS.items()]
    return "\n".join(["| network | FedAvg | C2M3 |", "| --- | ---: | ---: |", *lines])


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description="Federations of tiny networks of the transformers library.")
    parser.add_argument("--redraw", action="store_true", help="print the table of the record and measure nothing")
    if not parser.parse_args().redraw:
        from simulations.examples import language  # needs transformers and peft

        torch.set_num_threads(1)
        configuration = {"rounds": 2, "clients": language.CLIENTS, "seeds": "1 + client", "threads": 1}
        write_record(RESULTS, COMMAND, configuration, language.main())
    print(table(read_record(RESULTS)["rows"]))


if __name__ == "__main__":
    main()
