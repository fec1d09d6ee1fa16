"""What the core promises is there; `tests/test_floors.py` holds its modules one above the other."""

from __future__ import annotations

import c2m3_fl.core


def test_what_the_core_promises_is_there():
    for name in c2m3_fl.core.__all__:
        assert getattr(c2m3_fl.core, name).__doc__ or name == "Permutation"
