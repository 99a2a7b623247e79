"""What did each model answer here, and what became of it?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets
import pandas as pd

from persodpo.completions import OUTCOMES
from persodpo.explore.answers import dialogue_html
from persodpo.explore.finder import Finder
from persodpo.explore.panel import Panel, labelled, or_sentence, page
from persodpo.figures.style import ordered
from persodpo.runfolder import RunFolder

_ANY = "any"


class ResponsesPanel(Panel):
    """A search, two filters, and a menu of the dialogues that match."""

    def __init__(self, dialogues: pd.DataFrame, responses: pd.DataFrame, scores: pd.DataFrame) -> None:
        """Start with every dialogue that was answered; see `responses`."""
        joined = responses.merge(scores, on=["dialogue_id", "model"], how="left", validate="one_to_one")
        self._answers = joined.set_index("dialogue_id").sort_index(kind="stable")
        self._models = ordered(responses["model"])
        classes = [outcome for outcome in OUTCOMES if responses["outcome"].eq(outcome).any()]
        self._finder = Finder(dialogues, responses)
        self._model = labelled(widgets.Dropdown, "Model", options=[_ANY, *self._models])
        self._outcome = labelled(widgets.Dropdown, "Outcome class", options=[_ANY, *classes])
        filters = {"search": self._finder.search, "model": self._model, "outcome": self._outcome}
        super().__init__({**filters, "dialogue": self._finder.menu}, self._render)

    @property
    def matches(self) -> list[str]:
        """Dialogues that match, in the table's order."""
        return self._finder.matches

    def follow(self, change: Any) -> None:
        """Offer other dialogues after a changed search or filter."""
        if change["owner"] is self._finder.menu:
            return
        rows = self._answers
        if self._model.value != _ANY:
            rows = rows[rows["model"] == self._model.value]
        if self._outcome.value != _ANY:
            rows = rows[rows["outcome"] == self._outcome.value]
        self._finder.offer(set(rows.index))

    def _render(self) -> Sequence[Any]:
        dialogue = self._finder.dialogue
        if dialogue is None:
            return (page(self._finder.told),)
        places = {model: place for place, model in enumerate(self._models)}
        answers = self._answers.loc[[dialogue["dialogue_id"]]]
        answers = answers.sort_values("model", key=lambda names: names.map(places))
        return (page(self._finder.told + dialogue_html(dialogue, answers)),)


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
