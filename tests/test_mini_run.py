"""The miniature: five models made on the spot, one of them served, and arms that answer what they were not trained on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pandas.testing import assert_frame_equal

from persodpo.config import Profile, load_profile
from persodpo.errors import PersodpoError
from persodpo.miniature import models
from persodpo.runfolder import RunFolder
from persodpo.stages import ablate
from persodpo.stages.policy import made_model

#: A world, models and trainings so small that all notebooks run in two or three minutes.
SMALL = {
    "miniature.train": 60, "miniature.valid": 24,
    "policy.small.hidden_size": 64, "policy.small.steps": 300,
    "policy.small.batch_tokens": 2048,
    "scoring.accept_failed_probes": "[coherence, c_score, ue_score]",
    "training.arms": "[perso, corrected]", "training.epochs": 1,
    "evaluation.seeds": "[44, 45]", "evaluation.timed": 4, "evaluation.pairs": "[[perso, base], [corrected, perso]]",
    "pairs.sets": "[perso]", "evaluation.ablated": "perso",
    "evaluation.ablations": (
        "[{name: without coherence, without: coherence}, {name: apart, changes: [pairs.low_quantile=0.2]}]"
    ),
}  # fmt: skip

TINIER = {
    "generation.models": "[good, cut]",
    "scoring.accept_failed_probes": "[coherence, c_score, ue_score, persona_distance]",
    "training.arms": "[perso]", "evaluation.seeds": "[44]", "training.health_tokens": 8, "miniature.valid": 20,
    "evaluation.pairs": "[[perso, base]]",
    "evaluation.ablations": "[]", "evaluation.timed": 1,
}  # fmt: skip


def mini(folder: Path, **settings: object) -> Profile:
    places = [f"home={folder}"]
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


def test_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(PersodpoError, match=r"no miniature model 'bad'; there are base, good"):
        made_model(RunFolder(mini(tmp_path)), "miniature/bad")


def test_models_learn_from_no_dialogue_that_a_run_asks_about(tmp_path):
    table = models.own_dialogues(tmp_path, 44)
    assert len(table) == models.DIALOGUES
    assert table["dialogue_id"].min() >= f"mini-{models.FIRST}"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ("{name: x, changes: [generation.temperature=1]}", "'generation.temperature=1' is no ablation"),
        ("{name: x, changes: [scoring.weights.coherence=0]}", "'scoring.weights.coherence=0' is no ablation"),
        ("{name: x}", "'x' changes nothing"),
        ("{name: x, without: coherence}, {name: x, without: c_score}", "'x' stands twice"),
    ],
)
def test_what_would_ask_anew_is_no_ablation(changes, says, tmp_path):
    with pytest.raises(PersodpoError, match=re.escape(says)):
        mini(tmp_path, **{"evaluation.ablations": f"[{changes}]"})


def test_a_signal_that_is_left_out_gives_its_weight_to_the_others(tmp_path):
    profile = mini(tmp_path)
    weights = ablate.varied(profile, profile.evaluation.ablations[0]).scoring.weights
    assert weights.coherence == 0
    assert weights.compliance / weights.c_score == pytest.approx(0.32 / 0.20)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(tmp_path):
    """Everything is made anew, models included, in two processes; only times are measured, not made."""
    code = "import sys; from persodpo import stages; from persodpo.config import load_profile\n"
    code += "stages.make(load_profile(sys.argv[1]), 'evaluate')"
    tables = []
    for name in ("one", "two"):
        profile = mini(tmp_path / name, **TINIER)
        (tmp_path / name).mkdir()
        (tmp_path / name / "profile.yaml").write_text(profile.to_yaml())
        command = [sys.executable, "-c", code, str(tmp_path / name / "profile.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        run = RunFolder(profile)
        log = run.read("training/perso/log")
        tables.append([run.read("pairs/perso"), log, run.read("evaluation/scores")])
    for one, two in zip(*tables, strict=True):
        assert_frame_equal(one, two)
