"""Figure files and their JSON in, pictures that a page holds in itself out."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persodpo.artifacts import RunFolder, read_json, sha256
from persodpo.figures import FIGURES
from persodpo.plots.style import SCREEN_DPI

#: Resolution of the PNG files.
_PRINT_DPI = 300
_PNG_START = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A figure as a page shows it.

    Attributes:
        name: The figure's name.
        note: What it stands for.
        source: Its PNG as a data URI.
        width: Width on screen, pixels.
        height: Height on screen, pixels.
    """

    name: str
    note: str
    source: str
    width: int
    height: int


def pictures(run: RunFolder, digests: Mapping[str, str]) -> tuple[list[Picture], list[str]]:
    """Read the figures of a run.

    Args:
        run: The run folder; figures lie in ``run.figures``.
        digests: sha256 of the run's tables, by name.

    Returns:
        The figures that were drawn from these tables, in the order of `persodpo.figures.FIGURES`, and the names of the
        others: drawn from tables that this run lacks or has made anew since, or changed after they were drawn.
    """
    order = list(FIGURES)
    records = {path.stem: path for path in sorted(run.figures.glob("*.json"))}
    names = sorted(records, key=lambda name: (order.index(name) if name in order else len(order), name))
    found = {name: _picture(name, records[name], digests) for name in names}
    return [one for one in found.values() if one], [name for name, one in found.items() if not one]


def _picture(name: str, record: Path, digests: Mapping[str, str]) -> Picture | None:
    content, file = read_json(record), record.with_suffix(".png")
    if not (_is_of(content, digests) and file.is_file() and content.get("files", {}).get(file.name) == sha256(file)):
        return None
    data = file.read_bytes()
    if not data.startswith(_PNG_START):
        return None
    width, height = (round(size * SCREEN_DPI / _PRINT_DPI) for size in struct.unpack(">II", data[16:24]))
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return Picture(name, str(content.get("note") or name.replace("_", " ")), source, width, height)


def _is_of(content: Mapping[str, Any], digests: Mapping[str, str]) -> bool:
    """Tell whether a figure was drawn from the run's tables; published numbers and code are no tables of a run."""
    tables = {name: value for name, value in content.get("inputs", {}).items() if not name.startswith("published/")}
    return all(digests.get(name) == value for name, value in tables.items() if name != "code")
