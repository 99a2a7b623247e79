"""What `make reproduce` and `make reproduce PROFILE=release` left: run after both, by `make test-reproduced`."""

from __future__ import annotations

import re
import subprocess
import sys

import nbformat
import pandas as pd
import pytest

from persodpo.config import load_profile
from persodpo.files import PROJECT
from persodpo.miniature import models
from persodpo.reproduce import notebook_files
from persodpo.runfolder import RunFolder
from persodpo.stages.figures import figure_names
from persodpo.stages.heldout import BASE, arms_of
from persodpo.tables import check_table

pytestmark = pytest.mark.reproduced

TRAINED = ("log", "health", "generations")
RANKED = ["dialogues", "responses", "scores", "thresholds", "extras", "pairs/simple", "pairs/perso", "pairs/gate"]
EVALUATED = [f"evaluation/{name}" for name in ("responses", "scores", "judged", "results", "estimates", "comparisons")]


def run_of(name: str) -> RunFolder:
    run = RunFolder(load_profile(name))
    assert run.notebooks.is_dir(), f"runs/{name} is not there: make reproduce PROFILE={name}"
    return run


@pytest.mark.parametrize("name", ["mini", "release"])
def test_every_notebook_ran_without_a_warning(name):
    run = run_of(name)
    assert {copy.name for copy in run.notebooks.glob("*.ipynb")} == {path.name for path in notebook_files()}
    for copy in run.notebooks.glob("*.ipynb"):
        book = nbformat.read(copy, as_version=4)
        outputs = [out for cell in book.cells for out in cell.get("outputs", [])]
        assert outputs, copy.name
        assert [out["text"] for out in outputs if out.get("name") == "stderr"] == [], copy.name
    assert "make it with" not in (run.notebooks / "explore.ipynb").read_text(), "it runs last"
    assert {path.stem for path in run.figures.glob("*.json")} >= set(figure_names(run))


def test_the_miniature_wrote_its_tables():
    run = run_of("mini")
    arms = [model for model in arms_of(run.profile)["model"] if model != BASE]
    tables = [*RANKED, *EVALUATED, "answers", "probes", "scorers"]
    tables += [f"training/{arm}/{table}" for arm in arms for table in TRAINED]
    tables += [f"ablations/{name}" for name in ("pairs", "responses", "scores", "judged", "estimates", "comparisons")]
    assert all(check_table(run.path(table), table) > 0 for table in tables)


def test_the_release_wrote_its_tables():
    run = run_of("release")
    tables = [
        *RANKED,
        *EVALUATED,
        *(f"training/{arm}/{table}" for arm in run.profile.training.arms for table in TRAINED),
    ]
    tables += [f"audit/{name}" for name in ("parity", "findings", "corrections")]
    assert all(check_table(run.path(table), table) > 0 for table in tables)


def test_five_models_answer_and_one_was_asked_over_http():
    run = run_of("mini")
    responses = run.read("responses")
    assert set(responses["model"]) == set(models.FINISHES)
    assert responses.groupby("model").size().eq(run.profile.miniature.train).all()
    served = responses[responses["model"] == "impersonal"]
    assert served["batch_size"].isna().all()
    assert served["response_time"].gt(0).all()
    outcomes = pd.crosstab(responses["model"], responses["outcome"])
    assert outcomes.loc["good", "ok"] == outcomes["ok"].max()
    assert (outcomes.drop(index=["good", "impersonal"], columns="ok").sum(axis=1) > 0).any()


def test_every_arm_and_seed_answers_every_held_out_dialogue():
    run = run_of("mini")
    responses, scores = run.read("evaluation/responses"), run.read("evaluation/scores")
    assert set(responses["model"]) == set(arms_of(run.profile)["model"])
    assert responses.groupby("model")["dialogue_id"].nunique().eq(run.profile.miniature.valid).all()
    timed = responses[responses["response_time"].notna()]
    assert timed.groupby("model").size().eq(run.profile.evaluation.timed).all()
    assert timed["batch_size"].eq(1).all()
    assert scores["quality"].notna().all()


def test_an_arm_beats_base_and_simple_by_the_judge_and_does_not_repeat_itself():
    run = run_of("mini")
    tests = (
        run.read("evaluation/comparisons").query("metric == 'grounded' and arm == 'corrected'").set_index("baseline")
    )
    assert tests.loc[["base", "simple"], "difference"].gt(0).all()
    assert tests.loc[["base", "simple"], "p_holm"].lt(0.05).all()
    repeats = run.read("evaluation/judged").merge(arms_of(run.profile), on="model").groupby("arm")["repeats"].mean()
    assert repeats["corrected"] <= 0.1


def test_ablations_differ_in_their_pairs_and_answer_the_same_dialogues():
    run = run_of("mini")
    made = run.read("ablations/pairs").set_index("ablation")
    assert made.loc["completions as generated", "shared_pairs"] == made.loc["completions as generated", "pairs"]
    assert made.loc["each sentence counted once", "shared_pairs"] < made.loc["each sentence counted once", "pairs"]
    responses = run.read("ablations/responses")
    assert responses.groupby("model")["dialogue_id"].nunique().eq(run.profile.miniature.valid).all()
    assert set(run.read("ablations/estimates")["arm"]) == {run.profile.evaluation.ablated, *made.index}


def test_a_second_run_has_nothing_to_do():
    """Its time is measured by `make bench-mini`."""
    run = run_of("mini")
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*.parquet")}
    command = [sys.executable, "-m", "persodpo.cli", "reproduce", "--profile", "mini"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PROJECT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert {path: path.stat().st_mtime_ns for path in run.root.rglob("*.parquet")} == before
    for number, stage in enumerate(("generate", "score", "pairs", "train", "evaluate", "figure"), start=1):
        (copy,) = run.notebooks.glob(f"0{number}_*.ipynb")
        text = copy.read_text()
        assert f"{stage}" in text
        assert "unchanged: " in text
        assert not re.search(r"- written in|drawn in", text), copy.name
