"""Optional dependencies: the error that says which extra brings what is missing."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from c2m3_fl.errors import MissingExtraError

Extra = Literal["cli", "simulation"]


def require(extra: Extra | None, *modules: str) -> None:
    """Check that modules which an extra installs can be found; none of them is imported.

    Parameters
    ----------
    extra : {"cli", "simulation"}, optional
        The extra; None for modules that are installed under their own names.
    *modules : str
        Top-level names.

    Raises
    ------
    MissingExtraError
        When a module is missing; the message names the pip command.

    Examples
    --------
    >>> require("cli", "json")
    >>> require("cli", "no_such_module")
    Traceback (most recent call last):
    c2m3_fl.errors.MissingExtraError: no_such_module is not installed; run: pip install 'c2m3-fl[cli]'
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        what = " ".join(missing) if extra is None else f"'c2m3-fl[{extra}]'"
        raise MissingExtraError(f"{', '.join(missing)} {verb} not installed; run: pip install {what}")
