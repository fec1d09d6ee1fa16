"""The quickstart with every strategy, through ``flwr run``: ``python -m simulations.examples.quickstart_runs``.

Prints a table and writes ``simulations/results/quickstart.json``; a run that the file already holds is not repeated.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from itertools import product
from pathlib import Path

from simulations.engine import FlowerEngine, flower_engine
from simulations.ledger import now, surroundings
from simulations.settings import Value

APP = Path(__file__).parent / "quickstart"
RESULTS = Path(__file__).parents[1] / "results" / "quickstart.json"
STRATEGIES = ("fedavg", "c2m3", "c2m3-head", "c2m3-refit")
CLIENTS = 10


def run(engine: FlowerEngine, **overrides: Value) -> dict[str, dict[str, float]]:
    """Loss and accuracy on the test images after every round of one run."""
    output = engine.home / "quickstart.json"
    output.unlink(missing_ok=True)
    config = {name.replace("_", "-"): value for name, value in overrides.items()}
    engine.run_app(APP, {**config, "output": str(output)}, CLIENTS, lambda: None)
    rounds: dict[str, dict[str, float]] = json.loads(output.read_text())["rounds"]
    return rounds


def main() -> None:
    """Run the missing configurations, save after each, and print accuracy and loss of the last round."""
    parser = argparse.ArgumentParser(description="The quickstart with every strategy.")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.01])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    defaults = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    RESULTS.parent.mkdir(exist_ok=True)
    print("| learning rate | seed | strategy | accuracy | loss |\n| --- | --- | --- | ---: | ---: |", flush=True)
    with flower_engine() as engine:
        for rate, seed, strategy in product(asked.rates, asked.seeds, STRATEGIES):
            overrides = {"strategy": strategy, "learning_rate": rate, "seed": seed, "num_server_rounds": asked.rounds}
            config = {**defaults, **{name.replace("_", "-"): value for name, value in overrides.items()}}
            found = next((each for each in runs if each["config"] == config), None)
            if found is None:
                found = {"config": config, "clients": CLIENTS, "date": now(), "rounds": run(engine, **overrides)}
                runs.append(found)
                RESULTS.write_text(json.dumps({**surroundings(), "runs": runs}, indent=1))
            last = found["rounds"][str(asked.rounds)]
            print(f"| {rate} | {seed} | {strategy} | {last['accuracy']:.3f} | {last['loss']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
