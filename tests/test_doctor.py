"""What the doctor finds: each line when the thing is there and when it is not, through `diagnose` and the command."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections import Counter
from pathlib import Path

import huggingface_hub.constants
import pytest
from conftest import profile_in
from paper_swaps import swapped
from transformers import Qwen2Config
from typer.testing import CliRunner

from persodpo.artifacts import RELEASE_VARIABLE
from persodpo.cli import app
from persodpo.config import load_profile, with_overrides
from persodpo.doctor import diagnose, estimates, machine

RELEASE = os.environ.get(RELEASE_VARIABLE)
CANARY = "sk-canary/9d+1Z=="
LOCAL = ("Qwen2-7B-Instruct", "Qwen2-0.5B-Instruct", "Mistral-7B-Instruct", "Llama3-1-8B-Instruct")
#: 2 layers of width 32, counted by hand: embeddings 100 x 32, attention 3 x 32 x 32 + 3 x 32 + 32 x 32, feed-forward
#: 3 x 32 x 64 and two norms a layer, one norm at the end; the head shares the embeddings.
PARAMETERS = 100 * 32 + 2 * (4 * 32 * 32 + 3 * 32 + 3 * 32 * 64 + 2 * 32) + 32


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """Away from the machine's own cache, keys and folders, with no way out."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("OPENAI_API_KEY", RELEASE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "gpu_memory", lambda: None)
    there = tmp_path / "here"
    there.mkdir()
    monkeypatch.chdir(there)

    def refuse(*_, **__):
        raise AssertionError("went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def fake_model(folder: Path, *, chat: bool = True) -> Path:
    """A folder that looks like a model; no number is in it, so nobody could have loaded it."""
    Qwen2Config(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True, architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    (folder / "model.safetensors").write_bytes(b"no weights")
    (folder / "tokenizer.json").write_text("{}")
    if chat:
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def equipped(folder: Path, **changes):
    """The paper profile on a machine that has everything."""
    weights = {name: fake_model(folder / name) for name in LOCAL}
    scorers = {name: fake_model(folder / name) for name in ("coherence", "c_score", "ue_score")}
    (folder / "vectors.txt").write_text("like 1.0 0.0\n")
    scorers["persona_distance"] = folder / "vectors.txt"
    return swapped(folder, weights, scorers, weights["Qwen2-0.5B-Instruct"], "http://127.0.0.1:9/v1", **changes)


def line(profile, start: str):
    """The one finding whose sentence starts so."""
    found = [finding for finding in diagnose(profile) if finding.sentence.startswith(start)]
    assert len(found) == 1, [str(finding) for finding in found]
    return found[0]


def doctor(*arguments: str):
    found = CliRunner().invoke(app, ["doctor", *arguments])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


def test_the_paper_profile_on_a_machine_that_has_nothing(tmp_path):
    places = [f"--set=paths.{name}={tmp_path / name}" for name in ("runs", "figures", "release")]
    done = doctor("--profile", "paper", *places)
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    states = Counter(one.split()[0] for one in lines)
    assert states["ok"] == 0
    for words in (
        "missing  Dialogues: data/focus/train_focus.json is not there; get the FoCus files from https://",
        "missing  Weights of Qwen2-0.5B-Instruct and the policy: Qwen/Qwen2-0.5B-Instruct is to be downloaded (of unknown",
        "unknown  Chat template of Llama3-1-8B-Instruct:",
        "missing  Weights of coherence: MingZhong/unieval-dialog is to be downloaded",
        "missing  Weights of c_score: there is no folder ./scorers/dialogue_nli; make it with `persodpo finetune-scorer",
        "missing  Weights of persona_distance: there is no file of word vectors at ./data/GoogleNews",
        "missing  API key: Model gpt-3.5-turbo needs an API key in the environment variable OPENAI_API_KEY, which is not",
        "missing  GPU: none can be used here",
        "estimate Requests, tokens, money and hours: unknown while the dialogues are missing",
    ):
        assert sum(one.startswith(words) for one in lines) == 1, words
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["here"]


def test_a_machine_that_has_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    path = tmp_path / "profile.yaml"
    path.write_text(equipped(tmp_path).to_yaml())
    before = sorted(tmp_path.rglob("*"))
    done = doctor("--profile", str(path))
    assert done.exit_code == 0, done.stdout
    assert "missing" not in done.stdout
    assert CANARY not in done.stdout + done.stderr
    assert "sk-canary" not in done.output
    assert done.stdout.count("Chat template of") == 4
    assert "ok       API key: the environment variable OPENAI_API_KEY is set" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_dialogue_files(tmp_path):
    profile = equipped(tmp_path)
    found = [str(finding) for finding in diagnose(profile) if finding.sentence.startswith("Dialogues")]
    assert found == [
        f"ok       Dialogues: {tmp_path / 'train_focus.json'} gives 10 train dialogues.",
        f"ok       Dialogues: {tmp_path / 'valid_focus.json'} gives 4 valid dialogues.",
    ]
    few = with_overrides(profile, ["dialogues.train_size=13"])
    assert "12 usable dialogues, 13 are to be drawn; lower train_size" in next(iter(diagnose(few))).sentence
    (tmp_path / "train_focus.json").write_text("{}")
    broken = next(iter(diagnose(profile)))
    assert (broken.state, "is not FoCus JSON" in broken.sentence) == ("missing", True)
    assert "unknown while the dialogues are missing" in next(iter(estimates(profile)))


def test_published_files_that_are_not_there(tmp_path):
    lost = line(
        profile_in(tmp_path), "Published files (dialogues.source, generation.source, scoring.source, evaluation"
    )
    assert lost.state == "missing"
    assert "41 other files" in lost.sentence
    assert "`persodpo fetch release`" in lost.sentence


@pytest.mark.skipif(not RELEASE, reason=f"{RELEASE_VARIABLE} is not set: the published files are not at hand")
def test_published_files_that_are_there_and_one_that_was_edited(tmp_path):
    copy = tmp_path / "release"
    shutil.copytree(RELEASE, copy)
    places = [f"--set=paths.{name}={tmp_path / name}" for name in ("release", "runs", "figures")]
    done = doctor("--profile", "release", *places)
    assert done.exit_code == 0, done.stdout
    assert "ok       Published files (dialogues.source" in done.stdout
    assert "estimate Asking: no model is asked" in done.stdout
    edited = max(copy.rglob("*.csv"), key=lambda path: path.stat().st_size)
    edited.chmod(0o644)
    content = edited.read_bytes()
    edited.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = line(profile_in(tmp_path), "Published files")
    assert (found.state, edited.name in found.sentence) == ("missing", True)
    asking = profile_in(tmp_path, "generation.source=models", "generation.models=[gpt-4o-mini]")
    assert "is not the published file" in next(iter(estimates(asking)))


def test_weights_in_a_folder(tmp_path):
    profile = equipped(tmp_path)
    name = "Weights of Mistral-7B-Instruct"
    folder = tmp_path / "Mistral-7B-Instruct"
    assert line(profile, name).state == "ok"
    (folder / "tokenizer.json").unlink()
    assert "lacks its tokenizer" in line(profile, name).sentence
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "no weights in safetensors" in line(profile, name).sentence
    shards = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}, "metadata": {"total_size": 7}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    (folder / "model-1.safetensors").write_bytes(b"")
    assert "lacks model-2.safetensors, its tokenizer" in line(profile, name).sentence
    shutil.rmtree(folder)
    gone = line(profile, name)
    assert (gone.state, "there is no folder" in gone.sentence) == ("missing", True)


def test_models_that_the_run_makes(tmp_path):
    small = [
        f"scoring.compute.models.{name}=small" for name in ("coherence", "c_score", "ue_score", "persona_distance")
    ]
    made = profile_in(tmp_path, "scoring.source=compute", *small)
    assert line(made, "Weights of coherence and c_score and ue_score and persona_distance:").state == "ok"
    assert line(made, "Weights of the policy:").state == "ok"
    asking = with_overrides(made, ["generation.source=models", "generation.models=[small]"])
    assert "is made from responses that are there already" in line(asking, "Weights of small:").sentence


def in_cache(tmp_path: Path, name: str, **of: bool) -> Path:
    """A model in the Hub's cache, at a made-up commit."""
    place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("c0ffee")
    return fake_model(place / "snapshots" / "c0ffee", **of)


def test_the_default_profile_lacks_nothing(tmp_path):
    profile = load_profile("mini", [f"paths.{name}={tmp_path / name}" for name in ("runs", "figures", "release")])
    assert [str(finding) for finding in diagnose(profile) if finding.state == "missing"] == []


def test_weights_in_the_cache_of_the_hub(tmp_path):
    profile = equipped(tmp_path, policy__model="someone/model")
    start = "Weights of the policy"
    lost = line(profile, start)
    assert lost.state == "missing"
    assert (
        "someone/model is to be downloaded (of unknown size); get it with `hf download someone/model`" in lost.sentence
    )
    folder = in_cache(tmp_path, "someone/model")
    assert str(line(profile, start)) == f"ok       {start}: someone/model is on this machine."
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors"}, "metadata": {"total_size": 3 * 2**30}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "to be downloaded (3.0 GiB at most)" in line(profile, start).sentence
    assert line(profile, "Disk of the Hub's cache").state in {"ok", "missing"}
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "not in safetensors" in line(profile, start).sentence


def test_chat_templates_and_adapters(tmp_path):
    profile = equipped(tmp_path)
    folder = tmp_path / "Qwen2-7B-Instruct"
    start = "Chat template of Qwen2-7B-Instruct"
    assert line(profile, start).state == "ok"
    (folder / "chat_template.jinja").unlink()
    assert "choose format raw" in line(profile, start).sentence
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert line(profile, start).state == "ok"
    entries = [entry.model_dump(mode="json") for entry in profile.generation.backends]
    entries[0] |= {"adapter": str(tmp_path / "adapter"), "format": "raw"}
    tuned = with_overrides(profile, [f"generation.backends={json.dumps(entries)}"])
    assert not [one for one in diagnose(tuned) if one.sentence.startswith(start)]
    assert line(tuned, "Adapter of Qwen2-7B-Instruct").state == "missing"
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "adapter" / name).write_text("")
    assert line(tuned, "Adapter of Qwen2-7B-Instruct").state == "ok"


def test_keys_prices_and_addresses(tmp_path, monkeypatch):
    profile = equipped(tmp_path)
    assert line(profile, "API key").state == "missing"
    monkeypatch.setenv("OPENAI_API_KEY", CANARY + "\u00e9")
    assert CANARY not in line(profile, "API key").sentence
    assert line(profile, "API key").state == "missing"
    entries = [entry.model_dump(mode="json") for entry in profile.generation.backends]
    entries[-1] |= {"prices": None, "base_url": f"https://user:{CANARY}@example.org/v1"}
    wrong = with_overrides(profile, [f"generation.backends={json.dumps(entries)}"])
    assert line(wrong, "Prices of gpt-4-turbo").state == line(wrong, "Endpoint:").state == "missing"
    assert CANARY not in "".join([str(finding) for finding in diagnose(wrong)] + list(estimates(wrong)))


def test_optional_packages(tmp_path, monkeypatch):
    profile = equipped(tmp_path, engine__scorers="ray", scoring__compute__models__persona_distance="someone/sentences")
    found = {"ray": None, "sentence_transformers": None}
    monkeypatch.setattr(machine.importlib.util, "find_spec", found.get)
    assert "`pip install 'persodpo[ray]'`" in line(profile, "Package ray").sentence
    assert "`pip install 'persodpo[sentences]'`" in line(profile, "Package sentence_transformers").sentence
    found.update(ray=object(), sentence_transformers=object())
    assert line(profile, "Package ray").state == line(profile, "Package sentence_transformers").state == "ok"


@pytest.mark.parametrize(
    ("memory", "state"), [(2**40, "ok"), (PARAMETERS * 16 + 1, "unknown"), (PARAMETERS * 16 - 1, "missing")]
)
def test_memory_of_the_gpu(tmp_path, monkeypatch, memory, state):
    profile = equipped(tmp_path)
    monkeypatch.setattr(machine, "gpu_memory", lambda: ("A GPU", memory))
    found = line(profile, "GPU: ")
    assert found.state == state, found.sentence
    assert "GPU: A GPU with" in found.sentence


def test_without_a_gpu(tmp_path):
    assert line(equipped(tmp_path), "GPU: ").state == "unknown"
    assert line(equipped(tmp_path, training__bf16=True), "GPU: ").state == "missing"
    assert line(profile_in(tmp_path), "GPU: ").state == "ok"


def test_free_disk(tmp_path, monkeypatch):
    profile = equipped(tmp_path)
    start = "Disk of"
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 2**40))
    assert line(profile, start).state == "ok"
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 2**29))
    assert "0.5 GiB are free" in line(profile, start).sentence
    assert line(profile, start).state == "missing"
    (tmp_path / "Qwen2-0.5B-Instruct" / "config.json").unlink()
    assert line(profile, start).state == "unknown"


def test_estimates(tmp_path):
    profile = equipped(tmp_path)
    lines = list(estimates(profile))
    api = next(one for one in lines if one.startswith("Asking gpt-4-turbo"))
    assert "10 of 10 requests to ask" in api
    assert "1,100 tokens, $" in api
    local = next(one for one in lines if one.startswith("Asking Mistral-7B-Instruct"))
    assert "10 prompts on this machine" in local
    assert "at most 1,100 tokens; hours unknown" in local
    assert any(one.startswith("Money: $") and "the budget is $40.00" in one for one in lines)
    assert any(one.startswith("Arm corrected") and "paper-corrected" in one for one in lines)
    assert "Scoring: at most 70 responses by four scorers; hours unknown until some are scored." in lines
    assert any(one.startswith("Training: 4 arms under 3 seeds; hours unknown") for one in lines)
    assert any(one.startswith("Evaluation: 13 times 4 answers") for one in lines)
    small = with_overrides(profile, ["generation.budget_usd=0.001"])
    assert any("may end the run before all is answered" in one for one in estimates(small))


def test_hours_on_a_gpu(tmp_path, monkeypatch):
    profile = equipped(tmp_path)
    monkeypatch.setattr(machine, "gpu_memory", lambda: ("A GPU", 2**40))
    lines = list(estimates(profile))
    assert any(one.startswith("Asking Qwen2-7B") and "assuming 15 to 60 tokens a second" in one for one in lines)
    training = next(one for one in lines if one.startswith("Training: 4 arms under 3 seeds, at most"))
    assert "assuming 10 to 100 TFLOP/s" in training
