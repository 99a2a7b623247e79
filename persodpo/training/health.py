"""Is a DPO run still healthy? Its logs and a few greedy generations in, a verdict on each way in which runs fail out.

Falling chosen log-probability and saturation show in the logs; broken format, a changed length and loops only in what
the model writes. With the callback `Health` training is bit-identical to training without.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from tqdm import tqdm
from transformers import GenerationConfig, TrainerCallback

from persodpo.completions import is_loop, read_completion, repeats_sentence
from persodpo.errors import PersodpoError

Level = Literal["ok", "watch", "bad"]
#: The verdicts of `judge`, in its order.
VERDICTS = ("chosen_logps", "saturation", "parse_rate", "length", "repetition")
#: Verdicts of which one that is bad means that the model has collapsed.
COLLAPSE = ("parse_rate", "repetition")
#: Where `Measured` goes in the trainer's log history.
LOGGED = ("health/parse_rate", "health/words", "health/loops")
#: Nats that chosen responses may lose against the reference; 20 are a quarter nat a token on responses of 80 tokens.
CHOSEN_FALL = 20.0
#: Training logs that are averaged, and that must all be saturated: from this accuracy on, with a loss below this.
WINDOW, SATURATED_ACCURACY, SATURATED_LOSS = 5, 0.99, 0.01
#: How far the parse rate may fall, and by which factor mean words may change.
PARSE_FALL, LENGTH_FACTOR = 0.2, 2.0
#: Share of generations that may loop or say a sentence twice, unless as many did at the start.
LOOPS = 0.2
#: Share of a threshold from which a verdict is ``watch``.
WATCH = 0.5


class Measured(NamedTuple):
    """What the generations of a step amount to: share read, mean words (0: none), share that loops or repeats a sentence."""

    step: int
    parse_rate: float
    words: float
    loops: float


class Verdict(NamedTuple):
    """A finding: its name of `VERDICTS`, level, the step and value it rests on (NaN before any), and a sentence."""

    name: str
    level: Level
    step: int
    value: float
    sentence: str


def judge(log_history: Sequence[Mapping[str, Any]], generations: Sequence[Measured], beta: float) -> list[Verdict]:
    """Judge a run as it stands.

    Args:
        log_history: The trainer's logs, under TRL's names.
        generations: Measured generations from the start on; the last is held against the first.
        beta: DPO's, which makes log-ratios of rewards.

    Returns:
        One verdict for each of `VERDICTS`. Where nothing was measured yet: ``watch`` at step -1 with value NaN.
    """
    logs = [log for log in log_history if {"loss", "rewards/accuracies", "rewards/margins"} <= set(log)][-WINDOW:]
    verdicts = [_judge_chosen(logs, beta), _judge_saturation(logs)] if logs else []
    verdicts += _judge_generations(generations[0], generations[-1]) if generations else []
    by_name = {verdict.name: verdict for verdict in verdicts}
    return [by_name.get(name) or Verdict(name, "watch", -1, math.nan, "Nothing to judge yet.") for name in VERDICTS]


def _judge_chosen(logs: Sequence[Mapping[str, Any]], beta: float) -> Verdict:
    change = _mean([log["rewards/chosen"] for log in logs]) / beta
    sentence = f"Chosen responses changed by {change:+.1f} nats since the reference (allowed: -{CHOSEN_FALL:g})."
    return Verdict("chosen_logps", _level(-change, CHOSEN_FALL), int(logs[-1]["step"]), change, sentence)


def _judge_saturation(logs: Sequence[Mapping[str, Any]]) -> Verdict:
    losses, margins = ([float(log[key]) for log in logs] for key in ("loss", "rewards/margins"))
    full = [log["rewards/accuracies"] >= SATURATED_ACCURACY and log["loss"] < SATURATED_LOSS for log in logs]
    level: Level = "watch" if full[-1] else "ok"
    sentence = f"The loss of the last {len(logs)} logs is {_mean(losses):.2g}; {sum(full)} of them are saturated."
    if not all(map(math.isfinite, losses + margins)):
        level, sentence = "bad", "The loss or the margin is not a number."
    elif sum(full) == WINDOW and margins[-1] > margins[0]:
        level = "bad"
        sentence = f"Nothing is left to learn, yet the margin grows from {margins[0]:.1f} to {margins[-1]:.1f}."
    return Verdict("saturation", level, int(logs[-1]["step"]), _mean(losses), sentence)


def _judge_generations(first: Measured, last: Measured) -> list[Verdict]:
    read = _level(first.parse_rate - last.parse_rate, PARSE_FALL)
    sentence = f"{last.parse_rate:.0%} of the generations can be read, {first.parse_rate:.0%} at the start."
    if first.parse_rate == last.parse_rate == 0:
        read, sentence = "watch", "No generation can be read, now or at the start, so a collapse could not show."
    low, high = sorted((first.words, last.words))
    length = _level(high / low if low else math.inf, LENGTH_FACTOR, least=1.0) if first.words else "watch"
    loops = _level(last.loops, LOOPS)
    loops = "watch" if loops == "bad" and last.loops <= first.loops else loops
    looping = f"{last.loops:.0%} of the generations repeat themselves, {first.loops:.0%} at the start."
    long = f"A response has {last.words:.1f} words, {first.words:.1f} at the start."
    return [
        Verdict("parse_rate", read, last.step, last.parse_rate, sentence),
        Verdict("length", length, last.step, last.words, long),
        Verdict("repetition", loops, last.step, last.loops, looping),
    ]


def _level(value: float, allowed: float, least: float = 0.0) -> Level:
    """Rate how far a value went from ``least``; what is not a number is bad."""
    if math.isnan(value) or value > allowed:
        return "bad"
    return "watch" if value > least + WATCH * (allowed - least) else "ok"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class Health(TrainerCallback):
    """Generates at the start, at each evaluation and at the end of training, and judges the run.

    ``state.log_history`` gets ``health/parse_rate``, ``health/words`` and ``health/loops``; a line is printed when a
    level changes. A resumed run is held against the start in its checkpoint's log history. A best model loaded at the end
    is not measured again: its evaluation was.

    Args:
        prompts: Held-out prompts; the first ``count`` distinct ones are taken.
        max_new_tokens: Longest generation; what is cut there counts as not read.
        reading: As in `read_completion`. ``as_released`` accepts a tail of braces behind the object, ``strict`` not.
        stop: Stop training when a verdict of `COLLAPSE` is bad; needs evaluations during training.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        *,
        count: int = 16,
        max_new_tokens: int = 256,
        reading: Literal["as_released", "strict"] = "strict",
        stop: bool = False,
    ) -> None:
        """Keep the first distinct prompts."""
        self.prompts = list(dict.fromkeys(prompts))[:count]
        if not self.prompts:
            raise PersodpoError("Health has no prompts to generate for; pass some held-out ones.")
        self.max_new_tokens, self.reading, self.stop = max_new_tokens, reading, stop
        self._verdicts: list[Verdict] = []
        self._measured: list[Measured] = []
        self._rows: list[tuple[int, int, str, str]] = []

    @property
    def generations(self) -> pd.DataFrame:
        """Every generation of this process: step, prompt (its number), completion, outcome."""
        return pd.DataFrame(self._rows, columns=["step", "prompt", "completion", "outcome"])

    def summary(self) -> pd.DataFrame:
        """Return the latest verdicts: name, level, step, value, sentence."""
        return pd.DataFrame(self._verdicts, columns=list(Verdict._fields))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start anew, or from the log history of the checkpoint."""
        if AcceleratorState().distributed_type == DistributedType.FSDP:
            raise PersodpoError("Health needs whole weights on a process; train without sharding or without Health.")
        logs = [log for log in state.log_history if LOGGED[0] in log]
        self._measured = [Measured(int(log["step"]), *(log[name] for name in LOGGED)) for log in logs]
        self._rows, self._verdicts = [], []
        self._measure(args, state, control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Generate and judge."""
        self._measure(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Generate and judge once more, unless this step was."""
        if state.best_model_checkpoint is None or not args.load_best_model_at_end:
            self._measure(args, state, control, **kwargs)

    def _measure(self, args: Any, state: Any, control: Any, *, model: Any, processing_class: Any, **_: Any) -> None:
        """Generate unless this step was, log, judge, print what changed, and stop if asked."""
        if all(measured.step != state.global_step for measured in self._measured):
            with _untouched(model):
                self._record(state, _generate(model, processing_class, self.prompts, self.max_new_tokens))
        before = {verdict.name: verdict.level for verdict in self._verdicts if verdict.step >= 0}
        self._verdicts = judge(state.log_history, self._measured, args.beta)
        for name, level, step, _value, sentence in self._verdicts:
            if step >= 0 and level != before.get(name, "ok") and state.is_world_process_zero:
                tqdm.write(f"health at step {state.global_step}: {name} {level}. {sentence}")
        if self.stop and any(found.level == "bad" and found.name in COLLAPSE for found in self._verdicts):
            control.should_training_stop = True

    def _record(self, state: Any, texts: list[str]) -> None:
        """Read the generations and log what they amount to."""
        readings = [read_completion(text, self.reading) for text in texts]
        words = [len((reading.response or "").split()) for reading in readings]
        loops = [
            reading.outcome == "loop" or is_loop(text) or repeats_sentence(reading.response or "")
            for reading, text in zip(readings, texts, strict=True)
        ]
        read = _mean([reading.outcome == "ok" for reading in readings])
        measured = Measured(state.global_step, read, _mean(words), _mean(loops))
        self._measured.append(measured)
        for number, (text, reading) in enumerate(zip(texts, readings, strict=True)):
            self._rows.append((measured.step, number, text, reading.outcome))
        logs = dict(zip(LOGGED, measured[1:], strict=True)) | ({} if state.epoch is None else {"epoch": state.epoch})
        state.log_history.append(logs | {"step": measured.step})


@contextmanager
def _untouched(model: Any) -> Iterator[None]:
    """Switch to evaluation without gradients; put back each module's mode and torch's random states."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    model.train(mode=False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _generate(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Generate greedily in one batch, padded on the left; the model's own sampling and penalties are set aside.

    TRL gives a tokenizer without a padding token that of its end.
    """
    batch = tokenizer(
        list(prompts), padding=True, padding_side="left", return_attention_mask=True, return_tensors="pt"
    ).to(model.device)
    plain = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, temperature=1.0, top_p=1.0, top_k=50,
        repetition_penalty=1.0, no_repeat_ngram_size=0, pad_token_id=tokenizer.pad_token_id, use_cache=True,
    )  # fmt: skip
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rows = model.generate(input_ids=ids, attention_mask=mask, generation_config=plain)
    return list(tokenizer.batch_decode(rows[:, ids.shape[1] :], skip_special_tokens=True))
