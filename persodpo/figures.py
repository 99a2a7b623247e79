"""Which figure is drawn from which tables, and drawing them into figures/<profile>/."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from persodpo.config import Profile
from persodpo.errors import NothingToShowError, PersodpoError
from persodpo.imports import code_of
from persodpo.plots import (
    ablations,
    failure_classes,
    forest,
    metric_correlation,
    overview,
    pair_sources,
    response_time,
    score_distributions,
    style,
    time_distribution,
    training_curves,
)
from persodpo.release import published
from persodpo.runfolder import RunFolder, file_is_current, sha256
from persodpo.training.arms import ARMS

Tables = Mapping[str, pd.DataFrame]
Layout = Literal["published", "ours"]

#: Run of the paper's Figures 2b and 2c, and what it is called here.
PAPER_RUN = "Qwen2-5B-Instruct-FoCus-perso-DPO"
PAPER_RUN_LABEL = "Qwen2-0.5B, perso (published)"
#: Models of Figure 2a, and the untuned model of the tuned one's size.
BENCHMARK, UNTUNED, TUNED = "Qwen2-7B-Instruct", "Qwen2-0.5B-Instruct", "Qwen2-0.5B-Instruct/length_prior"

CURVES = "published/training_curves.csv"
LOGS = "training/<arm>/log"
ABLATIONS = "ablations/estimates"
RESPONSE_TIMES = "response_times"
#: Optimiser steps of an epoch of the paper's run: 9,184 pairs, 16 a step.
PAPER_EPOCH = 9_184 / 16


@dataclass(frozen=True)
class FigureSpec:
    """A figure, the tables it is drawn from, and a sentence that goes with it.

    Attributes:
        tables: Names of run tables; a name that starts with ``published/`` is a file of published numbers, and one with
            ``<arm>`` stands for the tables of all arms that the profile trains.
        draw: Draws it from those tables.
        note: What it stands for.
        evaluation: The ``evaluation.source`` that it belongs to; None for any.
    """

    tables: tuple[str, ...]
    draw: Callable[[Tables], Figure]
    note: str
    evaluation: Literal["published", "arms"] | None = None


def _figure_2a(models: Mapping[str, str], layout: Layout) -> Callable[[Tables], Figure]:
    def draw(tables: Tables) -> Figure:
        results = response_time.from_results(tables["evaluation/results"]).set_index("model")
        return response_time.draw(results.loc[list(models)].reset_index(), layout=layout, labels=models)

    return draw


def _figure_2a_arms(tables: Tables) -> Figure:
    """Set the starting policy beside the arms, which are of its size; of several seeds the first."""
    responses = tables["evaluation/responses"]
    first = responses[~responses["model"].str.contains("@")]
    rows = [
        {
            "model": model, "responses": len(group), "response_time_mean": group["response_time"].mean(),
            "response_time_std": group["response_time"].std(ddof=0), "failures": int(group["outcome"].ne("ok").sum()),
        }
        for model, group in first.groupby("model", sort=False)
    ]  # fmt: skip
    return response_time.draw(pd.DataFrame(rows))


def _curves(panels: tuple[training_curves.Panel, training_curves.Panel], layout: Layout) -> Callable[[Tables], Figure]:
    def draw(tables: Tables) -> Figure:
        return training_curves.draw(
            tables[CURVES],
            panels=panels,
            layout=layout,
            highlight=[PAPER_RUN],
            labels={PAPER_RUN: PAPER_RUN_LABEL},
            others="other published runs",
        )

    return draw


def arm_curves(tables: Tables) -> tuple[pd.DataFrame, dict[str, str]]:
    """Set the logs of the arms beside the paper's run.

    Args:
        tables: The arms' logs, and the published curves.

    Returns:
        A table for `training_curves.draw` by epoch, and the labels of its runs, which say what was trained.
    """
    logs = {name.split("/")[1]: table for name, table in tables.items() if name.endswith("/log")}
    steps = [log[log["kind"] == "train"].assign(run=arm) for arm, log in logs.items()]
    published = tables[CURVES]
    paper = published[published["run"] == PAPER_RUN].assign(epoch=lambda frame: frame["step"] / PAPER_EPOCH)
    labels = {arm: f"{arm}: {log['policy'].iloc[0]}" for arm, log in logs.items()}
    return pd.concat([*steps, paper], ignore_index=True), labels


def _arms(panels: tuple[training_curves.Panel, training_curves.Panel]) -> Callable[[Tables], Figure]:
    def draw(tables: Tables) -> Figure:
        curves, labels = arm_curves(tables)
        return training_curves.draw(
            curves, panels, highlight=list(labels), labels=labels, others=PAPER_RUN_LABEL, time="epoch"
        )

    return draw


def _quality(by: Literal["reading", "model"]) -> Callable[[Tables], Figure]:
    def draw(tables: Tables) -> Figure:
        value = tables["thresholds"].set_index("name")["value"]
        return score_distributions.draw_quality(tables["scores"], value["low"], value["high"], by=by)

    return draw


def short_names(tables: Tables) -> dict[str, str]:
    """Name published arms by what they were tuned to, the untuned model as that; our arms keep their names."""
    table = tables["evaluation/comparisons"]
    names = {*table["arm"], *table["baseline"]}
    if not any("/" in name for name in names):
        return {name: name for name in names}
    return {name: name.split("/")[1] if "/" in name else "untuned" for name in names}


def _ablations(tables: Tables) -> Figure:
    """Set every ablation beside the arm that they start from, which alone has an arm's name."""
    table, order = tables[ABLATIONS], tables["ablations/pairs"]["ablation"].tolist()
    return ablations.draw(table, next(arm for arm in table["arm"] if arm in ARMS), arms=order)


def _published_results(tables: Tables) -> pd.DataFrame:
    """Leave out the set that was published without scores."""
    scores = tables["evaluation/scores"]
    measured = scores.loc[~scores["imputed"] & scores["quality"].notna(), "model"].unique()
    return scores[scores["model"].isin(measured)]


FIGURES: dict[str, FigureSpec] = {
    "overview": FigureSpec((), lambda _: overview.draw(), "The method in one picture."),
    "figure_2a_published": FigureSpec(
        ("evaluation/results",),
        _figure_2a({BENCHMARK: "Benchmark (Qwen2-7B)", TUNED: "PersoDPO (Qwen2-0.5B)"}, "published"),
        "Figure 2a as published: two models of different size, two units on one axis (audit A6, A7).",
        "published",
    ),
    "figure_2a": FigureSpec(
        ("evaluation/results",),
        _figure_2a(
            {BENCHMARK: "Qwen2-7B\nuntuned", UNTUNED: "Qwen2-0.5B\nuntuned", TUNED: "Qwen2-0.5B\nlength_prior"}, "ours"
        ),
        "Figure 2a with the untuned model of the tuned one's size beside it.",
        "published",
    ),
    "figure_2a_arms": FigureSpec(
        ("evaluation/responses",),
        _figure_2a_arms,
        "Figure 2a of the arms trained here: before and after, at equal size.",
        "arms",
    ),
    "figure_2b_published": FigureSpec(
        (CURVES,), _curves(("loss", "grad_norm"), "published"), "Figure 2b as published: loss and gradient norm."
    ),
    "figure_2b": FigureSpec(
        (CURVES,), _curves(("loss", "grad_norm"), "ours"), "Figure 2b in panels that share the step axis."
    ),
    "figure_2c_published": FigureSpec(
        (CURVES,),
        _curves(("reward_margin", "reward_accuracy"), "published"),
        "Figure 2c as published: reward margin, accuracy.",
    ),
    "figure_2c": FigureSpec(
        (CURVES,),
        _curves(("reward_margin", "reward_accuracy"), "ours"),
        "Figure 2c in panels that share the step axis.",
    ),
    "figure_2b_arms": FigureSpec(
        (LOGS, CURVES), _arms(("loss", "grad_norm")), "Figure 2b of the arms trained here, the paper's run behind."
    ),
    "figure_2c_arms": FigureSpec(
        (LOGS, CURVES),
        _arms(("reward_margin", "reward_accuracy")),
        "Figure 2c of the arms trained here, the paper's run behind.",
    ),
    "failure_classes": FigureSpec(
        ("responses",),
        lambda tables: failure_classes.draw(tables["responses"]),
        "Why train responses failed, by model.",
    ),
    "failure_classes_evaluation": FigureSpec(
        ("evaluation/responses",),
        lambda tables: failure_classes.draw(tables["evaluation/responses"]),
        "Why held-out responses failed; unknown where no completion was published (audit A16, A17).",
    ),
    RESPONSE_TIMES: FigureSpec(
        ("responses",),
        lambda tables: time_distribution.draw(tables["responses"]),
        "Response times of train prompts, one prompt at a time; API times include the network.",
    ),
    "score_metrics": FigureSpec(
        ("scores",),
        lambda tables: score_distributions.draw_metrics(tables["scores"]),
        "The five signals of parsed responses.",
    ),
    "score_metrics_evaluation": FigureSpec(
        ("evaluation/scores",),
        lambda tables: score_distributions.draw_metrics(_published_results(tables)),
        "The five signals of parsed held-out responses.",
    ),
    "quality": FigureSpec(("scores", "thresholds"), _quality("reading"), "Quality and the two thresholds."),
    "quality_by_model": FigureSpec(
        ("scores", "thresholds"), _quality("model"), "Quality and the two thresholds, by model."
    ),
    "pair_sources": FigureSpec(
        ("pairs/perso",),
        lambda tables: pair_sources.draw(tables["pairs/perso"]),
        "Which model is preferred to which, perso pairs.",
    ),
    "pair_sources_simple": FigureSpec(
        ("pairs/simple",),
        lambda tables: pair_sources.draw(tables["pairs/simple"]),
        "Which model is preferred to which, simple pairs.",
    ),
    "forest": FigureSpec(
        ("evaluation/comparisons",),
        lambda tables: forest.draw(tables["evaluation/comparisons"], labels=short_names(tables)),
        "Paired differences on held-out dialogues, failures imputed.",
    ),
    "forest_successes": FigureSpec(
        ("evaluation/comparisons",),
        lambda tables: forest.draw(tables["evaluation/comparisons"], "successes alone", labels=short_names(tables)),
        "Paired differences on held-out dialogues that both arms answered.",
    ),
    "ablations": FigureSpec(
        (ABLATIONS, "ablations/pairs"),
        _ablations,
        "One thing done otherwise: quality and failures on held-out dialogues.",
        "arms",
    ),
    "metric_correlation": FigureSpec(
        ("scores",),
        lambda tables: metric_correlation.draw(tables["scores"]),
        "Rank correlation, failures left out and imputed.",
    ),
}


@dataclass(frozen=True)
class FigureReport:
    """What became of a figure.

    Attributes:
        figure: Its name.
        skipped: True if its tables and code were unchanged, so the files were left alone.
        files: PDF, PNG and JSON; none where the run has nothing that it could show.
        seconds: Wall time.
    """

    figure: str
    skipped: bool
    files: tuple[Path, ...]
    seconds: float

    def __str__(self) -> str:
        """Return one line for logs."""
        done = "unchanged, skipped" if self.skipped else f"drawn in {self.seconds:.1f} s"
        done = done if self.files else "left out, as the run has nothing that it could show"
        return f"figure {self.figure}: {done}"


def _tables(run: RunFolder, name: str) -> list[str]:
    """Return the tables of a figure, those of all arms by their names."""
    arms = run.profile.training.arms
    return [
        table.replace("<arm>", arm)
        for table in FIGURES[name].tables
        for arm in (arms if "<arm>" in table else arms[:1])
    ]


def _source(run: RunFolder, table: str) -> Path:
    return published.fact_files()[table] if table.startswith("published/") else run.checked_path(table)


def figure_names(run: RunFolder) -> list[str]:
    """Return the figures whose tables the profile makes."""
    profile = run.profile
    absent = {f"pairs/{name}" for name in ("simple", "perso")} - {f"pairs/{name}" for name in profile.pairs.sets}
    if not profile.evaluation.ablations:
        absent.add(ABLATIONS)
    return [
        name
        for name, spec in FIGURES.items()
        if spec.evaluation in {None, profile.evaluation.source} and not absent & set(spec.tables)
        if name != RESPONSE_TIMES or _timed(profile)
    ]


def _timed(profile: Profile) -> bool:
    """Tell whether some answers of the profile have a response time of their own, rather than a batch's."""
    if profile.generation.source != "models":
        return profile.generation.source == "published"
    asked = [entry for entry in profile.generation.backends if entry.model in profile.generation.models]
    return any(entry.kind != "transformers" or entry.mode == "latency" for entry in asked)


def draw_figure(run: RunFolder, name: str) -> Figure:
    """Draw a figure from the run's tables, without writing it.

    Raises:
        PersodpoError: There is no such figure, or a table is missing or was edited.
    """
    if name not in FIGURES:
        raise PersodpoError(f"There is no figure '{name}'; there are {', '.join(FIGURES)}.")
    tables = {
        table: pd.read_csv(_source(run, table)) if table.startswith("published/") else run.read(table)
        for table in _tables(run, name)
    }
    return FIGURES[name].draw(tables)


def save_figure(run: RunFolder, name: str, *, overwrite: bool = False) -> FigureReport:
    """Draw a figure and write it to figures/<profile>/, unless its tables and code are those it was drawn from.

    Raises:
        PersodpoError: As `draw_figure`, or the folder cannot be written.
    """
    if name not in FIGURES:
        raise PersodpoError(f"There is no figure '{name}'; there are {', '.join(FIGURES)}.")
    started = time.perf_counter()
    inputs = {table: sha256(_source(run, table)) for table in _tables(run, name)} | {"code": code_of(__name__)}
    files = tuple(run.figures / f"{name}.{suffix}" for suffix in ("pdf", "png", "json"))
    if not overwrite and file_is_current(files[-1], inputs):
        return FigureReport(name, True, files, 0.0)
    try:
        figure = draw_figure(run, name)
    except NothingToShowError:
        for path in files:
            path.unlink(missing_ok=True)
        return FigureReport(name, False, (), 0.0)
    style.save(figure, name, run.figures, inputs=inputs, note=FIGURES[name].note)
    return FigureReport(name, False, files, time.perf_counter() - started)


def save_figures(run: RunFolder, *, overwrite: bool = False) -> list[FigureReport]:
    """Write every figure whose tables the profile makes, with a progress bar where someone watches."""
    names = tqdm(figure_names(run), desc="figures", leave=False, disable=not sys.stderr.isatty())
    return [save_figure(run, name, overwrite=overwrite) for name in names]
