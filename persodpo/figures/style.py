"""The look of every figure, the register of figures, and the one place that writes figures to disk.

In: tables. Out: figures, and ``<name>.pdf``, ``<name>.png`` and ``<name>.json``, repeatable byte for byte under the same
versions of matplotlib and its fonts.
"""

from __future__ import annotations

import functools
import importlib.metadata
import io
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib.style
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from persodpo.errors import NothingToShowError
from persodpo.files import sha256, write_atomically, write_json

STYLE = Path(__file__).with_name("persodpo.mplstyle")
#: Where names are written in characters that DejaVu Sans lacks; those that the machine has are used, in this order.
FALLBACK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Microsoft YaHei", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS", "Droid Sans Fallback", "Unifont",
)  # fmt: skip

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
LineStyle = str | tuple[int, tuple[int, ...]]
LINES: tuple[LineStyle, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)))
#: The two sides of a preference pair, in every figure.
CHOSEN, REJECTED = GREEN, VERMILLION

#: Where tables come from in a run whose ``evaluation.source`` this is; None: in any.
Source = Literal["published", "arms"] | None


class ModelStyle(NamedTuple):
    """How a model looks: label with its true size, hex colour, marker, line style, and hatch of a tuned one's bars."""

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


def _base(name: str) -> str:
    """Return the model of `MODEL_STYLES` that a name is, or is tuned from; an empty text if there is none."""
    return next((model for model in MODEL_STYLES if name.startswith(model)), "")


def model_styles(models: Iterable[str]) -> dict[str, ModelStyle]:
    """Give each distinct model its look, in the order of `MODEL_STYLES`, each before its tuned arms, all others at the end.

    A model of `MODEL_STYLES` always looks the same; an arm named after one, such as ``Qwen2-0.5B-Instruct/perso``, keeps
    its colour under a hatch. All others take the palette in turn.
    """
    styles: dict[str, ModelStyle] = {}
    slots, places = itertools.cycle(zip(PALETTE, MARKERS, LINES, strict=True)), [*MODEL_STYLES, ""]
    for name in sorted(set(models), key=lambda name: (places.index(_base(name)), name)):
        base = _base(name)
        if not base:
            styles[name] = ModelStyle(" ".join(name.split()), *next(slots))
        elif name == base:
            styles[name] = MODEL_STYLES[name]
        else:
            look, arm = MODEL_STYLES[base], name.removeprefix(base).strip("/-_ ").replace("_", " ")
            styles[name] = look._replace(label=f"{look.label} {' '.join(arm.split())}", hatch="////")
    return styles


def context() -> AbstractContextManager[None]:
    """Return a context in which matplotlib follows the project's style and nothing of the user's own settings."""
    installed = {font.name for font in fontManager.ttflist}
    fonts = {"font.family": ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)]}
    manager: AbstractContextManager[None] = matplotlib.style.context([STYLE, fonts], after_reset=True)
    return manager


class PaperFigure(Figure):
    """A figure that no global state of pyplot knows, and that a notebook shows all the same."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """Return the picture at print resolution, for which it is laid out, and its size on screen."""
        picture = io.BytesIO()
        with context():
            self.savefig(picture, format="png", dpi=300)
        return picture.getvalue(), {"width": round(self.get_figwidth() * SCREEN_DPI)}


def new_figure(height: float, width: float = COLUMN) -> Figure:
    """Return an empty figure; height and width (`COLUMN` or `DOUBLE`) in inches. Call it, and draw, in `context`."""
    return PaperFigure(figsize=(width, height))


def beside(axes: Axes, row: float, text: str, offset: float = 3, size: float = 6.5) -> None:
    """Write a text at a panel's right, in a row; its distance and size in points."""
    place = axes.get_yaxis_transform()
    axes.annotate(text, (1, row), (offset, 0), xycoords=place, textcoords="offset points", va="center", fontsize=size)


def slanted(axes: Axes, angle: float) -> None:
    """Slant the names of columns, so that each ends under its own."""
    axes.tick_params(axis="x", rotation=angle)
    for text in axes.get_xticklabels():
        text.set(ha="right", rotation_mode="anchor")


Draw = Callable[..., Figure]


class FigureSpec(NamedTuple):
    """A figure of a run.

    Attributes:
        draw: Draws it, given its tables in order.
        tables: Names of run tables. One with ``<arm>`` stands for those of all arms, and comes as a dictionary by arm; one
            that starts with ``published/`` is a file of published numbers.
        note: What it shows, in a sentence.
        source: The ``evaluation.source`` that it belongs to; None for any.
    """

    draw: Draw
    tables: tuple[str, ...]
    note: str
    source: Source


#: Every figure by name, in the order in which they are drawn.
FIGURES: dict[str, FigureSpec] = {}


def figure(
    name: str, tables: Sequence[str], note: str, source: Source = None, **options: Any
) -> Callable[[Draw], Draw]:
    """Enter a draw function into `FIGURES`, where it draws in the project's style, whatever settings it is called under.

    A figure is laid out once and for all, at print resolution, as the width of text depends on it: every rendering would
    move things a little, so that a figure shown in a notebook and then saved would differ from one saved at once. It raises
    NothingToShowError if one of its tables is empty.

    Args:
        name: Name of the figure and of its files.
        tables: As in `FigureSpec`, like ``note`` and ``source``.
        note: What it shows, in a sentence.
        source: Where it belongs.
        **options: Of the draw function, where several figures share it.
    """

    def register(draw: Draw) -> Draw:
        @functools.wraps(draw)
        def draw_in_style(*tables: Any) -> Figure:
            if any(table.empty for table in tables if isinstance(table, pd.DataFrame)):
                raise NothingToShowError(f"Figure {name} has nothing to show: a table that it is drawn from is empty.")
            with context():
                fig = draw(*tables, **options)
                screen = fig.get_dpi()
                fig.set_dpi(300)
                for _ in range(2):  # the second pass settles the first
                    fig.draw_without_rendering()
                fig.set_dpi(screen)
                fig.set_layout_engine("none")
                return fig

        FIGURES[name] = FigureSpec(draw_in_style, tuple(tables), note, source)
        return draw

    return register


def save(fig: Figure, name: str, folder: Path, inputs: Mapping[str, str], note: str) -> tuple[Path, ...]:
    """Write a figure as PDF and PNG (300 dpi), and what it was drawn from as JSON; return the three files.

    Each is written under a temporary name and renamed, the JSON last. ``inputs`` holds the sha256 of every table that the
    figure was drawn from, and of its code, by name.
    """
    pdf, png, record = (folder / f"{name}.{suffix}" for suffix in ("pdf", "png", "json"))
    # A date, and in the PNG a version, would make two runs differ; the JSON holds the versions.
    metadata = {
        pdf: {"CreationDate": None, "Title": name, "Creator": "persodpo"}, png: {"Software": None, "Title": name},
    }  # fmt: skip
    with context():
        for path, texts in metadata.items():
            write_atomically(path, functools.partial(fig.savefig, metadata=texts))
    content = {
        "figure": name, "note": note, "inputs": dict(sorted(inputs.items())),
        "files": {path.name: sha256(path) for path in metadata},
        "versions": {package: importlib.metadata.version(package) for package in ("matplotlib", "seaborn")},
    }  # fmt: skip
    write_json(record, content)
    return pdf, png, record
