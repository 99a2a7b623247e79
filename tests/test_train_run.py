"""Training an arm from a pairs table: what is written, what is logged, what survives a kill, what is refused."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from test_policy import EXAMPLES, SETTINGS
from typer.testing import CliRunner

from persodpo.cli import app
from persodpo.config import load_profile
from persodpo.errors import PersodpoError
from persodpo.figures.curves import PAPER_RUN, arm_curves
from persodpo.release import published
from persodpo.stages.train import rate_warning
from persodpo.tables import check_table, write_table
from persodpo.training import run
from persodpo.training.arms import split_prompts
from persodpo.training.policy import load_policy, make_small_policy

pytestmark = pytest.mark.usefixtures("one_thread")

OVERRIDES = [
    "training.epochs=2", "training.prompts_per_step=2", "training.health_tokens=8", "training.held_out=0.2",
    "training.max_length=128", "training.warmup_steps=1",
    "training.learning_rate=0.001",
]  # fmt: skip


def pairs_table(prompts: int = 10) -> pd.DataFrame:
    texts = [text for _, text in EXAMPLES]
    rows = [
        {
            "prompt": f"{EXAMPLES[0][0]} {number}", "chosen": texts[(number + c) % 12],
            "rejected": texts[(number + 6 + r) % 12], "score_chosen": 0.9 - c / 10,
            "score_rejected": 0.1 + r / 10 + number / 50,
        }
        for number in range(prompts) for c in range(2) for r in range(3)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module", autouse=True)
def frequent_evaluations():
    """Evaluate and write a checkpoint at every second step."""
    with patch.object(run, "FEWEST_STEPS", 2):
        yield


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_small_policy(EXAMPLES, SETTINGS, tmp_path_factory.mktemp("policy") / "small")


@pytest.fixture(scope="module")
def profile():
    return load_profile("release", OVERRIDES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, policy, profile):
    folder = tmp_path_factory.mktemp("arm") / "perso_weighted"
    return folder, run.train_arm(pairs_table(), "perso_weighted", policy, folder, profile=profile, key="k")


@settings(max_examples=40)
@given(st.lists(st.integers(0, 8), min_size=2, max_size=40), st.floats(0.01, 0.99), st.integers(0, 9))
def test_no_prompt_is_trained_on_and_held_out(numbers, share, seed):
    pairs = pd.DataFrame({"prompt": [f"p{number}" for number in numbers]})
    count = pairs["prompt"].nunique()
    if count < 2:
        with pytest.raises(PersodpoError, match="needs two"):
            split_prompts(pairs, share, seed)
        return
    train, held_out = split_prompts(pairs, share, seed)
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert len(train) + len(held_out) == len(pairs)
    assert held_out["prompt"].nunique() == min(count - 1, max(1, round(share * count)))


def test_an_arm_leaves_a_model_that_loads_and_nothing_to_unpickle(trained, policy):
    folder, _ = trained
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "trainer_state.json", "arm.json", "README.md", "tokenizer.json"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pth")) or name.startswith("checkpoint")}
    after, before = load_policy(folder)[0].state_dict(), load_policy(policy)[0].state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    record = json.loads((folder / "arm.json").read_text())
    assert record["policy"].startswith("small policy, 0.0 M")
    assert (record["train_pairs"], record["held_out_pairs"], record["steps"]) == (48, 12, 8)


def test_the_log_starts_at_weight_times_log_2_and_has_every_kind(trained, tmp_path):
    log = trained[1].log
    write_table(tmp_path / "log.parquet", "training/perso_weighted/log", log)
    assert check_table(tmp_path / "log.parquet", "training/perso_weighted/log") == len(log)
    train = log[log["kind"] == "train"]
    assert train["step"].tolist() == list(range(1, 9))
    assert train["loss"].iloc[0] == pytest.approx(train["weight"].iloc[0] * math.log(2), abs=1e-6)
    assert train["grad_norm"].gt(0).all()
    assert train["weight"].ne(1).any()
    assert log.loc[log["kind"] == "eval", "step"].tolist() == [2, 4, 6, 8]
    assert log.loc[log["kind"] == "health", "step"].tolist() == [0, 2, 4, 6, 8]
    assert log.loc[log["kind"] == "eval", ["loss", "reward_margin", "reward_accuracy"]].notna().all(axis=None)
    assert trained[1].generations["step"].tolist() == [step for step in (0, 2, 4, 6, 8) for _ in range(2)]
    assert trained[1].generations["prompt"].str.startswith("User1").all()


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
tests, policy, folder = sys.argv[1:]
sys.path.insert(0, tests)
from pathlib import Path
import test_train_run as t
profile = t.load_profile("release", t.OVERRIDES)
t.run.FEWEST_STEPS = 2
t.run.train_arm(t.pairs_table(), "perso_weighted", policy, Path(folder), profile=profile, key="k")
"""


@pytest.mark.slow
def test_a_killed_training_goes_on_from_its_checkpoint_to_the_same_end(tmp_path, policy, profile, trained):
    folder = tmp_path / "perso_weighted"
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(policy), str(folder)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        started = time.monotonic()
        while not list(folder.glob("checkpoint-*/trainer_state.json")) and time.monotonic() - started < 120:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert list(folder.glob("checkpoint-*/trainer_state.json"))
    assert not run.is_trained(folder, "k")
    again = run.train_arm(pairs_table(), "perso_weighted", policy, folder, profile=profile, key="k")
    pd.testing.assert_frame_equal(again.log.drop(columns="policy"), trained[1].log.drop(columns="policy"))
    after, whole = (load_policy(path)[0].state_dict() for path in (folder, trained[0]))
    assert all(torch.equal(after[name], whole[name]) for name in whole)


def test_checkpoints_of_other_settings_are_not_gone_on_from(tmp_path, policy, profile, trained):
    folder = tmp_path / "perso_weighted"
    left = folder / "checkpoint-6"
    left.mkdir(parents=True)
    (left / "trainer_state.json").write_text("{}")
    (folder / "arm.json").write_text('{"key": "other"}')
    made = run.train_arm(pairs_table(), "perso_weighted", policy, folder, profile=profile, key="k")
    pd.testing.assert_frame_equal(made.log, trained[1].log)


def test_is_trained_only_with_its_key_its_end_and_its_weights(trained, tmp_path):
    assert run.is_trained(trained[0], "k")
    assert not run.is_trained(trained[0], "other")
    assert not run.is_trained(tmp_path, "k")
    (tmp_path / "arm.json").write_text('{"key": "k", "steps": 3}')
    assert not run.is_trained(tmp_path, "k")
    copied = shutil.copytree(trained[0], tmp_path / "copied")
    content = (copied / "model.safetensors").read_bytes()
    for edited in (content[:1000], content[:-1] + bytes([content[-1] ^ 1]), None):
        (copied / "model.safetensors").unlink()
        if edited is not None:
            (copied / "model.safetensors").write_bytes(edited)
        assert not run.is_trained(copied, "k")
        (copied / "model.safetensors").write_bytes(content)
    assert run.is_trained(copied, "k")


@pytest.mark.parametrize("names", [["optimizer.pt"], ["trainer_state.json", "rng_state.pth"]])
def test_damaged_checkpoints_are_set_aside(tmp_path, policy, profile, trained, names, capsys):
    """The newest, then the one before; where every one is damaged training begins anew."""
    folder, save = tmp_path / "perso_weighted", run._CheckpointRecord.on_save

    def interrupted(self, args, state, control, **kwargs):
        save(self, args, state, control)
        if state.global_step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), patch.object(run._CheckpointRecord, "on_save", interrupted):
        run.train_arm(pairs_table(), "perso_weighted", policy, folder, profile=profile, key="k")
    for checkpoint, name in zip(sorted(folder.glob("checkpoint-*"), reverse=True), names, strict=False):
        (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:-40])
    made = run.train_arm(pairs_table(), "perso_weighted", policy, folder, profile=profile, key="k")
    printed = capsys.readouterr().out
    assert "checkpoint-4 is damaged" in printed
    assert ("checkpoint-2 is damaged" in printed) == (len(names) == 2)
    pd.testing.assert_frame_equal(made.log, trained[1].log)
    assert run.is_trained(folder, "k")
    assert not list(folder.glob("*checkpoint*"))


def test_a_learning_rate_that_is_too_high_leaves_no_arm(tmp_path, policy):
    profile = load_profile("release", [*OVERRIDES, "training.learning_rate=1000", "training.epochs=20"])
    with pytest.raises(PersodpoError, match=r"not a number|loss is"):
        run.train_arm(pairs_table(), "perso", policy, tmp_path / "perso", profile=profile, key="k")
    assert not run.is_trained(tmp_path / "perso", "k")
    assert not (tmp_path / "perso" / "model.safetensors").exists()


def test_a_folder_of_adapters_is_trained_on_from_where_they_were(tmp_path, policy, capsys):
    """The first round's weights are the second round's reference, and stay in what is saved."""
    quick = [*OVERRIDES, "training.epochs=0.5", "training.warmup_steps=0"]
    profile = load_profile("release", [*quick, "training.lora_rank=2", "training.learning_rate=0.05"])
    first = tmp_path / "first"
    made = run.train_arm(pairs_table(), "perso", policy, first, profile=profile, key="k").log.query("kind == 'train'")
    assert made["loss"].iloc[0] == pytest.approx(math.log(2), abs=1e-6)
    assert (first / "adapter_model.safetensors").is_file()
    assert run.is_trained(first, "k")
    merged, tokenizer = load_policy(first)
    assert "merged into their base" in capsys.readouterr().out
    base = load_policy(policy)[0]
    ids = torch.tensor([tokenizer("User1: hello")["input_ids"]])
    with torch.no_grad():
        logits = [model(ids).logits for model in (base, merged)]
        logits.append(PeftModel.from_pretrained(base, str(first))(ids).logits)
    assert not torch.allclose(logits[1], logits[0], atol=1e-3)
    assert torch.allclose(logits[1], logits[2], atol=1e-5)
    for rank in ("null", "4"):
        again = load_profile("release", [*quick, f"training.lora_rank={rank}"])
        log = run.train_arm(pairs_table(), "perso", first, tmp_path / rank, profile=again, key="k").log
        train = log.query("kind == 'train'")
        assert train["loss"].iloc[0] == pytest.approx(math.log(2), abs=1e-6)
        assert train["logps_chosen"].iloc[0] != pytest.approx(made["logps_chosen"].iloc[0], abs=1e-3)


def test_an_unknown_arm_is_one_sentence(tmp_path):
    done = CliRunner().invoke(app, ["train", "--arm", "pers", "--set", f"home={tmp_path}"])
    assert isinstance(done.exception, PersodpoError)
    assert "no arm 'pers'; there are simple, perso, perso_weighted, corrected" in str(done.exception)


def test_curves_of_arms_stand_beside_the_papers_on_one_axis(trained):
    curves, labels = arm_curves({"perso_weighted": trained[1].log}, published.training_curves())
    assert labels == {"perso_weighted": "perso_weighted: small policy, 0.0 M parameters"}
    ours = curves[curves["run"] == "perso_weighted"]
    assert ours["epoch"].iloc[-1] == 2
    paper = curves[curves["run"] != "perso_weighted"]
    assert set(paper["run"]) == {PAPER_RUN}
    assert paper["epoch"].max() == pytest.approx(1700 * 16 / 9184)


def test_a_real_policy_at_the_rate_of_the_small_one_is_warned_of():
    real = ["policy.model=someone/model"]
    assert rate_warning(load_profile("mini")) == rate_warning(load_profile("paper", real)) == []
    (warning,) = rate_warning(load_profile("mini", real))
    assert warning.startswith("warning: training.learning_rate is 0.0003")
