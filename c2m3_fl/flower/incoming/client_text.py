"""Text that clients wrote, made fit for one line of a log."""

from __future__ import annotations

_LONGEST = 400  # characters of one message: names the thing, and leaves a log readable


def shown(text: object) -> str:
    r"""Text on one line, cut, with newlines, ANSI sequences, marks of direction and all else unprintable escaped.

    Examples
    --------
    >>> print(shown("no data\n[ROUND 2]"))
    no data\n[ROUND 2]
    """
    whole = str(text)
    line = "".join(each if each.isprintable() else _escaped(each) for each in whole[:_LONGEST])
    if len(whole) <= _LONGEST and len(line) <= _LONGEST:
        return line
    return f"{line[:_LONGEST]}… ({len(whole)} characters)"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
