"""The report of a small run: whole, safe whatever models wrote, honest about what is missing, and the same every time."""

from __future__ import annotations

import html
from html.parser import HTMLParser

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import profile_in
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from typer.testing import CliRunner

from persodpo.artifacts import RunFolder
from persodpo.cli import app
from persodpo.errors import PersodpoError
from persodpo.plots import style
from persodpo.report import write_report
from persodpo.tables import schema_of, write_table

HOSTILE = '<script>alert("1")</script></td></table><img src="https://evil.example/a.png" onerror=x> {{ 7 * 7 }} & more'
VOID = {"meta", "img", "br", "hr"}


class Page(HTMLParser):
    """Reads a page, and fails where tags do not close in order."""

    def __init__(self, text: str) -> None:  # noqa: D107
        super().__init__()
        self.text = text
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.headings: list[str] = []
        self.items: list[str] = []
        self.styles = ""
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self.stack.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            assert self.stack[-2] == "tr"
            self.tables[-1][-1].append("")
        elif tag == "h2":
            self.headings.append("")
        elif tag == "li":
            self.items.append("")

    def handle_endtag(self, tag):
        assert tag not in VOID
        assert self.stack.pop() == tag, self.getpos()

    def handle_data(self, data):
        if {"td", "th"} & set(self.stack):
            self.tables[-1][-1][-1] += data
        if "h2" in self.stack:
            self.headings[-1] += data
        if "li" in self.stack:
            self.items[-1] += data
        if "style" in self.stack:
            self.styles += data

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def table(self, *headings):
        return next(table for table in self.tables if tuple(table[0][: len(headings)]) == headings)


def assert_loads_nothing(page: Page, *, links=False) -> None:
    """Nothing runs, and nothing comes from elsewhere; a link that a reader may follow is no such thing."""
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "form", "base", "svg"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in {"srcset", "style"}], attributes
        for name in ("src", "href", "background", "poster", "action"):
            value = attributes.get(name) or ""
            if name == "src":
                assert not value or value.startswith("data:image/")
            else:
                assert not value.startswith("//")
                assert ":" not in value or (links and tag == "a" and value.startswith("https://"))
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    policy = page.named("meta")[1]
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def full(name: str, rows: list[dict]) -> pd.DataFrame:
    """Return rows of a table whose other columns are missing."""
    return pd.DataFrame(rows).reindex(columns=schema_of(name).names).astype(object).replace({np.nan: None})


def save(run: RunFolder, **tables: list[dict]) -> None:
    """Publish tables as stages do; a double underscore stands for a slash."""
    named = {name.replace("__", "/"): rows for name, rows in tables.items()}

    def build(targets):
        for name, rows in named.items():
            write_table(targets[name], name, full(name, rows))

    run.stage("made", inputs={}, settings={}, outputs=list(named), code=[], build=build, overwrite=True)


def dialogue(number: int) -> dict:
    names = {"dialogue_id": f"d{number}", "split": "valid", "dataset": "FoCus"}
    return names | {"personas": ["I like <b>boats</b>."], "context": "User1: Hi!\nUser2: Yes?", "reference": "A & B"}


def estimate(arm: str, metric: str, mean: float, low: float, high: float, reading: str) -> dict:
    counts = {"seeds": 1, "responses": 1000, "left_out": 0, "interval": "Wilson"}
    return counts | {"arm": arm, "metric": metric, "mean": mean, "low": low, "high": high, "reading": reading}


def draw(run: RunFolder, name: str, note: str, table: str) -> None:
    figure = Figure(figsize=(3, 1))
    figure.subplots().plot([0, 1], [0, 1])
    style.save(figure, name, run.figures, inputs={table: run.provenance(table)["sha256"], "code": "any"}, note=note)


@pytest.fixture
def run(profile):
    made = RunFolder(profile)
    comparison = {
        "arm": "perso", "baseline": "base", "metric": "failure_ratio", "reading": "all responses", "arm_seeds": 1,
        "baseline_seeds": 1, "dialogues": 1000, "difference": -0.1204, "low": -0.15, "high": -0.09, "p_value": 0.0002,
        "p_holm": 0.0004, "family": 1,
    }  # fmt: skip
    models = ["base", "perso/<i>"]
    save(
        made,
        dialogues=[dialogue(number) for number in range(6)],
        evaluation__responses=[
            {"dialogue_id": f"d{number}", "split": "valid", "model": model, "outcome": "ok" if number else "malformed"}
            | {"response": HOSTILE if number else None}
            for number in range(6)
            for model in models
        ],
        evaluation__scores=[
            {"dialogue_id": f"d{number}", "model": model, "quality": 0.25, "coherence": -1.0, "imputed": not number}
            for number in range(6)
            for model in models[:1]
        ],
        evaluation__estimates=[
            estimate("base", "failure_ratio", 0.39, 0.3603, 0.4206, "all responses"),
            estimate("base", "quality", 0.411, 0.39, 0.432, "failures imputed"),
        ],
        evaluation__comparisons=[comparison],
        pairs__gate=[
            {"pair_set": "simple", "check": "pairs", "value": 12452.0, "meaning": "rows"},
            {"pair_set": "perso", "check": "pairs", "value": 9184.0, "meaning": "rows"},
            {"pair_set": "perso", "check": "length_alone", "value": 0.84361, "meaning": "share of pairs"},
        ],
        scorers=[{"table": "scores", "scorer": "coherence", "quantity": "accuracy", "value": 0.9}],
        probes=[{"scorer": "c_score", "probe": HOSTILE, "expected": "1", "found": "-1", "passed": False}],
        training__perso__health=[
            {"name": "saturation", "level": "watch", "step": -1, "value": np.nan, "sentence": "Nothing to judge yet."}
        ],
        audit__findings=[
            {
                "id": "A1",
                "claim": "It is scrambled.",
                "verdict": "confirmed",
                "evidence": HOSTILE,
                "consequence": "None.",
            }
        ],
    )
    draw(made, "forest", 'Paired "differences" <in> one picture.', "evaluation/comparisons")
    return made


def page_of(run: RunFolder) -> Page:
    return Page(write_report(run).read_text())


def test_the_page_shows_what_the_tables_hold(run):
    page = page_of(run)
    assert page.table("Arm", "Seeds")[1] == [
        "base",
        "1",
        "1,000",
        "0.411 [0.390, 0.432]",
        "0.390 [0.360, 0.421]",
        "– (a)",
    ]
    assert "−0.120 [−0.150, −0.090]" in page.table("Difference of")[1]
    assert page.table("Check", "Simple")[1:] == [
        ["Pairs", "12,452", "9,184", "rows"], ["Length alone", "–", "0.844", "share of pairs"],
    ]  # fmt: skip
    assert page.table("Table", "Scorer")[1] == ["scores", "coherence", "accuracy", "0.900"]
    assert page.table("Scorer", "Probe")[1] == ["c_score", HOSTILE, "1", "-1", "no"]
    assert page.table("Arm", "Check")[1] == ["perso", "saturation", "watch", "–", "–", "Nothing to judge yet."]
    assert page.table("Finding")[1][:3] == ["A1", "It is scrambled.", "confirmed"]
    assert page.headings == [
        "Not in this run", "Results", "Pairs", "Scorers", "Training", "Audit", "Examples", "Figures", "Settings",
        "Provenance",
    ]  # fmt: skip
    assert run.profile.to_yaml() in html.unescape(page.text)


def test_provenance_names_every_table_with_its_hash(run):
    table = page_of(run).table("Table", "Rows")
    rows = {row[0]: dict(zip(table[0], row, strict=True)) for row in table[1:]}
    assert list(rows)[:2] == ["dialogues", "scorers"]
    assert {"training/perso/health", "evaluation/scores", "audit/findings"} <= set(rows)
    content = run.provenance("dialogues")
    assert rows["dialogues"]["sha256"] == content["sha256"]
    assert rows["dialogues"]["Rows"] == "6"
    assert rows["dialogues"]["Commit"].startswith((content["commit"] or "–")[:12])
    assert f"(1) python {content['versions']['python']}" in page_of(run).text


def test_four_dialogues_with_every_answer_side_by_side(run):
    page = page_of(run)
    tables = [table for table in page.tables if table[0] == ["", "base", "perso/<i>"]]
    assert len(tables) == 4
    assert tables[0][1:5] == [
        ["Answer", "–", "–"], ["Outcome", "malformed", "malformed"], ["Scores imputed", "yes", "–"],
        ["Quality", "0.250", "–"],
    ]  # fmt: skip
    assert tables[1][1] == ["Answer", HOSTILE, HOSTILE]
    assert ["Coherence", "−1.000", "–"] in tables[1]
    assert [f">d{number} <" in page.text for number in range(6)] == [True, True, False, True, True, False]


def test_whatever_models_wrote_stays_text_and_nothing_is_loaded(run):
    page = page_of(run)
    assert_loads_nothing(page)
    assert all(len({len(row) for row in table}) == 1 for table in page.tables)
    assert "<script" not in page.text
    assert "49 &amp; more" not in page.text
    assert page.items[1:].count("I like <b>boats</b>.") == 4
    assert [picture["alt"] for picture in page.named("img")] == ['Paired "differences" <in> one picture.']
    assert page.named("img")[0]["src"].startswith("data:image/png;base64,")
    assert {link["href"][1:] for link in page.named("a")} <= {attributes.get("id") for _, attributes in page.tags}


def test_the_same_run_gives_the_same_bytes(run):
    notebook(run, "01_first.ipynb")

    def files():
        folder = write_report(run).parent
        return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.html"))}

    first = files()
    assert len(first) == 2
    assert files() == first


def test_what_is_missing_is_one_line_each_and_no_heading(profile):
    run = RunFolder(profile)
    save(run, dialogues=[dialogue(1)])
    page = page_of(run)
    assert page.headings == ["Not in this run", "Settings", "Provenance"]
    assert page.items == [
        "No results, paired differences, answers to held-out dialogues: run persodpo evaluate --profile release.",
        "No ablations: the profile names none (evaluation.ablations).",
        "No gate of the pairs: run persodpo pairs --profile release.",
        "No reports on the scorers: scores come from published files (scoring.source).",
        "No probes of the scorers: scores come from published files (scoring.source).",
        "No training health: run persodpo train --profile release.",
        "No audit findings, effects of the corrections, published numbers beside ours: run persodpo audit "
        "--profile release.",
        "No figures: run persodpo figures --profile release.",
        "No executed notebooks: run persodpo reproduce --profile release.",
    ]
    save(run, **{"evaluation__comparisons": [], "evaluation__responses": []})
    items = page_of(run).items
    assert "No paired differences: table evaluation/comparisons has no rows." in items


def test_long_tables_are_folded(profile):
    run = RunFolder(profile)
    save(run, audit__parity=[{"group": "pairs", "quantity": f"count {row}", "ours": str(row)} for row in range(61)])
    page = page_of(run)
    assert "<summary>61 rows</summary>" in page.text
    assert page.table("Group")[61][:4] == ["pairs", "count 60", "–", "60"]


def test_a_run_with_nothing_is_refused(profile):
    run = RunFolder(profile)
    with pytest.raises(
        PersodpoError, match=r"Run release has no tables to report.*`persodpo evaluate --profile release`"
    ):
        write_report(run)
    assert not run.root.exists()


def test_figures_of_other_tables_are_left_out(run):
    draw(run, "quality", "Quality.", "scorers")
    save(run, scorers=[{"table": "scores", "scorer": "coherence", "quantity": "accuracy", "value": 0.1}])
    page = page_of(run)
    assert len(page.named("img")) == 1
    assert page.items[2].startswith(
        "No quality (drawn from tables that this run lacks or has made anew since): run persodpo"
    )


def test_edited_tables_and_foreign_folders_are_refused(run):
    report = write_report(run)
    before = report.read_bytes()
    path = run.path("audit/findings")
    write_table(path, "audit/findings", full("audit/findings", [{"id": "A2"}]))
    with pytest.raises(PersodpoError, match=r"audit/findings does not match its provenance file.*`persodpo audit"):
        write_report(run)
    assert report.read_bytes() == before
    path.unlink()
    save(run, extras=[{"dialogue_id": "d1", "model": "base", "words": 3}])
    write_table(run.path("extras"), "extras", full("extras", [{"dialogue_id": "d1", "model": "base", "words": 4}]))
    with pytest.raises(PersodpoError, match=r"Table extras does not match its provenance file"):
        write_report(run)
    run.forget("extras")
    (run.root / "report" / "index.html").rename(run.root / "report" / "mine.html")
    with pytest.raises(PersodpoError, match="holds something other than a report"):
        write_report(run)


def notebook(run: RunFolder, name: str) -> None:
    outputs = [
        new_output("stream", text="\x1b[31mred\x1b[0m <b>not bold</b>"),
        new_output(
            "display_data",
            {"text/html": f"<style>td {{ color: red }}</style><p>{HOSTILE}</p>"},
        ),
        new_output(
            "display_data", {"text/html": '<p onclick="x()" style="color: red">kept</p><svg onload="x()"></svg>'}
        ),
        new_output("display_data", {"application/javascript": "alert(2)", "text/plain": "js"}),
        new_output(
            "display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "m"}, "text/plain": "bar"}
        ),
        new_output("display_data", {"image/png": "iVBORw0KGgo=", "text/plain": "picture"}),
        new_output("display_data", {"text/html": "plain"}, metadata={"text/html": {"isolated": True}}),
    ]
    text = (
        "# 1 · First & last\n\n[next](02_second.ipynb#part) [lost](09_none.ipynb) [paper](https://arxiv.org/abs/2602.04493) "
        '[bad](javascript:alert(3)) <a href="da\tta:text/html,x">data</a> <iframe src="https://evil.example"></iframe>\n\n'
        "![far](https://evil.example/b.png) $x^2$"
    )
    cells = [new_markdown_cell(text), new_code_cell('print("<script>alert(4)</script>")', outputs=outputs)]
    run.notebooks.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells), run.notebooks / name)


def test_notebooks_become_pages_that_run_and_load_nothing(run):
    for name in ("01_first.ipynb", "02_second.ipynb"):
        notebook(run, name)
    index = page_of(run)
    links = [link["href"] for link in index.named("a") if link["href"].startswith("notebooks/")]
    assert links == ["notebooks/01_first.html", "notebooks/02_second.html"]
    assert "1 · First & last" in index.items
    page = Page((run.root / "report" / links[0]).read_text())
    assert_loads_nothing(page, links=True)
    assert [link.get("href") for link in page.named("a")] == [
        "../index.html", "02_second.html", None, "https://arxiv.org/abs/2602.04493", None, None,
    ]  # fmt: skip
    assert [picture["src"] for picture in page.named("img") if "src" in picture] == [
        "data:image/png;base64,iVBORw0KGgo="
    ]
    for kept in (
        "&lt;b&gt;not bold&lt;/b&gt;",
        "<p>kept</p>",
        "&lt;script&gt;alert",
        "<title>1 · First &amp; last</title>",
    ):
        assert kept in page.text
    for gone in ("color: red", "alert(2)", "onclick", "evil.example"):
        assert gone not in page.text


def test_a_broken_notebook_is_named(run):
    run.notebooks.mkdir(parents=True)
    (run.notebooks / "01_first.ipynb").write_text("{")
    with pytest.raises(PersodpoError, match=r"01_first\.ipynb cannot be read as a notebook"):
        write_report(run)


def test_the_command_writes_the_page(run, tmp_path):
    places = [f"paths.{name}={tmp_path / name}" for name in ("runs", "figures", "release")]
    assert profile_in(tmp_path) == run.profile
    done = CliRunner().invoke(
        app, ["report", "--profile", "release", *(word for place in places for word in ("--set", place))]
    )
    assert done.exit_code == 0, done.output
    assert done.output.replace("\n", "") == str(run.root / "report" / "index.html")
    assert (run.root / "report" / "index.html").is_file()
