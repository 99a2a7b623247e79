"""Tables and logs as notebooks show them: text reads from the left, is never cut, and is escaped, as models wrote it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby

import pandas as pd
from IPython.core.getipython import get_ipython
from IPython.display import clear_output
from pandas.io.formats.style import Styler

from persodpo.runfolder import StageReport

#: How a verdict looks: a sign that needs no colour, and a colour from the palette of the figures.
VERDICTS = {
    "reproduced": ("✓", "#009E7333"),
    "differs": ("✗", "#D55E0033"),
    "not derivable": ("?", "#99999933"),
}

#: Control signs as pictures, for browsers draw them as wide boxes in which no line can be broken.
_PICTURES = {number: chr(0x2400 + number) for number in range(32) if chr(number) not in "\t\n\r"}
_PICTURES |= {0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")
#: What a line cannot be broken in; a zero-width space goes behind it.
_UNBROKEN = re.compile(r"[\u2400-\u2421\ufffd]{8}(?=\S)|\S{30}(?=\S)")
_LEFT = {"text-align": "left", "vertical-align": "top", "white-space": "pre-wrap"}


def text_table(frame: pd.DataFrame, decimals: int = 3) -> Styler:
    """Show a table that holds text: aligned left, wrapped, and escaped. Its index is shown if it has a name."""
    if not frame.index.is_unique:
        frame = frame.reset_index(drop=frame.index.name is None)
    text = frame.select_dtypes(["object", "string"]).columns
    frame = frame.copy()
    for column in text:
        frame[column] = frame[column].map(
            lambda cell: _UNBROKEN.sub("\\g<0>\u200b", cell.translate(_PICTURES)) if isinstance(cell, str) else cell
        )
    styler = frame.style.format(escape="html", precision=decimals, thousands=",", na_rep="–")
    styler = styler.format_index(escape="html", axis=0).set_properties(subset=text, **_LEFT)
    styler = styler.set_table_styles({column: [{"selector": "th", "props": "text-align: left"}] for column in text})
    return styler.hide() if frame.index.name is None else styler


def verdict_table(cells: pd.DataFrame, verdicts: pd.DataFrame) -> Styler:
    """Show cells with a sign and a colour for their verdicts.

    Args:
        cells: The cells' text.
        verdicts: A key of `VERDICTS` for each cell of ``cells`` that has one; other columns stay plain.
    """
    marked = cells.copy()
    for column in verdicts.columns:
        marked[column] = verdicts[column].map(lambda verdict: VERDICTS[verdict][0]) + " " + cells[column]
    colours = verdicts.map(lambda verdict: f"background-color: {VERDICTS[verdict][1]}")
    return text_table(marked).apply(lambda _: colours, axis=None, subset=list(verdicts.columns))


def stage_log(reports: Sequence[object]) -> str:
    """Return what `persodpo.Run.make` did, and take what it wrote meanwhile off a notebook's page.

    There is a line for all that was unchanged, one for steps of a kind (trainings, the tables of another run), and what each
    other stage reports; warnings stay.
    """
    if get_ipython() is not None:
        clear_output(wait=True)  # type: ignore[no-untyped-call]
    unchanged = [one for one in reports if isinstance(one, StageReport) and one.skipped]
    names = [_names(kind, group) for kind, group in groupby(unchanged, _kind)]
    lines = [f"unchanged: {', '.join(names)}"] if names else []
    lines += [warning for one in unchanged for warning in one.warnings]
    for kind, group in groupby([one for one in reports if one not in unchanged], _kind):
        alike = list(group)
        steps = [one for one in alike if isinstance(one, StageReport)]
        if kind is None or len(steps) < 2:
            lines += map(str, alike)
            continue
        lines.append(f"{_names(kind, steps)}: written in {sum(one.seconds for one in steps):.1f} s")
        lines += [warning for one in steps for warning in one.warnings]
    return "\n".join(lines)


def _names(kind: str | None, steps: Iterable[StageReport]) -> str:
    """Name steps, those of a kind after it in brackets."""
    names = [one.stage.removeprefix(kind or "").lstrip(", ") for one in steps]
    return f"{kind} ({', '.join(names)})" if kind else ", ".join(names)


def _kind(report: object) -> str | None:
    """Return what steps of a kind have in common: their run, where it is another one, or the word train."""
    stage = report.stage if isinstance(report, StageReport) else ""
    run, comma, _ = stage.partition(", ")
    return run if comma else ("train" if stage.startswith("train ") else None)
