"""The modules of the core stand one above the other."""

from __future__ import annotations

import ast
from pathlib import Path

import c2m3_fl.core

ROOM = Path(c2m3_fl.core.__file__).parent


def imports(module):
    """The modules of the core that one of them imports anywhere, for types only or not."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("c2m3_fl.core"):
            inside = node.module.removeprefix("c2m3_fl.core").lstrip(".")
            found |= {inside} if inside else {alias.name for alias in node.names}
    return found


def test_no_module_of_the_core_imports_itself_through_others():
    above = {path.stem: imports(path) for path in ROOM.glob("*.py") if path.stem != "__init__"}
    while above:  # take away, again and again, what imports nothing that is left
        free = {name for name, needs in above.items() if not needs & above.keys()}
        assert free, f"a circle among {sorted(above)}"
        above = {name: needs for name, needs in above.items() if name not in free}


def test_what_the_core_promises_is_there():
    for name in c2m3_fl.core.__all__:
        assert getattr(c2m3_fl.core, name).__doc__ or name == "Permutation"
