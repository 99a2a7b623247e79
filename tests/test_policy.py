"""The small policy: repeatable to the byte, reused, whole or not there at all."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from persodpo.errors import PersodpoError
from persodpo.runfolder import PROJECT, sha256
from persodpo.training import policy
from persodpo.training.policy import END, RECORD, WEIGHTS, SmallPolicy, load_policy, make_small_policy

SETTINGS = SmallPolicy(
    vocabulary=320, hidden_size=16, intermediate_size=32, max_length=128, steps=30, batch_tokens=512, learning_rate=1e-2,
    seed=3,
)  # fmt: skip
WORDS = ["the", "a", "river", "castle", "museum", "likes", "visits", "old", "stone", "bridge", "garden", "near"]


def made_up(count: int = 12, seed: int = 0) -> list[tuple[str, str]]:
    """Two completions a prompt."""
    draw = random.Random(seed)
    said = lambda words: " ".join(draw.choices(WORDS, k=words))  # noqa: E731
    prompts = [f"User1: {said(8)}\nReply with JSON:" for _ in range(count // 2)]
    return [(prompt, json.dumps({"response": said(6)})) for prompt in prompts for _ in range(2)]


EXAMPLES = made_up()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_small_policy(EXAMPLES, SETTINGS, tmp_path_factory.mktemp("policy") / "small", progress=False)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def record(folder) -> dict:
    return json.loads((folder / RECORD).read_text())


def test_same_seed_gives_the_same_bytes_and_leaves_the_global_generator_alone(folder, tmp_path):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    again = make_small_policy(EXAMPLES, SETTINGS, tmp_path / "again", progress=False)
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


def test_an_unchanged_policy_is_reused(folder):
    before = (folder / RECORD).stat().st_ino
    assert make_small_policy(list(EXAMPLES), SETTINGS, folder) == folder
    assert (folder / RECORD).stat().st_ino == before


@pytest.mark.parametrize("change", ["text", "order", "setting", "code", "damage", "missing file"])
def test_any_change_trains_again(tmp_path, monkeypatch, change):
    settings, examples = SETTINGS.model_copy(update={"steps": 2}), EXAMPLES
    folder = make_small_policy(examples, settings, tmp_path / "small", progress=False)
    if change == "text":
        examples = [(examples[0][0], examples[0][1] + " "), *examples[1:]]
    elif change == "order":
        examples = examples[::-1]
    elif change == "setting":
        settings = settings.model_copy(update={"seed": 4})
    elif change == "code":
        monkeypatch.setattr(policy, "code_of", lambda *_: "other")
    elif change == "damage":
        (folder / WEIGHTS).write_bytes(b"\0" * 9)
    else:
        (folder / "tokenizer.json").unlink()
    before = (folder / RECORD).stat().st_ino, (folder / RECORD).stat().st_mtime_ns
    make_small_policy(examples, settings, folder, progress=False)
    assert before != ((folder / RECORD).stat().st_ino, (folder / RECORD).stat().st_mtime_ns)
    assert load_policy(folder)[0].config.vocab_size <= 320
    assert names(tmp_path) == ["small"]


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
    folder = make_small_policy(examples, SETTINGS.model_copy(update={"steps": 1}), tmp_path / "small", progress=False)
    assert (record(folder)["cut"], record(folder)["left_out"]) == (1, 1)


KILLED = """
import sys
from pathlib import Path
from persodpo.training import policy
from tests.test_policy import EXAMPLES, SETTINGS
batches = policy._batches
def announced(*args):
    for number, batch in enumerate(batches(*args)):
        if number == 5:
            print("training", flush=True)
        yield batch
policy._batches = announced
policy.make_small_policy(EXAMPLES, SETTINGS.model_copy(update={"steps": 10**6}), Path(sys.argv[1]), progress=False)
"""


def test_a_killed_run_leaves_nothing_half_made(folder, tmp_path):
    target = tmp_path / "small"
    command = [sys.executable, "-c", KILLED, str(target)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "training\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith(f".partial-{process.pid}-")
    make_small_policy(EXAMPLES, SETTINGS, target, progress=False)
    assert names(tmp_path) == ["small"]
    assert sha256(target / WEIGHTS) == sha256(folder / WEIGHTS)


def test_a_failed_run_leaves_what_was_there(tmp_path, monkeypatch):
    settings = SETTINGS.model_copy(update={"steps": 1})
    folder = make_small_policy(EXAMPLES, settings, tmp_path / "small", progress=False)
    before = sha256(folder / WEIGHTS)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(policy, "_train", fail)
    with pytest.raises(PersodpoError, match="is full"):
        make_small_policy(EXAMPLES, settings.model_copy(update={"seed": 9}), folder, progress=False)
    assert sha256(folder / WEIGHTS) == before
    assert names(tmp_path) == ["small"]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (EXAMPLES[:3], "at least 8 examples.*not 3"),
        ([*EXAMPLES, ("a prompt", " \n")], "Example 12 has an empty completion"),
        ([*EXAMPLES, ("", "{}")], "Example 12 has an empty prompt"),
        ([("word " * 400, str(n)) for n in range(9)], "fills the length limit of 128 tokens"),
    ],
)
def test_texts_that_cannot_be_learned_from_are_refused(tmp_path, examples, message):
    with pytest.raises(PersodpoError, match=message):
        make_small_policy(examples, SETTINGS, tmp_path / "small", progress=False)
    assert not names(tmp_path)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PersodpoError, match="something other than a small policy"):
        make_small_policy(EXAMPLES, SETTINGS, tmp_path, progress=False)
    assert names(tmp_path) == ["notes.txt"]


def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path, folder, monkeypatch):
    with pytest.raises(PersodpoError, match=r"Model '.*nowhere' cannot be loaded"):
        load_policy(tmp_path / "nowhere")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in folder.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes() if path.name != WEIGHTS else b"\0" * 20)
    with pytest.raises(PersodpoError, match="damaged' cannot be loaded"):
        load_policy(damaged)

    def offline(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(PersodpoError, match=r"Model 'someone/model'.*network"):
        load_policy("someone/model")


@pytest.mark.parametrize("damage", ["tensor", "vocabulary"])
def test_a_folder_that_lacks_something_is_refused(folder, tmp_path, damage):
    copied = shutil.copytree(folder, tmp_path / "copied")
    if damage == "tensor":
        tensors = load_file(copied / WEIGHTS)
        lacking = next(name for name in tensors if "q_proj" in name)
        save_file(
            {name: tensor for name, tensor in tensors.items() if name != lacking}, copied / WEIGHTS, {"format": "pt"}
        )
    else:
        lacking = "Hello there"
        (copied / "tokenizer.json").unlink()
    with pytest.raises(PersodpoError, match=lacking if damage == "tensor" else "tokenizer"):
        load_policy(copied)
