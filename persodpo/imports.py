"""Which modules a module imports, and a digest of their source, so that a stage runs again when its code changes."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def imported_modules(module: str, within: str = "persodpo") -> frozenset[str]:
    """Return a module and every module below ``within`` that it imports, directly or not, at its top or in a function."""
    found, pending = set(), [module]
    while pending:
        name = pending.pop()
        if name not in found and _source(name) is not None:
            found.add(name)
            pending += [other for other in _imports(name) if other == within or other.startswith(f"{within}.")]
    return frozenset(found)


@functools.cache
def _imports(module: str) -> frozenset[str]:
    """Return the modules that a module's own source names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(_source(module) or "")):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if name.startswith("persodpo") and _source(name) is not None}
            names |= modules | ({node.module} if modules != inner else set())
    return frozenset(names)


@functools.cache
def code_of(module: str, within: str = "persodpo") -> str:
    """Return the sha256 of the source of `imported_modules`, so that changed code runs again."""
    digest = hashlib.sha256()
    for name in sorted(imported_modules(module, within)):
        digest.update(f"{name}\n{_source(name)}\n".encode())
    return digest.hexdigest()


@functools.cache
def _source(module: str) -> str | None:
    """Return a module's source; None for a name that is no module, or one that was typed into a notebook."""
    place = ROOT.joinpath(*module.split("."))
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if module.startswith("persodpo") and file.is_file():
            return file.read_text(encoding="utf-8")
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return None
