"""Health of a DPO run: verdicts on hand-made logs, and a callback that leaves training bit-identical."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig
from tiny import grouped, logs, stock, tiny_model, tiny_pairs, tiny_tokenizer, trained

from persodpo.errors import PersodpoError
from persodpo.training import health
from persodpo.training.health import VERDICTS, Health, Measured, judge

SOUND = Measured(0, parse_rate=1.0, words=20.0, loops=0.0)
LOOP = '{"response": "hello"}' + "}" * 200
GOOD = '{"response": "hello there"}'


pytestmark = pytest.mark.usefixtures("one_thread")


def training_logs(losses, margins=None, accuracy=1.0, chosen=None):
    columns = zip(losses, margins or range(len(losses)), chosen or [0.0] * len(losses), strict=True)
    return [
        {
            "loss": loss,
            "rewards/margins": margin,
            "rewards/accuracies": accuracy,
            "rewards/chosen": reward,
            "step": step,
        }
        for step, (loss, margin, reward) in enumerate(columns, 1)
    ]


def found(name, logs=(), generations=()):
    verdicts = judge(logs, generations, 0.1)
    assert [verdict.name for verdict in verdicts] == list(VERDICTS)
    return next(verdict for verdict in verdicts if verdict.name == name)


@pytest.mark.parametrize(("last", "level"), [(5.0, "ok"), (-15.0, "watch"), (-21.0, "bad"), (math.nan, "bad")])
def test_chosen_log_probability_is_held_against_the_reference(last, level):
    """The mean of the last five logs, in nats: rewards over beta."""
    verdict = found("chosen_logps", training_logs([0.6] * 6, chosen=[-99.0, *[last / 10] * 5]))
    assert (verdict.level, verdict.step) == (level, 6)
    assert verdict.value == pytest.approx(last, nan_ok=True)


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
    ("name", "field", "levels"),
    [
        ("parse_rate", "parse_rate", {0.95: "ok", 0.85: "watch", 0.75: "bad"}),
        ("length", "words", {25.0: "ok", 35.0: "watch", 41.0: "bad", 9.0: "bad", 0.0: "bad"}),
        ("repetition", "loops", {0.1: "ok", 0.15: "watch", 0.25: "bad"}),
    ],
)
def test_generations_are_held_against_the_start(name, field, levels):
    for value, level in levels.items():
        last = SOUND._replace(step=7, **{field: value})
        assert found(name, generations=[SOUND, last])[1:4] == (level, 7, value)


def test_what_was_so_before_training_is_watched_not_bad():
    start = Measured(0, parse_rate=0.0, words=0.0, loops=0.9)
    assert [verdict.level for verdict in judge([], [start, start._replace(step=5)], 0.1)][2:] == ["watch"] * 3


def test_nothing_measured_is_not_called_ok():
    for verdict in judge([], [], 0.1):
        assert (verdict.level, verdict.step) == ("watch", -1)
        assert math.isnan(verdict.value)
    with pytest.raises(PersodpoError, match="no prompts"):
        Health([])


PROMPTS = tiny_pairs()["prompt"][:]
SETTINGS = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1e-2}


def watched(folder, *callbacks, make=grouped, **changes):
    return trained(make(folder, eval_dataset=tiny_pairs(2, seed=5), callbacks=[*callbacks], **SETTINGS | changes))


def said(monkeypatch, *texts):
    """Let the model write these texts, at each measurement two."""
    made = iter(texts)
    monkeypatch.setattr(health, "_generate", lambda *_: [next(made), next(made)])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_bit_identical_with_and_without(tmp_path, checkpointing):
    """Dropout draws from the random state at every step, so a disturbed one would show."""
    runs = [
        watched(
            tmp_path / str(len(watch)), *watch, model=tiny_model(attention_dropout=0.2), disable_dropout=False,
            gradient_checkpointing=checkpointing,
        )
        for watch in ([Health(PROMPTS, count=3, max_new_tokens=5)], [])
    ]  # fmt: skip
    states = [run.model.state_dict() for run in runs]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[1]["lm_head.weight"], tiny_model().state_dict()["lm_head.weight"])
    assert logs(runs[0]) == logs(runs[1])
    assert [log["step"] for log in runs[0].state.log_history if "health/parse_rate" in log] == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("make", "changes"), [(grouped, {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}), (stock, {})]
)
def test_generations_are_recorded_at_start_evaluations_and_end(tmp_path, make, changes):
    watch = Health(PROMPTS, count=3, max_new_tokens=5)
    run = watched(tmp_path, watch, make=make, max_steps=3, **changes)
    table = watch.generations
    assert list(table.columns) == ["step", "prompt", "completion", "outcome"]
    assert table.groupby("step")["prompt"].apply(list).to_dict() == {step: [0, 1, 2] for step in (0, 2, 3)}
    assert table.completion.str.split().str.len().between(0, 5).all()
    assert len([log for log in run.state.log_history if {"health/words", "health/loops", "step"} <= set(log)]) == 3
    assert list(watch.summary().name) == list(VERDICTS)
    chosen = watch.summary().set_index("name").value["chosen_logps"]
    assert chosen == pytest.approx(sum(logs(run, "rewards/chosen")) / 3 / run.args.beta)


def test_generations_are_greedy_and_those_of_each_prompt_alone(tmp_path):
    """Without the dropout of training."""
    watch = Health(PROMPTS, count=4, max_new_tokens=6)
    watched(tmp_path, watch, model=tiny_model(attention_dropout=0.5), disable_dropout=False, max_steps=1)
    together = watch.generations.query("step == 0").completion
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    for prompt, text in zip(watch.prompts, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(6):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == 1:
                break
        alone = tokenizer.decode(ids[0, len(tokenizer(prompt)["input_ids"]) :], skip_special_tokens=True)
        assert text == alone


def test_a_sentence_said_again_is_repetition_though_it_reads_well(tmp_path, monkeypatch):
    """What preference training on length taught the miniature: a filler, word for word, until the length fits."""
    padded = json.dumps({"response": "It was opened in 1720. It is closed on Tuesdays. It is closed on Tuesdays."})
    said(monkeypatch, GOOD, padded, GOOD, padded, padded, padded, padded, padded)
    watch = Health(PROMPTS, count=2)
    watched(tmp_path, watch)
    verdict = watch.summary().set_index("name").loc["repetition"]
    assert (verdict["level"], verdict["value"]) == ("bad", 1.0)
    assert set(watch.generations["outcome"]) == {"ok"}


def test_a_collapse_is_announced_and_stops_training_if_asked(tmp_path, monkeypatch, capsys):
    """The published collapse: an object, then closing braces without end."""
    for stop, steps in ((True, 4), (False, 6)):
        said(monkeypatch, GOOD, GOOD, GOOD, GOOD, GOOD, LOOP, GOOD, LOOP)
        watch = Health(PROMPTS, count=2, stop=stop)
        assert watched(tmp_path / str(stop), watch).state.global_step == steps
        verdicts = watch.summary().set_index("name")
        assert list(verdicts.loc[["parse_rate", "repetition"], "level"]) == ["bad", "bad"]
        assert list(watch.generations.outcome)[:6] == ["ok"] * 5 + ["loop"]
        printed = capsys.readouterr().out
        assert printed.count("repetition bad") == 1
        assert "health at step 4: parse_rate bad. 50% of the generations can be read, 100% at the start." in printed


def test_a_resumed_run_is_held_against_the_first_start(tmp_path, monkeypatch):
    said(monkeypatch, GOOD, GOOD, GOOD, GOOD, LOOP, LOOP)
    watched(tmp_path, Health(PROMPTS, count=2), max_steps=2, save_strategy="steps", save_steps=2)
    fresh = Health(PROMPTS, count=2)
    resumed = grouped(tmp_path, eval_dataset=tiny_pairs(2, seed=5), callbacks=[fresh], max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert list(fresh.generations.step) == [4, 4]
    assert "100% at the start" in fresh.summary().set_index("name").sentence["parse_rate"]
