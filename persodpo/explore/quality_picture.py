"""The picture of `persodpo.explore.quality`: drawn once, then only its marks are drawn anew."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from IPython.display import Image
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from persodpo.explore.moving import Floats, Outcome, Pool
from persodpo.explore.panel import encoded
from persodpo.figures.style import (
    BLACK,
    BLUE,
    CHOSEN,
    DOUBLE,
    FAINT,
    GREY,
    REJECTED,
    SCREEN_DPI,
    context,
    model_styles,
    new_figure,
    styled,
)

BINS = 50


class QualityPicture:
    """Quality with both thresholds, pairs by their models, and the models' mean quality, side by side."""

    def __init__(self, pool: Pool, own: Outcome, highest: float) -> None:
        """Draw the profile's own setting.

        Args:
            pool: The responses.
            own: What the profile's setting gives; stands behind every other.
            highest: The highest quality there can be.
        """
        styles = model_styles(pool.models)
        self._order = [pool.models.index(model) for model in styles]
        self._labels = [style.label for style in styles.values()]
        self._own = own
        self._edges = np.linspace(0.0, highest, BINS + 1)
        figure = self._draw()
        figure.set_dpi(SCREEN_DPI)
        canvas: Any = FigureCanvasAgg(figure)
        self._canvas = canvas
        self._marks: list[Artist] = [
            self._now, *self._lines, self._heat, *itertools.chain(*self._cells), self._dots, *self._places,
        ]  # fmt: skip
        for mark in self._marks:
            mark.set_animated(True)
        with context():
            canvas.draw()
        self._ground = canvas.copy_from_bbox(figure.bbox)

    def png(self, outcome: Outcome) -> Image:
        """Move every mark to an outcome and return the picture."""
        self._move_quality(outcome)
        self._move_sources(outcome)
        self._move_means(outcome)
        best = self._labels[int(np.argmax(outcome.means[self._order]))]
        told = (
            f"Thresholds {outcome.low:.3f} and {outcome.high:.3f}, {outcome.pairs} pairs, highest mean quality {best}."
        )
        self._canvas.restore_region(self._ground)
        with context():
            for mark in self._marks:
                mark.draw(self._canvas.get_renderer())
        return encoded(self._canvas, told)

    @styled
    def _draw(self) -> Figure:
        figure = new_figure(2.9, DOUBLE)
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.0, 1.25, 1.0))
        self._draw_quality(left)
        self._draw_sources(middle)
        self._draw_means(right)
        return figure

    def _heights(self, outcome: Outcome) -> Floats:
        """Return the bars' heights; with 1 for the fullest, the axis holds for every setting and need not be drawn anew."""
        inside = np.clip(outcome.quality, self._edges[0], self._edges[-1])
        counts = np.histogram(inside, self._edges)[0]
        return np.asarray(counts / counts.max(), dtype=float)

    def _draw_quality(self, axes: Axes) -> None:
        axes.set_title("Quality")
        axes.set_xlabel("Quality, scored responses")
        axes.set_ylabel("Responses (fullest bin = 1)")
        own = self._heights(self._own)
        axes.stairs(own, self._edges, color=GREY, linewidth=0.8, label="profile")
        self._now = axes.stairs(own, self._edges, color=BLUE, fill=True, alpha=0.6, label="now")
        self._lines = [
            axes.axvline(value, 0, 1.1 / 1.7, color=colour, linestyle=line, label=label)
            for value, colour, line, label in (
                (self._own.low, REJECTED, "--", "rejected below"),
                (self._own.high, CHOSEN, "-", "chosen above"),
            )
        ]
        axes.set_xlim(self._edges[0], self._edges[-1])
        axes.set_ylim(0, 1.7)
        axes.set_yticks([0, 0.5, 1])
        axes.legend(loc="upper left", fontsize=6)

    def _move_quality(self, outcome: Outcome) -> None:
        self._now.set_data(self._heights(outcome))
        for line, value in zip(self._lines, (outcome.low, outcome.high), strict=True):
            line.set_xdata([value, value])

    def _draw_sources(self, axes: Axes) -> None:
        axes.set_title("Pairs by model")
        places = range(len(self._labels))
        self._heat = axes.imshow(np.zeros((len(places), len(places))), cmap="Blues", aspect="auto", vmin=0)
        self._cells: list[list[Text]] = [
            [axes.text(column, row, "0,000", ha="center", va="center", fontsize=5.5) for column in places]
            for row in places
        ]
        axes.set_xticks(places, self._labels, rotation=40, ha="right", rotation_mode="anchor", fontsize=6)
        axes.set_yticks(places, self._labels, fontsize=6)
        axes.tick_params(length=0)
        axes.set_xlabel("Rejected")
        axes.set_ylabel("Chosen")

    def _move_sources(self, outcome: Outcome) -> None:
        counts = outcome.sources[np.ix_(self._order, self._order)]
        top = max(int(counts.max()), 1)
        self._heat.set_data(counts)
        self._heat.set_clim(0, top)
        for row, texts in zip(counts, self._cells, strict=True):
            for count, text in zip(row, texts, strict=True):
                text.set_text(f"{count:,}" if count else "")
                text.set_color("white" if count > 0.6 * top else BLACK)

    def _draw_means(self, axes: Axes) -> None:
        axes.set_title("Mean quality and rank")
        places = list(range(len(self._labels)))
        own = self._own.means[self._order]
        axes.plot(own, places, "o", color=GREY, markerfacecolor="white", label="profile")
        (self._dots,) = axes.plot(own, places, "o", color=BLUE, markersize=4.5, label="now")
        axes.set_yticks(places, self._labels, fontsize=6)
        axes.set_ylim(len(places) - 0.5, -1.2)
        axes.set_xlim(self._edges[0], self._edges[-1])
        axes.grid(axis="y", color=FAINT)
        axes.set_xlabel("Mean quality; rank (profile's)")
        axes.legend(loc="upper left", fontsize=6, ncols=2)
        across = axes.get_yaxis_transform()
        self._places = [axes.text(1.0, row, "7 (7)", transform=across, va="center", fontsize=6) for row in places]

    def _move_means(self, outcome: Outcome) -> None:
        self._dots.set_xdata(outcome.means[self._order])
        now, own = outcome.ranks[self._order], self._own.ranks[self._order]
        for text, rank, before in zip(self._places, now, own, strict=True):
            text.set_text(f"{rank} ({before})")
            text.set_fontweight("bold" if rank != before else "normal")
