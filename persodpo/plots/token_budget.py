"""What the token budget does to answers: how long they would be, and where the budget cuts them off.

In: one row a response, with the columns

    model      name; see `persodpo.plots.style.MODEL_STYLES`
    outcome    ``ok`` for an answer that ended by itself, ``truncated`` for one that was cut off; others are left out
    response   the answer's text, for a cut-off one what was recovered

A cut-off answer says that it would have been longer, not how long: lengths are censored, and their distribution is
estimated by Kaplan and Meier (1958). Source: ``responses`` of a run folder.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.stats import CensoredData, ecdf

from persodpo.errors import PersodpoError
from persodpo.plots.checks import require
from persodpo.plots.style import FAINT, GREY, model_styles, new_figure, styled

#: A line ends where fewer answers are left to tell how it goes on.
AT_RISK = 20


def answer_lengths(responses: pd.DataFrame) -> pd.DataFrame:
    """Estimate, for each model, how many answers are longer than a number of words.

    Args:
        responses: One row a response; see the module's docstring.

    Returns:
        Columns model, words and longer (share of answers that are longer, by Kaplan and Meier), as far as `AT_RISK` answers
        are that long or longer.

    Raises:
        PersodpoError: No answer ended by itself.
    """
    frames = []
    for model, group in responses[responses["outcome"].isin(["ok", "truncated"])].groupby("model", sort=False):
        words = word_counts(group["response"])
        cut = (group["outcome"] == "truncated").to_numpy()
        if cut.all():
            continue
        found = ecdf(CensoredData(uncensored=words[~cut], right=words[cut])).sf
        frame = pd.DataFrame({"model": model, "words": found.quantiles, "longer": found.probabilities})
        frames.append(frame[[(words >= length).sum() >= AT_RISK for length in frame["words"]]])
    if not frames:
        raise PersodpoError("Figure token_budget got no answer that ended by itself; raise generation.token_budget.")
    table: pd.DataFrame = pd.concat(frames, ignore_index=True)
    return table


def word_counts(texts: pd.Series[str]) -> np.ndarray:
    """Return how many words each text has; a missing one has none."""
    return np.array([len((text or "").split()) for text in texts])


@styled
def draw(responses: pd.DataFrame, max_words: int) -> Figure:
    """Draw the share of answers that are longer than a number of words, where they were cut off, and the limit they knew.

    Args:
        responses: One row a response; see the module's docstring.
        max_words: The word limit that the prompt named.

    Returns:
        The figure, one column wide: a line a model, a grey band over the middle 90 % of the lengths at which answers were
        cut off, a line at the word limit.

    Raises:
        PersodpoError: The table is empty or lacks a column, or no answer ended by itself.
    """
    require(responses, ("model", "outcome", "response"), "token_budget")
    lengths = answer_lengths(responses)
    styles = model_styles(lengths["model"])
    figure = new_figure(2.3 + 0.14 * len(styles) / 2)
    axes = figure.add_subplot()
    cut = word_counts(responses.loc[responses["outcome"] == "truncated", "response"])
    if len(cut):
        low, high = np.quantile(cut, [0.05, 0.95])
        axes.axvspan(low, high, color=FAINT, linewidth=0)
        axes.annotate("cut off", ((low + high) / 2, 0.97), ha="center", va="top", fontsize=7)
    axes.axvline(max_words, color=GREY, linewidth=0.8)
    axes.annotate(
        f"limit told:\n{max_words} words", (max_words, 0.97), (3, 0), textcoords="offset points", va="top", fontsize=7
    )
    for model, style in styles.items():
        own = lengths[lengths["model"] == model]
        axes.step(
            own["words"], own["longer"], where="post", label=style.label, color=style.colour, linestyle=style.line,
            linewidth=1.1,
        )  # fmt: skip
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.set_ylim(0, 1)
    axes.set_xlim(0, max_words * 1.3)
    axes.set_xlabel("Words")
    axes.set_ylabel("Answers that are longer")
    figure.legend(loc="outside upper left", ncols=2, handlelength=2.6, labelspacing=0.3)
    return figure
