"""A tiny tokenizer, model and set of pairs, and the grouped and the stock trainer on them, for tests of training."""

from __future__ import annotations

import random
from functools import lru_cache

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer

from persodpo.training.packing import Group
from persodpo.training.trainer import GroupedDPOConfig, GroupedDPOTrainer

WORDS = [f"w{number}" for number in range(60)]
TINY = {
    "learning_rate": 1e-3, "logging_steps": 1, "bf16": False, "report_to": [], "gradient_checkpointing": False,
    "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential", "max_length": 64,
}  # fmt: skip
PAIRS_A_PROMPT = 6
#: Arguments of trainers that are no settings.
OBJECTS = {"peft_config", "eval_dataset", "ref_model", "callbacks"}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<eos>", "<pad>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )


def tiny_model(seed: int = 0, **changes) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "attn_implementation": "sdpa", "initializer_range": 0.2, "eos_token_id": 1,
        "pad_token_id": 2,
    }  # fmt: skip
    return Qwen2ForCausalLM(Qwen2Config(**sizes | changes))


@lru_cache
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
            (prompt, sides[c], sides[r], scores[c], scores[r])
            for c in range(chosen)
            for r in range(chosen, chosen + rejected)
        ]
    names = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
    return Dataset.from_list([dict(zip(names, row, strict=True)) for row in rows])


def make(kind, config, folder, dataset=None, *, model=None, **changes):
    extra = {name: changes.pop(name) for name in OBJECTS & set(changes)}
    return kind(
        model=model or tiny_model(), args=config(str(folder), **TINY | {"max_steps": 3} | changes),
        train_dataset=tiny_pairs() if dataset is None else dataset, processing_class=tiny_tokenizer(), **extra,
    )  # fmt: skip


def grouped(folder, dataset=None, **changes) -> GroupedDPOTrainer:
    settings = {"per_device_train_batch_size": 4, "token_budget": 150} | changes
    return make(GroupedDPOTrainer, GroupedDPOConfig, folder, dataset, **settings)


def stock(folder, dataset=None, **changes) -> DPOTrainer:
    settings = {"per_device_train_batch_size": 4 * PAIRS_A_PROMPT} | changes
    if not {"model", "peft_config"} & set(settings):
        settings = {"ref_model": tiny_model()} | settings
    return make(DPOTrainer, DPOConfig, folder, dataset, **settings)


def trained(trainer):
    trainer.train()
    return trainer


def logs(trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry and "train_runtime" not in entry]


def plain_log_probs(model, group: Group) -> torch.Tensor:
    """One forward pass a response: prompt and response alone."""
    sums = []
    for response in group.responses:
        ids = torch.tensor([group.prompt + response])
        log_probs = torch.log_softmax(model(input_ids=ids).logits.float(), -1)
        start = len(group.prompt) - 1
        sums.append(log_probs[0, start:-1].gather(-1, ids[0, start + 1 :, None]).sum())
    return torch.stack(sums)
