"""One epoch of DPO on the released pairs, from TRL as it comes to grouped rows: time, memory and tokens.

Run by `make bench-train` (DEVICE=cpu or cuda). The ladder, every rung on the same model, dtype, threads, sdpa attention,
pairs, AdamW steps and clipping, each rung adding one saving:

- trl: TRL's DPOTrainer with its defaults (reference model in the loop, gradient checkpointing), batches of 4 pairs;
- trl-tuned: reference log-probabilities computed once, no checkpointing;
- pairs: prompt and response for both sides of every pair, the head on response positions only;
- sequences: each distinct prompt and response once, losses over pairs by index;
- grouped-loop: each distinct prompt once, each distinct response once, in the plain loop of the two rungs above;
- grouped: `GroupedDPOTrainer`, the same rows in the trainer.

An optimiser step is a fixed number of pairs of whole prompts, the same for every rung. Every measurement is a process of
its own on a fixed subset of prompts, after one untimed forward and backward pass; seconds are scaled to an epoch by
pairs and hold one pass for reference log-probabilities where a rung computes them ahead. Before anything is timed, the
losses of the first prompts, pair by pair in float32 and against a reference that is not the policy, must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config
from trl import DPOConfig, DPOTrainer

from persodpo.artifacts import PROJECT, RunFolder, git_commit, versions, write_json
from persodpo.config import load_profile
from persodpo.training.forward import response_log_probs
from persodpo.training.loss import LossSettings, Pairs, pair_losses
from persodpo.training.packing import Group, PackedRows, TokenPair, group_pairs, pack
from persodpo.training.trainer import GroupedDPOConfig, GroupedDPOTrainer

RESULTS = PROJECT / "benchmarks" / "results"
RUNGS = ["trl", "trl-tuned", "pairs", "sequences", "grouped-loop", "grouped"]
TRAINERS = {"trl", "trl-tuned", "grouped"}
CHECKED = ["trl", "pairs", "sequences", "grouped"]
MAX_LENGTH = 1024
TOKENIZER_WORDS = 16_384
TOLERANCE = 1e-4
SEED = 44
#: Device -> least factor of `grouped` against a rung.
BOUNDS = {"cpu": {"trl": 20.0, "pairs": 6.0}, "cuda": {"trl": 7.0, "trl-tuned": 4.0}}


@dataclass(frozen=True)
class Scale:
    """What differs between devices; ``batch`` counts pairs, ``budget`` positions of a micro-batch."""

    model: dict[str, Any]
    dtype: str
    step_pairs: int
    batch: dict[str, int]
    budget: int
    prompts: int


SCALES = {
    "cpu": Scale(
        {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 1024, "vocab_size": TOKENIZER_WORDS, "tie_word_embeddings": True},
        "float32", 16, {"trl": 4, "trl-tuned": 4}, 1024, 16,
    ),
    "cuda": Scale(
        {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
         "intermediate_size": 4864, "vocab_size": 151_936, "tie_word_embeddings": True},
        "bfloat16", 224, {"trl": 4, "trl-tuned": 16}, 16_384, 192,
    ),
}  # fmt: skip


def partition(counts: list[int], target: int) -> list[list[int]]:
    """Split prompts with so many pairs into steps of exactly ``target`` pairs; the end may fill none."""
    pool, steps = list(range(len(counts))), []
    while pool:
        sums: dict[int, list[int]] = {0: []}
        for prompt in pool:
            for total in sorted(sums, reverse=True):
                if total + counts[prompt] <= target:
                    sums.setdefault(total + counts[prompt], [*sums[total], prompt])
            if target in sums:
                break
        if target not in sums:
            break
        steps.append(sums[target])
        pool = [prompt for prompt in pool if prompt not in sums[target]]
    return steps


def prepare(folder: Path, scale: Scale, prompts: int, overrides: list[str]) -> dict[str, int]:
    """Write the subset's pairs and a tokenizer trained on all texts; return the sizes of set and subset."""
    frame = RunFolder(load_profile("release", overrides)).read("pairs/perso")
    frame = frame[frame["chosen"] != frame["rejected"]]
    # A line break keeps a token from spanning prompt and response.
    frame["prompt"] += "\n"
    texts = [text for name in ("prompt", "chosen", "rejected") for text in frame[name].unique()]
    tokenizer = ByteLevelBPETokenizer()
    special = ["<|end|>", "<|pad|>"]
    tokenizer.train_from_iterator(texts, vocab_size=TOKENIZER_WORDS, special_tokens=special, show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|end|>", pad_token="<|pad|>")  # noqa: S106
    fast.save_pretrained(folder / "tokenizer")
    rows: dict[str, list[tuple[str, str, str]]] = {}
    for row in frame[["prompt", "chosen", "rejected"]].itertuples(index=False, name=None):
        rows.setdefault(row[0], []).append(row)
    order = list(rows)
    random.Random(SEED).shuffle(order)  # noqa: S311
    steps, taken = [], 0
    for step in partition([len(rows[prompt]) for prompt in order], scale.step_pairs):
        if taken >= prompts:
            break
        steps.append([rows[order[place]] for place in step])
        taken += len(step)
    (folder / "steps.json").write_text(json.dumps(steps))
    all_pairs = sum(len(pairs) for pairs in rows.values())
    return {"all_prompts": len(rows), "all_pairs": all_pairs, "prompts": taken,
            "pairs": len(steps) * scale.step_pairs, "steps": len(steps)}  # fmt: skip


class Rung:
    """One rung in its own process: data, model, and what it is to do."""

    def __init__(self, name: str, device: str, folder: Path, *, check: bool) -> None:
        """Load the subset, cut to the first prompts for a check, and build the models."""
        self.name, self.device, self.check, self.scale = name, device, check, SCALES[device]
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        steps = json.loads((folder / "steps.json").read_text())
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
        self.micro: list[list[tuple[list[Group], torch.Tensor]]] = []
        self.trainer: Any = None
        torch.manual_seed(0)

    def build(self, seed: int) -> Any:
        """Build a model with random weights."""
        torch.manual_seed(seed)
        config = Qwen2Config(**self.scale.model, max_position_embeddings=2048)
        config.pad_token_id = self.tokenizer.pad_token_id
        dtype = torch.float32 if self.check else getattr(torch, self.scale.dtype)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
        return model.to(self.device)

    def setup_trainer(self) -> float:
        """Make the trainer; return the seconds that reference log-probabilities took."""
        common: dict[str, Any] = {
            "output_dir": str(self.folder / "out"), "use_cpu": self.device == "cpu", "bf16": False, "report_to": "none",
            "save_strategy": "no", "num_train_epochs": 1, "disable_tqdm": True, "max_length": MAX_LENGTH,
            "train_sampling_strategy": "sequential",
        }  # fmt: skip
        tuned = {} if self.name == "trl" else {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
        if self.name == "grouped":
            args = GroupedDPOConfig(**common, **tuned, token_budget=self.scale.budget)
        else:
            batch = self.scale.batch[self.name]
            sizes = {
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": self.scale.step_pairs // batch,
            }
            args = DPOConfig(**common, **tuned, **sizes)
        data = Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), zip(*self.rows, strict=True), strict=True)))
        seconds = [0.0]
        made = measured(GroupedDPOTrainer if self.name == "grouped" else DPOTrainer, self.steps, seconds)
        self.trainer = made(self.model, self.reference, args, train_dataset=data, processing_class=self.tokenizer)
        return seconds[0]

    def setup_loop(self) -> float:
        """Fill micro-batches; return the seconds that reference log-probabilities took."""
        groups = iter(self.groups)
        steps = [self.fill([unit for _ in step for unit in self.units(next(groups))]) for step in self.steps]
        started = time.perf_counter()
        with torch.no_grad():
            for step in steps:
                known = [response_log_probs(self.reference or self.model, self.pack(rows)) for rows in step]
                self.micro.append(list(zip(step, known, strict=True)))
        wait()
        return time.perf_counter() - started

    def pack(self, rows: list[Group]) -> PackedRows:
        """Return the rows on the device."""
        return pack(rows, self.tokenizer.pad_token_id).to(torch.device(self.device))

    def units(self, group: Group) -> list[list[Group]]:
        """Split a group into the rows that belong together: of a pair, or of a prompt."""
        if self.name == "grouped-loop":
            return [[group]]
        # Indices of pairs count responses from the row that holds them.
        alone = [Group(group.prompt, [response]) for response in group.responses]
        if self.name == "sequences":
            return [[replace(group, responses=group.responses[:1]), *alone[1:]]]
        return [
            [Group(group.prompt, [group.responses[chosen]], [0], [1], [1.0], [0.0]), alone[rejected]]
            for chosen, rejected in zip(group.chosen, group.rejected, strict=True)
        ]

    def fill(self, units: list[list[Group]]) -> list[list[Group]]:
        """Fill micro-batches up to the budget with units of like length; a check keeps each unit alone, in order."""
        if self.check:
            return units
        batches: list[list[Group]] = []
        longest = 0
        for unit in sorted(units, key=lambda rows: -max(row.tokens for row in rows)):
            if batches and longest * (len(batches[-1]) + len(unit)) <= self.scale.budget:
                batches[-1].extend(unit)
            else:
                longest = max(row.tokens for row in unit)
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
            parts = [(batch.rows[0].to(self.model.device), batch.reference[0].to(self.device)) for batch in batches]
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
        wait()
        started = time.perf_counter()
        if self.trainer is not None:
            self.trainer.train()
        else:
            self.model.train()
            optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
            for step in self.micro:
                for rows, known in step:
                    (self.losses(self.pack(rows), known).sum() / self.scale.step_pairs).backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        wait()
        return time.perf_counter() - started

    def tokens(self) -> int:
        """Count the positions that the policy computes in one epoch of the subset, padding included."""
        if self.trainer is None:
            return sum(len(rows) * max(row.tokens for row in rows) for step in self.micro for rows, _ in step)
        if self.name == "grouped":
            batches = (inputs["batch"] for inputs in self.trainer.get_train_dataloader())
            return sum(rows.input_ids.numel() for batch in batches for rows in batch.rows)
        rows, batch = list(self.trainer.train_dataset), self.scale.batch[self.name]
        collate = self.trainer.data_collator
        return sum(collate(rows[at : at + batch])["input_ids"].numel() for at in range(0, len(rows), batch))


def wait() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured(base: Any, steps: list[list[Any]], seconds: list[float]) -> Any:
    """Return the trainer with its reference pass timed and, if grouped, with batches of whole steps in order."""

    class Measured(base):  # type: ignore[misc]
        def _precompute_ref_logps(self, *args: Any) -> Any:
            started = time.perf_counter()
            dataset = super()._precompute_ref_logps(*args)
            wait()
            seconds[0] += time.perf_counter() - started
            return dataset

        def get_train_dataloader(self) -> Any:
            if base is not GroupedDPOTrainer:
                return super().get_train_dataloader()
            places = iter(range(len(self.train_dataset)))
            batches = [[next(places) for _ in step] for step in steps]
            return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)

    return Measured


def one(name: str, device: str, folder: Path, *, check: bool) -> None:
    """Print one measurement, or the losses of a check, as JSON."""
    torch.set_num_threads(2)
    rung = Rung(name, device, folder, check=check)
    reference = rung.setup_trainer() if name in TRAINERS else rung.setup_loop()
    losses = rung.first_losses()
    if check:
        print(json.dumps({"losses": losses}))
        return
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = rung.train()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    floor = sum(len(group.prompt) + sum(map(len, group.responses)) for group in rung.groups)
    print(json.dumps({"seconds": seconds, "reference_seconds": reference, "tokens": rung.tokens(), "floor": floor,
                      "gib": peak / 2**30, "parameters": rung.model.num_parameters()}))  # fmt: skip


def run(name: str, arguments: argparse.Namespace, folder: Path, *flags: str) -> dict[str, Any]:
    """Run one measurement, or the check of a rung, in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--device", arguments.device, "--work", str(folder), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"Rung {name} failed.")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return how far each rung's losses are from TRL's on the first prompts; fail where that is too far."""
    found = {name: run(name, arguments, folder, "--check")["losses"] for name in CHECKED}
    assert max(found["trl"]) - min(found["trl"]) > 0.1, "the losses are all the same; nothing is checked"
    worst = {}
    for name in CHECKED[1:]:
        worst[name] = max(abs(a - b) for a, b in zip(found[name], found["trl"], strict=True))
        if worst[name] > TOLERANCE:
            sys.exit(f"Rung {name} computes another loss than TRL: {worst[name]:.1e} apart on a pair.")
    return worst


def summarise(rows: dict[str, list[dict[str, Any]]], sizes: dict[str, int]) -> dict[str, dict[str, float]]:
    """Return medians of each rung, scaled to an epoch, and its ratios."""
    scale, found = sizes["all_pairs"] / sizes["pairs"], {}
    for name, runs in rows.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "reference_seconds")}
        total = statistics.median(run["seconds"] + run["reference_seconds"] for run in runs)
        found[name] = {
            "epoch_seconds": total * scale, "training_seconds": middle["seconds"] * scale,
            "reference_seconds": middle["reference_seconds"] * scale, "gib": max(run["gib"] for run in runs),
            "tokens": runs[0]["tokens"] * scale, "share_of_floor": runs[0]["floor"] / runs[0]["tokens"],
        }  # fmt: skip
    for other in {"trl", "trl-tuned", "pairs"} & set(found):
        for entry in found.values():
            entry[f"against_{other}"] = found[other]["epoch_seconds"] / entry["epoch_seconds"]
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Format the table."""
    head = ["rung", "an epoch", "of it reference", "against trl", "against trl-tuned", "against pairs", "peak memory",
            "tokens computed", "floor / computed"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name, entry in found.items():
        ratios = (entry.get(f"against_{other}") for other in ("trl", "trl-tuned", "pairs"))
        cells = [
            name, f"{entry['epoch_seconds']:,.0f} s", f"{entry['reference_seconds']:,.0f} s",
            *("" if ratio is None else f"{ratio:.1f}x" for ratio in ratios), f"{entry['gib']:.2f} GiB",
            f"{entry['tokens'] / 1e6:.2f} M", f"{entry['share_of_floor']:.0%}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def missed(found: dict[str, dict[str, float]], device: str) -> list[str]:
    """Return the bounds that were missed."""
    ours = found.get("grouped", {})
    ratios = {name: (ours.get(f"against_{name}"), least) for name, least in BOUNDS[device].items()}
    wrong = [f"{got:.1f}x {name}, not {least:.0f}x" for name, (got, least) in ratios.items() if got and got < least]
    if ours and "trl" in found and ours["gib"] >= found["trl"]["gib"]:
        wrong.append(f"{ours['gib']:.2f} GiB, trl {found['trl']['gib']:.2f}")
    return wrong


def bench(arguments: argparse.Namespace) -> None:
    """Run the ladder, write the results, and fail where a bound is missed."""
    scale = SCALES[arguments.device]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.rungs}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sizes = prepare(folder, scale, arguments.prompts or scale.prompts, arguments.set)
        apart = check(arguments, folder)
        for _ in range(arguments.repeats):
            for name in arguments.rungs:
                rows[name].append(run(name, arguments, folder))
                print(name, rows[name][-1], file=sys.stderr, flush=True)
    found = summarise(rows, sizes)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or platform.machine()
    content = {
        "machine": {"device": device, "cores": os.cpu_count(), "threads": 2, **versions(), "commit": git_commit()},
        "sizes": sizes, "repeats": arguments.repeats, "scale": asdict(scale), "losses_apart": apart, "rungs": found,
        "runs": rows,
    }  # fmt: skip
    million = rows[arguments.rungs[0]][0]["parameters"] / 1e6
    note = (
        f"{device}, {million:.0f} M parameters, {scale.dtype}. Timed on {sizes['prompts']} prompts with {sizes['pairs']} "
        f"pairs ({sizes['steps']} steps of {scale.step_pairs}), scaled to the {sizes['all_pairs']:,} pairs of an epoch; "
        f"medians of {arguments.repeats}. Losses of the first pairs are within {max(apart.values()):.0e} of TRL's."
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / f"train-{arguments.device}.json", content)
    (arguments.output / f"train-{arguments.device}.md").write_text(f"{table(found)}\n\n{note}\n")
    print(f"{table(found)}\n\n{note}")
    if wrong := missed(found, arguments.device):
        sys.exit(f"Bounds missed by grouped: {'; '.join(wrong)}.")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=list(SCALES), default="cpu")
    parser.add_argument("--prompts", type=int, help="least prompts of the subset")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=RUNGS)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in `persodpo --set`")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--one", choices=RUNGS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one, arguments.device, arguments.work, check=arguments.check)
    else:
        bench(arguments)


if __name__ == "__main__":
    main()
