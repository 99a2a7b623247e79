"""The look of every figure, and the one place that writes figures to disk.

In: a drawn figure and the sha256 of the tables it was drawn from. Out: ``<name>.pdf``, ``<name>.png`` and
``<name>.json``, repeatable byte for byte under the same versions of matplotlib and its fonts.
"""

from __future__ import annotations

import importlib.metadata
import io
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import ParamSpec

import matplotlib.style
from matplotlib.figure import Figure

from persodpo.plots.checks import plotted_sha256
from persodpo.runfolder import sha256, write_atomically, write_json

P = ParamSpec("P")

STYLE = Path(__file__).with_name("persodpo.mplstyle")

#: Width of one text column and of the whole text block, in inches.
COLUMN = 3.3
DOUBLE = 6.9

#: Points an inch on screen, in notebooks.
SCREEN_DPI = 130

#: The palette of Okabe and Ito; yellow is left out, as it vanishes on white.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
GREY = "#9A9A9A"
FAINT = "#D9D9D9"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)))
#: The two sides of a preference pair, in every figure.
CHOSEN, REJECTED = GREEN, VERMILLION

LineStyle = str | tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class ModelStyle:
    """How a model looks in every figure.

    Attributes:
        label: Short name for axes and legends, with the true size.
        colour: Hex colour.
        marker: Marker of points.
        line: Line style.
        hatch: Hatch of filled areas; empty for the models of `MODEL_ORDER`.
    """

    label: str
    colour: str
    marker: str
    line: LineStyle
    hatch: str = ""


#: Models whose responses are ranked: open ones by size, then those behind an API.
MODEL_STYLES: dict[str, ModelStyle] = {
    "Qwen2-0.5B-Instruct": ModelStyle("Qwen2-0.5B", SKY, "o", "-"),
    "Qwen2-7B-Instruct": ModelStyle("Qwen2-7B", BLUE, "s", "--"),
    "Mistral-7B-Instruct": ModelStyle("Mistral-7B", VERMILLION, "^", "-."),
    "Llama3-1-8B-Instruct": ModelStyle("Llama-3.1-8B", ORANGE, "D", ":"),
    "gpt-3.5-turbo": ModelStyle("GPT-3.5 Turbo", PURPLE, "v", LINES[4]),
    "gpt-4o-mini": ModelStyle("GPT-4o mini", GREEN, "P", LINES[5]),
    "gpt-4-turbo": ModelStyle("GPT-4 Turbo", BLACK, "X", LINES[6]),
}
MODEL_ORDER = tuple(MODEL_STYLES)

#: Tuned arms keep their base model's colour and are told apart by these.
HATCHES = ("////", "....", "\\\\\\\\", "xxxx", "////....", "oooo", "\\\\\\\\....")


def ordered(models: Iterable[str]) -> list[str]:
    """Return the distinct ``models`` in the order of `MODEL_ORDER`, each before its tuned arms, all others at the end."""

    def place(name: str) -> tuple[int, str]:
        base = _base(name)
        return (MODEL_ORDER.index(base) if base else len(MODEL_ORDER), name)

    return sorted(set(models), key=place)


def _base(name: str) -> str | None:
    """Return the known model that a name is, or is an arm of."""
    return next((known for known in MODEL_ORDER if name.startswith(known)), None)


def model_styles(models: Iterable[str], labels: Mapping[str, str] | None = None) -> dict[str, ModelStyle]:
    """Give each model its look.

    Models of `MODEL_ORDER` always look the same. Any other name takes its look from a checksum of the name, so that it
    too stays the same from figure to figure unless two of one figure collide; an arm named after a known model, such
    as ``Qwen2-0.5B-Instruct/perso``, keeps that model's colour under a hatch of its own.

    Args:
        models: Names of the models in one figure.
        labels: Labels that replace the short names.

    Returns:
        A style for each distinct model, in the order of `ordered`.
    """
    styles: dict[str, ModelStyle] = {}
    taken: set[int] = set()
    for name in ordered(models):
        style = MODEL_STYLES.get(name)
        if style is None:
            slot = _free_slot(name, taken)
            base = _base(name)
            style = ModelStyle(name, PALETTE[slot], MARKERS[slot], LINES[slot])
            if base:
                known, arm = MODEL_STYLES[base], name.removeprefix(base).strip("/-_ ").replace("_", " ")
                label = f"{known.label} {arm}"
                style = replace(style, label=label, colour=known.colour, hatch=HATCHES[slot])
        styles[name] = replace(style, label=(labels or {}).get(name, style.label))
    return styles


def _free_slot(name: str, taken: set[int]) -> int:
    """Return the slot of a name's checksum, or the next free one, and mark it taken."""
    start = zlib.crc32(name.encode()) % len(PALETTE)
    slots = [(start + step) % len(PALETTE) for step in range(len(PALETTE))]
    slot = next((slot for slot in slots if slot not in taken), start)
    taken.add(slot)
    return slot


def context() -> AbstractContextManager[None]:
    """Return a context in which matplotlib follows the project's style and nothing of the user's own settings."""
    manager: AbstractContextManager[None] = matplotlib.style.context(STYLE, after_reset=True)
    return manager


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Make a draw function follow the project's style, whatever settings it is called under, and lay its figure out."""

    @wraps(draw)
    def draw_in_style(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with context():
            figure = draw(*args, **kwargs)
            # Laid out once and for all: every rendering would move things a little, so that a figure shown in a
            # notebook and then saved would differ from one saved at once. Done at print resolution, as the width of
            # text depends on it; the second pass settles the first.
            screen = figure.get_dpi()
            figure.set_dpi(300)
            for _ in range(2):
                figure.draw_without_rendering()
            figure.set_dpi(screen)
            figure.set_layout_engine("none")
            return figure

    return draw_in_style


class PaperFigure(Figure):
    """A figure that no global state of pyplot knows, and that a notebook shows all the same."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """Return the picture a notebook shows: at print resolution, for which it is laid out, and its size on screen."""
        picture = io.BytesIO()
        with context():
            self.savefig(picture, format="png", dpi=300)
        return picture.getvalue(), {"width": round(self.get_figwidth() * SCREEN_DPI)}


def new_figure(height: float, width: float = COLUMN) -> Figure:
    """Return an empty figure.

    Args:
        height: Height in inches.
        width: Width in inches, `COLUMN` or `DOUBLE`.
    """
    return PaperFigure(figsize=(width, height))


def save(figure: Figure, name: str, folder: Path, *, inputs: Mapping[str, str], note: str = "") -> list[Path]:
    """Write a figure as PDF and PNG (300 dpi), and what it was drawn from as JSON.

    Args:
        figure: The figure.
        name: Base name of the files.
        folder: Their folder; it is created.
        inputs: sha256 of every table the figure was drawn from, by the table's name.
        note: One sentence for the reader of the JSON, such as the paper's figure it stands beside.

    Returns:
        The three files: PDF, PNG, JSON. Each is written under a temporary name and renamed, the JSON last.

    Raises:
        PersodpoError: The disk is full or the folder cannot be written.
    """
    digest = plotted_sha256(figure)
    pdf, png, record = (folder / f"{name}.{suffix}" for suffix in ("pdf", "png", "json"))
    # A date, and in the PNG a version, would make two runs differ; the JSON holds the versions.
    written: Sequence[tuple[Path, dict[str, str | None]]] = (
        (pdf, {"CreationDate": None, "Title": name, "Creator": "persodpo"}),
        (png, {"Software": None, "Title": name}),
    )
    with context():
        for path, metadata in written:
            write_atomically(path, partial(figure.savefig, metadata=metadata))
    content = {
        "figure": name, "note": note, "inputs": dict(sorted(inputs.items())), "plotted_sha256": digest,
        "files": {path.name: sha256(path) for path, _ in written},
        "versions": {package: importlib.metadata.version(package) for package in ("matplotlib", "seaborn")},
    }  # fmt: skip
    write_json(record, content)
    return [pdf, png, record]
