"""A tiny tokenizer, model and set of pairs for tests of training."""

from __future__ import annotations

import random

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

WORDS = [f"w{number}" for number in range(60)]
TINY = {
    "learning_rate": 1e-3, "logging_steps": 1, "bf16": False, "report_to": [], "gradient_checkpointing": False,
    "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
}  # fmt: skip


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<eos>", "<pad>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )


def tiny_model(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa", initializer_range=0.2, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def tiny_pairs(prompts: int = 24, chosen: int = 2, rejected: int = 3, seed: int = 0) -> Dataset:
    """Make a cross product of pairs a prompt, with scores."""
    source = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(source.choice(WORDS) for _ in range(source.randint(low, high)))

    rows = []
    for _ in range(prompts):
        prompt, sides = text(5, 12) + "\n", [text(2, 8) for _ in range(chosen + rejected)]
        scores = [source.random() for _ in sides]
        rows += [
            {
                "prompt": prompt,
                "chosen": sides[c],
                "rejected": sides[r],
                "score_chosen": scores[c],
                "score_rejected": scores[r],
            }
            for c in range(chosen)
            for r in range(chosen, chosen + rejected)
        ]
    return Dataset.from_list(rows)
