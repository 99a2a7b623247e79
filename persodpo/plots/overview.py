"""The method in one picture, drawn by code: from dialogues to a tuned policy and back to figures.

In: nothing; the picture shows the method, not results. The bars and the histogram in it are ornaments without numbers.

Source: section 3 of the paper.
"""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle, Wedge
from matplotlib.path import Path

from persodpo.plots.style import (
    BLUE,
    CHOSEN,
    DOUBLE,
    FAINT,
    GREY,
    MODEL_STYLES,
    ORANGE,
    PURPLE,
    REJECTED,
    SKY,
    new_figure,
    styled,
)

_HEIGHT = 3.68
_BOX = (2.1, 1.64)
_GAP = 0.3
_INK = "#222222"
_EDGE = "#8A8A8A"
_CENTRED: dict[str, Any] = {"ha": "center", "va": "center_baseline"}

#: Heading and caption of each stage, in reading order.
STAGES = (
    ("Dialogues", "persona + context"),
    ("Responses", "many LLMs, one prompt"),
    ("Five signals", ""),
    ("Quality and pairs", "weighted, normalised sum"),
    ("Score-weighted DPO", "pairs weighted by their scores"),
    ("Evaluation", "held-out dialogues → figures"),
)


@styled
def draw() -> Figure:
    """Draw the method: six stages in two rows, joined by arrows.

    Returns:
        The figure, two columns wide, in inches as data units.
    """
    figure = new_figure(_HEIGHT, DOUBLE)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1), aspect="equal")
    axes.set(xlim=(0, DOUBLE), ylim=(0, _HEIGHT))
    axes.set_axis_off()
    icons = (_dialogues, _responses, _signals, _quality, _training, _evaluation)
    corners = [_corner(number) for number in range(len(STAGES))]
    for (heading, caption), corner, icon in zip(STAGES, corners, icons, strict=True):
        _stage(axes, heading, caption, corner)
        icon(axes, *corner)
    for number in (0, 1, 3, 4):
        _step(axes, corners[number])
    _turn(axes, corners[2], corners[3])
    return figure


def _corner(number: int) -> tuple[float, float]:
    """Return the lower left corner of a stage: three to a row, the first row on top."""
    row, column = divmod(number, 3)
    return column * (_BOX[0] + _GAP), (1 - row) * (_HEIGHT - _BOX[1])


def _stage(axes: Axes, heading: str, caption: str, corner: tuple[float, float]) -> None:
    """Draw a stage's frame, heading and caption."""
    x, y = corner
    axes.add_patch(_rounded((x + 0.02, y + 0.02), (_BOX[0] - 0.04, _BOX[1] - 0.04), "#F7F8FA", _EDGE, 0.08))
    top = y + _BOX[1] - 0.23
    axes.text(x + 0.15, top, heading, color=BLUE, fontsize=10, fontweight="bold", ha="left", va="center_baseline")
    axes.text(x + _BOX[0] / 2, y + 0.17, caption, color=_INK, fontsize=8.5, **_CENTRED)


def _rounded(
    corner: tuple[float, float], size: tuple[float, float], face: str, edge: str = "none", radius: float = 0.04
) -> FancyBboxPatch:
    """Return a box with round corners, by its lower left corner, width and height."""
    style = f"round,pad=0,rounding_size={radius}"
    return FancyBboxPatch(corner, *size, boxstyle=style, facecolor=face, edgecolor=edge, linewidth=0.8)


def _arrow(axes: Axes, path: Path, colour: str = _INK, width: float = 1.6) -> None:
    style = "-|>,head_length=4,head_width=2.4"
    look: dict[str, Any] = {"color": colour, "linewidth": width, "joinstyle": "miter", "capstyle": "butt", "zorder": 5}
    axes.add_patch(FancyArrowPatch(path=path, arrowstyle=style, **look))


def _step(axes: Axes, corner: tuple[float, float]) -> None:
    """Join a stage with the next one in its row."""
    x, y = corner[0] + _BOX[0], corner[1] + _BOX[1] / 2
    _arrow(axes, Path([(x + 0.02, y), (x + _GAP - 0.02, y)]))


def _turn(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Join the end of the first row with the start of the second, through the gap between the rows."""
    down, over, middle = start[0] + _BOX[0] / 2, end[0] + _BOX[0] / 2, _HEIGHT / 2
    _arrow(axes, Path([(down, start[1] + 0.02), (down, middle), (over, middle), (over, end[1] + _BOX[1])]))
    patch = {"facecolor": "white", "edgecolor": "none", "pad": 3}
    axes.text(DOUBLE / 2, middle, "no human annotation", fontsize=8.5, color=_INK, bbox=patch, zorder=6, **_CENTRED)


def _lines(axes: Axes, x: float, y: float, widths: tuple[float, ...], colour: str) -> None:
    """Draw lines of text that say nothing."""
    for number, width in enumerate(widths):
        axes.add_patch(_rounded((x, y - number * 0.085), (width, 0.035), colour, radius=0.015))


def _dialogues(axes: Axes, x: float, y: float) -> None:
    """Draw a persona beside two turns of a dialogue."""
    axes.add_patch(_rounded((x + 0.15, y + 0.34), (0.62, 0.85), "white", _EDGE))
    axes.add_patch(Circle((x + 0.46, y + 1.0), 0.085, facecolor=ORANGE, edgecolor="none"))
    axes.add_patch(Wedge((x + 0.46, y + 0.755), 0.155, 0, 180, facecolor=ORANGE, edgecolor="none"))
    _lines(axes, x + 0.24, y + 0.63, (0.44, 0.36, 0.4), GREY)
    for left, bottom, colour, tail in ((0.95, 0.84, SKY, 0.08), (1.1, 0.42, FAINT, 0.66)):
        axes.add_patch(_rounded((x + left, y + bottom), (0.85, 0.32), colour, radius=0.07))
        foot = np.array([[0, 0.02], [0.12, 0.02], [0.02 if tail < 0.3 else 0.1, -0.08]])
        foot += np.array([x + left + tail, y + bottom])
        axes.add_patch(Polygon(foot, facecolor=colour, edgecolor="none"))
        _lines(axes, x + left + 0.1, y + bottom + 0.185, (0.65, 0.45), "white" if colour == SKY else GREY)


def _responses(axes: Axes, x: float, y: float) -> None:
    """Draw the seven models and the answers they give, some of them cut off."""
    colours = [style.colour for style in MODEL_STYLES.values()]
    for label, models, top in (("open weights", colours[:4], 0.84), ("API", colours[4:], 0.42)):
        axes.text(x + 0.15, y + top + 0.25, label, fontsize=8, color=_INK, ha="left", va="center_baseline")
        for number, colour in enumerate(models):
            axes.add_patch(_rounded((x + 0.15 + 0.22 * number, y + top), (0.17, 0.17), colour))
    _arrow(axes, Path([(x + 1.1, y + 0.76), (x + 1.32, y + 0.76)]), GREY, 1.2)
    for number, (bottom, whole) in enumerate(((0.92, True), (0.63, False), (0.34, True))):
        axes.add_patch(_rounded((x + 1.38, y + bottom), (0.56, 0.25), "white", _EDGE))
        widths = (0.42, 0.34) if whole else (0.42,)
        _lines(axes, x + 1.45, y + bottom + 0.15, widths, colours[(0, 2, 5)[number]])
        if not whole:
            _lines(axes, x + 1.45, y + bottom + 0.065, (0.14,), REJECTED)


def _signals(axes: Axes, x: float, y: float) -> None:
    """Draw a bar for each signal."""
    names = ("coherence", "C score", "UE score", "persona distance", "compliance")
    for number, (name, width) in enumerate(zip(names, (0.62, 0.42, 0.2, 0.34, 0.52), strict=True)):
        middle = y + 1.16 - 0.23 * number
        axes.text(x + 0.15, middle, name, fontsize=8.5, color=_INK, ha="left", va="center_baseline")
        axes.add_patch(Rectangle((x + 1.28, middle - 0.055), 0.66, 0.11, facecolor=FAINT, edgecolor="none"))
        axes.add_patch(Rectangle((x + 1.28, middle - 0.055), width, 0.11, facecolor=BLUE, edgecolor="none"))


def _quality(axes: Axes, x: float, y: float) -> None:
    """Draw a distribution cut by two thresholds into rejected, unused and chosen."""
    heights = np.array([2, 4, 7, 5, 2, 2, 4, 6, 8, 7, 10, 9, 5, 3, 2]) / 10
    width, base = 0.115, y + 0.36
    for number, height in enumerate(heights):
        colour = REJECTED if number < 6 else FAINT if number < 9 else CHOSEN
        axes.add_patch(
            Rectangle((x + 0.19 + number * width, base), 0.1, 0.55 * height, facecolor=colour, edgecolor="none")
        )
    for number in (6, 9):
        place = x + 0.19 + number * width - 0.0075
        axes.plot([place, place], [base, base + 0.66], color=_INK, linewidth=1.0, linestyle=(0, (3, 2)))
    for place, name, colour in ((0.53, "rejected", REJECTED), (1.57, "chosen", CHOSEN)):
        axes.text(x + place, y + 1.09, name, fontsize=8.5, color=colour, fontweight="bold", **_CENTRED)


def _training(axes: Axes, x: float, y: float) -> None:
    """Draw a pair, heavier or lighter by its score margin, that moves the policy."""
    for bottom, colour, mark in ((0.83, CHOSEN, "chosen"), (0.42, REJECTED, "rejected")):
        axes.add_patch(_rounded((x + 0.15, y + bottom), (0.72, 0.3), "white", colour))
        axes.text(x + 0.51, y + bottom + 0.15, mark, fontsize=8.5, color=colour, **_CENTRED)
    _arrow(axes, Path([(x + 0.92, y + 0.77), (x + 1.2, y + 0.77)]), PURPLE, 2.6)
    axes.add_patch(_rounded((x + 1.28, y + 0.42), (0.67, 0.71), SKY, BLUE, 0.06))
    layers = [(1.41, 3), (1.615, 4), (1.82, 3)]
    nodes = [[(x + left, y + 0.86 + 0.13 * (n - (count - 1) / 2)) for n in range(count)] for left, count in layers]
    for near, far in pairwise(nodes):
        for a in near:
            for b in far:
                axes.plot(*zip(a, b, strict=True), color="white", linewidth=0.5, zorder=3)
    for node in chain(*nodes):
        axes.add_patch(Circle(node, 0.035, facecolor=BLUE, edgecolor="none", zorder=4))
    axes.text(x + 1.615, y + 0.515, "policy", fontsize=8.5, color=_INK, **_CENTRED)


def _evaluation(axes: Axes, x: float, y: float) -> None:
    """Draw a table and a figure."""
    axes.add_patch(_rounded((x + 0.15, y + 0.4), (0.8, 0.74), "white", _EDGE))
    for row in range(4):
        for column in range(3):
            colour = GREY if row == 0 or column == 0 else FAINT
            axes.add_patch(
                Rectangle((x + 0.22 + 0.235 * column, y + 0.97 - 0.165 * row), 0.19, 0.075, facecolor=colour)
            )
    axes.plot([x + 1.15, x + 1.15, x + 1.95], [y + 1.14, y + 0.42, y + 0.42], color=_INK, linewidth=1.0)
    steps = np.linspace(0, 1, 40)
    axes.plot(x + 1.19 + 0.72 * steps, y + 0.48 + 0.55 * np.exp(-4 * steps), color=BLUE, linewidth=1.6)
    axes.plot(
        x + 1.19 + 0.72 * steps, y + 1.06 - 0.45 * np.exp(-5 * steps), color=REJECTED, linewidth=1.6, linestyle="--"
    )
