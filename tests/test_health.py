"""Health of a DPO run: verdicts on hand-made logs, and a callback that leaves training bit-identical."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer

from persodpo.errors import PersodpoError
from persodpo.training import health
from persodpo.training.health import VERDICTS, Health, HealthSettings, Measured, judge
from persodpo.training.trainer import GroupedDPOConfig, GroupedDPOTrainer

SOUND = Measured(0, parse_rate=1.0, words=20.0, loops=0.0)
WORDS = ["<unk>", "<eos>", "<pad>", *(f"w{number}" for number in range(40))]
LOOP = '{"response": "hello"}' + "}" * 200
GOOD = '{"response": "hello there"}'


pytestmark = pytest.mark.usefixtures("one_thread")


def training_logs(losses, margins=None, accuracy=1.0, **columns):
    margins = margins or [float(number) for number in range(len(losses))]
    return [
        {"loss": loss, "rewards/margins": margin, "rewards/accuracies": accuracy, "step": number + 1}
        | {name.replace("_", "/"): values[number] for name, values in columns.items()}
        for number, (loss, margin) in enumerate(zip(losses, margins, strict=True))
    ]


def found(name, logs=(), generations=(), **settings):
    verdicts = judge(logs, generations, HealthSettings(**settings))
    assert [verdict.name for verdict in verdicts] == list(VERDICTS)
    return next(verdict for verdict in verdicts if verdict.name == name)


@pytest.mark.parametrize(("last", "level"), [(-195.0, "ok"), (-215.0, "watch"), (-221.0, "bad"), (math.nan, "bad")])
def test_chosen_log_probability(last, level):
    logs = training_logs([0.6] * 3, logps_chosen=[-200.0, -205.0, last])
    verdict = found("chosen_logps", logs)
    assert (verdict.level, verdict.step) == (level, 3)
    assert verdict.value == pytest.approx(last + 200.0, nan_ok=True)


def test_chosen_log_probability_against_the_reference_has_no_batch_noise():
    logs = training_logs([0.6] * 2, logps_chosen=[-100.0, -300.0], rewards_chosen=[0.0, -1.0])
    assert found("chosen_logps", logs).level == "bad"
    assert found("chosen_logps", logs, beta=0.1, window=1)[1:4] == ("ok", 2, -10.0)
    assert found("chosen_logps", logs, beta=0.04, window=1).level == "bad"


@pytest.mark.parametrize(
    ("logs", "level"),
    [
        (training_logs([0.5] * 6), "ok"),
        (training_logs([1e-4] * 6, accuracy=0.9), "ok"),
        (training_logs([0.5] * 5 + [1e-4]), "watch"),
        (training_logs([1e-4] * 4), "watch"),
        (training_logs([1e-4] * 6, margins=[9.0] * 6), "watch"),
        (training_logs([0.5, *[1e-4] * 5]), "bad"),
        (training_logs([0.5, math.nan]), "bad"),
    ],
)
def test_saturation(logs, level):
    verdict = found("saturation", logs)
    assert (verdict.level, verdict.step) == (level, logs[-1]["step"])


@pytest.mark.parametrize(
    ("name", "change", "level"),
    [
        ("parse_rate", {"parse_rate": 0.95}, "ok"),
        ("parse_rate", {"parse_rate": 0.85}, "watch"),
        ("parse_rate", {"parse_rate": 0.75}, "bad"),
        ("length", {"words": 25.0}, "ok"),
        ("length", {"words": 35.0}, "watch"),
        ("length", {"words": 41.0}, "bad"),
        ("length", {"words": 9.0}, "bad"),
        ("length", {"words": 0.0}, "bad"),
        ("repetition", {"loops": 0.1}, "ok"),
        ("repetition", {"loops": 0.15}, "watch"),
        ("repetition", {"loops": 0.25}, "bad"),
    ],
)
def test_generations_are_held_against_the_start(name, change, level):
    last = SOUND._replace(step=7, **change)
    assert found(name, generations=[SOUND, last])[1:4] == (level, 7, next(iter(change.values())))


def test_what_was_so_before_training_is_watched_not_bad():
    start = Measured(0, parse_rate=0.0, words=0.0, loops=0.9)
    levels = [verdict.level for verdict in judge([], [start, start._replace(step=5)], HealthSettings())]
    assert levels[2:] == ["watch"] * 3


def test_nothing_measured_is_not_called_ok():
    for verdict in judge([], [], HealthSettings()):
        assert (verdict.level, verdict.step) == ("watch", -1)
        assert math.isnan(verdict.value)


def test_refusals_are_sentences():
    with pytest.raises(PersodpoError, match="no prompts"):
        Health([])
    with pytest.raises(PersodpoError, match=r"max_new_tokens .* is 0"):
        HealthSettings(max_new_tokens=0)


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="right", **special)


@pytest.fixture(scope="module")
def pairs():
    draw = random.Random(0)

    def text(count):
        return " ".join(draw.choice(WORDS[3:]) for _ in range(count))

    prompts = [text(draw.randint(3, 9)) + " " for _ in range(16)]
    return Dataset.from_list([{"prompt": p, "chosen": text(4), "rejected": text(5)} for p in prompts for _ in range(2)])


def tiny_model(dropout=0.0):
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.3, attention_dropout=dropout, eos_token_id=1, pad_token_id=2,
            bos_token_id=None,
        )
    )  # fmt: skip
    model.config.name_or_path = "tiny"
    return model


def train(tmp_path, tokenizer, pairs, callbacks, trainer=GroupedDPOTrainer, dropout=0.0, peft=None, **changes):
    args = {
        "learning_rate": 1e-2, "max_steps": 6, "logging_steps": 1, "bf16": False, "report_to": [], "use_cpu": True,
        "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 2, "disable_tqdm": True, "disable_dropout": False,
        "per_device_train_batch_size": 4,
    } | changes  # fmt: skip
    made = trainer(
        model=tiny_model(dropout), args=(GroupedDPOConfig if trainer is GroupedDPOTrainer else DPOConfig)(tmp_path, **args),
        train_dataset=pairs, eval_dataset=pairs.select(range(4)), processing_class=tokenizer, callbacks=callbacks,
        peft_config=peft, ref_model=None if peft else tiny_model(),
    )  # fmt: skip
    made.train()
    return made


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_bit_identical_with_and_without(tmp_path, tokenizer, pairs, checkpointing):
    """Dropout draws from the random state at every step, so a disturbed one would show."""
    watch = Health(pairs["prompt"], HealthSettings(prompts=3, max_new_tokens=5))
    options = {"dropout": 0.2, "gradient_checkpointing": checkpointing}
    with_health = train(tmp_path, tokenizer, pairs, [watch], **options)
    without = train(tmp_path, tokenizer, pairs, [], **options)
    other = without.model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in with_health.model.state_dict().items())
    assert not torch.equal(other["lm_head.weight"], tiny_model().state_dict()["lm_head.weight"])
    losses = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in (with_health, without)]
    assert losses[0] == losses[1]
    assert tokenizer.padding_side == "right"
    steps = [log["step"] for log in with_health.state.log_history if "health/parse_rate" in log]
    assert steps == [0, 2, 4, 6]


@pytest.mark.parametrize(("trainer", "peft"), [(GroupedDPOTrainer, True), (DPOTrainer, False)])
def test_generations_are_recorded_at_start_evaluations_and_end(tmp_path, tokenizer, pairs, trainer, peft):
    watch = Health(pairs["prompt"], HealthSettings(prompts=3, max_new_tokens=5))
    lora = LoraConfig(r=2, target_modules=["q_proj"]) if peft else None
    run = train(tmp_path, tokenizer, pairs, [watch], trainer, peft=lora, eval_steps=2, max_steps=3)
    table = watch.generations
    assert list(table.columns) == ["step", "prompt", "completion", "outcome"]
    assert table.groupby("step")["prompt"].apply(list).to_dict() == {step: [0, 1, 2] for step in (0, 2, 3)}
    assert table.completion.str.split().str.len().between(1, 5).all()
    logged = [log for log in run.state.log_history if "health/words" in log]
    assert [set(log) >= {"health/parse_rate", "health/loops", "step"} for log in logged] == [True] * 3
    assert list(watch.summary().name) == list(VERDICTS)
    assert watch.settings.beta == run.args.beta
    chosen = watch.summary().set_index("name").value["chosen_logps"]
    rewards = [log["rewards/chosen"] for log in run.state.log_history if "rewards/chosen" in log]
    assert chosen == pytest.approx(sum(rewards) / len(rewards) / run.args.beta)


def test_generating_switches_dropout_off_and_puts_everything_back():
    model = tiny_model(dropout=0.5).train()
    model.lm_head.eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    with health._untouched(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_batched_generations_are_those_of_each_prompt_alone(tokenizer, pairs):
    model = tiny_model().eval()
    prompts = pairs["prompt"][:8:2]
    together = health._generate(model, tokenizer, prompts, 6)
    for prompt, text in zip(prompts, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(6):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == 1:
                break
        alone = tokenizer.decode(ids[0, len(tokenizer(prompt)["input_ids"]) :], skip_special_tokens=True)
        assert text == alone


def test_a_sentence_said_again_is_repetition_though_it_reads_well(tmp_path, tokenizer, pairs, monkeypatch):
    """What preference training on length taught the miniature: a filler, word for word, until the length fits."""
    padded = json.dumps({"response": "It was opened in 1720. It is closed on Tuesdays. It is closed on Tuesdays."})
    texts = iter([[GOOD, padded], [GOOD, padded], [padded, padded], [padded, padded]])
    monkeypatch.setattr(health, "_generate", lambda *_: next(texts))
    watch = Health(pairs["prompt"], HealthSettings(prompts=2))
    train(tmp_path, tokenizer, pairs, [watch])
    verdict = watch.summary().set_index("name").loc["repetition"]
    assert (verdict["level"], verdict["value"]) == ("bad", 1.0)
    assert set(watch.generations["outcome"]) == {"ok"}


def test_a_collapse_is_announced_and_stops_training(tmp_path, tokenizer, pairs, monkeypatch, capsys):
    """The published collapse: an object, then closing braces without end."""
    texts = iter([[GOOD, GOOD], [GOOD, GOOD], [GOOD, LOOP]])
    monkeypatch.setattr(health, "_generate", lambda *_: next(texts))
    watch = Health(pairs["prompt"], HealthSettings(prompts=2, stop=True))
    run = train(tmp_path, tokenizer, pairs, [watch])
    assert run.state.global_step == 4
    found = watch.summary().set_index("name")
    assert list(found.loc[["parse_rate", "repetition"], "level"]) == ["bad", "bad"]
    assert list(watch.generations.outcome) == ["ok"] * 5 + ["loop"]
    printed = capsys.readouterr().out
    assert printed.count("repetition bad") == 1
    assert "health at step 4: parse_rate bad. 50% of the generations can be read, 100% at the start." in printed


def test_without_stop_a_collapse_is_only_announced(tmp_path, tokenizer, pairs, monkeypatch):
    texts = iter([[GOOD, GOOD], *[[LOOP, LOOP]] * 3])
    monkeypatch.setattr(health, "_generate", lambda *_: next(texts))
    assert train(tmp_path, tokenizer, pairs, [Health(pairs["prompt"])]).state.global_step == 6


def test_a_resumed_run_is_held_against_the_first_start(tmp_path, tokenizer, pairs, monkeypatch):
    texts = iter([[GOOD, GOOD], [GOOD, GOOD], [LOOP, LOOP]])
    monkeypatch.setattr(health, "_generate", lambda *_: next(texts))
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    train(tmp_path, tokenizer, pairs, [Health(pairs["prompt"])], **options)
    fresh = Health(pairs["prompt"])
    resumed = GroupedDPOTrainer(
        model=tiny_model(), train_dataset=pairs, eval_dataset=pairs.select(range(4)), processing_class=tokenizer,
        args=GroupedDPOConfig(tmp_path, max_steps=4, bf16=False, report_to=[], use_cpu=True, disable_tqdm=True),
        callbacks=[fresh],
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert list(fresh.generations.step) == [4, 4]
    assert "100% at the start" in fresh.summary().set_index("name").sentence["parse_rate"]
