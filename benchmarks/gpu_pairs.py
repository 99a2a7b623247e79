"""Pairs of random tokens in the shape of the released ones, and what they cost; sizes of `gpu.py`."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Prompt = tuple[int, list[int], list[int]]
#: Chosen and rejected responses of eight prompts: 7 pairs and 5.6 responses per prompt, as in the released pairs.
SIDES = ((1, 4), (3, 4), (2, 3), (2, 3), (3, 3), (2, 4), (1, 5), (2, 3))


@dataclass(frozen=True)
class Size:
    """What differs between a full and a quick run.

    Attributes:
        model: Settings of the ladder's model.
        deviation: Standard deviation of its weights.
        words: Distinct tokens of the texts.
        lengths: Mean tokens of prompts and of responses.
        prompts: Prompts per optimiser step of the ladder, a multiple of eight.
        rungs: Name -> pairs per micro-batch (TRL) or positions (grouped), in the order in which they run.
        few: Pairs per micro-batch of TRL in the training part, whose optimiser steps have 28 pairs of 4 prompts.
        rates: Factor of the learning rates there.
    """

    model: dict[str, Any]
    deviation: float
    words: int
    lengths: tuple[int, int]
    prompts: int
    rungs: dict[str, int]
    few: int
    rates: float


FULL = Size(
    {"vocab_size": 151_936, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
     "intermediate_size": 4864, "tie_word_embeddings": True, "max_position_embeddings": 2048},
    0.02, 20_000, (424, 79), 64,
    {"grouped-16k": 16_384, "tuned-16": 16, "trl": 8, "grouped-8k": 8192, "grouped-32k": 32_768, "tuned-32": 32}, 4, 1.0,
)  # fmt: skip
QUICK = Size(
    {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
     "intermediate_size": 64, "tie_word_embeddings": True, "max_position_embeddings": 128},
    0.2, 100, (24, 6), 8, {"grouped-128": 128, "tuned-14": 14, "trl": 8}, 14, 10.0,
)  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """Optimiser steps of the same shape: for each prompt its tokens, and those of its chosen and rejected responses."""

    size: Size
    prompts: list[Prompt]
    count: int

    @classmethod
    def draw(cls, size: Size, prompts: int, count: int) -> Steps:
        """Draw lengths, the end of sequence included."""
        source = random.Random(0)  # noqa: S311
        prompt, response = size.lengths
        drawn: list[Prompt] = []
        for number in range(prompts):
            one, other = (
                [round(response * source.uniform(0.4, 1.6)) for _ in range(side)] for side in SIDES[number % 8]
            )
            drawn.append((round(prompt * source.uniform(0.6, 1.4)), one, other))
        return cls(size, drawn, count)

    @property
    def pairs(self) -> int:
        """Pairs of a step."""
        return sum(len(chosen) * len(rejected) for _, chosen, rejected in self.prompts)

    def texts(self) -> dict[str, list[str]]:
        """Return the pairs of all steps as columns, each step with tokens of its own."""
        source, words = random.Random(1), [f"w{number}" for number in range(self.size.words)]  # noqa: S311
        rows = []
        for length, *sides in self.prompts * self.count:
            prompt = " ".join(source.choices(words, k=length)) + "\n"
            one, other = ([" ".join(source.choices(words, k=n - 1)) for n in side] for side in sides)
            rows += [(prompt, chosen, rejected) for chosen in one for rejected in other]
        return dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*rows, strict=True)), strict=True))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a tokenizer of whole words."""
        words = ["<unk>", "<eos>", "<pad>", *(f"w{number}" for number in range(self.size.words))]
        tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = dict(zip(("unk_token", "eos_token", "pad_token"), words[:3], strict=True))
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)

    def work(self, *, grouped: bool) -> dict[str, float]:
        """Count positions and operations of a step, and the tokens of its pairs.

        Operations are the model's in the forward and the backward pass, three times those of the forward pass: padding,
        recomputation and references do not count, attention counts the keys that are seen, the head labelled positions.
        """
        positions = seen = labels = pairwise = 0.0
        for prompt, chosen, rejected in self.prompts:
            uses = [(n, len(rejected)) for n in chosen] + [(n, len(chosen)) for n in rejected]
            pairwise += sum(times * (prompt + n) for n, times in uses)
            sequences = [(n, 1) for n, _ in uses] if grouped else uses
            prompts = 1 if grouped else sum(times for _, times in sequences)
            positions += (prompt - grouped) * prompts + sum(times * n for n, times in sequences)
            seen += prompt**2 / 2 * prompts + sum(times * n * (prompt + n / 2) for n, times in sequences)
            labels += sum(times * n for n, times in sequences)
        names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "num_hidden_layers")
        hidden, heads, keys, inner, layers = (self.size.model[name] for name in names)
        weights = layers * (hidden * hidden * (2 + 2 * keys / heads) + 3 * hidden * inner)
        head = hidden * self.size.model["vocab_size"]
        forward = 2 * weights * positions + 4 * layers * hidden * seen + 2 * head * labels
        return {"positions": positions, "operations": 3 * forward, "pairwise_tokens": pairwise}
