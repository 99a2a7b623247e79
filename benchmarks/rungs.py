"""The rungs of `bench_train.py`: what each one computes, in a process of its own."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
from trl import DPOConfig, DPOTrainer

from persodpo.training.checks import check_models
from persodpo.training.forward import install_packed_forward, response_log_probs
from persodpo.training.groups import TokenPair, group_pairs
from persodpo.training.guard import Verdict
from persodpo.training.loss import LossSettings, Pairs, pair_losses
from persodpo.training.packing import Group, Layout, PackedRows, pack
from persodpo.training.trainer import GroupedDPOConfig, GroupedDPOTrainer

RUNGS = ["trl", "trl-tuned", "pairs", "sequences", "grouped-loop", "grouped"]
TRAINERS = {"trl", "trl-tuned", "grouped"}
#: Rungs that are timed on the larger subset.
FAST = {"grouped-loop", "grouped"}
MAX_LENGTH = 1024
TOKENIZER_WORDS = 16_384


MODEL = {
    "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 1024, "vocab_size": TOKENIZER_WORDS, "tie_word_embeddings": True,
}  # fmt: skip
#: Pairs of an optimiser step, pairs of TRL's micro-batch, positions of ours, prompts of the subset.
#: The budget holds the largest group, so that none is split, and little more, so that few positions are padding.
STEP_PAIRS, BATCH, BUDGET, PROMPTS = 16, 4, 1200, 10


class Rung:
    """One rung in its own process: data, model, and what it is to do."""

    def __init__(self, name: str, folder: Path, *, check: bool) -> None:
        """Load the subset, cut to the first prompts for a check, and build the models."""
        self.name, self.check = name, check
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        kind = "fast" if name in FAST and not check else "slow"
        steps = json.loads((folder / f"steps-{kind}.json").read_text())
        # A check takes prompts of the first step only, and few where a step is long.
        self.steps = [steps[0][:4]] if check else steps
        self.rows = [row for step in self.steps for pairs in step for row in pairs]
        ids = {text: self.tokenizer(text)["input_ids"] for row in self.rows for text in row}
        end = [self.tokenizer.eos_token_id]
        pairs = [TokenPair(ids[p], ids[c] + end, ids[r] + end) for p, c, r in self.rows]
        self.groups, skipped = group_pairs(pairs, MAX_LENGTH)
        assert sum(len(group.weights) for group in self.groups) == len(self.rows), str(skipped)
        self.model = self.build(0)
        # A check needs a reference that is not the policy, or every loss is log 2.
        self.reference = self.build(1) if check or name == "trl" else None
        if name == "grouped-loop":
            install_packed_forward(self.model)
        self.micro: list[list[tuple[list[Group], torch.Tensor]]] = []
        self.trainer: Any = None
        torch.manual_seed(0)

    def build(self, seed: int) -> Any:
        """Build a model with random weights."""
        torch.manual_seed(seed)
        config = Qwen2Config(**MODEL, max_position_embeddings=2048)
        config.pad_token_id = self.tokenizer.pad_token_id
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)

    def setup_trainer(self) -> tuple[float, float]:
        """Make the trainer; return the seconds that reference log-probabilities took, and the guard, which looks once."""
        common: dict[str, Any] = {
            # A folder of its own, or the second run would find the reference of the first.
            "output_dir": str(self.folder / f"out-{os.getpid()}"), "use_cpu": True, "bf16": False,
            "report_to": "none", "save_strategy": "no", "num_train_epochs": 1, "disable_tqdm": True,
            "max_length": MAX_LENGTH, "train_sampling_strategy": "sequential",
        }  # fmt: skip
        tuned = {} if self.name == "trl" else {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
        if self.name == "grouped":
            args = GroupedDPOConfig(**common, **tuned, token_budget=BUDGET)
        else:
            sizes = {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": STEP_PAIRS // BATCH}
            args = DPOConfig(**common, **tuned, **sizes)
        data = Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), zip(*self.rows, strict=True), strict=True)))
        seconds, guard = [0.0], [0.0]

        def check_timed(*models: Any, **settings: Any) -> Verdict:
            started = time.perf_counter()
            verdict = check_models(*models, **settings)
            guard[0] += time.perf_counter() - started
            return verdict

        made = measured(GroupedDPOTrainer if self.name == "grouped" else DPOTrainer, self.steps, seconds)
        with mock.patch("persodpo.training.trainer.check_models", check_timed):
            self.trainer = made(self.model, self.reference, args, train_dataset=data, processing_class=self.tokenizer)
        return seconds[0] - guard[0], guard[0]

    def setup_loop(self) -> tuple[float, float]:
        """Fill micro-batches; return the seconds that reference log-probabilities took, and a guard, which there is none."""
        groups = iter(self.groups)
        steps = [self.fill([unit for _ in step for unit in self.units(next(groups))]) for step in self.steps]
        started = time.perf_counter()
        with torch.no_grad():
            for step in steps:
                known = [response_log_probs(self.reference or self.model, self.pack(rows)) for rows in step]
                self.micro.append(list(zip(step, known, strict=True)))
        return time.perf_counter() - started, 0.0

    def pack(self, rows: list[Group]) -> PackedRows:
        """Return the rows as tensors."""
        return pack(rows, Layout(pad_token_id=self.tokenizer.pad_token_id))

    def units(self, group: Group) -> list[list[Group]]:
        """Split a group into the rows that belong together: of a pair, or of a prompt."""
        if self.name == "grouped-loop":
            return [[group]]
        # Indices of pairs count responses from the row that holds them.
        alone = [Group(group.prompt, [response]) for response in group.responses]
        if self.name == "sequences":
            return [[replace(group, responses=group.responses[:1]), *alone[1:]]]
        return [
            [Group(group.prompt, [group.responses[chosen]], [0], [1], [1.0]), alone[rejected]]
            for chosen, rejected in zip(group.chosen, group.rejected, strict=True)
        ]

    def fill(self, units: list[list[Group]]) -> list[list[Group]]:
        """Fill micro-batches up to the budget with units of like length; a check keeps each unit alone, in order."""
        if self.check:
            return units
        batches: list[list[Group]] = []
        longest = 0
        for unit in sorted(units, key=lambda rows: -max(positions(row) for row in rows)):
            if batches and longest * (len(batches[-1]) + len(unit)) <= BUDGET:
                batches[-1].extend(unit)
            else:
                longest = max(positions(row) for row in unit)
                batches.append(list(unit))
        return batches

    def losses(self, rows: PackedRows, known: torch.Tensor) -> torch.Tensor:
        """Return the loss of each pair of a packed micro-batch."""
        ratio, lengths = response_log_probs(self.model, rows) - known, rows.lengths
        pairs = Pairs(ratio[rows.chosen], ratio[rows.rejected], lengths[rows.chosen], lengths[rows.rejected])
        return rows.weights * pair_losses(pairs, LossSettings())

    def first_losses(self) -> list[float]:
        """Return losses of the first prompts' pairs, by the code that training runs; leave no gradient."""
        trainer, many, parts = self.trainer, None if self.check else 4, []
        if trainer is None:
            parts = [(self.pack(rows), known) for rows, known in self.micro[0][:many]]
        elif self.name == "grouped":
            batches = [trainer.data_collator([row])["batch"] for row in list(trainer.train_dataset)[:many]]
            parts = [(batch.rows[0], batch.rows[0].reference) for batch in batches]
        else:
            batches = [trainer.data_collator([row]) for row in list(trainer.train_dataset)[:many]]
            parts = [(trainer._prepare_inputs(batch),) for batch in batches]
        compute = partial(trainer.compute_loss, self.model) if self.name.startswith("trl") else self.losses
        found: list[float] = []
        for part in parts:
            losses = compute(*part)
            losses.sum().backward()
            found.extend(losses.detach().flatten().tolist())
        self.model.zero_grad(set_to_none=True)
        return found

    def train(self) -> float:
        """Run one epoch of the subset; return its seconds."""
        started = time.perf_counter()
        if self.trainer is not None:
            self.trainer.train()
        else:
            self.model.train()
            optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
            for step in self.micro:
                for rows, known in step:
                    (self.losses(self.pack(rows), known).sum() / STEP_PAIRS).backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    def tokens(self) -> int:
        """Count the positions that the policy computes in one epoch of the subset, padding included."""
        if self.trainer is None:
            return sum(len(rows) * max(map(positions, rows)) for step in self.micro for rows, _ in step)
        if self.name == "grouped":
            batches = (inputs["batch"] for inputs in self.trainer.get_train_dataloader())
            return sum(rows.input_ids.numel() for batch in batches for rows in batch.rows)
        rows, batch = list(self.trainer.train_dataset), BATCH
        collate = self.trainer.data_collator
        return sum(collate(rows[at : at + batch])["input_ids"].numel() for at in range(0, len(rows), batch))


def positions(group: Group) -> int:
    """Return the positions of a group's row."""
    return Layout().positions(group.prompt, group.responses)


def measured(base: Any, steps: list[list[Any]], seconds: list[float]) -> Any:
    """Return the trainer with its reference pass timed and, if grouped, with batches of whole steps in order."""

    class Measured(base):  # type: ignore[misc]
        def _precompute_ref_logps(self, *args: Any) -> Any:
            started = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args)
            seconds[0] += time.perf_counter() - started
            return dataset

        def get_train_dataloader(self) -> Any:
            if base is not GroupedDPOTrainer:
                return super().get_train_dataloader()
            places = iter(range(len(self.train_dataset)))
            batches = [[next(places) for _ in step] for step in steps]
            return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)

    return Measured
