"""What did each model answer here, and what became of it?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets
import pandas as pd

from persodpo.artifacts import RunFolder
from persodpo.completions import OUTCOMES
from persodpo.explore.answers import dialogue_html
from persodpo.explore.panel import Panel, labelled, or_sentence, page
from persodpo.plots.style import ordered

#: Dialogues that a menu offers at a time.
OFFERED = 200
_ANY = "any"
_TITLE = 70


class ResponsesPanel(Panel):
    """A search, two filters, and a menu of the dialogues that match.

    Attributes:
        matches: Dialogues that match, in the table's order.
    """

    def __init__(self, dialogues: pd.DataFrame, responses: pd.DataFrame, scores: pd.DataFrame) -> None:
        """Start with every dialogue that was answered; see `responses`."""
        joined = responses.merge(scores, on=["dialogue_id", "model"], how="left", validate="one_to_one")
        self._answers = joined.set_index("dialogue_id").sort_index(kind="stable")
        answered = dialogues[dialogues["dialogue_id"].isin(self._answers.index)]
        self._dialogues: dict[str, dict[str, Any]] = {
            str(row["dialogue_id"]): {str(name): value for name, value in row.items()}
            for row in answered.to_dict("records")
        }
        self._titles = {name: _title(name, row["context"]) for name, row in self._dialogues.items()}
        self._text = _searchable(answered, responses)
        self._models = ordered(responses["model"])
        classes = [outcome for outcome in OUTCOMES if responses["outcome"].eq(outcome).any()]
        self._search = labelled(
            widgets.Text, "Text to find", placeholder="in personas, context and answers", continuous_update=False
        )
        self._model = labelled(widgets.Dropdown, "Model", options=[_ANY, *self._models])
        self._outcome = labelled(widgets.Dropdown, "Outcome class", options=[_ANY, *classes])
        self._menu = labelled(widgets.Dropdown, "Dialogue", width="850px", options=[])
        self._moving = False
        self.matches: list[str] = []
        self._offer()
        controls = {"search": self._search, "model": self._model, "outcome": self._outcome, "dialogue": self._menu}
        super().__init__(controls, self._render)

    def refresh(self, change: Any = None) -> None:
        """Follow a control; a changed search or filter offers other dialogues."""
        if self._moving:
            return
        if change and change["owner"] is not self._menu:
            self._offer()
        super().refresh(change)

    def _offer(self) -> None:
        """Fill the menu with what matches; the dialogue that is shown stays, if it does."""
        self.matches = self._find()
        before = self._menu.value
        offered = self.matches[:OFFERED]
        self._moving = True
        try:
            self._menu.options = [(self._titles[name], name) for name in offered]
            self._menu.value = before if before in offered else next(iter(offered), None)
        finally:
            self._moving = False

    def _find(self) -> list[str]:
        wanted = " ".join(self._search.value.casefold().split())
        rows = self._answers
        if self._model.value != _ANY:
            rows = rows[rows["model"] == self._model.value]
        if self._outcome.value != _ANY:
            rows = rows[rows["outcome"] == self._outcome.value]
        names = set(rows.index)
        return [name for name in self._dialogues if name in names and wanted in self._text[name]]

    def _render(self) -> Sequence[Any]:
        if self._menu.value is None:
            return (page("<p>No dialogue matches; shorten the text, or choose <em>any</em>.</p>"),)
        more = f", the first {OFFERED} in the menu" if len(self.matches) > OFFERED else ""
        count = f"<p>{len(self.matches):,} of {len(self._dialogues):,} dialogues match{more}.</p>"
        answers = self._answers.loc[[self._menu.value]]
        places = {model: place for place, model in enumerate(self._models)}
        answers = answers.sort_values("model", key=lambda names: names.map(places))
        return (page(count + dialogue_html(self._dialogues[self._menu.value], answers)),)


def _title(name: str, context: str | None) -> str:
    """Return a dialogue's name and its last turn, cut short for a menu."""
    last = next(reversed((context or "").splitlines()), "")
    return f"{name}: {last if len(last) <= _TITLE else last[:_TITLE] + '…'}"


def _searchable(dialogues: pd.DataFrame, responses: pd.DataFrame) -> dict[str, str]:
    """Return all text of each dialogue in lower case, with single spaces."""
    texts = responses["completion"].fillna("") + " " + responses["response"].fillna("")
    answers = texts.groupby(responses["dialogue_id"]).agg(" ".join)
    rows = zip(dialogues["dialogue_id"], dialogues["personas"], dialogues["context"], strict=True)
    return {
        name: " ".join(f"{' '.join(personas)} {context or ''} {answers[name]}".casefold().split())
        for name, personas, context in rows
    }


@or_sentence
def responses(run: RunFolder) -> Panel:
    """Pick a dialogue by its text, a model or an outcome class, and see all answers side by side with their scores.

    Persona words are set off, and what keeps a completion from being JSON is marked. Model text is never run.

    Args:
        run: A run with dialogues, responses and scores.

    Returns:
        The panel, with the controls ``search``, ``model``, ``outcome`` and ``dialogue``; a sentence if a table is missing.
    """
    dialogues, answers, scores = (run.read(name) for name in ("dialogues", "responses", "scores"))
    return ResponsesPanel(dialogues, answers, scores)
