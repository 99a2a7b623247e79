"""Controls with labels above, ordinary pictures and tables below that follow them.

Pictures and tables are the cell's own output and not a widget's, so that a notebook that was executed without a browser,
and every page made of it, shows them as they were at first; in JupyterLab a move replaces them in place.
"""

from __future__ import annotations

import asyncio
import functools
import html
import io
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import ipywidgets as widgets
import numpy as np
import PIL.Image
from IPython.display import HTML, DisplayHandle, Image, display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from persodpo.errors import PersodpoError
from persodpo.figures.style import DOUBLE, SCREEN_DPI, context

P = ParamSpec("P")

#: Width of pictures, and the most that controls and tables take, in pixels.
WIDTH = round(DOUBLE * SCREEN_DPI)
_LABEL = {"description_width": "170px"}
#: The panel of each kind that looks at what changes outside of the notebook.
_LOOKING: dict[type, asyncio.Task[None]] = {}


class Panel:
    """A set of controls and what they show.

    Attributes:
        controls: The controls by name; setting a ``value`` moves one as a hand would.
        shown: Pictures and tables as they are now.
        message: What was wrong with the last move, empty if nothing was.
    """

    def __init__(
        self, controls: dict[str, Any], view: Callable[[], Sequence[Any]], rows: Sequence[Any] | None = None
    ) -> None:
        """Lay controls out, and show what they say.

        Args:
            controls: Widgets by name, in the order of the keyboard's tabulator.
            view: Called after each move; returns always the same number of pictures and tables.
            rows: The controls in rows; None for one a row.

        Raises:
            PersodpoError: From the first ``view``.
        """
        self.controls = controls
        self._view = view
        self._status = widgets.HTML()
        self._box = widgets.VBox(
            [*(rows or controls.values()), self._status], layout=widgets.Layout(max_width=f"{WIDTH}px")
        )
        self._following = False
        self.shown = tuple(view())
        self._handles = [DisplayHandle() for _ in self.shown]  # type: ignore[no-untyped-call]
        self._displayed = False
        for control in controls.values():
            if not isinstance(control, widgets.Button):
                control.observe(self.refresh, names="value")

    @property
    def message(self) -> str:
        """What was wrong with the last move."""
        return html.unescape(str(self._status.value))

    def follow(self, change: Any) -> None:
        """Move other controls after one was moved; what they say then is shown once."""

    def look(self) -> None:
        """Show what has changed outside of the notebook; called again and again where `watch` is on."""

    @property
    def watch(self) -> float:
        """Seconds between two looks, 0 for none."""
        return 0.0

    def refresh(self, change: Any = None) -> None:
        """Show what the controls say now; where that is impossible, say why and leave everything as it was."""
        if self._following:
            return
        if change is not None:
            self._following = True
            try:
                self.follow(change)
            finally:
                self._following = False
        try:
            self.shown = tuple(self._view())
        except PersodpoError as error:
            self._status.value = html.escape(str(error))
            return
        self._status.value = ""
        if self._displayed:
            for handle, item in zip(self._handles, self.shown, strict=True):
                handle.update(item)  # type: ignore[no-untyped-call]

    def _ipython_display_(self) -> None:
        """Show controls, pictures and tables in a notebook."""
        self._displayed = True
        display(self._box)  # type: ignore[no-untyped-call]
        for handle, item in zip(self._handles, self.shown, strict=True):
            handle.display(item)  # type: ignore[no-untyped-call]
        self._begin_to_look()

    def _begin_to_look(self) -> None:
        """Look from the kernel's own loop, between cells; a panel of this kind that was shown before looks no more."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # a plain Python process has none
            return
        before = _LOOKING.pop(type(self), None)
        if before is not None:
            before.cancel()
        if self.watch:
            _LOOKING[type(self)] = loop.create_task(self._look_on())

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(self.watch)
            try:
                self.look()
            except PersodpoError as error:
                self._status.value = html.escape(str(error))


class Sentence:
    """One sentence in the place of a panel.

    Attributes:
        text: What is missing, and how to get it.
    """

    def __init__(self, text: str) -> None:
        """Keep the sentence."""
        self.text = text

    def __repr__(self) -> str:
        """Return the sentence."""
        return self.text

    def _repr_html_(self) -> str:
        """Return the sentence for a notebook."""
        return f"<p>{html.escape(self.text)}</p>"


def or_sentence(door: Callable[P, Panel]) -> Callable[P, Panel | Sentence]:
    """Let a function that makes a panel say in a sentence what the run lacks, so that a notebook goes on."""

    @functools.wraps(door)
    def open_door(*args: P.args, **kwargs: P.kwargs) -> Panel | Sentence:
        try:
            return door(*args, **kwargs)
        except PersodpoError as error:
            return Sentence(str(error))

    return open_door


def labelled(kind: Callable[..., Any], description: str, width: str = "560px", **options: Any) -> Any:
    """Return a control with its label beside it, the label of one width for all; options are those of ``kind``."""
    return kind(description=description, style=_LABEL, layout=widgets.Layout(width=width), **options)


def page(text: str) -> HTML:
    """Return HTML as an output; whoever wrote it has escaped what models wrote."""
    return HTML(text)  # type: ignore[no-untyped-call]


def picture(figure: Figure, alternative: str) -> Image:
    """Return a figure as a picture of the width of the panel.

    Args:
        figure: The figure, `persodpo.figures.style.DOUBLE` wide.
        alternative: What it says, for those who cannot see it.
    """
    figure.set_dpi(SCREEN_DPI)
    canvas: Any = FigureCanvasAgg(figure)
    with context():
        canvas.draw()
    return encoded(canvas, alternative)


def printed(figure: Figure, alternative: str) -> Image:
    """Return a figure of the paper as it is printed, shown at the width of the panel: slow, and laid out to the pixel.

    Args:
        figure: The figure, `persodpo.figures.style.DOUBLE` wide.
        alternative: What it says, for those who cannot see it.
    """
    data = io.BytesIO()
    with context():
        figure.savefig(data, format="png", dpi=300)
    return Image(data.getvalue(), format="png", width=WIDTH, alt=alternative)  # type: ignore[no-untyped-call]


def encoded(canvas: Any, alternative: str) -> Image:
    """Return what is drawn on an Agg canvas as a picture."""
    data = io.BytesIO()
    drawn = PIL.Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    drawn.save(data, format="png", compress_level=1)
    return Image(data.getvalue(), format="png", width=drawn.width, alt=alternative)  # type: ignore[no-untyped-call]
