"""Tables as they are printed: hand-compared cells, escapes, the structure of LaTeX, and files."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell

from persodpo.errors import PersodpoError
from persodpo.evaluation.exports import (
    TextTable,
    comparison_table,
    latex,
    markdown,
    results_table,
    write_exports,
)
from persodpo.evaluation.observations import EVERY, IMPUTED, SUCCESSES
from persodpo.metrics import number, p_text
from persodpo.runfolder import StageReport
from persodpo.show import stage_log, text_table


def estimate(arm: str, metric: str, mean: float, low=np.nan, high=np.nan, *, reading=EVERY, reason=None, **more):
    return {
        "arm": arm, "metric": metric, "reading": reading, "batch_size": None, "hardware": None, "seeds": 1,
        "responses": 1000, "left_out": 0, "mean": mean, "low": low, "high": high, "interval": "", "reason": reason,
    } | more  # fmt: skip


@pytest.fixture
def estimates():
    alone = {"batch_size": 1, "hardware": "cpu"}
    return pd.DataFrame([
        estimate("base", "failure_ratio", 0.39, 0.3603, 0.4206),
        estimate("base", "c_score", -0.1254, -0.2, -0.0004, reading=IMPUTED),
        estimate("base", "c_score", 1 / 3, 0.2, 0.4, reading=SUCCESSES, responses=610, left_out=390),
        estimate("base", "quality", np.nan, reading=IMPUTED, reason="no score in 3 of 1,000 dialogues"),
        estimate("base", "response_time", 0.76, 0.75, 0.77, **alone),
        estimate("perso_weighted", "failure_ratio", 0.148, 0.1273, 0.1714),
        estimate("perso_weighted", "c_score", 0.5, reading=IMPUTED, reason="9 dialogues are too few"),
        estimate("perso_weighted", "quality", 0.61, 0.6, 0.62, reading=IMPUTED),
        estimate("perso_weighted", "response_time", 3.0, 2.9, 3.1, batch_size=8, hardware="cpu"),
    ])  # fmt: skip


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
\par\footnotesize (a) no score in 3 of 1,000 dialogues
"""


def test_three_files_of_a_results_table_by_hand(tmp_path, estimates):
    write_exports(tmp_path / "tables", "results_imputed", estimates, results_table(estimates, IMPUTED))
    csv, md, tex = sorted((tmp_path / "tables").iterdir())
    assert md.read_text() == MARKDOWN
    assert LATEX in tex.read_text()
    assert r"\label{tab:results-imputed}" in tex.read_text()
    back = pd.read_csv(csv)
    assert back["mean"][2] == 1 / 3  # every digit
    assert back["reason"][3] == "no score in 3 of 1,000 dialogues"
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PersodpoError, match=r"cannot be created.*another folder"):
        write_exports(tmp_path / "file", "results", estimates, results_table(estimates, IMPUTED))


def test_successes_alone_and_times_of_two_conditions(estimates):
    gpu = estimate("base", "response_time", 0.1, 0.09, 0.11, batch_size=1, hardware="gpu")
    table = results_table(pd.concat([estimates[:5], pd.DataFrame([gpu])]), SUCCESSES)
    assert table.cells.to_numpy().tolist() == [
        ["base", "1", "610", "0.333 [0.200, 0.400]", "0.390 [0.360, 0.421]", "– (a)"]
    ]
    assert table.notes == ["(a) timed under several conditions, which have no common mean"]
    assert "successes alone" in table.caption
    with pytest.raises(PersodpoError, match="quality of base has neither value nor reason"):
        results_table(estimates.assign(reason=None), IMPUTED)


def test_comparison_table_by_hand():
    first = {
        "arm": "perso", "baseline": "base", "metric": "failure_ratio", "reading": EVERY, "arm_seeds": 3, "baseline_seeds": 1,
        "dialogues": 1000, "difference": -0.1204, "low": -0.15, "high": -0.09, "detectable": 0.043, "p_value": 0.0002,
        "p_at_floor": True, "p_holm": 0.0014,
        "exact_test": "sign test", "p_exact": 1e-9, "p_exact_holm": 2e-9, "family": 2, "reason": None,
    }  # fmt: skip
    numbers = ["difference", "low", "high", "detectable", "p_value", "p_holm", "p_exact", "p_exact_holm"]
    lost = dict.fromkeys(numbers, np.nan)
    lost |= {"exact_test": None, "metric": "response_time", "reason": "base was not timed"}
    table = comparison_table(pd.DataFrame([first, first | lost]))
    assert table.cells.to_numpy().tolist() == [
        ["perso − base", "Failure ratio", EVERY, "1,000", "−0.120 [−0.150, −0.090]", "<0.001", "≤0.001",
         "<0.001 (sign test)", "0.043"],
        ["perso − base", "Response time (s)", EVERY, "1,000", "– (a)", "", "", "", ""],
    ]  # fmt: skip
    assert table.notes == ["(a) base was not timed"]
    assert "corrected over 2 tests (Holm)" in table.caption
    assert table.caption.endswith("3 seeds an arm at most.")
    assert r"& \textless{}0.001 & $\leq$0.001 & \textless{}0.001 (sign test) &" in latex(table, "tab:c")


def test_numbers_as_text():
    assert [number(value, 2) for value in (-0.001, 0.0, -0.126, 1.005e3)] == ["0.00", "0.00", "−0.13", "1005.00"]
    assert [p_text(p) for p in (1e-9, 0.00049, 0.0005, 0.0496, 1.0)] == ["<0.001", "<0.001", "0.001", "0.050", "1.000"]


def table_of(rows, columns=("Arm_", "#")) -> TextTable:
    return TextTable("A 95 % caption & more", pd.DataFrame(rows, columns=list(columns)), ["(a) 5 % lost"])


def test_names_are_escaped_by_hand():
    name = r"50% of a_b & {c} $d #e ~f ^g \h <i> | [j]"
    assert (
        r"50\% of a\_b \& \{c\} \$d \#e \textasciitilde{}f \textasciicircum{}g \textbackslash{}h \textless{}i\textgreater{} "
        r"\textbar{} [j] & 1 \\"
    ) in latex(table_of([(name, "1")]), "tab:x")
    assert "\n{}[0.1] & two lines \\\\" in latex(table_of([("[0.1]", "two\nlines")]), "tab:x")
    assert r"| a\|b \*c\* \_d\_ \`e\` \<f\> | 1 |" in markdown(table_of([("a|b *c* _d_ `e` <f>", "1")]))


names = st.text(st.sampled_from("ab5%_&{}$#~^\\<>|[]*−– \n`"), min_size=1, max_size=12)


@settings(max_examples=40)
@given(st.lists(st.tuples(names, names), min_size=1, max_size=4))
def test_any_name_keeps_the_structure_of_a_table(rows):
    source = latex(table_of(rows), "tab:x")
    lines = source.split(r"\midrule")[1].split(r"\bottomrule", maxsplit=1)[0].strip("\n").split("\n")
    assert len(lines) == len(rows)
    assert all(line.endswith(r"\\") and len(re.split(r"(?<!\\)&", line)) == 2 for line in lines)
    assert re.findall(r"\\(begin|end)\{(\w+)\}", source) == [
        ("begin", "table"), ("begin", "tabular"), ("end", "tabular"), ("end", "table"),
    ]  # fmt: skip
    bare = re.sub(r"\\[{}\\]", "", source.replace("\\\\\n", "\n"))
    assert bare.count("{") == bare.count("}")
    assert len(re.findall(r"(?<!\\)\$", bare)) % 2 == 0
    # A bare per cent sign would comment the rest of its line away; the first line is the only comment.
    assert not re.search(r"(?<!\\)[%#_^~]", source.split("\n", 1)[1])
    assert not re.search(r"\\\\\n\s*[\[*]", source)
    pipes = markdown(table_of(rows)).split("\n")[2 : 4 + len(rows)]
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3 for line in pipes)


def test_shown_text_can_be_broken_and_is_escaped():
    shown = text_table(pd.DataFrame({"text": ["x" * 200 + " <b>"]})).to_html()
    assert "x" * 31 not in shown
    assert shown.count("x" * 30) == 6
    boxes = text_table(pd.DataFrame({"text": ["so " + "\x0e\ufffd" * 50]})).to_html()
    assert max(len(part) for part in re.findall("[\u240e\ufffd]+", boxes)) == 8
    assert "\x0e" not in boxes
    assert "&lt;b&gt;" in shown


def test_a_log_says_in_one_line_what_was_unchanged():
    reports = [
        StageReport("score", True, {"scores": 3}, 0.0, ("warning: probes failed",)),
        StageReport("pairs", True, {"pairs/perso": 2}, 0.0, ("a card",)),
        StageReport("train simple", False, {"training/simple/log": 1}, 2.0),
    ]
    first, second, third = stage_log(reports).splitlines()
    assert first == "unchanged: score, pairs"
    assert second == "warning: probes failed"
    assert third.startswith("train simple: ")


def test_the_log_has_a_line_for_steps_of_a_kind_and_keeps_their_warnings():
    def made(stage, *notes):
        return StageReport(stage, False, {}, 2.0, notes)

    reports = [
        StageReport("pairs", True, {}, 0.0), StageReport("train base", True, {}, 0.0),
        made("train simple", "80 pairs"), made("train perso", "warning: one row"),
        made("mini-corrected, score", "a tally"), made("mini-corrected, pairs"), made("evaluate", "what it says"),
    ]  # fmt: skip
    assert stage_log(reports).splitlines() == [
        "unchanged: pairs, train (base)",
        "train (simple, perso): written in 4.0 s",
        "warning: one row",
        "mini-corrected (score, pairs): written in 4.0 s",
        "evaluate: written in 2.0 s",
        "  what it says",
    ]
    assert "80 pairs" in stage_log(reports[:3])  # a step by itself says all


def test_a_notebook_shows_the_log_in_place_of_what_was_written_meanwhile(capsys):
    shell = InteractiveShell.instance()
    try:
        shell.run_cell("from persodpo.show import stage_log\nprint('on the way')\nprint(stage_log([]), 'end')")
        shown = capsys.readouterr().out
    finally:
        InteractiveShell.clear_instance()
    assert shown.index("on the way") < shown.index("\033[2K\r") < shown.index("end")  # how a terminal clears its line
