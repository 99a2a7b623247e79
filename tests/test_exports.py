"""Tables as they are printed: hand-compared cells, escapes, the structure of LaTeX, and files."""

from __future__ import annotations

import io
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persodpo.errors import PersodpoError
from persodpo.evaluation.cells import TextTable, comparison_table, number, p_text, results_table
from persodpo.evaluation.exports import csv, escape_latex, escape_markdown, latex, markdown, write_exports
from persodpo.evaluation.observations import EVERY, IMPUTED, SUCCESSES


def estimate(
    arm: str, metric: str, mean: float, low=np.nan, high=np.nan, *, reading=EVERY, reason=None, **more
) -> dict:
    return {
        "arm": arm, "metric": metric, "reading": reading, "batch_size": None, "hardware": None, "seeds": 1,
        "responses": 1000, "left_out": 0, "mean": mean, "low": low, "high": high, "interval": "", "reason": reason,
    } | more  # fmt: skip


@pytest.fixture
def estimates():
    alone = {"batch_size": 1, "hardware": "cpu"}
    rows = [
        estimate("base", "failure_ratio", 0.39, 0.3603, 0.4206),
        estimate("base", "c_score", -0.1254, -0.2, -0.0004, reading=IMPUTED),
        estimate("base", "c_score", 0.25, 0.2, 0.3, reading=SUCCESSES, responses=610, left_out=390),
        estimate("base", "quality", np.nan, reading=IMPUTED, reason="no score in 3 of 1,000 dialogues"),
        estimate("base", "response_time", 0.76, 0.75, 0.77, **alone),
        estimate("perso_weighted", "failure_ratio", 0.148, 0.1273, 0.1714),
        estimate("perso_weighted", "c_score", 0.5, reading=IMPUTED, reason="9 dialogues are too few"),
        estimate("perso_weighted", "quality", 0.61, 0.6, 0.62, reading=IMPUTED),
        estimate("perso_weighted", "response_time", 3.0, 2.9, 3.1, batch_size=8, hardware="cpu"),
    ]
    return pd.DataFrame(rows)


MARKDOWN = """\
Means with 95 % intervals, failures imputed in text metrics; shares of responses with Wilson's interval. One seed an arm: \
intervals cover the draw of dialogues, not that of another training.

| Arm | Seeds | Responses | Quality | C score | Failure ratio | Response time (s) |
| --- | --- | --- | --- | --- | --- | --- |
| base | 1 | 1,000 | – (a) | −0.125 [−0.200, 0.000] | 0.390 [0.360, 0.421] | 0.760 [0.750, 0.770] |
| perso\\_weighted | 1 | 1,000 | 0.610 [0.600, 0.620] | 0.500 (b) | 0.148 [0.127, 0.171] | – (c) |

(a) no score in 3 of 1,000 dialogues  
(b) 9 dialogues are too few  
(c) answered in batches, which have no response time of their own  
"""  # noqa: W291 - two spaces break a line of Markdown

LATEX = r"""
\begin{tabular}{lrrrrrr}
\toprule
Arm & Seeds & Responses & Quality & C score & Failure ratio & Response time (s) \\
\midrule
base & 1 & 1,000 & -- (a) & $-$0.125 [$-$0.200, 0.000] & 0.390 [0.360, 0.421] & 0.760 [0.750, 0.770] \\
perso\_weighted & 1 & 1,000 & 0.610 [0.600, 0.620] & 0.500 (b) & 0.148 [0.127, 0.171] & -- (c) \\
\bottomrule
\end{tabular}
"""


def test_results_table_by_hand(estimates):
    table = results_table(estimates)
    assert markdown(table) == MARKDOWN
    assert LATEX in latex(table, "tab:results")


def test_successes_alone_and_labels(estimates):
    table = results_table(estimates, SUCCESSES, arms=["base"], labels={"base": "Untuned"}, decimals=2)
    assert table.columns == ("Arm", "Seeds", "Responses", "C score", "Failure ratio", "Response time (s)")
    cells = ("Untuned", "1", "610", "0.25 [0.20, 0.30]", "0.39 [0.36, 0.42]", "0.76 [0.75, 0.77]")
    assert table.rows == (cells,)
    assert "successes alone" in table.caption


def test_machines_have_columns_of_their_own(estimates):
    gpu = estimate("perso_weighted", "response_time", 0.1, 0.09, 0.11, batch_size=None, hardware="gpu")
    table = results_table(pd.concat([estimates[:-1], pd.DataFrame([gpu])]))
    assert table.columns[-2:] == ("Response time (s), cpu", "Response time (s), gpu")
    assert [row[-2:] for row in table.rows] == [
        ("0.760 [0.750, 0.770]", "– (b)"), ("– (d)", "0.100 [0.090, 0.110]"),
    ]  # fmt: skip
    assert table.notes[1] == "(b) timed on cpu"
    twice = results_table(pd.concat([estimates, pd.DataFrame([gpu])]))
    assert "timed under several conditions, which have no common mean" in " ".join(twice.notes)


def test_a_cell_without_value_and_reason_does_not_render(estimates):
    with pytest.raises(PersodpoError, match="Quality of base has neither value nor reason"):
        results_table(estimates.assign(reason=None))
    with pytest.raises(PersodpoError, match="no estimates with wishes"):
        results_table(estimates, "wishes")
    with pytest.raises(PersodpoError, match="Arm 'simple' has no estimates"):
        results_table(estimates, arms=["simple"])


@pytest.fixture
def comparisons():
    first = {
        "arm": "perso", "baseline": "base", "metric": "failure_ratio", "reading": EVERY, "arm_seeds": 3, "baseline_seeds": 1,
        "dialogues": 1000, "difference": -0.1204, "low": -0.15, "high": -0.09, "detectable": 0.043, "p_value": 0.0002,
        "p_at_floor": True, "p_holm": 0.0004,
        "exact_test": "sign test", "p_exact": 1e-9, "p_exact_holm": 2e-9, "family": 2, "reason": None,
    }  # fmt: skip
    lost = {"difference": np.nan, "low": np.nan, "high": np.nan, "detectable": np.nan, "p_value": np.nan}
    lost |= {"p_holm": np.nan, "exact_test": None, "p_exact": np.nan, "p_exact_holm": np.nan}
    return pd.DataFrame([first, first | lost | {"metric": "response_time", "reason": "base was not timed"}])


def test_comparison_table_by_hand(comparisons):
    table = comparison_table(comparisons, labels={"perso": "PersoDPO"})
    assert table.rows == (
        ("PersoDPO − base", "Failure ratio", EVERY, "1,000", "−0.120 [−0.150, −0.090]", "<0.001", "<0.001",
         "<0.001 (sign test)", "0.043"),
        ("PersoDPO − base", "Response time (s)", EVERY, "1,000", "– (a)", "", "", "", ""),
    )  # fmt: skip
    assert table.notes == ("(a) base was not timed",)
    assert "corrected over 2 tests (Holm)" in table.caption
    assert table.caption.endswith("3 seeds an arm at most.")
    assert "& \\textless{}0.001 (sign test) &" in latex(table, "tab:c")
    with pytest.raises(PersodpoError, match="no comparisons to print"):
        comparison_table(comparisons[:0])


def test_numbers_as_text():
    assert [number(value, 2) for value in (-0.001, 0.0, -0.126, 1.005e3)] == ["0.00", "0.00", "−0.13", "1005.00"]
    assert [p_text(p) for p in (1e-9, 0.00049, 0.0005, 0.0496, 1.0)] == ["<0.001", "<0.001", "0.001", "0.050", "1.000"]


# --- escapes ---------------------------------------------------------------------------------------------------------


def test_names_are_escaped_by_hand():
    name = r"50% of a_b & {c} $d #e ~f ^g \h <i> | [j]"
    assert escape_latex(name) == (
        r"50\% of a\_b \& \{c\} \$d \#e \textasciitilde{}f \textasciicircum{}g \textbackslash{}h \textless{}i\textgreater{} "
        r"\textbar{} [j]"
    )
    assert escape_markdown("a|b *c* _d_ `e` <f>") == r"a\|b \*c\* \_d\_ \`e\` \<f\>"
    assert escape_latex("[0.1]") == "{}[0.1]"
    assert escape_latex("\n*") == "{} *"
    assert escape_latex("two\nlines") == "two lines"


def body(source: str) -> list[list[str]]:
    """Read the rows of a tabular back: cells between unescaped ampersands, each row ended by two backslashes."""
    inner = source.split(r"\midrule")[1].split(r"\bottomrule", maxsplit=1)[0].strip("\n")
    lines = inner.split("\n")
    assert all(line.endswith(r"\\") for line in lines)
    return [re.split(r"(?<!\\)&", line.removesuffix(r"\\")) for line in lines]


names = st.text(st.sampled_from("ab5%_&{}$#~^\\<>|[]*−– \n`"), min_size=1, max_size=12)


@settings(max_examples=40)
@given(st.lists(st.tuples(names, names), min_size=1, max_size=4))
def test_latex_of_any_name_has_the_structure_of_a_table(rows):
    source = latex(TextTable("A 95 % caption & more", ("Arm_", "#"), tuple(rows), ("(a) 5 % lost",)), "tab:x")
    assert [len(cells) for cells in body(source)] == [2] * len(rows)
    assert re.findall(r"\\(begin|end)\{(\w+)\}", source) == [
        ("begin", "table"), ("begin", "tabular"), ("end", "tabular"), ("end", "table"),
    ]  # fmt: skip
    assert [source.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    bare = re.sub(r"\\[{}\\]", "", source.replace("\\\\\n", "\n"))
    depth = 0
    for sign in re.findall(r"[{}]", bare):
        depth += 1 if sign == "{" else -1
        assert depth >= 0
    assert depth == 0
    assert len(re.findall(r"(?<!\\)\$", bare)) % 2 == 0
    # A bare per cent sign would comment the rest of its line away; the first line is the only comment.
    assert not re.search(r"(?<!\\)[%#_^~]", source.split("\n", 1)[1])
    assert not re.search(r"\\\\\n\s*[\[*]", source)


@given(st.lists(st.tuples(names, names), min_size=1, max_size=4))
def test_markdown_of_any_name_keeps_its_columns(rows):
    lines = markdown(TextTable("A caption", ("Arm", "x"), tuple(rows), ())).rstrip("\n").split("\n")
    assert len(lines) == 4 + len(rows)
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3 for line in lines[2:])


# --- files -----------------------------------------------------------------------------------------------------------


def test_csv_keeps_every_digit(estimates):
    table = estimates.assign(mean=[1 / 3, *estimates["mean"][1:]])
    back = pd.read_csv(io.StringIO(csv(table)))
    assert back["mean"][0] == 1 / 3
    pd.testing.assert_series_equal(back["low"], estimates["low"])
    assert back["reason"][3] == "no score in 3 of 1,000 dialogues"


def test_three_files_of_one_table(tmp_path, estimates):
    table = results_table(estimates)
    files = write_exports(tmp_path / "tables", "results_imputed", estimates, table)
    assert [path.name for path in files] == ["results_imputed.csv", "results_imputed.md", "results_imputed.tex"]
    assert files[1].read_text() == MARKDOWN
    assert r"\label{tab:results-imputed}" in files[2].read_text()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PersodpoError, match=r"cannot be created.*another folder"):
        write_exports(tmp_path / "file", "results", estimates, table)
