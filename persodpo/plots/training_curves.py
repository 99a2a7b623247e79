"""Figures 2b and 2c of the paper: loss, gradient norm, reward margin and reward accuracy over training steps.

In: one row a logged step of a run, with the columns

    run                name of the run
    step               optimiser step, from 1 (or epoch, passes over the pairs, to set runs of unlike batches side by side)
    loss               DPO loss (nats), from 0
    grad_norm          norm of the gradient before clipping, from 0
    reward_margin      mean of beta x (log-ratio of chosen - log-ratio of rejected)
    reward_accuracy    share of pairs whose chosen response has the larger reward, 0 to 1

Source: ``training/<arm>/log`` of a run folder, or ``data/published/training_curves.csv``, which was read from the
released vector plots (loss within 2e-5, gradient norm within 5e-3, so that values near zero may read as negative).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from persodpo.errors import PersodpoError
from persodpo.plots.checks import require
from persodpo.plots.style import BLUE, GREY, LINES, MARKERS, PALETTE, VERMILLION, new_figure, styled

Panel = Literal["loss", "grad_norm", "reward_margin", "reward_accuracy"]
Time = Literal["step", "epoch"]

_TIMES: dict[Time, str] = {"step": "Optimiser step", "epoch": "Epoch"}


@dataclass(frozen=True)
class _Scale:
    """Label of a quantity, and where its logarithmic axis ends (None: a linear axis)."""

    label: str
    floor: float | None = None


# Losses and gradient norms span four decades. The axis ends just above the reading precision of the published curves:
# smaller values stand on its last line, marked "≤", so that no point is dropped and noise does not look like structure.
_SCALES: dict[str, _Scale] = {
    "loss": _Scale("DPO loss", 1e-4),
    "grad_norm": _Scale("Gradient norm", 1e-2),
    "reward_margin": _Scale("Reward margin"),
    "reward_accuracy": _Scale("Reward accuracy"),
}


@styled
def draw(
    curves: pd.DataFrame,
    panels: Sequence[Panel] = ("loss", "grad_norm"),
    layout: Literal["published", "ours"] = "ours",
    *,
    highlight: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    others: str = "other runs",
    time: Time = "step",
) -> Figure:
    """Draw training curves, chosen runs in colour before all others in grey.

    Args:
        curves: One row a run and step, columns as in the module's docstring; of the quantities only those in ``panels``
            are needed, and missing values are left out.
        panels: Quantities to draw, top to bottom.
        layout: ``ours`` stacks panels on a shared step axis that ends with the longest highlighted run; loss and
            gradient norm are logarithmic and end at 1e-4 and 1e-2, where smaller values are drawn. ``published`` puts
            two quantities of one run on twin linear axes.
        highlight: Runs in colour, in order of the legend; None for all. At most seven.
        labels: Labels of runs. Pass the true size: "Qwen2-5B" in published names is Qwen2-0.5B.
        others: Legend entry of the grey runs.
        time: Column of the horizontal axis.

    Returns:
        The figure, one column wide.

    Raises:
        PersodpoError: The table is empty or lacks a column, a highlighted run or a panel is unknown, too many runs are
            highlighted, or the published layout is asked for anything but two quantities of one run.
    """
    _check_panels(panels)
    require(curves, ("run", time, *panels), "training_curves")
    runs = list(dict.fromkeys(curves["run"] if highlight is None else highlight))
    _check_runs(curves, runs)
    names = {run: (labels or {}).get(run, run) for run in runs}
    if layout == "published":
        return _published(curves, panels, names, time)
    return _ours(curves, panels, names, others, time)


def _check_panels(panels: Sequence[str]) -> None:
    unknown = [panel for panel in panels if panel not in _SCALES]
    if unknown or not panels:
        raise PersodpoError(
            f"Figure training_curves can draw {', '.join(_SCALES)}, not {', '.join(unknown) or 'nothing'}."
        )


def _check_runs(curves: pd.DataFrame, runs: Sequence[str]) -> None:
    absent = [run for run in runs if run not in set(curves["run"])]
    if absent:
        raise PersodpoError(
            f"Figure training_curves has no run '{absent[0]}'; runs are {', '.join(sorted(set(curves['run'])))}."
        )
    if not 1 <= len(runs) <= len(PALETTE):
        raise PersodpoError(
            f"Figure training_curves tells at most {len(PALETTE)} runs apart, not {len(runs)}; name those to highlight."
        )


def _points(curves: pd.DataFrame, run: str, panel: str, time: Time) -> pd.DataFrame:
    """Return when a quantity of a run was logged, and its values, in order."""
    points = curves.loc[curves["run"].eq(run), [time, panel]].dropna().sort_values(time)
    return points.rename(columns={time: "time"})


def _published(curves: pd.DataFrame, panels: Sequence[str], names: Mapping[str, str], time: Time) -> Figure:
    """Draw two quantities of one run on twin axes."""
    if len(panels) != 2 or len(names) != 1:
        raise PersodpoError("The published layout of training_curves takes two panels and one highlighted run.")
    (run, name), figure = next(iter(names.items())), new_figure(2.2)
    left = figure.add_subplot()
    right = left.twinx()
    looks: list[tuple[Axes, str, str, str]] = [(left, BLUE, "o", "-"), (right, VERMILLION, "s", "--")]
    handles = []
    for panel, (axes, colour, marker, line) in zip(panels, looks, strict=True):
        points = _points(curves, run, panel, time)
        handles += axes.plot(
            points["time"], points[panel], color=colour, marker=marker, linestyle=line, label=_SCALES[panel].label
        )
        axes.set_ylabel(_SCALES[panel].label, color=colour)
        axes.tick_params(axis="y", colors=colour)
    right.spines["right"].set_visible(True)
    left.set_xlabel(_TIMES[time])
    figure.legend(handles=handles, loc="outside upper center", ncols=2, title=name, title_fontsize=7)
    return figure


def _ours(curves: pd.DataFrame, panels: Sequence[str], names: Mapping[str, str], others: str, time: Time) -> Figure:
    """Stack panels that share the axis of time."""
    background = [run for run in dict.fromkeys(curves["run"]) if run not in names]
    rows = len(names) + bool(background)
    figure = new_figure(0.45 + 1.15 * len(panels) + 0.14 * rows)
    stack = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(stack, panels, strict=True):
        for run in background:
            _line(axes, _points(curves, run, panel, time), panel, color=GREY, linewidth=0.6, alpha=0.7, zorder=1)
        for number, run in enumerate(names):
            points = _points(curves, run, panel, time)
            _line(axes, points, panel, **_look(number), markevery=max(1, len(points) // 15), zorder=3)
        _scale(axes, panel)
    stack[0].set_xlim(0, 1.03 * curves.loc[curves["run"].isin(list(names)), time].max())
    stack[-1].set_xlabel(_TIMES[time])
    figure.align_ylabels(stack)
    handles = [Line2D([], [], label=name, **_look(number)) for number, name in enumerate(names.values())]
    if background:
        label = others if len(background) == 1 else f"{others} ({len(background)})"
        handles.append(Line2D([], [], color=GREY, linewidth=0.6, label=label))
    figure.legend(handles=handles, loc="outside upper left", ncols=1, labelspacing=0.25)
    return figure


def _look(number: int) -> dict[str, Any]:
    """Return colour, marker and line style of the n-th highlighted run."""
    return {"color": PALETTE[number], "marker": MARKERS[number], "linestyle": LINES[number], "markersize": 2.8}


def _line(axes: Axes, points: pd.DataFrame, panel: str, **look: Any) -> None:
    """Draw one run, values below the axis on its last line."""
    axes.plot(points["time"], points[panel].clip(lower=_SCALES[panel].floor), **look)


def _scale(axes: Axes, panel: str) -> None:
    """Label a panel's axis and give it its scale."""
    scale = _SCALES[panel]
    axes.set_ylabel(scale.label)
    axes.grid(axis="y")
    if scale.floor is None:
        return
    floor, high = scale.floor, axes.get_ylim()[1]
    axes.set_yscale("log")
    top = 1.5 * max(high, floor)
    # The last line needs room below it, or its points would be cut in half.
    axes.set_ylim(0.6 * floor, top)
    exponents = range(round(math.log10(floor)), math.floor(math.log10(top)) + 1)
    texts = [f"$10^{{{exponent}}}$" for exponent in exponents]
    texts[0] = rf"$\leq\,${texts[0]}".replace("$$", "")
    axes.set_yticks([10.0**exponent for exponent in exponents], texts)
    axes.minorticks_off()
