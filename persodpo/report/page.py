"""Everything a run has in, the pages of its report out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from persodpo.artifacts import RunFolder, read_text
from persodpo.errors import PersodpoError
from persodpo.evaluation.cells import TextTable
from persodpo.folders import refuse_others, replaced
from persodpo.report.contents import Lack, by_command, command, sections, tables_of
from persodpo.report.examples import Example, examples
from persodpo.report.notebooks import NotebookPage, notebook_pages
from persodpo.report.pictures import Picture, pictures
from persodpo.report.provenance import provenance_table

INDEX = "index.html"
#: How a cell of a column of numbers starts: a number, with its interval or test behind it, a dash, or nothing.
_NUMBER = re.compile(r"[−<]?\d[\d,.]*( |$)|–|$")
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class _Cell:
    text: str
    numeric: bool


def write_report(run: RunFolder) -> Path:
    """Write the report of a run: one page that needs no network, and the executed notebooks as pages beside it.

    Args:
        run: The run folder; ``report/`` in it is replaced.

    Returns:
        The page.

    Raises:
        PersodpoError: The run has no tables, one of them was edited, a notebook cannot be read, another process works in
            the folder, ``report/`` holds something other than a report, or the disk fails. An earlier report stays.
    """
    if not tables_of(run):
        raise PersodpoError(
            f"Run {run.profile.name} has no tables to report ({run.root}); make some first, for example with "
            f"`{command(run, 'evaluate')}`."
        )
    folder = run.root / "report"
    with run.locked():
        refuse_others(folder, INDEX, "a report")
        notebooks = notebook_pages(run.notebooks.glob("*.ipynb"))
        page = _index(run, notebooks)

        def fill(scratch: Path) -> None:
            (scratch / INDEX).write_text(page, encoding="utf-8")
            if notebooks:
                (scratch / "notebooks").mkdir()
            for notebook in notebooks:
                html = _render("notebook.html.jinja", title=notebook.title, body=notebook.body)
                (scratch / "notebooks" / f"{notebook.name}.html").write_text(html, encoding="utf-8")

        return replaced(folder, fill) / INDEX


def _index(run: RunFolder, notebooks: list[NotebookPage]) -> str:
    """Return the page as HTML."""
    names = tables_of(run)
    provenance = provenance_table(run, names)
    digests = {name: str(run.provenance(name)["sha256"]) for name in names}
    parts, lacks = sections(run, names)
    drawn, stale = pictures(run, digests)
    shown = _examples(run, names)
    settings = read_text(run.root / "profile.yaml")
    others = _other_lacks(run, drawn=drawn, stale=stale, shown=shown, notebooks=notebooks, settings=settings)
    return _render(
        "report.html.jinja",
        name=run.profile.name,
        parts=parts,
        lacks=by_command([*lacks, *others]),
        pictures=drawn,
        examples=shown,
        settings=settings,
        notebooks=notebooks,
        provenance=provenance,
    )


def _examples(run: RunFolder, names: list[str]) -> list[Example]:
    if not {"dialogues", "evaluation/responses"} <= set(names):
        return []
    scores = run.read("evaluation/scores") if "evaluation/scores" in names else None
    return examples(run.read("dialogues"), run.read("evaluation/responses"), scores)


def _other_lacks(
    run: RunFolder,
    *,
    drawn: list[Picture],
    stale: list[str],
    shown: list[Example],
    notebooks: list[NotebookPage],
    settings: str | None,
) -> list[Lack]:
    """Say what of figures, examples, notebooks and settings the run lacks."""
    old = f"{', '.join(stale)} (drawn from tables that this run lacks or has made anew since)"
    lacks = [
        (not drawn and not stale, Lack("figures", command(run, "figures"))),
        (bool(stale), Lack(old, command(run, "figures"))),
        (not shown, Lack("answers to held-out dialogues", command(run, "evaluate"))),
        (not notebooks, Lack("executed notebooks", command(run, "reproduce"))),
        (not settings, Lack("No settings: profile.yaml is missing; every stage writes it.", None)),
    ]
    return [lack for holds, lack in lacks if holds]


def _cells(table: TextTable) -> list[list[_Cell]]:
    """Return a table's cells, and whether each stands in a column of numbers."""
    columns = list(zip(*table.rows, strict=True))
    numeric = [all(_NUMBER.match(text) for text in column) for column in columns]
    return [[_Cell(text, right) for text, right in zip(row, numeric, strict=True)] for row in table.rows]


def _render(template: str, **content: Any) -> str:
    """Fill a template; all that is not marked as safe is escaped."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cells"] = _cells
    return environment.get_template(template).render(**content) + "\n"
