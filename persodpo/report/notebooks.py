"""Executed notebooks in, the bodies of pages out: nothing in them runs or loads anything.

nbconvert's own pages fetch require.js, MathJax and more from elsewhere; here only the cells are taken, and of their HTML
only tags that format text, with pictures that the notebook holds in itself. What models wrote into an output stays text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import bleach
from nbconvert import HTMLExporter

from persodpo.errors import PersodpoError

_TAGS = frozenset({
    "a", "abbr", "b", "blockquote", "br", "caption", "code", "dd", "del", "div", "dl", "dt", "em", "h1", "h2", "h3", "h4",
    "h5", "h6", "hr", "i", "img", "kbd", "li", "ol", "p", "pre", "s", "span", "strong", "sub", "sup", "table", "tbody", "td",
    "tfoot", "th", "thead", "tr", "ul",
})  # fmt: skip
_ATTRIBUTES = {
    "a": {"href", "title"}, "img": {"src", "alt", "width", "height"},
    "td": {"colspan", "rowspan"}, "th": {"colspan", "rowspan", "scope"},
}  # fmt: skip
#: Links that may stay: to elsewhere, which load nothing by themselves, to the page itself, to a file beside it.
_LINK = re.compile(r"(https?://\S+|#\S*|[\w.-]+(#\S*)?)\Z")
_PICTURE = re.compile(r"data:image/(png|jpeg|gif|svg\+xml);base64,")
#: Blocks whose content is no text: removing the tag alone would show it.
_NO_TEXT = re.compile(r"<(style|script)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_NOTEBOOK_LINK = re.compile(r' href="([^":/#]+)\.ipynb(?:#[^"]*)?"')
_HEADING = re.compile(r"<h1[^>]*>(.*?)</h1>", re.DOTALL)


@dataclass(frozen=True)
class NotebookPage:
    """An executed notebook as a page.

    Attributes:
        name: Its file's name, without suffix.
        title: Its first heading as plain text, its name if it has none.
        body: Its cells as HTML that is safe to show.
    """

    name: str
    title: str
    body: str


def notebook_pages(notebooks: Iterable[Path]) -> list[NotebookPage]:
    """Convert executed notebooks; links between them lead to their pages.

    Raises:
        PersodpoError: A file is no notebook.
    """
    files = sorted(notebooks)
    exporter = HTMLExporter(template_name="basic", exclude_anchor_links=True)  # type: ignore[no-untyped-call]
    return [_page(exporter, file, {other.stem for other in files}) for file in files]


def _page(exporter: HTMLExporter, file: Path, others: Collection[str]) -> NotebookPage:
    try:
        cells, _ = exporter.from_filename(str(file))
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise PersodpoError(
            f"{file} cannot be read as a notebook ({error}); run it again with `persodpo reproduce`, or remove it."
        ) from error
    body = bleach.clean(
        _NO_TEXT.sub("", cells), tags=_TAGS, attributes=_allowed, protocols={"http", "https", "data"}, strip=True
    )
    body = _NOTEBOOK_LINK.sub(lambda found: f' href="{found[1]}.html"' if found[1] in others else "", body)
    heading = _HEADING.search(body)
    title = html.unescape(bleach.clean(heading[1], tags=set(), strip=True)) if heading else file.stem
    return NotebookPage(file.stem, title, body)


def _allowed(tag: str, name: str, value: str) -> bool:
    """Tell whether an attribute may stay: pictures only from the page itself, links of known forms."""
    if name == "class":
        return True
    if name not in _ATTRIBUTES.get(tag, ()):
        return False
    if name == "src":
        return bool(_PICTURE.match(value))
    return name != "href" or bool(_LINK.match(value))
