"""What the panels of `persodpo.explore` show: tables in, HTML and figures out, no widgets.

Every text of a model or a dialogue is escaped. Figures are drawn in one ink, for which JupyterLab's text colour is set.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from persodpo.completions import is_one_object
from persodpo.evaluation.observations import SUCCESSES
from persodpo.figures import style
from persodpo.figures.curves import LABELS
from persodpo.figures.style import CHOSEN, LINES, REJECTED
from persodpo.method import SIGNALS

#: Width of figures in inches; 864 pixels on screen, where JupyterLab on a laptop has room for 950.
WIDTH = 9.0
#: Text and lines of figures.
INK = "#24292f"
#: What the controls say now.
NOW = style.BLUE
#: Of curves; black would vanish in the dark theme.
PALETTE = (*style.PALETTE[:-1], INK)
STYLE: Any = {
    "font.size": 8.5, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.titley": 1.0, "axes.spines.top": False,
    "axes.spines.right": False, "axes.facecolor": "none", "legend.frameon": False, "svg.fonttype": "none",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}  # fmt: skip
_WORD = re.compile(r"(\w+)")


@dataclass(frozen=True)
class Outcome:
    """What weights and thresholds make of the scored responses of a run.

    Attributes:
        rated: dialogue_id, model and quality of each.
        low: Quality at or below which a response may be rejected.
        high: Quality at or above which it may be chosen.
        pairs: From `persodpo.method.perso_pairs`, by dialogue, chosen and rejected model.
    """

    rated: pl.DataFrame
    low: float
    high: float
    pairs: pl.DataFrame

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each model by mean quality, 1 for the highest, in that order."""
        means = self.rated.group_by("model").agg(pl.col("quality").mean()).sort("quality", "model", descending=True)
        return dict(zip(means["model"], means["quality"].rank("min", descending=True), strict=True))


def png(figure: Figure) -> bytes:
    """Return a figure as a picture on white, for pages that have no theme."""
    data = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(data, format="png", dpi=96, facecolor="white")
    return data.getvalue()


def svg(figure: Figure) -> str:
    """Return a figure as HTML whose ink is the text colour of JupyterLab's theme, light or dark."""
    data = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(
            data, format="svg", facecolor="none", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = data.getvalue()
    text = text[text.index("<svg") :].replace("<svg", '<svg style="max-width: 100%; height: auto"', 1)
    return f'<div style="color: var(--jp-content-font-color1, {INK})">{text.replace(INK, "currentColor")}</div>'


def dialogue_html(dialogue: Mapping[str, Any], answers: pd.DataFrame) -> str:
    """Return a dialogue, and its responses with their scores side by side; words of the persona stand out."""
    words = {word.casefold() for text in dialogue["personas"] for word in _WORD.findall(text)} - ENGLISH_STOP_WORDS
    persona = "".join(f"<li>{marked(text, words)}</li>" for text in dialogue["personas"])
    turns = "<br>".join(html.escape(turn) for turn in (dialogue["context"] or "").splitlines())
    reference = f"<p><b>reference</b> {html.escape(dialogue['reference'])}</p>" if dialogue["reference"] else ""
    cards = "".join(_answer_html(row, words) for row in answers.sort_values("model").to_dict("records"))
    grid = "display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 8px; max-width: 900px"
    return (  # two dollars in a text are money, and no formula
        f'<div class="tex2jax_ignore mathjax_ignore"><b>{html.escape(dialogue["dialogue_id"])}</b><ul>{persona}</ul>'
        f'<p>{turns}</p>{reference}<div style="{grid}">{cards}</div></div>'
    )


def _answer_html(row: Mapping[Any, Any], words: Collection[str]) -> str:
    """Return an answer: what was read of it, its scores, and the completion where that is not one JSON object."""
    text = "<i>nothing could be read</i>" if row["response"] is None else marked(row["response"], words)
    signals = ", ".join(f"{name.replace('_', ' ')} {row[name]:.2f}" for name in SIGNALS)
    scores = "not scored" if pd.isna(row["quality"]) else f"<b>quality {row['quality']:.3f}</b> ({signals})"
    state, raw = "" if row["outcome"] == "ok" else f"failed: {row['outcome']}", ""
    if row["completion"] is not None and not is_one_object(row["completion"]):
        state = state or "read, but not exactly one JSON object"
        bar = f"white-space: pre-wrap; border-left: 3px solid {REJECTED}; padding-left: 6px"
        raw = f'<div style="{bar}">{html.escape(row["completion"])}</div>'
    return (
        f'<div style="border: 1px solid #9A9A9A; padding: 6px; overflow-wrap: anywhere"><b>{html.escape(row["model"])}</b> '
        f"<i>{html.escape(state)}</i><p>{text}</p><p>{scores}</p>{raw}</div>"
    )


def marked(text: str, words: Collection[str]) -> str:
    """Return a text as HTML with some words, given in lower case, bold and underlined."""
    pieces = ((html.escape(piece), piece.casefold() in words) for piece in _WORD.split(text))
    return "".join(f"<b><u>{piece}</u></b>" if mark else piece for piece, mark in pieces)


def quality_figure(now: Outcome, own: Outcome) -> Figure:
    """Draw the quality of all responses with both thresholds, and each model's rank and pairs, beside the profile's own."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2))
        margins = {"left": 0.05, "right": 0.98, "bottom": 0.1, "top": 0.88, "wspace": 0.45}
        left, right = figure.subplots(1, 2, gridspec_kw=margins)
        top = max(1.0, now.rated["quality"].to_numpy().max(), own.rated["quality"].to_numpy().max())
        edges = np.linspace(0, top, 41)
        counts = [np.histogram(each.rated["quality"].to_numpy(), edges)[0] for each in (now, own)]
        left.stairs(counts[0], edges, color=NOW, fill=True, alpha=0.6)
        left.stairs(counts[1], edges, color=INK, linewidth=0.8)
        height = 1.1 * np.max(counts)
        for place, colour, side, label in (
            (now.low, REJECTED, "right", "rejected "),
            (now.high, CHOSEN, "left", " chosen"),
        ):
            left.vlines(place, 0, height, color=colour, linewidth=1.6)
            left.text(place, height, label, ha=side, va="top")
        left.set(title="Quality of the scored responses (line: under the profile)", xlim=(0, top), ylim=(0, height))
        left.locator_params(nbins=3)
        _draw_models(right, now, own)
    return figure


def _draw_models(axes: Axes, now: Outcome, own: Outcome) -> None:
    """Draw a row for each model, best of the profile first: its rank, and how often it is chosen and rejected."""
    ranks, before = now.ranks, own.ranks
    models, places = list(before), range(len(before))
    for side, colour, sign in (("chosen", CHOSEN, 1), ("rejected", REJECTED, -1)):
        counts = dict(now.pairs[f"model_{side}"].value_counts().iter_rows())
        bars = axes.barh(places, [sign * counts.get(model, 0) for model in models], color=colour, alpha=0.75)
        axes.bar_label(bars, [f"{counts.get(model, 0):,}" for model in models], padding=2, fontsize=7.5)
    ranks_before = {model: f" (was {before[model]})" if before[model] != ranks[model] else "" for model in models}
    axes.set_yticks(places, [f"{ranks[model]}. {model[:24]}{ranks_before[model]}" for model in models])
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.margins(x=0.18)
    axes.invert_yaxis()
    axes.set(title="Rank by mean quality; pairs rejected, chosen", xticks=[])


def curves_figure(curves: Mapping[str, pd.DataFrame], strength: float, *, share: bool) -> Figure:
    """Draw four quantities of some trainings by name, over the share of each training or over its steps.

    ``strength`` is the weight of the past in exponentially weighted means: 0, what was logged, to below 1.
    """
    rows = -(-len(curves) // 3)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.9 + 0.17 * rows))
        top = 1 - (0.2 + 0.17 * rows) / figure.get_figheight()
        margins = {"left": 0.07, "right": 0.98, "bottom": 0.1, "top": top, "wspace": 0.2, "hspace": 0.15}
        panels = figure.subplots(2, 2, sharex=True, gridspec_kw=margins).ravel()
        for axes, (quantity, label) in zip(panels, LABELS.items(), strict=True):
            for number, (name, curve) in enumerate(curves.items()):
                logged = curve[curve[quantity].notna()]
                steps = logged["step"] / (logged["step"].max() / 100 if share else 1)
                colour, line = PALETTE[number % len(PALETTE)], LINES[number % len(LINES)]
                if strength:
                    axes.plot(steps, logged[quantity], color=colour, linewidth=0.6, alpha=0.35)
                means = logged[quantity].ewm(alpha=1 - strength).mean()
                axes.plot(steps, means, color=colour, linestyle=line, label=name)
            axes.set_ylabel(label)
        for axes in panels[2:]:
            axes.set_xlabel("share of the training (%)" if share else "optimiser step")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="upper left", ncols=3)
    return figure


def differences(
    comparisons: pd.DataFrame, rows: pd.DataFrame, dialogue: str | None, metric: str, reading: str
) -> pd.DataFrame:
    """Set each difference between two arms in one dialogue beside that of all dialogues.

    ``here`` is the column of means over seeds, from held-out responses with their scores; NaN where nothing counts.
    """
    here = rows[rows["dialogue_id"] == dialogue]
    failed = here["outcome"] != "ok"
    values = (failed if metric == "failure_ratio" else here[metric]).astype(float)
    if reading == SUCCESSES:
        values = values.where(~failed)
    labels = [model.partition("@") for model in here["model"]]
    seeded = values.set_axis([seed for _, _, seed in labels])
    by_arm: dict[Any, Any] = dict(iter(seeded.groupby([arm for arm, _, _ in labels])))
    table, nothing = comparisons.query("metric == @metric and reading == @reading"), pd.Series(dtype=float)
    means = []
    for row in table.itertuples():
        left, right = by_arm.get(row.arm, nothing), by_arm.get(row.baseline, nothing)
        means.append((left - right).mean() if row.seeds_paired else left.mean() - right.mean())
    return table.assign(here=means)


def differences_html(table: pd.DataFrame) -> str:
    """Return differences between arms from `differences`; an arm is named by what follows a slash."""
    arm, base = (table[side].str.split("/").str[-1] for side in ("arm", "baseline"))
    spans = table[["difference", "low", "high"]].to_numpy(float)
    cells = pd.DataFrame({
        "difference": arm + " − " + base, "this dialogue": table["here"].map("{:+.3f}".format, na_action="ignore"),
        "all dialogues, with interval": [f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" for mean, low, high in spans],
        "dialogues": table["dialogues"], "p (Holm)": table["p_holm"].map("{:.2g}".format, na_action="ignore"),
    })  # fmt: skip
    return cells.to_html(index=False, na_rep="–")
