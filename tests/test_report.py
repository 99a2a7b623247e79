"""The report: an index of the executed notebooks, pictures kept, and nothing of what models wrote runs or loads."""

from __future__ import annotations

from html.parser import HTMLParser

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from persodpo.errors import PersodpoError
from persodpo.report import write_report
from persodpo.runfolder import RunFolder

SCRIPT = '<script>alert("x")</script><img src="https://evil.example/a.png" onerror="alert(1)">'
HOSTILE = f'<p onclick="alert(2)">kept</p>{SCRIPT}<svg onload="alert(3)"></svg><a href="javascript:alert(4)">a</a>'
DATA = {
    "text/html": HOSTILE, "text/markdown": HOSTILE, "text/plain": HOSTILE, "image/svg+xml": f"<svg>{SCRIPT}</svg>",
    "application/javascript": "alert(5)", "text/vnd.mermaid": HOSTILE, "image/png": "iVBORw0KGgo=",
}  # fmt: skip


@pytest.fixture
def run(profile):
    run = RunFolder(profile)
    run.notebooks.mkdir(parents=True)
    outputs = [new_output("stream", text=HOSTILE)] + [new_output("display_data", {kind: DATA[kind]}) for kind in DATA]
    for name, heading in (("02_second", "2 · Second"), ("01_first", "1 · First & last")):
        text = new_markdown_cell(f"# {heading}\n\n[next](02_second.ipynb) {HOSTILE}\n\n| head |\n| --- |\n| cell |")
        book = new_notebook(cells=[text, new_code_cell("x = '<script>'", outputs=outputs)])
        nbformat.write(book, run.notebooks / f"{name}.ipynb")
    return run


def tags(path):
    """Return the tags of a page, each with its attributes."""
    found, parser = [], HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(path.read_text())
    return found


def test_the_index_links_every_executed_notebook_in_order(run):
    index = write_report(run)
    links = [attributes["href"] for tag, attributes in tags(index) if tag == "a"]
    assert links[-2:] == ["01_first.html", "02_second.html"]
    assert index.read_text().index("1 · First &amp; last") < index.read_text().index("2 · Second")
    assert ("a", {"href": "02_second.html"}) in tags(index.with_name("01_first.html"))
    (run.notebooks / "01_first.ipynb").unlink()
    assert sorted(path.name for path in write_report(run).parent.iterdir()) == ["02_second.html", "index.html"]


def test_pictures_stay_and_nothing_of_the_outputs_runs_or_loads(run):
    page = tags(write_report(run).with_name("01_first.html"))
    names = {tag for tag, _ in page}
    assert {"h1", "p", "table", "th", "td", "img"} <= names
    assert not names & {"script", "iframe", "object", "embed", "form", "base", "link", "svg"}
    assert not [name for _, attributes in page for name in attributes if name.startswith("on")]
    assert not [attributes for tag, attributes in page if tag == "a" and ":" in attributes.get("href", "")]
    sources = [attributes["src"] for tag, attributes in page if tag == "img"]
    assert f"data:image/png;base64,{DATA['image/png']}" in sources
    assert all(source.startswith("data:image/") for source in sources)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in page


def test_without_executed_notebooks_or_with_a_broken_one_there_is_a_sentence(run):
    (run.notebooks / "01_first.ipynb").write_text("{")
    with pytest.raises(PersodpoError, match=r"01_first\.ipynb"):
        write_report(run)
    for path in run.notebooks.iterdir():
        path.unlink()
    with pytest.raises(PersodpoError, match=r"persodpo reproduce --profile release"):
        write_report(run)
    assert not (run.root / "report").exists()
