"""The server: runs the strategies of the run config, one after the other, and writes the results."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from c2m3_fl.errors import ConfigError
from simulations.comparison import run_comparison
from simulations.results import PROGRESS, RESULTS, Comparison, Round, append, save
from simulations.settings import OUTPUT, Settings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run; if the run-config key ``output`` is set, write progress and results to that folder."""
    settings = Settings.from_run_config(context.run_config)
    output = context.run_config.get(OUTPUT, "")
    if not isinstance(output, str):
        raise ConfigError(f"{OUTPUT} is {output!r}, expected a folder")
    folder = Path(output).expanduser() if output else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    def report(scored: Round) -> None:
        if folder is not None:
            append([scored], folder / PROGRESS)

    rounds = run_comparison(grid, settings, report)
    if folder is not None:
        save(Comparison(settings.to_run_config(), rounds), folder / RESULTS)
