"""Four panels over the tables of a run: its responses, its quality score, the training of its arms, their held-out answers.

A panel is ipywidgets' own controls and, below them, what `interactive_output` shows of their values. Where nobody can move
a control (papermill, nbconvert) it is the first state alone, as ordinary tables and pictures. Nothing is written.
"""

from __future__ import annotations

import functools
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import polars as pl
from IPython import get_ipython
from IPython.display import HTML, Image, display
from matplotlib.figure import Figure

from persodpo import explore_views as views
from persodpo import method
from persodpo.config import Weights
from persodpo.errors import PersodpoError
from persodpo.gate import FEATURES, label_accuracy
from persodpo.pairs import answers_of, effective_weights, prompt_table, scale_of
from persodpo.release.published import training_curves
from persodpo.runfolder import RunFolder

Shown = Sequence[str | Figure]

ANY, SHARE = "any", "share of the training"
#: Dialogues that a menu offers at a time.
OFFERED = 200
#: The paper's own run among the published curves.
PAPER_RUN = "FoCus-perso-DPO"
_GRID = {"grid_template_columns": "repeat(auto-fill, minmax(280px, 1fr))", "max_width": "900px"}


@dataclass(frozen=True)
class Panel:
    """Controls, and what they show.

    Attributes:
        controls: The controls whose values are shown, by name.
        view: Takes their values by name; returns HTML, and figures.
        finders: Further controls, which only change what ``controls`` offer.
    """

    controls: Mapping[str, Any]
    view: Callable[..., Shown]
    finders: Mapping[str, Any] = field(default_factory=dict)

    def shown(self) -> Shown:
        """Return what the controls show now; where their values cannot be, the sentence that says so."""
        try:
            return self.view(**{name: control.value for name, control in self.controls.items()})
        except PersodpoError as error:
            return [f"<p>{html.escape(str(error))}</p>"]

    def _ipython_display_(self) -> None:
        if _is_headless():
            for part in self.shown():
                display(HTML(part) if isinstance(part, str) else Image(views.png(part)))  # type: ignore[no-untyped-call]
            return

        def show(**_: Any) -> None:
            parts = [part if isinstance(part, str) else views.svg(part) for part in self.shown()]
            display(HTML(f'<div class="persodpo-view">{"".join(parts)}</div>'))  # type: ignore[no-untyped-call]

        controls = widgets.GridBox([*self.finders.values(), *self.controls.values()], layout=_GRID)
        display(widgets.VBox([controls, widgets.interactive_output(show, self.controls)]))  # type: ignore[no-untyped-call]


def _is_headless() -> bool:
    """Tell whether a program runs the cells: those of nbclient come without standard input, those of a person with it."""
    parent: dict[str, Any] = getattr(get_ipython(), "get_parent", dict)()
    return not parent.get("content", {}).get("allow_stdin", False)


def _control(kind: Callable[..., Any], name: str, **options: Any) -> Any:
    """Return a control of one kind with its label, as wide as its column."""
    style, layout = {"description_width": "125px"}, {"width": "auto"} | options.pop("layout", {})
    return kind(description=name.replace("_", " "), style=style, layout=layout, **options)


def _or_sentence(panel: Callable[[RunFolder], Panel]) -> Callable[[RunFolder], Panel | HTML]:
    """Let a panel whose tables are missing be the sentence that says how to make them, so that a notebook goes on."""

    @functools.wraps(panel)
    def open_panel(run: RunFolder) -> Panel | HTML:
        try:
            return panel(run)
        except PersodpoError as error:
            return HTML(f"<p>{html.escape(str(error))}</p>")  # type: ignore[no-untyped-call]

    return open_panel


@_or_sentence
def responses(run: RunFolder) -> Panel:
    """Find a dialogue by its text, a model or an outcome class; see all answers side by side with their scores.

    Where a completion failed, or is not exactly one JSON object, it is shown as it came.
    """
    dialogues, answers, scores = (run.read(name) for name in ("dialogues", "responses", "scores"))
    rows = _joined(answers, scores)
    finders, menu = _finder(dialogues, answers, "model", "outcome")
    return Panel({"dialogue": menu}, lambda dialogue: [_page(dialogues, rows, dialogue)], finders)


def _joined(answers: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    return answers.merge(scores, on=["dialogue_id", "model"], how="left", validate="one_to_one")


def _page(dialogues: pd.DataFrame, rows: pd.DataFrame, name: str | None) -> str:
    """Return a dialogue and its answers as HTML."""
    if name is None:
        return "<p>No dialogue matches.</p>"
    dialogue = dialogues[dialogues["dialogue_id"] == name].to_dict("records")[0]
    return views.dialogue_html({str(key): value for key, value in dialogue.items()}, rows[rows["dialogue_id"] == name])


def _finder(dialogues: pd.DataFrame, answers: pd.DataFrame, *columns: str) -> tuple[dict[str, Any], Any]:
    """Return a text to find and a menu for each of some columns, by name; and the menu of the dialogues that match."""
    questions = dialogues[dialogues["dialogue_id"].isin(answers["dialogue_id"])].set_index("dialogue_id")
    texts = answers["completion"].fillna("") + " " + answers["response"].fillna("")
    texts = texts.groupby(answers["dialogue_id"]).agg(" ".join)
    searched = (questions["personas"].map(" ".join) + " " + questions["context"].fillna("") + " " + texts).map(_plain)
    last = questions["context"].fillna("").str.rsplit("\n", n=1).str[-1].str.slice(0, 80)
    text = _control(widgets.Text, "text", placeholder="in dialogue or answers", continuous_update=False)
    filters = {
        column: _control(widgets.Dropdown, column, options=[ANY, *sorted(answers[column].unique())])
        for column in columns
    }
    menu = _control(widgets.Dropdown, "dialogue", layout={"grid_area": "auto / 1 / auto / -1"})

    def fill(_: Any = None) -> None:
        rows = answers
        for column, control in filters.items():
            rows = rows if control.value == ANY else rows[rows[column] == control.value]
        fits = questions.index.isin(rows["dialogue_id"]) & searched[questions.index].str.contains(
            _plain(text.value), regex=False
        )
        names, before = questions.index[fits], menu.value
        menu.description = f"{len(names):,} dialogues"
        menu.options = [(f"{name}: {last[name]}", name) for name in names[:OFFERED]]
        menu.value = before if before in names[:OFFERED] else next(iter(names), None)

    for control in (text, *filters.values()):
        control.observe(fill, "value")
    fill()
    return {"text": text, **filters}, menu


def _plain(text: str) -> str:
    """Return text in lower case, with single spaces."""
    return " ".join(text.casefold().split())


def pairs_under(run: RunFolder) -> Callable[[Mapping[str, float], float, float], views.Outcome]:
    """Prepare what no weight changes, so that `persodpo.method` answers while a slider moves.

    The answer is to a weight for each of `persodpo.method.SIGNALS` (they sum to 1) and the low and high quantile of quality
    (0 to 1); all other settings are the run's own.
    """
    profile = run.profile
    answers, scores, dialogues = (run.read(name) for name in ("responses", "scores", "dialogues"))
    scale = scale_of(scores, profile.scoring)
    scored = scores[scores["quality"].notna()]
    metrics = pl.from_pandas(scored.drop(columns="quality"))
    texts = answers_of("perso", answers, scored, prompt_table(dialogues, profile), profile).drop("quality", "outcome")
    length = pl.col("text").map_elements(lambda text: FEATURES["length"](text, ""), return_dtype=pl.Float64)
    texts = texts.with_columns(length.alias("length"))

    def pair(weights: Mapping[str, float], low: float, high: float) -> views.Outcome:
        scoring = profile.scoring.model_copy(update={"weights": Weights(**weights)})
        acting = effective_weights(profile.model_copy(update={"scoring": scoring}))
        rated = metrics.select("dialogue_id", "model", method.quality(scale, acting).alias("quality"))
        limits = method.thresholds(rated, low, high)
        pairs = method.perso_pairs(texts.join(rated, on=["dialogue_id", "model"]), *limits)
        return views.Outcome(rated, *limits, pairs.sort("dialogue_id", "model_chosen", "model_rejected"))

    return pair


@_or_sentence
def quality(run: RunFolder) -> Panel:
    """Move the five weights and the two quantiles of a run, and see what becomes of scores, pairs and ranks.

    The sliders give proportions: weights are divided by their sum.
    """
    pair, weights, settings = pairs_under(run), run.profile.scoring.weights.model_dump(), run.profile.pairs
    bounds = (settings.low_quantile, settings.high_quantile)
    own = pair(weights, *bounds)

    def view(quantiles: tuple[float, float], **shares: float) -> Shown:
        shared = normalised(shares)
        now = pair(shared, *quantiles)
        return [_numbers_html(now, own, shared, run.profile.seed), views.quality_figure(now, own)]

    steps = {"min": 0, "max": 1, "step": 0.01}
    # A browser moves a value that lies between two steps, and sends it back as if a hand had moved it.
    controls = {
        name: _control(widgets.FloatSlider, name, value=round(weight, 2), **steps) for name, weight in weights.items()
    }
    return Panel(controls | {"quantiles": _control(widgets.FloatRangeSlider, "quantiles", value=bounds, **steps)}, view)


def normalised(shares: Mapping[str, float]) -> dict[str, float]:
    """Return weights that sum to 1, in the proportions of ``shares``."""
    total = sum(shares.values())
    if total == 0:
        raise PersodpoError("All weights are 0, so there is no quality; move one of them up.")
    return {name: share if abs(total - 1) < 1e-9 else share / total for name, share in shares.items()}


def _numbers_html(now: views.Outcome, own: views.Outcome, weights: Mapping[str, float], seed: int) -> str:
    """Return the numbers of a setting, and the settings as a command takes them."""
    new = len(now.pairs.join(own.pairs, on=["dialogue_id", "model_chosen", "model_rejected"], how="anti"))
    columns = (now.pairs["length_chosen"], now.pairs["length_rejected"], now.pairs["dialogue_id"].rank("dense"))
    chosen, rejected, prompts = (column.to_numpy() for column in columns)
    alone = label_accuracy(chosen, rejected, prompts, seed)
    gate = "" if np.isnan(alone) else f" Length alone predicts the chosen side of {alone:.1%} of them."
    nonzero = json.dumps({name: round(weight, 4) for name, weight in weights.items()})
    return (
        f"<div><b>{len(now.pairs):,} pairs</b> of {now.pairs['dialogue_id'].n_unique():,} prompts; the profile has "
        f"{len(own.pairs):,}, and {new:,} are not among them. Rejected up to {now.low:.4f}, chosen from {now.high:.4f}."
        f"{gate}<br><code>scoring.weights={html.escape(nonzero)}</code></div>"
    )


@_or_sentence
def training(run: RunFolder) -> Panel:
    """Set the training curves of a run's arms beside each other and the published ones; these alone before training."""
    curves = _curves(run)
    boxes = {
        name: widgets.Checkbox(
            value=name in run.profile.training.arms or PAPER_RUN in name, description=name, indent=False,
            layout={"width": "auto"},
        )
        for name in curves
    }  # fmt: skip
    axis = _control(widgets.Dropdown, "axis", options=[SHARE, "step"])
    smoothing = _control(widgets.FloatSlider, "smoothing", value=0, min=0, max=0.95, step=0.05)

    def view(axis: str, smoothing: float, **ticked: bool) -> Shown:
        curves_on = {name: curves[name] for name, on in ticked.items() if on}
        if not curves_on:
            raise PersodpoError("No training is ticked; tick one or more.")
        return [views.curves_figure(curves_on, smoothing, share=axis == SHARE)]

    return Panel({"axis": axis, "smoothing": smoothing, **boxes}, view)


def _curves(run: RunFolder) -> dict[str, pd.DataFrame]:
    """Return the logged steps of every training of a run, then those of the published runs, by name."""
    labels = [path.parent.name for path in run.root.glob("training/*/log.parquet")]
    labels.sort(key=lambda label: (label not in run.profile.training.arms, "@" not in label, label))
    logs = {label: run.read(f"training/{label}/log").query("kind == 'train'") for label in labels}
    published = training_curves().replace({"run": r"Qwen2-(0\.)?5B-"}, "", regex=True)  # all are of Qwen2-0.5B
    return logs | {f"published {name}": group for name, group in published.groupby("run")}


@_or_sentence
def arms(run: RunFolder) -> Panel:
    """See every arm's answer to one held-out dialogue, and how the arms differ here and over all dialogues.

    Of several seeds the answers of the first are shown; differences are of all.
    """
    comparisons = run.read("evaluation/comparisons").dropna(subset="difference")
    if comparisons.empty:
        raise PersodpoError("No two arms can be compared; name them in evaluation.pairs and evaluate again.")
    dialogues, answers, scores = (run.read(name) for name in ("dialogues", "evaluation/responses", "evaluation/scores"))
    rows = _joined(answers, scores)
    first = rows[~rows["model"].str.contains("@")]
    finders, menu = _finder(dialogues, answers)
    kinds = dict.fromkeys(comparisons[["metric", "reading"]].itertuples(index=False, name=None))
    options = [(f"{metric.replace('_', ' ')}, {reading}", (metric, reading)) for metric, reading in kinds]
    options.sort(key=lambda option: option[1][0] != "quality")
    compare = _control(widgets.Dropdown, "compare", options=options)

    def view(compare: tuple[str, str], dialogue: str | None) -> Shown:
        table = views.differences(comparisons, rows, dialogue, *compare)
        return [views.differences_html(table), _page(dialogues, first, dialogue)]

    return Panel({"compare": compare, "dialogue": menu}, view, finders)
