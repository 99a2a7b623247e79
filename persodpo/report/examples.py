"""Held-out dialogues, their responses and scores in, a few dialogues with every model's answer side by side out."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from persodpo.evaluation.cells import TextTable, number
from persodpo.evaluation.observations import TEXT_METRICS
from persodpo.plots.metrics import metric_label, metric_order
from persodpo.report.contents import cell

EXAMPLES = 4


@dataclass(frozen=True)
class Example:
    """A dialogue and what each model answered.

    Attributes:
        dialogue_id: Its name.
        dataset: Where it comes from.
        personas: Sentences of the one who answers.
        context: Turns so far, one a line.
        reference: The answer of the dataset; None if there is none.
        answers: One column a model; its answer, the outcome and the scores.
    """

    dialogue_id: str
    dataset: str
    personas: tuple[str, ...]
    context: str
    reference: str | None
    answers: TextTable


def examples(dialogues: pd.DataFrame, responses: pd.DataFrame, scores: pd.DataFrame | None) -> list[Example]:
    """Choose dialogues that stand evenly spaced among the answered ones.

    Args:
        dialogues: Dialogues table.
        responses: Held-out responses.
        scores: Their scores; None if there are none.

    Returns:
        `EXAMPLES` dialogues, or as many as were answered.
    """
    answered = dialogues[dialogues["dialogue_id"].isin(responses["dialogue_id"])]
    places = sorted({number * len(answered) // EXAMPLES for number in range(EXAMPLES)}) if len(answered) else []
    models = tuple(responses["model"].unique())
    found = []
    for row in answered.iloc[places].to_dict("records"):
        own = responses[responses["dialogue_id"] == row["dialogue_id"]]
        if scores is not None:
            own = own.merge(scores, on=["dialogue_id", "model"], how="left")
        found.append(
            Example(
                row["dialogue_id"], cell(row["dataset"]), tuple(row["personas"] if row["personas"] is not None else ()),
                row["context"] or "", row["reference"] or None, _answers(own.set_index("model"), models),
            )
        )  # fmt: skip
    return found


def _answers(own: pd.DataFrame, models: tuple[str, ...]) -> TextTable:
    """Lay the answers to one dialogue out, one column a model."""
    metrics = sorted(set(TEXT_METRICS) & set(own.columns), key=metric_order)
    for metric in metrics:
        own[metric] = own[metric].map(lambda value: number(value, 3), na_action="ignore")
    columns = {model: own.loc[model] for model in models if model in own.index}
    wanted = {"response": "Answer", "outcome": "Outcome", "imputed": "Scores imputed"}
    wanted |= {metric: metric_label(metric) for metric in metrics}
    rows = tuple(
        (label, *(cell(columns[model][name]) if model in columns else "–" for model in models))
        for name, label in wanted.items()
        if name in own.columns
    )
    return TextTable("", ("", *models), rows, ())
