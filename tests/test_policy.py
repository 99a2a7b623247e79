"""The small policy: repeatable to the byte, reused, whole or not there at all."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from persodpo.errors import PersodpoError
from persodpo.files import PROJECT, sha256
from persodpo.training import policy
from persodpo.training.policy import END, RECORD, WEIGHTS, SmallPolicy, load_policy, make_small_policy

SETTINGS = SmallPolicy(
    vocabulary=320, hidden_size=16, max_length=128, steps=30, batch_tokens=512, learning_rate=1e-2,
    seed=3,
)  # fmt: skip
WORDS = ["the", "a", "river", "castle", "museum", "likes", "visits", "old", "stone", "bridge", "garden", "near"]
DRAW = random.Random(0)


def said(words: int) -> str:
    return " ".join(DRAW.choices(WORDS, k=words))


PROMPTS = [f"User1: {said(8)}\nReply with JSON:" for _ in range(6)]
EXAMPLES = [(prompt, json.dumps({"response": said(6)})) for prompt in PROMPTS for _ in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_small_policy(EXAMPLES, SETTINGS, tmp_path_factory.mktemp("policy") / "small")


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def record(folder) -> dict:
    return json.loads((folder / RECORD).read_text())


def test_same_seed_gives_the_same_bytes_and_leaves_the_global_generator_alone(folder, tmp_path):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    again = make_small_policy(EXAMPLES, SETTINGS, tmp_path / "again")
    assert torch.equal(before, torch.random.get_rng_state())
    for name in (WEIGHTS, "tokenizer.json"):
        assert sha256(folder / name) == sha256(again / name)


def test_loss_falls_and_the_record_says_what_was_made(folder):
    found = record(folder)
    assert found["loss_end"] < 0.7 * found["loss_start"]
    assert found["settings"] == SETTINGS.model_dump()
    assert (found["examples"], found["prompts"], found["cut"], found["left_out"]) == (12, 6, 0, 0)
    assert found["parameters"] == load_policy(folder)[0].num_parameters()
    assert {"torch", "transformers"} <= set(found["versions"])


def test_only_a_change_trains_again(tmp_path, monkeypatch):
    """Another text, order, setting or code, damaged weights, a missing file."""
    folder, trained = tmp_path / "small", []
    monkeypatch.setattr(policy, "_train", lambda *args: trained.append(args) or [0.0])

    def made(examples=EXAMPLES, settings=SETTINGS):
        make_small_policy(examples, settings, folder)
        assert names(tmp_path) == ["small"]
        return len(trained)

    assert (made(), made()) == (1, 1)
    assert made([(EXAMPLES[0][0], EXAMPLES[0][1] + " "), *EXAMPLES[1:]]) == 2
    assert made(EXAMPLES[::-1]) == 3
    assert made(settings=SETTINGS.model_copy(update={"seed": 4})) == 4
    assert made() == 5
    (folder / WEIGHTS).write_bytes(b"\0" * 9)
    assert made() == 6
    (folder / "tokenizer.json").unlink()
    assert (made(), made()) == (7, 7)
    monkeypatch.setattr(policy, "code_of", lambda *_: "other")
    assert made() == 8


def test_a_loaded_policy_is_what_was_trained(folder):
    model, tokenizer = load_policy(folder)
    weights = load_file(folder / WEIGHTS)
    assert all(torch.equal(value, weights.get(name, value)) for name, value in model.state_dict().items())
    assert (model.config._attn_implementation, model.dtype, model.training) == ("sdpa", torch.float32, False)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END, model.config.eos_token_id)
    assert tokenizer.pad_token_id not in {None, tokenizer.eos_token_id}


def test_tokens_are_lossless_and_do_not_merge_across_the_prompts_end(folder):
    tokenizer = load_policy(folder)[1]
    text = ' Größe  {"response": "naïve — 你好 🙂\\n"}\r\n\t don\'t '
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    completion = EXAMPLES[0][1] + END
    for prompt in (EXAMPLES[0][0], 'ends so: {"response": "your reply"}', "ends in a blank ", "ends in a line\n"):
        alone, both = tokenizer(prompt)["input_ids"], tokenizer(prompt + completion)["input_ids"]
        assert both == alone + tokenizer(completion)["input_ids"]
        assert both[-1] == tokenizer.eos_token_id


def test_long_examples_are_cut_and_counted(tmp_path):
    prompt, completion = EXAMPLES[0]
    examples = [*EXAMPLES, (prompt, completion * 20), (prompt * 20, completion)]
    folder = make_small_policy(examples, SETTINGS.model_copy(update={"steps": 1}), tmp_path / "small")
    assert (record(folder)["cut"], record(folder)["left_out"]) == (1, 1)


KILLED = """
import sys, time
from pathlib import Path
from persodpo.files import made_once

def make(scratch):
    (scratch / "model.safetensors").write_text("half")
    print("half", flush=True)
    time.sleep(600)

made_once(Path(sys.argv[1]), "policy.json", {}, make, what="a small policy", needs="model.safetensors")
"""


def test_a_killed_run_leaves_nothing_half_made(folder, tmp_path):
    target = tmp_path / "small"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, target], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    ) as one:
        assert one.stdout.readline() == "half\n"
        one.kill()
    (left,) = names(tmp_path)
    assert left.startswith(f".partial-{one.pid}-")
    make_small_policy(EXAMPLES, SETTINGS, target)
    assert names(tmp_path) == ["small"]
    assert sha256(target / WEIGHTS) == sha256(folder / WEIGHTS)


def test_a_failed_run_leaves_what_was_there(tmp_path, monkeypatch):
    settings = SETTINGS.model_copy(update={"steps": 1})
    folder = make_small_policy(EXAMPLES, settings, tmp_path / "small")
    before = sha256(folder / WEIGHTS)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(policy, "_train", fail)
    with pytest.raises(PersodpoError, match="is full"):
        make_small_policy(EXAMPLES, settings.model_copy(update={"seed": 9}), folder)
    assert sha256(folder / WEIGHTS) == before
    assert names(tmp_path) == ["small"]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (EXAMPLES[:3], "at least 8 examples.*not 3"),
        ([*EXAMPLES, ("a prompt", " \n")], "Example 12 has an empty"),
        ([*EXAMPLES, ("", "{}")], "Example 12 has an empty"),
        ([("word " * 400, str(n)) for n in range(9)], "fills the length limit of 128 tokens"),
    ],
)
def test_texts_that_cannot_be_learned_from_are_refused(tmp_path, examples, message):
    with pytest.raises(PersodpoError, match=message):
        make_small_policy(examples, SETTINGS, tmp_path / "small")
    assert not names(tmp_path)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PersodpoError, match="something other than a small policy"):
        make_small_policy(EXAMPLES, SETTINGS, tmp_path)
    assert names(tmp_path) == ["notes.txt"]


def test_an_arm_of_a_pinned_policy_is_loaded_on_its_revision(folder, tmp_path, monkeypatch):
    """Two commits in a cache of the Hub: a LoRA arm of the older one is merged into that one."""
    from peft import get_peft_model

    from persodpo.training.run import _adapters

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = tmp_path / "hub" / "models--org--tiny"
    for commit, revision, factor in (("a" * 40, "v1", 1.0), ("b" * 40, "main", 2.0)):
        place = shutil.copytree(folder, cache / "snapshots" / commit)
        weights = {name: factor * value for name, value in load_file(place / "model.safetensors").items()}
        save_file(weights, place / "model.safetensors", {"format": "pt"})
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / revision).write_text(commit)
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    (old, tokenizer), (new, _) = load_policy("org/tiny@v1"), load_policy("org/tiny")
    before, newest = (one.get_input_embeddings().weight.clone() for one in (old, new))
    assert not torch.equal(before, newest)
    get_peft_model(old, _adapters(2, "org/tiny@v1")).save_pretrained(tmp_path / "arm")
    tokenizer.save_pretrained(tmp_path / "arm")
    assert torch.equal(load_policy(tmp_path / "arm")[0].get_input_embeddings().weight, before)


def test_a_policy_that_cannot_be_loaded_whole_is_one_sentence(folder, tmp_path, monkeypatch):
    """No folder, a tensor missing, damaged weights, no vocabulary, no network."""
    with pytest.raises(PersodpoError, match=r"Model '.*nowhere' cannot be loaded"):
        load_policy(tmp_path / "nowhere")
    copied = shutil.copytree(folder, tmp_path / "copied")
    tensors = load_file(copied / WEIGHTS)
    lacking = next(name for name in tensors if "q_proj" in name)
    del tensors[lacking]
    save_file(tensors, copied / WEIGHTS, {"format": "pt"})
    with pytest.raises(PersodpoError, match=lacking):
        load_policy(copied)
    (copied / WEIGHTS).write_bytes(b"\0" * 20)
    with pytest.raises(PersodpoError, match="copied' cannot be loaded"):
        load_policy(copied)
    shutil.copy(folder / WEIGHTS, copied)
    (copied / "tokenizer.json").unlink()
    with pytest.raises(PersodpoError, match="tokenizer"):
        load_policy(copied)

    def offline(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(PersodpoError, match=r"Model 'someone/model'.*network"):
        load_policy("someone/model")
