"""A tiny model that has learned to answer in JSON, for tests of generation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from persodpo.training.policy import SmallPolicy, make_small_policy

PLACES = ["Rome", "Paris", "Oslo", "Lima", "Cairo", "Delhi", "Quito", "Tunis"]
SETTINGS = SmallPolicy(
    vocabulary=400, hidden_size=48, max_length=256, steps=300, batch_tokens=512, learning_rate=5e-3,
    seed=44,
)  # fmt: skip


def question(place: str, turns: int = 0) -> str:
    """A prompt, longer with more turns before it."""
    return "".join(f"User2: I know {PLACES[turn % 8]}.\n" for turn in range(turns)) + f"User1: What about {place}?\n"


def reply(place: str) -> str:
    return f'{{"response": "{place} is old and lovely."}}'


#: ChatML, as Qwen2's own template writes it; `transformers serve` looks for its marks in models of that type.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def in_chatml(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def make_talker(folder: Path, prompt: Callable[[str], str] = str) -> Path:
    examples = [(prompt(question(place, turns)), reply(place)) for place in PLACES for turns in range(4)]
    return make_small_policy(examples, SETTINGS, folder)
