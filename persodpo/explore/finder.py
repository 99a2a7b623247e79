"""A text to find and a menu of the dialogues that hold it, for every panel that shows one dialogue."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import ipywidgets as widgets
import pandas as pd

from persodpo.explore.panel import labelled

#: Dialogues that a menu offers at a time.
OFFERED = 200
_TITLE = 70


class Finder:
    """Finds dialogues.

    Attributes:
        search: The text to find, in any case and spacing.
        menu: The dialogues that match; its value is the one that is shown, None where none matches.
        matches: All that match, in the table's order.
    """

    def __init__(self, dialogues: pd.DataFrame, responses: pd.DataFrame) -> None:
        """Offer every dialogue that was answered.

        Args:
            dialogues: Dialogues table.
            responses: Their responses; searched, too.
        """
        answered = dialogues[dialogues["dialogue_id"].isin(responses["dialogue_id"])]
        self._dialogues: dict[str, dict[str, Any]] = {
            str(row["dialogue_id"]): {str(name): value for name, value in row.items()}
            for row in answered.to_dict("records")
        }
        self._text = _searchable(self._dialogues, responses)
        self.search = labelled(
            widgets.Text, "Text to find", placeholder="in personas, context and answers", continuous_update=False
        )
        self.menu = labelled(widgets.Dropdown, "Dialogue", width="850px", options=[])
        self.matches: list[str] = []
        self.offer(self._dialogues)

    def offer(self, names: Collection[str]) -> None:
        """Fill the menu with those of ``names`` that hold the text; the dialogue that is shown stays, if it does."""
        wanted = _plain(self.search.value)
        allowed = set(names)
        self.matches = [name for name in self._dialogues if name in allowed and wanted in self._text[name]]
        before, offered = self.menu.value, self.matches[:OFFERED]
        self.menu.options = [(_title(self._dialogues[name]), name) for name in offered]
        self.menu.value = before if before in offered else next(iter(offered), None)

    @property
    def dialogue(self) -> dict[str, Any] | None:
        """The row of the dialogue that is shown."""
        return None if self.menu.value is None else self._dialogues[self.menu.value]

    @property
    def told(self) -> str:
        """How many match, as HTML."""
        if not self.matches:
            return "<p>No dialogue matches; shorten the text, or choose <em>any</em>.</p>"
        more = f", the first {OFFERED} in the menu" if len(self.matches) > OFFERED else ""
        return f"<p>{len(self.matches):,} of {len(self._dialogues):,} dialogues match{more}.</p>"


def _plain(text: str) -> str:
    """Return text in lower case, with single spaces."""
    return " ".join(text.casefold().split())


def _title(dialogue: dict[str, Any]) -> str:
    """Return a dialogue's name and its last turn, cut short for a menu."""
    last = next(reversed((dialogue["context"] or "").splitlines()), "")
    return f"{dialogue['dialogue_id']}: {last if len(last) <= _TITLE else last[:_TITLE] + '…'}"


def _searchable(dialogues: dict[str, dict[str, Any]], responses: pd.DataFrame) -> dict[str, str]:
    """Return all text of each dialogue."""
    texts = responses["completion"].fillna("") + " " + responses["response"].fillna("")
    answers = texts.groupby(responses["dialogue_id"]).agg(" ".join)
    return {
        name: _plain(f"{' '.join(row['personas'])} {row['context'] or ''} {answers[name]}")
        for name, row in dialogues.items()
    }
