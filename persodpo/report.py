"""A run's executed notebooks in, ``report/index.html`` and a page a notebook out: nothing in them runs or loads anything."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from nbconvert import HTMLExporter
from nbconvert.preprocessors.sanitize import SanitizeHTML

from persodpo.errors import PersodpoError
from persodpo.files import read_json, read_text, refuse_others, replace_folder, write_text
from persodpo.runfolder import RunFolder

INDEX = "index.html"
#: What HTML of a cell may hold; nbconvert's own list lacks paragraphs, headings and the cells of a table's head.
_TAGS = (
    "a abbr b blockquote br caption code dd del div dl dt em h1 h2 h3 h4 h5 h6 hr i kbd li mark ol p pre s span strong "
    "sub sup table tbody td tfoot th thead tr ul"
)
_ATTRIBUTES = {"*": ["class"], "a": ["href"], "td": ["colspan", "rowspan"], "th": ["colspan", "rowspan"]}
#: Blocks whose content is no text: removing the tag alone would show it.
_NO_TEXT = re.compile(r"<(style|script)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
#: The policy keeps a browser from running or loading anything, whatever the body holds.
_PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><title>{title}</title><style>
html {{ color-scheme: light dark; font: 1rem/1.5 system-ui; }} body {{ max-width: 66rem; margin: auto; padding: 1.5rem; }}
pre {{ padding: 1ex; overflow: auto; background: #8881; }} .output_subarea pre {{ background: none; white-space: pre-wrap; }}
pre, code, table {{ font-size: .85rem; }} .prompt {{ font-size: .75rem; }} img {{ max-width: 100%; height: auto; }}
.output_subarea {{ overflow-x: auto; }} table {{ border-collapse: collapse; }} tr {{ border-bottom: 1px solid #8884; }}
th, td {{ padding: .3rem .7rem; text-align: left; vertical-align: top; white-space: pre-wrap; }}
</style><p><a href="index.html">Run {run}</a></p>{body}</html>
"""


def write_report(run: RunFolder) -> Path:
    """Write ``report/`` in a run folder anew, and return its index.

    Raises:
        PersodpoError: No notebook was executed, one cannot be read, ``report/`` holds something other than a report, or
            the disk fails. An earlier report stays.
    """
    files = sorted(run.notebooks.glob("*.ipynb"))
    if not files:
        raise PersodpoError(f"{run.notebooks} holds no executed notebook; run {run.command('reproduce')} first.")
    refuse_others(run.root / "report", INDEX, "a report")
    pages = {f"{file.stem}.html": _body(file) for file in files}
    headings = {name: re.search(r"<h\d[^>]*>(.*?)</h\d>", body, re.DOTALL) for name, body in pages.items()}
    titles = {name: re.sub(r"<[^>]*>", "", heading[1]) if heading else name for name, heading in headings.items()}
    links = "".join(f'<li><a href="{name}">{title}</a></li>' for name, title in titles.items())
    settings = html.escape(read_text(run.root / "profile.yaml") or run.profile.to_yaml())
    index = f"<h1>Run {run.profile.name}</h1><ul>{links}</ul>{_made_with(run)}<h2>Profile</h2><pre>{settings}</pre>"

    def fill(scratch: Path) -> None:
        for name, body in {**pages, INDEX: index}.items():
            title = titles.get(name, f"Run {run.profile.name}")
            write_text(scratch / name, _PAGE.format(title=title, run=run.profile.name, body=body))

    return replace_folder(run.root / "report", fill) / INDEX


def _body(file: Path) -> str:
    """Return a notebook's cells as HTML: pictures as they are, other outputs as text or cleaned; links lead to pages."""
    cleaner: Any = SanitizeHTML(tags=_TAGS.split(), attributes=_ATTRIBUTES, strip=True)  # type: ignore[no-untyped-call]
    clean = {"clean_html": lambda text: cleaner.sanitize_html_tags(_NO_TEXT.sub("", text))}
    exporter = HTMLExporter(template_name="basic", sanitize_html=True, exclude_anchor_links=True, filters=clean)  # type: ignore[no-untyped-call]
    try:
        return re.sub(r'href="([^":/#]+)\.ipynb', r'href="\1.html', exporter.from_filename(str(file))[0])
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise PersodpoError(f"{file} cannot be read as a notebook ({error}); run it again or remove it.") from error


def _made_with(run: RunFolder) -> str:
    """Return the commits and versions that the run's tables were made with, a line each as HTML."""
    records = map(read_json, run.root.rglob("*.parquet.json"))
    lines = {(str(one.get("commit")), ", ".join(map(" ".join, one.get("versions", {}).items()))) for one in records}
    return "".join(f"<p>Made at commit {html.escape(' with '.join(line))}.</p>" for line in sorted(lines))
