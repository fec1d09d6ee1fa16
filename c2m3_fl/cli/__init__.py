"""The command line, ``c2m3-fl``: parse, call, draw."""

from __future__ import annotations

import sys

from c2m3_fl.errors import MissingExtraError
from c2m3_fl.extras import require


def main() -> None:
    """Run the command line; without the extra "cli", exit with status 1 and the pip command that installs it."""
    try:
        require("cli", "matplotlib", "PIL", "rich", "torchvision", "typer")
    except MissingExtraError as error:
        sys.exit(f"error: {error}")
    from c2m3_fl.cli.app import main as run

    run()
