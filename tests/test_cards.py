"""Cards of a run: what they say, that the Hub's own classes and loaders read them, and what others do with the pairs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
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
from persodpo.cards import dataset_card, model_card, write_dataset_card
from persodpo.config import Profile, load_profile
from persodpo.errors import PersodpoError
from persodpo.gate import inspect_pairs
from persodpo.release.corrections import mended_findings
from persodpo.runfolder import RunFolder, provenance_path, read_json, sha256, write_json
from persodpo.stages.score import score_settings
from persodpo.tables import SCHEMAS, write_table
from persodpo.training.policy import load_policy

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = ("good", "fair", "b|ad_<script>")
CORRECTED = [f"corrections=[A10b, A10c, {', '.join(mended_findings())}]"]


def frames(dialogues: int = 12) -> dict[str, pd.DataFrame]:
    """Three models' answers to each dialogue: a good one, one between the thresholds, and a failure."""
    ids = [f"d{number:02d}" for number in range(dialogues)]
    splits = ["train"] * (dialogues - 2) + ["valid"] * 2
    asked = pd.DataFrame({
        "dialogue_id": ids, "split": splits, "dataset": "made up",
        "personas": [[f"I own {n} boats."] for n in range(dialogues)],
        "context": [f"User1: Is it far to harbour {number}?" for number in range(dialogues)], "reference": "Not far.",
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


def do(run: RunFolder, name: str, **options: object) -> list:
    """Run one stage on the tables that are there."""
    stage = stages.STAGES[name]
    reports = [*stage.run(run, **options)]
    stage.after(run, **options)
    return reports


def run_of(profile: Profile) -> RunFolder:
    """Make a run's pairs for real, from tables that earlier stages would have written."""
    run, made = RunFolder(profile), frames()
    asked = {"source": profile.generation.source, "models": MODELS, "corrections": profile.switches("A18")}
    scored = score_settings(profile)
    for name, settings in {"dialogues": {}, "responses": asked, "scores": scored, "thresholds": scored}.items():
        run.stage(
            name, inputs={}, settings=settings, outputs=[name], code=__name__,
            build=lambda targets, name=name: write_table(targets[name], name, made[name]),
        )  # fmt: skip
    do(run, "pairs")
    return run


@pytest.fixture
def run(tmp_path):
    return run_of(profile_in(tmp_path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    changes = [*QUICK_TRAINING, "training.epochs=3", "training.arms=[perso_weighted]"]
    run = run_of(profile_in(tmp_path_factory.mktemp("trained"), *changes))
    do(run, "train")
    return run


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", text, re.DOTALL)


# --- pair sets -------------------------------------------------------------------------------------------------------


def test_the_hubs_class_reads_the_dataset_card_and_its_configurations(run):
    card = DatasetCard.load(run.root / "pairs" / "README.md")
    data = card.data.to_dict()
    assert data["configs"] == [
        {"config_name": "simple", "data_files": [{"split": "train", "path": "simple.parquet"}]},
        {"config_name": "perso", "data_files": [{"split": "train", "path": "perso.parquet"}], "default": True},
    ]
    assert (data["size_categories"], data["language"]) == (["n<1K"], ["en"])
    assert "license" not in data
    assert "the licences and terms of those models and dialogues apply" in card.text


def test_the_dataset_card_says_what_the_tables_say(run):
    text = (run.root / "pairs" / "README.md").read_text()
    gate = run.read("pairs/gate").set_index(["pair_set", "check"])["value"]
    assert gate["simple", "pairs"] == 20
    assert "| simple | 20 | 10 | 30 | 2 | 2 |" in text
    assert "| perso | 10 | 10 | 20 | 1 | 1 |" in text
    length = [f"{gate[pair_set, 'length_alone']:.1%}" for pair_set in ("simple", "perso")]
    assert f"| length | {' | '.join(length)} |" in text
    assert "chosen from a quality of 0.8000 on (quantile 0.6) and rejected up to 0.4000 (quantile 0.4)" in text
    assert r"| b\|ad\_\<script\> | 0 | 20 | 0 | 10 |" in text
    assert "<script" not in text.replace(r"\<script", "")
    for field in SCHEMAS["pairs/perso"]:
        assert rf"| {field.name.replace('_', chr(92) + '_')} | {field.type} |" in text
    assert run.provenance("pairs/perso")["sha256"] in text
    assert str(run.root) not in text


def found(text: str) -> list[str]:
    return re.findall(r"^- \*\*(A\d+)\*\*", text, re.MULTILINE)


def test_every_kept_defect_is_named_and_no_mended_one(run, tmp_path):
    released = dataset_card(run)
    assert found(released) == ["A1", "A3", "A4", "A5", "A9", "A10", "A11", "A12", "A18", "A19", "A20", "A21"]
    assert re.search(r"^\| A12 \| .* \| as released \|$", released, re.MULTILINE)
    mended = dataset_card(run_of(profile_in(tmp_path / "mended", *CORRECTED)))
    assert found(mended) == ["A5", "A9", "A19", "A20", "A21"]
    assert re.search(r"^\| A18 \| .* \| on \|$", mended, re.MULTILINE)
    assert "| as released |" not in mended


def test_defects_of_published_files_are_not_those_of_models_that_were_asked(tmp_path):
    changes = ["scoring.source=compute", "scoring.target_words=40", "pairs.sets=[simple]"]
    run = run_of(profile_in(tmp_path, *changes))
    path = provenance_path(run.path("responses"))
    write_json(path, read_json(path) | {"settings": {"corrections": {"A5": True, "A10a": False, "A18": True}}})
    text = dataset_card(run)
    assert found(text) == ["A3", "A10", "A12", "A20", "A21"]
    assert re.search(r"^\| A10b \| .* \| on \|$", text, re.MULTILINE)
    assert "perso.parquet" not in text


def test_the_card_is_the_same_for_the_same_tables_and_comes_back(run):
    path = run.root / "pairs" / "README.md"
    text, before = path.read_text(), path.stat().st_mtime_ns
    do(run, "pairs")
    assert path.stat().st_mtime_ns == before
    path.write_text("my own")
    assert do(run, "pairs")[-1].skipped
    assert path.read_text() == text == dataset_card(run)


def test_tables_that_do_not_support_a_card_are_one_sentence(run):
    gate = run.path("pairs/gate")
    content, provenance = gate.read_bytes(), read_json(provenance_path(gate))

    def rewrite(frame: pd.DataFrame) -> None:
        write_table(gate, "pairs/gate", frame)
        write_json(provenance_path(gate), provenance | {"sha256": sha256(gate)})

    whole = run.read("pairs/gate")
    rewrite(whole[whole["check"] != "length_alone"])
    with pytest.raises(
        PersodpoError, match=r"lacks length_alone of pairs/simple; make both again with `persodpo pairs"
    ):
        dataset_card(run)
    pairs, dialogues = run.read("pairs/simple"), run.read("dialogues")
    rewrite(inspect_pairs(pairs[:-1], dialogues, 0).assign(pair_set="simple"))
    with pytest.raises(PersodpoError, match=r"is of other pairs than pairs/simple; make both again"):
        dataset_card(run)
    gate.unlink()
    with pytest.raises(PersodpoError, match=r"Table pairs/gate is missing .*; make it with `persodpo pairs"):
        write_dataset_card(run)
    gate.write_bytes(content)
    write_json(provenance_path(gate), provenance)
    path = provenance_path(run.path("scores"))
    write_json(path, read_json(path) | {"sha256": "0" * 64})
    with pytest.raises(PersodpoError, match=r"made from another table scores than lies in .*; make them again with"):
        dataset_card(run)


# --- arms ------------------------------------------------------------------------------------------------------------


def test_the_model_card_says_what_the_arm_is(trained):
    folder = trained.root / "training" / "perso_weighted"
    card, record = ModelCard.load(folder / "README.md"), read_json(folder / "arm.json")
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert data["model_name"] == "persodpo perso_weighted"
    assert "base_model" not in data
    text = card.text
    assert f"**{record['policy']}**" in text
    assert f"small model of {record['parameters']:,} parameters, made on the spot" in text
    assert "high against low quality, weighted: what they meant" in text
    assert f"{record['train_pairs']:,} `perso` pairs to train on and {record['held_out_pairs']:,} of other" in text
    assert "pairs weigh by the sigmoid of their score margin, mean 1" in text
    assert "| beta | 0.1 |" in text
    log, health = trained.read("training/perso_weighted/log"), trained.read("training/perso_weighted/health")
    assert log[log["kind"] == "train"]["step"].tolist() == [1, 2, 3]
    for kind in ("train", "eval"):
        last = log[log["kind"] == kind].iloc[-1]
        assert f"| {kind} | 3 | {last['loss']:.4g} | {last['reward_margin']:.4g} |" in text
    for verdict in health.itertuples():
        assert f"| {verdict.level} |" in text
    assert found(text)[0] == "A1"
    assert str(trained.root) not in text
    assert model_card(trained, "perso_weighted", trained) == (folder / "README.md").read_text()


def test_the_model_cards_own_lines_load_the_arm(trained, monkeypatch, tmp_path):
    text = (trained.root / "training" / "perso_weighted" / "README.md").read_text()
    (tmp_path / "runs").symlink_to(trained.root.parent)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(blocks(text, "python")[0], names)  # noqa: S102 - what the card tells readers to run
    same, _ = load_policy(trained.root / "training" / "perso_weighted")
    assert names["model"].num_parameters() == same.num_parameters()
    assert names["tokenizer"]("User1: far?")["input_ids"]


def test_the_corrected_arm_names_the_pairs_it_was_trained_on(tmp_path):
    source = run_of(profile_in(tmp_path, "name=release-corrected", *CORRECTED))
    run = run_of(profile_in(tmp_path, *QUICK_TRAINING))
    do(run, "train", arms=["corrected"])
    text = (run.root / "training" / "corrected" / "README.md").read_text()
    assert f"those of the run `release-corrected` (sha256 {sha256(source.path('pairs/perso'))})" in text
    assert found(text) == ["A5", "A9", "A19", "A20", "A21"]


def test_a_real_policy_and_adapters_are_named(trained, tmp_path):
    copy = profile_in(tmp_path)
    shutil.copytree(trained.root, RunFolder(copy).root)
    run = RunFolder(copy)
    path = provenance_path(run.path("training/perso_weighted/log"))
    made = read_json(path)
    settings = made["settings"] | {"policy": "Qwen/Qwen2-0.5B-Instruct"}
    settings["training"] = settings["training"] | {"lora_rank": 4}
    write_json(path, made | {"settings": settings})
    record = run.root / "training" / "perso_weighted" / "arm.json"
    write_json(record, read_json(record) | {"policy": "Qwen2-0.5B-Instruct, 494.0 M parameters"})
    text = model_card(run, "perso_weighted", run)
    data = ModelCard(text).data
    assert (data.base_model, data.library_name) == ("Qwen/Qwen2-0.5B-Instruct", "peft")
    assert "**Qwen2-0.5B-Instruct, 494.0 M parameters**" in text
    assert "LoRA adapters of rank 4" in text
    assert "made on the spot" not in text
    assert "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer" in text


def test_an_arm_that_its_run_does_not_support_is_one_sentence(trained, tmp_path):
    copy = profile_in(tmp_path)
    shutil.copytree(trained.root, RunFolder(copy).root)
    run = RunFolder(copy)
    path = provenance_path(run.path("pairs/perso"))
    write_json(path, read_json(path) | {"sha256": "0" * 64})
    with pytest.raises(
        PersodpoError, match=r"trained on other perso pairs than lie in .*persodpo train .*--arm perso_w"
    ):
        model_card(run, "perso_weighted", run)
    write_json(run.root / "training" / "perso_weighted" / "arm.json", {"key": "k"})
    with pytest.raises(PersodpoError, match=r"no finished training; run `persodpo train"):
        model_card(run, "perso_weighted", run)
    with pytest.raises(PersodpoError, match="Table training/simple/log is missing"):
        model_card(run, "simple", run)


# --- use by others ---------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(run, tmp_path, monkeypatch):
    """A folder from which the run lies at the path that its card names."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    (place / "runs").symlink_to(run.root.parent)
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize("pair_set", ["simple", "perso"])
def test_datasets_opens_the_pairs_by_file_and_by_folder(run, elsewhere, pair_set):
    wanted = pq.read_table(run.path(f"pairs/{pair_set}")).to_pylist()
    cache = str(elsewhere / "cache")
    by_folder = load_dataset("runs/release/pairs", pair_set, split="train", cache_dir=cache)
    files = f"runs/release/pairs/{pair_set}.parquet"
    by_file = load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    assert by_folder.to_list() == by_file.to_list() == wanted
    assert len(wanted) == {"simple": 20, "perso": 10}[pair_set]
    if pair_set == "perso":
        assert load_dataset("runs/release/pairs", split="train", cache_dir=cache).to_list() == wanted


def test_the_dataset_cards_own_lines_load_the_pairs(run, elsewhere, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(elsewhere / "cache"))
    names: dict = {}
    exec(blocks(dataset_card(run), "python")[0], names)  # noqa: S102 - what the card tells readers to run
    assert names["pairs"].to_list() == names["same"].to_list() == pq.read_table(run.path("pairs/perso")).to_pylist()


@pytest.mark.slow
def test_trls_own_command_trains_on_the_pairs_as_they_are(run, elsewhere, trained):
    """The card's command, with a tiny model of this machine and two steps."""
    model = trained.root / "policy"
    words = shlex.split(blocks(dataset_card(run), "bash")[0])
    words[words.index("--model_name_or_path") + 1] = str(model)
    words += shlex.split(
        "--max_steps 2 --logging_steps 1 --per_device_train_batch_size 2 --use_cpu true --bf16 false --report_to none "
        "--gradient_checkpointing false --save_strategy no --learning_rate 0.001"
    )
    words[0] = str(Path(sys.executable).with_name("trl"))
    places = {"HF_HOME": str(elsewhere / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment = {**os.environ, **places, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Training completed" in done.stdout
    before, after = (load_policy(folder)[0].state_dict() for folder in (model, elsewhere / "dpo"))
    assert before.keys() == after.keys()
    assert any(not value.equal(after[name]) for name, value in before.items())


def test_the_published_runs_card(release_run):
    text = (release_run.root / "pairs" / "README.md").read_text()
    assert "| perso | 9,184 | 1,316 | 7,428 |" in text
    assert "| length | 89.4% | 84.4% |" in text
    assert DatasetCard(text).data["size_categories"] == ["10K<n<100K"]
    assert load_profile("release").pairs.sets == ("simple", "perso")
