"""Which modules a module imports, and a digest of their source, so that a stage runs again when its code changes."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: An import of this package, at a module's top or in a function.
_IMPORT = re.compile(r"^\s*(?:from (persodpo[\w.]*) import ([\w ,]+|\([^)]*\))|import (persodpo[\w.]*))", re.MULTILINE)


@functools.cache
def imported_modules(module: str, within: str = "persodpo") -> frozenset[str]:
    """Return a module and every module below ``within`` that it imports, directly or not, at its top or in a function."""
    modules, pending = set(), [module]
    while pending:
        name = pending.pop()
        if name not in modules and _source(name) is not None:
            modules.add(name)
            pending += [other for other in _imports(name) if other == within or other.startswith(f"{within}.")]
    return frozenset(modules)


@functools.cache
def code_of(module: str, within: str = "persodpo") -> str:
    """Return the sha256 of the source of `imported_modules`, so that changed code runs again."""
    digest = hashlib.sha256()
    for name in sorted(imported_modules(module, within)):
        digest.update(f"{name}\n{_source(name)}\n".encode())
    return digest.hexdigest()


@functools.cache
def _imports(module: str) -> frozenset[str]:
    """Return the modules that a module's own source names: read, not parsed, which takes a second in every notebook."""
    modules: set[str] = set()
    for package, names, whole in _IMPORT.findall(_source(module) or ""):
        inner = {f"{package}.{name}" for name in re.findall(r"(\w+)(?: as \w+)?", names)} if package else {whole}
        below = {name for name in inner if _source(name) is not None}
        modules |= below | ({package} if package and below != inner else set())
    return frozenset(modules)


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
