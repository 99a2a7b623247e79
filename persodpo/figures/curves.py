"""Figures of training: the paper's Figures 2b (loss, gradient norm) and 2c (reward margin, reward accuracy).

In: ``published/training_curves.csv``, which was read from the released vector plots (loss within 2e-5, gradient norm within
5e-3, so that values near zero may read as negative), and the arms' ``training/<arm>/log``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from persodpo.figures.style import BLUE, GREY, LINES, MARKERS, PALETTE, VERMILLION, figure, new_figure

CURVES = "published/training_curves.csv"
LOGS = "training/<arm>/log"
#: Run of the paper's Figures 2b and 2c, and what it is called here.
PAPER_RUN = "Qwen2-5B-Instruct-FoCus-perso-DPO"
PAPER_RUN_LABEL = "Qwen2-0.5B, perso (published)"
OTHERS = "other published runs"
#: Optimiser steps of an epoch of the paper's run: 9,184 pairs, 16 a step.
PAPER_EPOCH = 9_184 / 16

LOSS, REWARD = ("loss", "grad_norm"), ("reward_margin", "reward_accuracy")
LABELS = {
    "loss": "DPO loss", "grad_norm": "Gradient norm", "reward_margin": "Reward margin", "reward_accuracy": "Reward accuracy",
}  # fmt: skip
#: Losses and gradient norms span four decades. Their axis ends just above the reading precision of the published curves:
#: smaller values stand on its last line, marked "≤", so that no point is dropped and noise does not look like structure.
FLOORS = {"loss": 1e-4, "grad_norm": 1e-2}
#: An axis of less than so many times its smallest value needs no logarithm.
_DECADES = 30
_ARMS_NOTE = "Figure {} of the arms trained here, the paper's run behind."
_TIMES = {"step": "Optimiser step", "epoch": "Epoch"}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def arm_curves(logs: Mapping[str, pd.DataFrame], published: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return the logged steps of the arms and of the paper's run, by epoch, and the arms' labels: what was trained."""
    steps = [log[log["kind"] == "train"].assign(run=arm) for arm, log in logs.items()]
    paper = published[published["run"] == PAPER_RUN].assign(epoch=lambda frame: frame["step"] / PAPER_EPOCH)
    names = {arm: f"{arm}: {log['policy'].iloc[0]}" for arm, log in logs.items()}
    return pd.concat([*steps, paper], ignore_index=True), names


def _points(curves: pd.DataFrame, run: str, time: str, quantity: str) -> tuple[pd.Series[float], pd.Series[float]]:
    """Return when a quantity of a run was logged, and its values, in order."""
    points = curves.loc[curves["run"] == run, [time, quantity]].dropna().sort_values(time)
    return points[time], points[quantity].clip(lower=FLOORS.get(quantity))


@figure("figure_2c_published", [CURVES], "Figure 2c as published: reward margin, accuracy.", quantities=REWARD)
@figure("figure_2b_published", [CURVES], "Figure 2b as published: loss and gradient norm.", quantities=LOSS)
def twin_axes(curves: pd.DataFrame, *, quantities: Sequence[str]) -> Figure:
    """Draw two quantities of the paper's run on twin axes, as the paper does."""
    fig = new_figure(2.2)
    left = fig.add_subplot()
    right, handles = left.twinx(), []
    looks = [(left, BLUE, "o", "-"), (right, VERMILLION, "s", "--")]
    for quantity, (axes, colour, marker, line) in zip(quantities, looks, strict=True):
        points = curves[curves["run"] == PAPER_RUN].dropna(subset=quantity).sort_values("step")
        look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line, "label": LABELS[quantity]}
        handles += axes.plot(points["step"], points[quantity], **look)
        axes.set_ylabel(LABELS[quantity], color=colour)
        axes.tick_params(axis="y", colors=colour)
    right.spines["right"].set_visible(True)
    left.set_xlabel(_TIMES["step"])
    fig.legend(handles=handles, loc="outside upper center", ncols=2, title=PAPER_RUN_LABEL, title_fontsize=7)
    return fig


@figure("figure_2c", [CURVES], "Figure 2c in panels that share the step axis.", quantities=REWARD)
@figure("figure_2b", [CURVES], "Figure 2b in panels that share the step axis.", quantities=LOSS)
def panels(curves: pd.DataFrame, *, quantities: Sequence[str]) -> Figure:
    """Draw the paper's run before all other published ones, a panel per quantity."""
    return _panels(curves, quantities, {PAPER_RUN: PAPER_RUN_LABEL}, OTHERS)


@figure("figure_2c_arms", [LOGS, CURVES], _ARMS_NOTE.format("2c"), quantities=REWARD)
@figure("figure_2b_arms", [LOGS, CURVES], _ARMS_NOTE.format("2b"), quantities=LOSS)
def arm_panels(logs: Mapping[str, pd.DataFrame], published: pd.DataFrame, *, quantities: Sequence[str]) -> Figure:
    """Draw the arms trained here before the paper's run, a panel per quantity."""
    curves, names = arm_curves(logs, published)
    return _panels(curves, quantities, names, PAPER_RUN_LABEL, time="epoch")


def _panels(
    curves: pd.DataFrame, quantities: Sequence[str], names: Mapping[str, str], others: str, *, time: str = "step"
) -> Figure:
    """Draw one panel per quantity over a shared axis of time, the named runs in colour before all others in grey.

    Axes fit what is drawn. A single other run is only there to compare with: where it leaves a panel, the legend says so.
    """
    background = [run for run in dict.fromkeys(curves["run"]) if run not in names]
    fig = new_figure(0.45 + 1.15 * len(quantities) + 0.14 * (len(names) + bool(background)))
    stack = fig.subplots(len(quantities), 1, sharex=True, squeeze=False)[:, 0]
    end, outside = curves.loc[curves["run"].isin(list(names)), time].max(), False
    for axes, quantity in zip(stack, quantities, strict=True):
        points = {run: _points(curves, run, time, quantity) for run in [*background, *names]}
        for run in background:
            axes.plot(*points[run], color=GREY, linewidth=0.6, alpha=0.7, zorder=1)
        for number, run in enumerate(names):
            axes.plot(*points[run], **_look(number), markevery=max(1, len(points[run][0]) // 15), zorder=3)
        inside = {run: values[times <= end] for run, (times, values) in points.items()}
        fitted = pd.concat([inside[run] for run in (names if len(background) == 1 else inside)])
        _scale(axes, quantity, float(fitted.min()), float(fitted.max()))
        low, high = axes.get_ylim()
        outside |= any(not values.between(low, high).all() for values in inside.values())
    stack[0].set_xlim(0, 1.03 * end)
    stack[-1].set_xlabel(_TIMES[time])
    fig.align_ylabels(stack)
    handles = [Line2D([], [], label=name, **_look(number)) for number, name in enumerate(names.values())]
    if background:
        count = f" ({len(background)})" if len(background) > 1 else ""
        label = f"{others}{count}{', partly off the axes' if outside else ''}"
        handles.append(Line2D([], [], color=GREY, linewidth=0.6, label=label))
    fig.legend(handles=handles, loc="outside upper left", ncols=1, labelspacing=0.25)
    return fig


def _look(number: int) -> dict[str, Any]:
    """Return colour, marker and line style of the n-th named run."""
    slot = number % len(PALETTE)
    return {"color": PALETTE[slot], "marker": MARKERS[slot], "linestyle": LINES[slot], "markersize": 2.8}


def _scale(axes: Axes, quantity: str, low: float, high: float) -> None:
    """Label a panel's axis and fit it to values, on a logarithmic scale where they span decades."""
    axes.set_ylabel(LABELS[quantity])
    axes.grid(axis="y")
    floor = FLOORS.get(quantity)
    if floor is None or high < _DECADES * low:
        room = 0.06 * (high - low) or 0.5
        axes.set_ylim(low - room, high + room)
        return
    axes.set_yscale("log")
    exponents = range(math.floor(math.log10(low) + 1e-9), math.floor(math.log10(1.5 * high)) + 1)
    texts = ["10" + str(exponent).translate(_SUPERSCRIPTS) for exponent in exponents]
    if low == floor:
        texts[0] = f"≤ {texts[0]}"
    axes.set_yticks([10.0**exponent for exponent in exponents], texts)
    # The last line needs room below it, or its points would be cut in half.
    axes.set_ylim(0.6 * 10.0 ** exponents[0], 1.5 * high)
    axes.minorticks_off()
