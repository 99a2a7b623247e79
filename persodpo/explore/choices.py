"""Some of many, as boxes to tick: a list's keys are JupyterLab's own, which moves to another cell at an arrow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets
import traitlets


class Choices(widgets.GridBox):  # type: ignore[misc]
    """Boxes to tick, in columns, a list that scrolls where it is long.

    Attributes:
        options: All that can be chosen.
        value: What is chosen, in the order of ``options``.
    """

    value = traitlets.Tuple()

    def __init__(self, options: Sequence[str], value: Sequence[str]) -> None:
        """Offer options, some of them chosen."""
        columns = "repeat(auto-fill, minmax(380px, 1fr))"
        super().__init__(layout=widgets.Layout(grid_template_columns=columns, max_height="150px", overflow="auto"))
        self._filling = False
        self.offer(options, value)
        self.observe(self._show, names="value")

    def offer(self, options: Sequence[str], value: Sequence[str]) -> None:
        """Offer other options; ``value`` are those that are chosen."""
        self.options = tuple(options)
        boxes = [
            widgets.Checkbox(name in value, description=name, indent=False, layout=widgets.Layout(width="auto"))
            for name in options
        ]
        for box in boxes:
            box.observe(self._gather, names="value")
        self.children = boxes
        self._gather()

    def _gather(self, _: Any = None) -> None:
        """Say what is ticked."""
        if not self._filling:
            self.value = tuple(box.description for box in self.children if box.value)

    def _show(self, change: Any) -> None:
        """Tick what was chosen."""
        self._filling = True
        for box in self.children:
            box.value = box.description in change["new"]
        self._filling = False
