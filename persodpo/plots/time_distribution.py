"""How long answers took, as distributions: one line for each way a model was asked.

In: one row a response, with the columns

    model           name; see `persodpo.plots.style.MODEL_STYLES`
    response_time   seconds
    batch_size      prompts answered together in that time; null where only the server knows
    hardware        what they were computed on; null where only the server knows

Times of different batch sizes or machines never share a line. Answers of batches have no response time of their own and are
left out. Source: ``responses`` of a run folder.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from persodpo.errors import PersodpoError
from persodpo.plots.checks import require
from persodpo.plots.style import model_styles, new_figure, styled


@styled
def draw(responses: pd.DataFrame) -> Figure:
    """Draw the share of prompts that were answered within a time.

    Args:
        responses: One row a response; see the module's docstring.

    Returns:
        The figure, one column wide, seconds on a logarithmic axis; models in the order of
        `persodpo.plots.style.ordered`.

    Raises:
        PersodpoError: The table is empty or lacks a column, or every response was answered in a batch.
    """
    require(responses, ("model", "response_time", "batch_size", "hardware"), "time_distribution")
    alone = responses["batch_size"].astype(float).fillna(1) == 1
    timed = responses[alone & responses["response_time"].gt(0)]
    if timed.empty:
        raise PersodpoError(
            "Figure time_distribution got answers of batches only, which have no response time of their own; ask the models "
            "in mode latency."
        )
    styles = model_styles(timed["model"])
    hardware = timed.groupby("model")["hardware"].nunique(dropna=False)
    figure = new_figure(2.3 + 0.14 * len(styles) / 2)
    axes = figure.add_subplot()
    for model, style in styles.items():
        for machine, group in timed[timed["model"] == model].groupby("hardware", dropna=False, sort=True):
            seconds = np.sort(group["response_time"].to_numpy())
            label = style.label if hardware[model] == 1 else f"{style.label} ({machine})"
            axes.step(
                seconds, np.arange(1, len(seconds) + 1) / len(seconds), where="post", label=label, color=style.colour,
                linestyle=style.line, linewidth=1.1,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.set_ylim(0, 1)
    axes.set_xlabel("Response time (s)")
    axes.set_ylabel("Prompts answered within")
    figure.legend(loc="outside upper left", ncols=2, handlelength=2.6, labelspacing=0.3)
    return figure
