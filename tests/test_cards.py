"""Cards of a run: what they say, that the Hub's own classes and loaders read them, and what others do with the pairs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import QUICK_TRAINING, profile_in
from datasets import load_dataset
from huggingface_hub import DatasetCard, ModelCard

from persodpo import stages
from persodpo.cards import plain, write_model_card
from persodpo.config import Profile
from persodpo.files import read_json, write_json
from persodpo.runfolder import RunFolder, provenance_path
from persodpo.stages.score import score_settings
from persodpo.tables import schema_of
from persodpo.training.policy import load_policy

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = ("good", "fair", "b|ad_<script>")


def frames() -> dict[str, pd.DataFrame]:
    """Three models' answers to each of twelve dialogues: a good one, one between the thresholds, and a failure."""
    ids = [f"d{number:02d}" for number in range(12)]
    splits = ["train"] * 10 + ["valid"] * 2
    asked = pd.DataFrame({
        "dialogue_id": ids, "split": splits, "dataset": "made up",
        "personas": [[f"I own {n} boats."] for n in range(12)],
        "context": [f"User1: Is it far to harbour {number}?" for number in range(12)], "reference": "Not far.",
    })  # fmt: skip
    rows = []
    for (number, dialogue), (rank, model) in ((d, m) for d in enumerate(ids) for m in enumerate(MODELS)):
        text = f"Harbour {number} is {rank + 1} miles from your boats"
        whole = json.dumps({"response": text})
        rows.append({
            "dialogue_id": dialogue, "split": splits[number], "model": model,
            "completion": whole if rank < 2 else whole[:-4], "response": text,
            "outcome": "ok" if rank < 2 else "truncated", "finish_reason": None, "response_time": 1.0, "batch_size": 1,
            "hardware": "cpu", "coherence": 0.5, "c_score": 0.5, "ue_score": 0.5, "persona_distance": 0.5, "words": 8,
            "imputed": rank == 2, "compliance": 0.5, "quality": 0.9 - rank * 0.3,
        })  # fmt: skip
    answers = pd.DataFrame(rows)
    thresholds = pd.DataFrame({"name": ["low", "high", "target_words", "mean_words"], "value": [0.4, 0.8, 53.0, 53.4]})
    return {"dialogues": asked, "responses": answers, "scores": answers, "thresholds": thresholds}


def do(run: RunFolder, name: str) -> None:
    """Run one stage on the tables that are there."""
    stages.STAGES[name].run(run)
    stages.STAGES[name].after(run)


def run_of(profile: Profile) -> RunFolder:
    """Make a run's pairs for real, from tables that earlier stages would have written."""
    run, tables = RunFolder(profile), frames()
    asked = {"source": profile.generation.source, "models": MODELS, "corrections": profile.switches("A18")}
    scored = score_settings(profile)
    for name, settings in {"dialogues": {}, "responses": asked, "scores": scored, "thresholds": scored}.items():
        run.stage(name, lambda: tables, settings=settings, outputs=[name])
    do(run, "pairs")
    return run


@pytest.fixture
def run(tmp_path):
    return run_of(profile_in(tmp_path, "corrections=[A3]"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    changes = [*QUICK_TRAINING, "training.epochs=3", "training.arms=[perso_weighted]"]
    run = run_of(profile_in(tmp_path_factory.mktemp("trained"), *changes))
    do(run, "train")
    return run


def block(text: str, language: str) -> str:
    return re.search(rf"```{language}\n(.*?)\n```", text, re.DOTALL)[1]


def cells(text: str, first: str) -> list[str]:
    """Return the cells of the table row that begins with a cell."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return row.strip("| ").split(" | ")


def test_the_dataset_card_says_what_the_tables_say(run):
    path = run.root / "pairs" / "README.md"
    card = DatasetCard.load(path)
    configs = {one["config_name"]: one for one in card.data.to_dict()["configs"]}
    assert configs["perso"]["data_files"] == [{"split": "train", "path": "perso.parquet"}]
    assert [name for name, one in configs.items() if one["default"]] == ["perso"]
    gate = run.read("pairs/gate").set_index(["pair_set", "check"])["value"]
    assert gate["simple", "pairs"] == 20
    assert cells(card.text, "pairs") == ["pairs", "rows", "20", "10"]
    assert cells(card.text, plain("length_alone"))[2:] == [
        f"{gate[name, 'length_alone']:.1%}" for name in ("simple", "perso")
    ]
    assert "Chosen from 0.8000 on" in card.text
    assert (cells(card.text, "A3")[-1], cells(card.text, "A12")[-1]) == ("on", "as released")
    assert cells(card.text, "pairs/perso")[2] == run.provenance("pairs/perso")["sha256"]
    assert str(run.root) not in card.text
    before = path.stat().st_mtime_ns
    do(run, "pairs")
    assert path.stat().st_mtime_ns == before, "the same tables give the same card"
    path.write_text("my own")
    do(run, "pairs")
    assert path.read_text() == card.content


def test_the_model_card_says_what_was_trained_and_how(trained):
    folder = trained.root / "training" / "perso_weighted"
    card, record = ModelCard.load(folder / "README.md"), read_json(folder / "arm.json")
    data = card.data.to_dict()
    assert (data["library_name"], data["model_name"]) == ("transformers", "persodpo perso_weighted")
    assert "base_model" not in data
    text = card.text
    assert f"{record['train_pairs']:,} `perso` pairs of the run `release` to train on" in text
    assert trained.provenance("pairs/perso")["sha256"] in text
    assert "weighted: by the sigmoid of the score margin, mean 1" in text
    assert "grouped: rows hold each prompt once" in text
    assert record["left_out"]["train"] in text
    assert cells(text, "beta") == ["beta", "0.1"]
    log = trained.read("training/perso_weighted/log").query("kind == 'train'")
    assert cells(text, "train")[:3] == ["train", "3", f"{log['loss'].iloc[-1]:.4g}"]
    assert all(f"**{level}**" in text for level in trained.read("training/perso_weighted/health")["level"])
    assert "None yet" in text
    assert str(trained.root) not in text


def test_results_come_with_their_judge_and_a_policy_of_the_hub_and_adapters_are_named(trained):
    row = {"arm": "perso_weighted", "metric": "quality", "reading": "failures imputed", "seeds": 3, "responses": 12,
           "mean": 0.5, "low": 0.4, "high": 0.6}  # fmt: skip
    estimates = pd.DataFrame([dict.fromkeys(schema_of("evaluation/estimates").names) | row, row | {"arm": "simple"}])
    judged, log = (provenance_path(trained.path(name)) for name in ("evaluation/scores", "training/perso_weighted/log"))
    write_json(judged, {"settings": {"scorers": {"c_score": "c0ffee"}}})
    content = read_json(log)
    settings = content["settings"] | {"policy": "Qwen/Qwen2-0.5B-Instruct"}
    settings["training"] = settings["training"] | {"lora_rank": 4}
    write_json(log, content | {"settings": settings})
    card = ModelCard.load(write_model_card(trained, "perso_weighted", trained, estimates))
    judged.unlink()
    write_json(log, content)
    write_model_card(trained, "perso_weighted", trained)
    assert cells(card.text, "quality") == ["quality", "failures imputed", "12", "0.5", "0.4 to 0.6"]
    assert r"- c\_score: encoder (key c0ffee)" in card.text
    assert "over 3 trainings" in card.text
    assert (card.data.base_model, card.data.library_name) == ("Qwen/Qwen2-0.5B-Instruct", "peft")
    assert "LoRA adapters of rank 4" in card.text
    assert "from peft import AutoPeftModelForCausalLM" in card.text


def test_the_cards_own_lines_load_the_arm_and_the_pairs(trained, monkeypatch, tmp_path):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "runs").symlink_to(trained.root.parent)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for folder in ("training/perso_weighted", "pairs"):
        exec(block((trained.root / folder / "README.md").read_text(), "python"), names)  # noqa: S102 - what cards tell readers
    same, _ = load_policy(trained.root / "training" / "perso_weighted")
    assert names["model"].num_parameters() == same.num_parameters()
    assert names["tokenizer"]("User1: far?")["input_ids"]
    assert names["pairs"].to_list() == pq.read_table(trained.path("pairs/perso")).to_pylist()
    simple = load_dataset("runs/release/pairs", "simple", split="train", cache_dir=str(tmp_path / "cache"))
    assert simple.to_list() == pq.read_table(trained.path("pairs/simple")).to_pylist()


@pytest.mark.slow
def test_trls_own_command_trains_on_the_pairs_as_they_are(trained, tmp_path, monkeypatch):
    """The card's command, with a tiny model of this machine and two steps."""
    (tmp_path / "runs").symlink_to(trained.root.parent)
    monkeypatch.chdir(tmp_path)
    model = trained.root / "policy"
    words = shlex.split(block((trained.root / "pairs" / "README.md").read_text(), "bash"))
    words[words.index("--model_name_or_path") + 1] = str(model)
    words += shlex.split(
        "--max_steps 2 --logging_steps 1 --per_device_train_batch_size 2 --use_cpu true --bf16 false --report_to none "
        "--gradient_checkpointing false --save_strategy no --learning_rate 0.001"
    )
    words[0] = str(Path(sys.executable).with_name("trl"))
    places = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment = {**os.environ, **places, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = (load_policy(folder)[0].state_dict() for folder in (model, tmp_path / "dpo"))
    assert any(not value.equal(after[name]) for name, value in before.items())


def test_the_published_runs_card(release_run):
    text = (release_run.root / "pairs" / "README.md").read_text()
    assert cells(text, "pairs")[-1] == "9,184"
    assert cells(text, "prompts")[-1] == "1,316"
    assert cells(text, plain("length_alone"))[-2:] == ["89.4%", "84.4%"]


def test_text_in_a_card_is_no_markup():
    assert plain("b|ad_<script>\n*x*") == r"b\|ad\_\<script\> \*x\*"
