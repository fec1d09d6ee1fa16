"""The modules of the package and of the simulations stand one above the other, imports for types only included."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    files = [path.relative_to(ROOT) for room in ("c2m3_fl", "simulations") for path in (ROOT / room).rglob("*.py")]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): ROOT / path for path in files}


def imports(module: Path, known: dict[str, Path]) -> set[str]:
    """The modules among the known ones that a module imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & known.keys()) or {node.module}
    return found & known.keys()


def test_no_module_imports_itself_through_others() -> None:
    known = modules()
    above = {name: imports(path, known) - {name} for name, path in known.items()}
    while above:  # take away, again and again, what imports nothing that is left
        free = {name for name, needs in above.items() if not needs & above.keys()}
        assert free, f"a circle among {sorted(above)}"
        above = {name: needs for name, needs in above.items() if name not in free}


def test_no_file_is_longer_than_300_lines() -> None:
    long = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert not {name: lines for name, lines in long.items() if lines > 300}
