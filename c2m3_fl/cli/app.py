"""Entry point of ``c2m3-fl``: one module of this package per command, imported when it is asked for."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import NoReturn

import click
import typer
from click.exceptions import NoArgsIsHelpError
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from c2m3_fl.errors import C2M3Error, ConfigError

_COMMANDS = {  # a command is the function of that name in the module of that name
    "barrier": "Draw loss and accuracy along the segment between two networks.",
    "compare": "Compare strategies on one simulated federation: table, JSON and picture.",
    "experiment": "Run an experiment of simulations/experiments, or the rest of it, and draw the results.",
    "inspect": "Show what may be permuted in a network, and what may not and why.",
    "landscape": "Draw the loss across the plane through three networks.",
    "merge": "Merge files of weights into one, with a report of what was done.",
}


_TRACEBACK = "C2M3_TRACEBACK"  # environment variable: an unexpected error shows its traceback
_LONGEST = 500  # characters of an unexpected error


def _module(command: str) -> ModuleType:
    """The module of a command; the experiments' commands import `simulations`, which is not in the wheel."""
    try:
        return import_module(f"c2m3_fl.cli.{command}")
    except ModuleNotFoundError as error:
        if error.name != "simulations":
            raise
        raise ConfigError(
            f"{command} needs a checkout of the repository: the installed package does not contain the simulations"
        ) from error


class _Command(TyperCommand):
    def get_help(self, ctx: click.Context) -> str:
        return super().get_help(ctx).replace(r"\[", "[")  # typer escapes brackets for rich, which does not print this


class _Commands(TyperGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        alone.command(cmd_name, cls=_Command)(getattr(_module(cmd_name), cmd_name))
        return typer.main.get_command(alone)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):  # from the list above, so that listing imports no command
            formatter.write_dl(list(_COMMANDS.items()))


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


@app.callback()
def _about() -> None:
    """Merge networks whose units are in different orders, and compare strategies in simulated federations."""


def main() -> None:
    """Run the command line; an error ends it with one line and status 1, or 2 for options that a command lacks."""
    try:
        status = app(standalone_mode=False)
    except NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "c2m3-fl"
        _fail(f"{error.format_message()} ({path} --help shows what there is)", error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except C2M3Error as error:
        _fail(str(error))
    except Exception as error:
        if os.environ.get(_TRACEBACK):
            raise
        _fail(f"{type(error).__name__}: {error}"[:_LONGEST] + f" ({_TRACEBACK}=1 shows where)")
    sys.exit(status if isinstance(status, int) else 0)  # 130 for Ctrl-C


def _fail(text: str, status: int = 1) -> NoReturn:
    message = Text.assemble(("error: ", "bold red"), " ".join(text.split()))
    Console(stderr=True).print(message, highlight=False, soft_wrap=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
