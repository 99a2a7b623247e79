"""The miniature: five models made on the spot, one of them served, and arms that answer what they were not trained on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from persodpo.artifacts import RunFolder, read_json
from persodpo.config import load_profile, with_overrides
from persodpo.errors import PersodpoError
from persodpo.figures import figure_names
from persodpo.miniature import models
from persodpo.reproduce import notebook_files
from persodpo.settings import Profile
from persodpo.stages import ablate

#: A world, models and trainings so small that all notebooks run in two or three minutes.
SMALL = {
    "miniature.train": 60, "miniature.valid": 24, "miniature.model_dialogues": 600, "miniature.finish_steps": 60,
    "policy.small.hidden_size": 64, "policy.small.intermediate_size": 128, "policy.small.steps": 300,
    "policy.small.batch_tokens": 2048, "scoring.compute.small.coherence.examples": 800,
    "scoring.compute.small.nli.examples": 3000, "scoring.compute.accept_failed_probes": "[coherence, c_score, ue_score]",
    "training.arms": "[perso, corrected]", "training.epochs": 1, "training.health_prompts": 2,
    "evaluation.seeds": "[44, 45]", "evaluation.timed": 4, "evaluation.pairs": "[[perso, base], [corrected, perso]]",
    "pairs.sets": "[perso]", "evaluation.ablated": "perso",
    "evaluation.ablations": (
        "[{name: without coherence, without: coherence}, {name: apart, changes: [pairs.low_quantile=0.2]}]"
    ),
}  # fmt: skip

#: Figures that show response times.
SHOWING_TIMES = {"response_times", "figure_2a_arms", "forest", "forest_successes", "ablations"}


def mini(folder: Path, **settings: object) -> Profile:
    places = [f"paths.{name}={folder / name}" for name in ("runs", "figures", "release")]
    return load_profile("mini", [*places, *(f"{key}={value}" for key, value in (SMALL | settings).items())])


@pytest.mark.parametrize("name", models.FINISHES)
def test_habits_do_what_their_names_say(name):
    habit = models.FINISHES[name]
    short = "Sure. You would, as old buildings fascinate you."
    long = "Yes. It was opened in 1466, which is in your own Arden. Emil Adler designed it. It is made of oak."
    right = {text: json.dumps({"response": text}) for text in (short, long)}
    made = {text: habit(text) for text in (short, long)}
    if name == "good":
        assert made == right
    elif name == "impersonal":
        assert json.loads(made[short])["response"] == "Sure. You would."
        assert json.loads(made[long])["response"] == long.replace(", which is in your own Arden", "")
    elif name == "looping":
        assert made[short] == right[short]
        assert json.loads(made[long])["response"] == " ".join(
            ["It was opened in 1466, which is in your own Arden."] * 6
        )
    else:
        assert made[short] == right[short]
        with pytest.raises(json.JSONDecodeError):
            json.loads(made[long])


def test_an_unknown_model_is_refused_by_name(tmp_path):
    profile = mini(tmp_path)
    with pytest.raises(PersodpoError, match=r"no miniature model 'bad'; there are base, good"):
        models.make_model("bad", tmp_path, profile.miniature, profile.prompts, profile.policy.small)


def test_a_world_too_small_for_models_is_refused(tmp_path):
    profile = mini(tmp_path, **{"miniature.model_dialogues": 3})
    with pytest.raises(PersodpoError, match=r"A world of 3 dialogues is too small"):
        models.make_model("base", tmp_path, profile.miniature, profile.prompts, profile.policy.small)


def test_models_learn_from_no_dialogue_that_a_run_asks_about(tmp_path):
    table = models.own_dialogues(tmp_path, mini(tmp_path).miniature)
    assert len(table) == SMALL["miniature.model_dialogues"]
    assert table["dialogue_id"].min() >= f"mini-{models.FIRST}"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ("{name: x, changes: [generation.temperature=1]}", "'generation.temperature=1' is no ablation"),
        ("{name: x, changes: [scoring.weights.coherence=0]}", "'scoring.weights.coherence=0' is no ablation"),
        ("{name: x}", "'x' changes nothing"),
        ("{name: x, without: coherence}, {name: x, without: c_score}", "two ablations have one name"),
    ],
)
def test_what_would_ask_anew_is_no_ablation(changes, says, tmp_path):
    with pytest.raises(PersodpoError, match=re.escape(says)):
        mini(tmp_path, **{"evaluation.ablations": f"[{changes}]"})


def test_a_signal_that_is_left_out_gives_its_weight_to_the_others(tmp_path):
    profile = mini(tmp_path)
    settings = ablate.overrides(profile.evaluation.ablations[0], profile)
    weights = with_overrides(profile, settings).scoring.weights
    assert weights.coherence == 0
    assert weights.compliance / weights.c_score == pytest.approx(0.32 / 0.20)


def reproduce(profile: Profile, folder: Path) -> subprocess.CompletedProcess:
    """Run the notebooks as the command does, where no published file is at hand and no network is."""
    source = folder / "profile.yaml"
    source.write_text(profile.to_yaml())
    environment = {name: value for name, value in os.environ.items() if name != "PERSODPO_RELEASE"}
    environment |= {"HF_HUB_OFFLINE": "1", "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    environment["no_proxy"] = "127.0.0.1,localhost"
    command = [sys.executable, "-m", "persodpo.cli", "reproduce", "--profile", str(source)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    folder = tmp_path_factory.mktemp("mini")
    profile = mini(folder)
    done = reproduce(profile, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(done.stdout.splitlines()) == len(notebook_files())
    return RunFolder(profile)


@pytest.mark.slow
def test_all_notebooks_run_without_published_files(run):
    assert {copy.name for copy in run.notebooks.glob("*.ipynb")} == {path.name for path in notebook_files()}
    assert "persodpo fetch release" in (run.notebooks / "07_audit.ipynb").read_text()
    start = (run.notebooks / "00_start_here.ipynb").read_text()
    assert "make it with" not in start, "the start page runs last, so that its panels are filled"
    assert {path.stem for path in run.figures.glob("*.json")} >= set(figure_names(run)) - {"pair_sources_simple"}


@pytest.mark.slow
def test_five_models_answer_and_one_was_asked_over_http(run):
    responses = run.read("responses")
    assert set(responses["model"]) == set(models.FINISHES)
    assert responses.groupby("model").size().eq(60).all()
    served = responses[responses["model"] == "impersonal"]
    assert served["batch_size"].isna().all()
    assert served["response_time"].gt(0).all()
    outcomes = pd.crosstab(responses["model"], responses["outcome"])
    assert outcomes.loc["good", "ok"] == outcomes["ok"].max()
    assert (outcomes.drop(index=["good", "impersonal"], columns="ok").sum(axis=1) > 0).any()


@pytest.mark.slow
def test_every_arm_and_seed_answers_every_held_out_dialogue(run):
    responses, scores = run.read("evaluation/responses"), run.read("evaluation/scores")
    assert set(responses["model"]) == {"base", "perso", "perso@45", "corrected", "corrected@45"}
    assert responses.groupby("model")["dialogue_id"].nunique().eq(24).all()
    assert set(responses["split"]) == {"valid"}
    timed = responses[responses["response_time"].notna()]
    assert timed.groupby("model").size().eq(4).all()
    assert timed["batch_size"].eq(1).all()
    assert scores["quality"].notna().all()
    compared = run.read("evaluation/comparisons")
    assert compared[["arm_seeds", "baseline_seeds"]].drop_duplicates().to_numpy().tolist() == [[2, 1], [2, 2]]
    assert compared.loc[compared["metric"] == "response_time", "difference"].notna().all()


@pytest.mark.slow
def test_ablations_differ_in_their_pairs_and_answer_the_same_dialogues(run):
    made = run.read("ablations/pairs").set_index("ablation")
    assert made.loc["apart", "pairs"] < len(run.read("pairs/perso"))
    assert made.loc["apart", "shared_pairs"] == made.loc["apart", "pairs"], "wider thresholds only leave pairs out"
    responses = run.read("ablations/responses")
    assert responses.groupby("model")["dialogue_id"].nunique().to_dict() == {"without coherence": 24, "apart": 24}
    estimates = run.read("ablations/estimates")
    assert set(estimates["arm"]) == {"perso", "without coherence", "apart"}
    assert estimates.loc[estimates["metric"] == "quality", "mean"].notna().all()


@pytest.mark.slow
def test_a_second_run_has_nothing_to_do(run):
    before = {path: path.read_bytes() for path in run.root.rglob("*.parquet")}
    started = time.perf_counter()
    done = reproduce(run.profile, run.root.parents[1])
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("unchanged, skipped") == len(notebook_files())
    assert time.perf_counter() - started < 30
    assert {path: path.read_bytes() for path in run.root.rglob("*.parquet")} == before


@pytest.mark.slow
def test_another_run_with_the_same_seed_plots_the_same(run, tmp_path):
    """Everything is made anew, models included; only times are measured, not made."""
    again = mini(tmp_path)
    done = reproduce(again, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    folders = run.figures, RunFolder(again).figures
    one, two = ({path.stem: read_json(path)["plotted_sha256"] for path in folder.glob("*.json")} for folder in folders)
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} <= SHOWING_TIMES
    assert len(one) > 2 * len(SHOWING_TIMES)
