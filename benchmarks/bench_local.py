"""Answering with a model of this machine: many prompts together against one at a time.

Run by `make bench-generate`. The released way is transformers' own text-generation pipeline, one prompt after another,
greedy, 110 new tokens. Both answer the same published prompts with the same weights in the same process, in turns, and the
texts are compared. Models:

- ``small``: the small policy of the release profile, trained on the run's own texts;
- ``random``: Qwen2's architecture with forty million random parameters, where arithmetic outweighs the cost of a step.

``latency`` and ``stop at JSON`` are this project's other ways to ask the small policy; the texts of the latter end with the
answer's object.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, pipeline
from transformers.utils.logging import set_verbosity_error

from persodpo import stages
from persodpo.artifacts import PROJECT, RunFolder, git_commit, versions, write_json
from persodpo.config import load_profile
from persodpo.generation.asking import job_for
from persodpo.generation.engine import generate
from persodpo.generation.local import TransformersBackend
from persodpo.generation.requests import Request, request_key
from persodpo.generation.store import Store
from persodpo.settings import TransformersModel
from persodpo.stages.policy import start_policy
from persodpo.training.policy import load_policy

RESULTS = PROJECT / "benchmarks" / "results"
BATCH = 32
#: What the small policy must reach against the released way.
AT_LEAST = 5.0
RANDOM = {
    "hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 8, "num_attention_heads": 10,
    "num_key_value_heads": 2,
}  # fmt: skip


def random_model(folder: Path, tokenizer_from: Path) -> Path:
    """Make a model of random weights with the small policy's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True, dtype=torch.float32, **RANDOM,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def released_way(weights: Path, requests: list[Request]) -> Callable[[], list[str]]:
    """Return the run of the released way."""
    model, tokenizer = load_policy(weights)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)

    def run() -> list[str]:
        return [
            write(one.prompt, max_new_tokens=one.max_new_tokens, do_sample=False, return_full_text=False)[0][
                "generated_text"
            ]
            for one in requests
        ]

    return run


def our_way(weights: Path, requests: list[Request], **settings: Any) -> Callable[[], list[str]]:
    """Return our run, into a fresh store every time; loading the model counts."""
    fields = {"kind": "transformers", "model": "bench", "weights": str(weights), "batch_size": BATCH, **settings}
    backend = TransformersBackend(TransformersModel(**fields), weights)

    def run() -> list[str]:
        with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "answers.sqlite") as store:
            generate(requests, backend, store, progress=False)
            entries = store.entries([request_key(one, backend) for one in requests])
            return [str(entry.answer.completion) for _, entry in entries if entry]

    return run


def measure(
    ways: dict[str, Callable[[], list[str]]], repeats: int, tokens: Callable[[list[str]], int]
) -> dict[str, Any]:
    """Time each way in turns; the first one is what the others are compared with."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, list[str]] = {}
    for _ in range(repeats):
        for name, run in ways.items():
            started = time.perf_counter()
            texts[name] = run()
            seconds[name].append(time.perf_counter() - started)
    first = next(iter(ways))
    rows = {}
    for name in ways:
        pairs = zip(texts[name], texts[first], strict=True)
        ratios = [theirs / ours for theirs, ours in zip(seconds[first], seconds[name], strict=True)]
        made = tokens(texts[name])
        rows[name] = {
            "seconds": statistics.median(seconds[name]), "all seconds": seconds[name], "tokens": made,
            "tokens a second": made / statistics.median(seconds[name]),
            "times the released way": statistics.median(ratios) * made / tokens(texts[first]),
            "same texts": sum(ours == theirs for ours, theirs in pairs) / len(texts[name]),
        }  # fmt: skip
    return rows


def table(measured: dict[str, dict[str, Any]], prompts: dict[str, int]) -> str:
    """Return the figures as a table."""
    lines = [
        "| model | way | prompts | seconds | tokens a second | times the released way | same texts |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model, rows in measured.items():
        for way, row in rows.items():
            lines.append(
                f"| {model} | {way} | {prompts[model]} | {row['seconds']:,.1f} | {row['tokens a second']:,.0f} | "
                f"{row['times the released way']:.1f}x | {row['same texts']:.1%} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, write the results, and fail where the bound is missed or a text differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--random-prompts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    set_verbosity_error()
    profile = load_profile("release")
    stages.run_generate(profile)
    run = RunFolder(profile)
    small = Path(start_policy(run))
    dialogues = run.read("dialogues").query("split == 'valid'")
    entry = next(entry for entry in profile.generation.backends if entry.model == "small")
    backend = TransformersBackend(TransformersModel.model_validate(entry.model_dump()), small)
    requests = list(job_for(dialogues.head(asked.prompts), entry, profile, backend).requests)
    fewer = requests[: asked.random_prompts]
    tokenizer = AutoTokenizer.from_pretrained(small)

    def tokens(texts: list[str]) -> int:
        return sum(map(len, tokenizer(texts)["input_ids"]))

    with tempfile.TemporaryDirectory() as made:
        random = random_model(Path(made) / "random", small)
        measured = {
            "small": measure(
                {
                    "released": released_way(small, requests),
                    "together": our_way(small, requests),
                    "latency": our_way(small, requests, mode="latency"),
                    "stop at JSON": our_way(small, requests, stop_at_json=True),
                },
                asked.repeats,
                tokens,
            ),
            "random": measure(
                {"released": released_way(random, fewer), "together": our_way(random, fewer)}, asked.repeats, tokens
            ),
        }
    prompts = {"small": len(requests), "random": len(fewer)}
    shown = table(measured, prompts)
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), **versions(), "commit": git_commit()}
    sizes = {
        "prompts": prompts,
        "batch_size": BATCH,
        "max_new_tokens": requests[0].max_new_tokens,
        "repeats": asked.repeats,
    }
    asked.output.mkdir(parents=True, exist_ok=True)
    write_json(asked.output / "local.json", {"machine": machine, "sizes": sizes, "measured": measured})
    (asked.output / "local.md").write_text(shown + "\n")
    print(shown)
    together = measured["small"]["together"]
    if together["times the released way"] < AT_LEAST or together["same texts"] < 1:
        sys.exit(f"together must reach {AT_LEAST}x with the same texts")


if __name__ == "__main__":
    main()
