"""What does every arm answer here, and is what one dialogue suggests true of all?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from persodpo.evaluation.cells import number, p_text
from persodpo.evaluation.observations import EVERY, IMPUTED, SUCCESSES, observe
from persodpo.explore.answers import dialogue_html
from persodpo.explore.finder import Finder
from persodpo.explore.panel import Panel, labelled, or_sentence, page, printed
from persodpo.figures.forest import forest, forest_successes, short_names
from persodpo.metrics import metric_label, metric_order
from persodpo.runfolder import RunFolder
from persodpo.show import text_table
from persodpo.stages.heldout import arms_of

_FIRST, _ALL = "the first", "all"


class ArmsPanel(Panel):
    """A held-out dialogue, and the comparisons of the whole run."""

    def __init__(
        self,
        dialogues: pd.DataFrame,
        responses: pd.DataFrame,
        scores: pd.DataFrame,
        comparisons: pd.DataFrame,
        arms: pd.DataFrame | None,
    ) -> None:
        """Start with the first held-out dialogue and quality; see `arms` for the last two tables."""
        self._comparisons, self._names = comparisons, short_names(comparisons)
        joined = responses.merge(scores, on=["dialogue_id", "model"], how="left", validate="one_to_one")
        self._answers = joined.set_index("dialogue_id").sort_index(kind="stable")
        self._own = _by_dialogue(observe(responses, scores, arms))
        self._pictures: dict[str, Any] = {}
        self._finder = Finder(dialogues, responses)
        found = sorted(comparisons.loc[comparisons["difference"].notna(), "metric"].unique(), key=metric_order)
        self._metric = labelled(widgets.Dropdown, "Metric", options=[(metric_label(name), name) for name in found])
        readings = [name for name in (IMPUTED, SUCCESSES) if comparisons["reading"].eq(name).any()]
        self._reading = labelled(widgets.Dropdown, "Failures count", options=readings)
        several = responses["model"].str.contains("@").any()
        self._seeds = labelled(widgets.Dropdown, "Trainings shown", options=[_FIRST, _ALL] if several else [_FIRST])
        controls = {
            "search": self._finder.search, "dialogue": self._finder.menu, "seeds": self._seeds, "metric": self._metric,
            "reading": self._reading,
        }  # fmt: skip
        super().__init__(controls, self._render)

    def follow(self, change: Any) -> None:
        """Offer other dialogues after a changed search."""
        if change["owner"] is self._finder.search:
            self._finder.offer(set(self._answers.index))

    def _render(self) -> Sequence[Any]:
        reading = self._reading.value
        if reading not in self._pictures:
            figure = (forest_successes if reading == SUCCESSES else forest)(self._comparisons)
            self._pictures[reading] = printed(figure, f"Paired differences between arms with intervals, {reading}.")
        return page(self._answered()), text_table(self._differences()), self._pictures[reading]

    def _answered(self) -> str:
        dialogue = self._finder.dialogue
        if dialogue is None:
            return self._finder.told
        answers = self._answers.loc[[dialogue["dialogue_id"]]]
        if self._seeds.value == _FIRST:
            answers = answers[~answers["model"].str.contains("@")]
        return self._finder.told + dialogue_html(dialogue, answers)

    def _differences(self) -> pd.DataFrame:
        """Set the difference in this dialogue beside that of all."""
        metric, readings = self._metric.value, (self._reading.value, EVERY)
        table = self._comparisons
        table = table[(table["metric"] == metric) & table["reading"].isin(readings)]
        rows = [
            {
                "difference": f"{self._names[row['arm']]} − {self._names[row['baseline']]}",
                "here": _text(self._here(row["arm"], row["baseline"])),
                "all dialogues": f"{_text(row['difference'])} [{_text(row['low'])}, {_text(row['high'])}]",
                "p (Holm)": "–" if pd.isna(row["p_holm"]) else p_text(row["p_holm"]),
                "dialogues": f"{int(row['dialogues']):,}",
            }
            for row in table.to_dict("records")
        ]
        name = f"{metric_label(metric)}, {table['reading'].iloc[0]}"
        return pd.DataFrame(rows).set_index("difference").rename_axis(name)

    def _here(self, arm: str, baseline: str) -> float:
        """Return the difference in the dialogue that is shown, NaN where it does not count."""
        dialogue, metric = self._finder.dialogue, self._metric.value
        if dialogue is None:
            return float("nan")
        own = self._own.loc[dialogue["dialogue_id"]]
        if not {arm, baseline} <= set(own.index):
            return float("nan")
        sides = [own.loc[[name]].set_index("seed") for name in (arm, baseline)]
        if self._reading.value == SUCCESSES and metric != "failure_ratio":
            sides = [side.where(side["failure_ratio"] == 0) for side in sides]
        left, right = (side[metric].astype(float) for side in sides)
        if not left.index.equals(right.index):  # other seeds: each with each
            crossed = _crossed(left, right)
            return float(crossed.mean()) if crossed.size else float("nan")
        return float((left - right).mean())


def _crossed(left: pd.Series[float], right: pd.Series[float]) -> NDArray[np.float64]:
    """Return the known differences of each value and each other one."""
    differences = np.subtract.outer(left.to_numpy(), right.to_numpy()).ravel()
    return np.asarray(differences[~np.isnan(differences)], dtype=float)


def _by_dialogue(observations: pd.DataFrame) -> pd.DataFrame:
    """Return observations by dialogue and arm, a row a seed."""
    values = observations.assign(failure_ratio=observations["failed"].astype(float))
    return values.sort_values("seed").set_index(["dialogue_id", "arm"]).sort_index(kind="stable")


def _text(value: float) -> str:
    return "–" if pd.isna(value) else number(value, 3)


@or_sentence
def arms(run: RunFolder) -> Panel:
    """See every arm's answer to one held-out dialogue, and how the arms differ over all of them.

    Args:
        run: A run that was evaluated; its dialogues, held-out responses and scores, and comparisons are read.

    Returns:
        The panel, with the controls ``search``, ``dialogue``, ``seeds``, ``metric`` and ``reading``; a sentence if a
        table is missing.
    """
    comparisons = run.read("evaluation/comparisons")
    dialogues, answers, scores = (run.read(name) for name in ("dialogues", "evaluation/responses", "evaluation/scores"))
    trained = arms_of(run.profile) if run.profile.evaluation.source == "arms" else None
    return ArmsPanel(dialogues, answers, scores, comparisons, trained)
