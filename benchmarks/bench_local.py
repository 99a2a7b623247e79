"""Answering with a model of this machine: many prompts together against one at a time.

Run by `make bench-generate`. The released way is transformers' own text-generation pipeline, one prompt after another,
greedy, 110 new tokens. Both answer the same published prompts with the same weights in the same process, in turns, and the
texts are compared. Models:

- ``small``: the small policy of the release profile, trained on the run's own texts;
- ``qwen2-0.5b``: the configuration of the authors' model, Qwen2-0.5B, with random weights, the small policy's tokenizer, and
  the tokens that this one lacks suppressed. Its answers never end by themselves, so both ways write as many tokens. The
  released way answers a sample of the prompts, spread over their lengths, for its time is the sum of its prompts' times.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, machine, pipes, save
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, pipeline
from transformers.utils.logging import set_verbosity_error

from persodpo import stages
from persodpo.config import TransformersModel, load_profile
from persodpo.generation.ask import generate
from persodpo.generation.local import TransformersBackend
from persodpo.generation.requests import Request, request_key, requests_for
from persodpo.generation.store import Store
from persodpo.runfolder import RunFolder
from persodpo.stages.policy import start_policy
from persodpo.training.policy import load_policy

BATCH = {"small": 32, "qwen2-0.5b": 64}
#: What answering together must reach against the released way, tokens a second, with the authors' model.
AT_LEAST = 3.0
#: https://huggingface.co/Qwen/Qwen2-0.5B-Instruct/blob/main/config.json
QWEN2 = {
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
COLUMNS = ("prompts", "seconds", "tokens a second", "times the released way", "same texts")


def random_qwen2(folder: Path, tokenizer_from: Path) -> Path:
    """Make a Qwen2-0.5B of random weights with the small policy's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    torch.manual_seed(0)
    config = Qwen2Config(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **QWEN2,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.generation_config.suppress_tokens = list(range(len(tokenizer), config.vocab_size))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sample_of(requests: list[Request], count: int) -> list[int]:
    """Return places of requests spread evenly over the lengths of their prompts, in ascending order."""
    by_length = sorted(range(len(requests)), key=lambda place: len(requests[place].prompt))
    step = len(requests) / count
    return sorted(by_length[int((number + 0.5) * step)] for number in range(count))


def released_way(weights: Path, requests: list[Request]) -> Callable[[], list[str]]:
    """Return the released way to answer requests; loading the model does not count."""
    model, tokenizer = load_policy(weights)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, do_sample=False, return_full_text=False)
    return lambda: [str(write(one.prompt, max_new_tokens=one.max_new_tokens)[0]["generated_text"]) for one in requests]


def our_way(weights: Path, requests: list[Request], batch_size: int) -> Callable[[], list[str]]:
    """Return our way, into a fresh store every time; loading the model counts."""
    settings = TransformersModel(model="bench", weights=str(weights), batch_size=batch_size)
    backend = TransformersBackend(settings, weights, load_policy)

    def run() -> list[str]:
        with Store(Path(":memory:")) as store:
            generate(requests, backend, store, progress=False)
            entries = store.entries([request_key(one, backend) for one in requests])
            return [str(entry.answer.completion) for _, entry in entries if entry]

    return run


def measure(weights: Path, requests: list[Request], places: list[int], batch_size: int, repeats: int) -> dict[str, Any]:
    """Time both ways in turns; the released one answers the requests at some places."""
    tokenizer = AutoTokenizer.from_pretrained(weights)
    released = released_way(weights, [requests[place] for place in places])
    ways = {"released": (released, places), "together": (our_way(weights, requests, batch_size), range(len(requests)))}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, dict[int, str]] = {}
    for _ in range(repeats):
        for name, (run, answered) in ways.items():
            started = time.perf_counter()
            made = run()
            seconds[name].append(time.perf_counter() - started)
            texts[name] = dict(zip(answered, made, strict=True))
            print(name, f"{seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
    rows = {}
    for name, times in seconds.items():
        written, theirs = (
            sum(map(len, tokenizer(list(texts[which].values()))["input_ids"])) for which in (name, "released")
        )
        ratios = [written / ours / (theirs / first) for first, ours in zip(seconds["released"], times, strict=True)]
        rows[name] = {
            "prompts": len(texts[name]), "seconds": statistics.median(times), "all seconds": times, "tokens": written,
            "tokens a second": written / statistics.median(times), "times the released way": statistics.median(ratios),
            "same texts": sum(texts[name][place] == text for place, text in texts["released"].items()) / len(places),
        }  # fmt: skip
    return rows


def main() -> None:
    """Measure, write the results, and fail where the bound is missed or a text differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=128, help="for the small policy")
    parser.add_argument("--qwen2-prompts", type=int, default=64)
    parser.add_argument("--qwen2-released", type=int, default=4, help="how many of them the released way answers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    set_verbosity_error()
    profile = load_profile("release")
    stages.make(profile, "generate")
    run = RunFolder(profile)
    small = Path(start_policy(run))
    dialogues = run.read("dialogues").query("split == 'valid'")
    entry = next(entry for entry in profile.generation.backends if entry.model == "small")
    requests = list(requests_for(dialogues.head(asked.prompts), entry, profile))
    fewer = requests[: asked.qwen2_prompts]
    with tempfile.TemporaryDirectory() as made:
        random, few = random_qwen2(Path(made) / "qwen2", small), sample_of(fewer, asked.qwen2_released)
        every = list(range(len(requests)))
        measured = {
            "small": measure(small, requests, every, BATCH["small"], asked.repeats),
            "qwen2-0.5b": measure(random, fewer, few, BATCH["qwen2-0.5b"], asked.repeats),
        }
    forms = ("{}", "{:,.1f}", "{:,.1f}", "{:.1f}x", "{:.1%}")
    rows = [
        [model, way, *(form.format(row[name]) for name, form in zip(COLUMNS, forms, strict=True))]
        for model, of_model in measured.items()
        for way, row in of_model.items()
    ]
    sizes = {"batch_size": BATCH, "max_new_tokens": requests[0].max_new_tokens, "repeats": asked.repeats}
    content = {"machine": machine(threads=torch.get_num_threads()), "sizes": sizes, "measured": measured}
    save("local", content, pipes(["model", "way", *COLUMNS], rows), asked.output)
    together = [of_model["together"] for of_model in measured.values()]
    if together[-1]["times the released way"] < AT_LEAST or any(row["same texts"] < 1 for row in together):
        sys.exit(f"together must reach {AT_LEAST}x with qwen2-0.5b, and the same texts with both")


if __name__ == "__main__":
    main()
