"""Tables in; CSV, Markdown and LaTeX (booktabs) out.

CSV holds a tidy table with all its digits; Markdown and LaTeX hold a `TextTable` made from the same tidy table. What stands
in cells is escaped, as arms are named by users.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pandas as pd

from persodpo.evaluation.cells import TextTable
from persodpo.runfolder import write_atomically

#: What LaTeX reads as a command, and how it prints it instead.
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "−": "$-$", "–": "--", "\n": " ",
}  # fmt: skip
_LATEX_SPECIAL = re.compile("|".join(map(re.escape, _LATEX)))
_MARKDOWN_SPECIAL = re.compile(r"([\\|*_`<>\[\]#~])")
#: An interval at the end of a cell, of which Markdown needs no escapes.
_INTERVAL = re.compile(r"^([−\d.]+) \[([−\d.]+), ([−\d.]+)\]$")


def csv(tidy: pd.DataFrame) -> str:
    """Return a tidy table as CSV: every column, every digit, missing values empty."""
    return tidy.to_csv(index=False, lineterminator="\n")


def escape_markdown(text: str) -> str:
    """Return ``text`` so that Markdown prints it as it is, in a cell of a table too."""
    if _INTERVAL.match(text):
        return text
    return _MARKDOWN_SPECIAL.sub(r"\\\1", text).replace("\n", " ")


def escape_latex(text: str) -> str:
    r"""Return ``text`` so that LaTeX prints it as it is.

    A leading bracket or star is shielded: at the start of a row, the ``\\`` before it would take it for its own.
    """
    escaped = _LATEX_SPECIAL.sub(lambda found: _LATEX[found.group()], text)
    return f"{{}}{escaped}" if escaped.lstrip().startswith(("[", "*")) else escaped


def markdown(table: TextTable) -> str:
    """Return a table as Markdown: caption, pipe table, notes."""
    lines = [
        escape_markdown(table.caption),
        "",
        _pipes(map(escape_markdown, table.columns)),
        _pipes(["---"] * len(table.columns)),
    ]
    lines += [_pipes(map(escape_markdown, row)) for row in table.rows]
    if table.notes:
        lines += ["", *(f"{escape_markdown(note)}  " for note in table.notes)]
    return "\n".join(lines) + "\n"


def _pipes(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def latex(table: TextTable, label: str) -> str:
    """Return a table as a LaTeX ``table`` with the rules of booktabs.

    Args:
        table: The table.
        label: Its name for references; letters, digits, colons and hyphens.

    Returns:
        The source; text columns stand left, all others right.
    """
    frame = pd.DataFrame(
        [[escape_latex(cell) for cell in row] for row in table.rows],
        columns=[escape_latex(name) for name in table.columns],
    )
    tabular = frame.style.hide(axis="index").to_latex(hrules=True, column_format=_alignment(table))
    notes = [rf"\par\footnotesize {escape_latex(note)}" for note in table.notes]
    lines = [
        "% needs \\usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\caption{{{escape_latex(table.caption)}}}",
        rf"\label{{{label}}}", tabular.rstrip("\n"), *notes, r"\end{table}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _alignment(table: TextTable) -> str:
    """Set columns of numbers right, others left."""
    columns = zip(*table.rows, strict=True)
    return "".join("r" if all(re.match(r"[−–<\d]|$", cell) for cell in column) else "l" for column in columns)


def write_exports(folder: Path, name: str, tidy: pd.DataFrame, table: TextTable) -> list[Path]:
    """Write a table as CSV, Markdown and LaTeX.

    Args:
        folder: Where; it is created.
        name: Base name of the files, and the LaTeX label after ``tab:``.
        tidy: For the CSV.
        table: The same, as it is printed.

    Returns:
        The three files, each written under a temporary name and renamed.

    Raises:
        PersodpoError: The disk is full or the folder cannot be written.
    """
    texts = {"csv": csv(tidy), "md": markdown(table), "tex": latex(table, f"tab:{name.replace('_', '-')}")}
    files = []
    for suffix, text in texts.items():
        path = folder / f"{name}.{suffix}"
        write_atomically(path, partial(_write, text=text))
        files.append(path)
    return files


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
