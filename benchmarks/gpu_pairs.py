"""Pairs of random tokens in the shape of the released ones, and what they cost; sizes of `gpu.py`."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, NamedTuple

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

#: Chosen and rejected responses of eight prompts: 7 pairs and 5.6 responses per prompt, as in the released pairs.
SIDES = ((1, 4), (3, 4), (2, 3), (2, 3), (3, 3), (2, 4), (1, 5), (2, 3))


class Size(NamedTuple):
    """What differs between a full and a quick run."""

    model: dict[str, Any]  # settings of the ladder's model
    deviation: float  # of its weights
    words: int  # distinct tokens of the texts
    lengths: tuple[int, int]  # mean tokens of prompts and of responses
    prompts: int  # in an optimiser step of the ladder, a multiple of eight
    rungs: dict[str, int]  # pairs per micro-batch (TRL) or positions (grouped), in the order in which they run
    few: int  # pairs per micro-batch of TRL in the training part, whose optimiser steps have 28 pairs of 4 prompts
    rates: dict[str, float]  # learning rates there


FULL = Size(
    {"vocab_size": 151_936, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
     "intermediate_size": 4864, "tie_word_embeddings": True, "max_position_embeddings": 2048},
    0.02, 20_000, (424, 79), 64,
    {"grouped-16k": 16_384, "tuned-16": 16, "trl": 8, "grouped-8k": 8192, "grouped-32k": 32_768, "tuned-32": 32}, 4,
    {"full": 1e-5, "LoRA": 1e-3},
)  # fmt: skip
QUICK = Size(
    {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
     "intermediate_size": 64, "tie_word_embeddings": True, "max_position_embeddings": 128},
    0.2, 100, (24, 6), 8, {"grouped-128": 128, "tuned-14": 14, "trl": 8}, 14, {"full": 1e-4, "LoRA": 1e-2},
)  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """Optimiser steps of the same shape: for each prompt its tokens, and those of its chosen and rejected responses."""

    size: Size
    prompts: list[tuple[int, list[int], list[int]]]
    count: int

    @classmethod
    def draw(cls, size: Size, prompts: int, count: int) -> Steps:
        """Draw lengths, the end of sequence included."""
        source = random.Random(0)  # noqa: S311
        drawn = []
        for number in range(prompts):
            sides = [[round(size.lengths[1] * source.uniform(0.4, 1.6)) for _ in range(n)] for n in SIDES[number % 8]]
            drawn.append((round(size.lengths[0] * source.uniform(0.6, 1.4)), *sides))
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

    def work(self, model: Any, *, grouped: bool) -> dict[str, float]:
        """Count positions of a step, the tokens of its pairs, and the model's operations: six a weight and position.

        Padding, recomputation, references and attention's scores do not count, the head at labelled positions alone.
        """
        positions = labels = pairwise = 0
        for prompt, chosen, rejected in self.prompts:
            uses = [(n, len(rejected)) for n in chosen] + [(n, len(chosen)) for n in rejected]
            tokens = sum(times * n for n, times in uses)
            pairwise += tokens + prompt * 2 * len(chosen) * len(rejected)
            labels += sum(chosen + rejected) if grouped else tokens
            positions += prompt - 1 + sum(chosen + rejected)
        positions = positions if grouped else pairwise
        head = model.get_input_embeddings().weight.numel()
        operations = 6 * (model.num_parameters(exclude_embeddings=True) * positions + head * labels)
        return {"positions": positions, "operations": operations, "pairwise_tokens": pairwise}
