"""The trainer on one GPU: packed rows against plain passes, losses beside TRL's, and the ladder against TRL.

For a machine without a network; `gpu.md` says how to prepare and run it. Three parts, of which each row is reported whether
or not the others work:

- packing: tiny models of eight architectures with random weights. The guard's verdict, and the log-probabilities of packed
  rows beside those of plain forward passes, in bf16 and fp32, with eager and sdpa attention;
- training: two epochs of three optimiser steps, full training and LoRA, and the losses of TRL on the same steps;
- ladder: the shape of Qwen2-0.5B with random weights in bf16. TRL as it comes (reference model in the loop, gradient
  checkpointing), TRL tuned (reference computed once, no checkpointing) and `GroupedDPOTrainer` at several token budgets.

All rungs take the same pairs in the same optimiser steps, the pairs of a prompt side by side, with sdpa attention and fused
AdamW. A timed repeat is one optimiser step on new tokens of the same lengths, after one step that is not timed. Reference
log-probabilities are timed apart; an epoch holds both.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.update({"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"})

import accelerate
import datasets
import peft
import tiny_architectures as tiny
import torch
import transformers
from gpu_pairs import FULL, QUICK, Steps
from measuring import RESULTS, machine, pipes
from transformers import AutoModelForCausalLM, Qwen2Config, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from persodpo.errors import PersodpoError
from persodpo.runfolder import write_json
from persodpo.training.guard import check_packing
from persodpo.training.packing import Group, Layout, pack
from persodpo.training.trainer import GroupedDPOConfig, GroupedDPOTrainer

Rows = dict[str, dict[str, Any]]
Work = Iterator[tuple[str, Callable[[], dict[str, Any]]]]
#: Model type -> variant of its attention.
ARCHITECTURES: dict[str, tiny.Variant] = {
    "qwen2": "plain", "llama": "plain", "mistral": "window 8", "gemma2": "window 8", "gemma3_text": "window 8",
    "granite": "plain", "mixtral": "plain", "lfm2": "plain",
}  # fmt: skip
#: Least factor of the best `grouped` against TRL as it comes and against the best `tuned`.
GOALS = {"trl": 10.0, "tuned": 6.0}
#: Dense bf16 operations per second, by a part of the device's name.
PEAKS = {"H100": 989e12, "H200": 989e12}
EPOCH_PAIRS = 9184


class Bench:
    """Sizes, device and time of a run."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        """Read them off the command line."""
        self.device, self.repeats, self.folder = arguments.device, arguments.repeats, folder
        self.quick, self.size = arguments.quick, QUICK if arguments.quick else FULL
        self.end = time.monotonic() + 60 * arguments.minutes
        self.prepared: dict[tuple[int, bool], Any] = {}

    def wait(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak(self, *, reset: bool = False) -> float:
        """Return the peak memory in GiB since the last reset, 0 without a GPU."""
        if self.device != "cuda":
            return 0.0
        if reset:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.max_memory_allocated() / 2**30)

    def attempt(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what the work returns, or why there is nothing."""
        if time.monotonic() > self.end:
            return {"error": "skipped: no time left"}
        started = time.monotonic()
        try:
            self.peak(reset=True)
            row = work()
        except Exception as error:  # one failure must not cost the rest of the run
            text = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {error}"
            row = {"error": " ".join(text.replace("|", "/").split())[:200]}
        return row | {"wall": round(time.monotonic() - started, 1)}

    def build(self, dtype: torch.dtype) -> Any:
        """Build the ladder's model on the device; its weights are always the same."""
        torch.manual_seed(0)
        config = Qwen2Config(**self.size.model, initializer_range=self.size.deviation)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def packing(bench: Bench) -> Work:
    """Compare packed rows with plain passes for each architecture, type and attention."""
    for kind in ARCHITECTURES:
        for dtype in ("float32", "bfloat16"):
            for attention in ("eager", "sdpa"):
                yield f"{kind} | {dtype} | {attention}", partial(compared, bench, kind, dtype, attention)


@torch.no_grad()
def compared(bench: Bench, kind: str, dtype: str, attention: str) -> dict[str, Any]:
    """Return the guard's verdict on a model, and how far its packed log-probabilities are from plain ones, in nats."""
    try:
        single = tiny.tiny_model(kind, attention, ARCHITECTURES[kind], torch.float32).to(bench.device)
    except ValueError as error:
        return {"refused": f"transformers: {str(error).split('. ')[0]}"}
    source, ids = torch.Generator().manual_seed(1), torch.tensor(tiny.plain_ids(single.config))
    groups = [
        Group(prompt, responses)
        for prompt, *responses in (
            [ids[torch.randint(len(ids), (length,), generator=source)].tolist() for length in row]
            for row in ((40, 9, 5, 13), (21, 7, 17))
        )
    ]
    # Not by `to`, which would round what is to stay in float32, such as the frequencies of positions.
    model: Any = AutoModelForCausalLM.from_config(
        single.config, dtype=getattr(torch, dtype), attn_implementation=attention
    )
    model.load_state_dict(single.state_dict())
    model = model.to(bench.device).eval()
    plain = plain_log_probs(model, groups)
    found = {"rounding": float((plain - plain_log_probs(single, groups)).abs().max())}
    try:
        verdict = check_packing(model, max_length=64, token_budget=256)
    except PersodpoError as refusal:
        return found | {"refused": str(refusal)}
    packed = model(packed=pack(groups, Layout(grouped=verdict.grouped)).to(bench.device))
    return found | vars(verdict) | {"apart": float((packed - plain).abs().max())}


def plain_log_probs(model: Any, groups: list[Group]) -> torch.Tensor:
    """Return the log-probability of each response by a forward pass of its own."""
    sums = []
    for prompt, response in ((group.prompt, response) for group in groups for response in group.responses):
        ids = torch.tensor([prompt + response], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        sums.append(torch.log_softmax(logits, -1).gather(-1, ids[0, len(prompt) :, None]).sum())
    return torch.stack(sums)


class Clock(TrainerCallback):
    """Notes when optimiser steps end, and ends training when the time is over and one step is timed."""

    def __init__(self, bench: Bench) -> None:
        """Take half of the time that is left."""
        self.bench, self.end, self.marks = bench, (bench.end + time.monotonic()) / 2, list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the time."""
        self.bench.wait()
        self.marks.append(time.perf_counter())
        control.should_training_stop |= len(self.marks) > 1 and time.monotonic() > self.end


def trainer_of(bench: Bench, name: str, steps: Steps, model: Any, micro: int, **changes: Any) -> Any:
    """Make the trainer of a rung; ``reference_seconds`` holds what its reference pass took, if it makes one ahead."""
    grouped = name.startswith("grouped")

    class Timed(GroupedDPOTrainer if grouped else DPOTrainer):  # type: ignore[misc]
        reference_seconds = 0.0

        def _prepare_dataset(self, *given: Any) -> Any:
            # Tokenised once for all rungs: it is not timed.
            key = (steps.pairs, grouped)
            if key not in bench.prepared:
                bench.prepared[key] = super()._prepare_dataset(*given)
            return bench.prepared[key]

        def _precompute_ref_logps(self, dataset: Any, *rest: Any) -> Any:
            # The first step's part warms up; another selection has another place in the cache.
            super()._precompute_ref_logps(dataset.select(range(len(dataset) // steps.count)), *rest)
            bench.wait()
            started = time.perf_counter()
            dataset = super()._precompute_ref_logps(dataset, *rest)
            bench.wait()
            self.reference_seconds = time.perf_counter() - started
            return dataset

    extra = {option: changes.pop(option) for option in {"ref_model", "peft_config"} & set(changes)}
    settings: dict[str, Any] = {
        "output_dir": str(bench.folder / str(time.monotonic_ns())), "use_cpu": bench.device == "cpu", "report_to": "none",
        "save_strategy": "no", "max_steps": steps.count, "disable_tqdm": True, "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": bench.device == "cuda", "bf16": not bench.quick,
    }  # fmt: skip
    if name != "trl":
        settings |= {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
    if grouped:
        settings |= {"per_device_train_batch_size": len(steps.prompts), "token_budget": micro}
    else:
        settings |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": steps.pairs // micro}
    args = (GroupedDPOConfig if grouped else DPOConfig)(**settings | changes)
    data = datasets.Dataset.from_dict(steps.texts())
    # In place of a digest of all weights, which takes long and is not timed; no trainer finds another's reference.
    with patch("trl.trainer.dpo_trainer.hash_module", return_value=settings["output_dir"]):
        trainer = Timed(model=model, args=args, train_dataset=data, processing_class=steps.tokenizer(), **extra)
    trainer.remove_callback(PrinterCallback)
    return trainer


def training(bench: Bench) -> Work:
    """Train with TRL and grouped, in full and by LoRA, in float32 and under bf16 autocast."""
    steps = Steps.draw(bench.size, 4, 3)
    for kind in bench.size.rates:
        for precision in ("float32", "bfloat16"):
            yield f"{kind} | {precision}", partial(losses, bench, steps, kind, precision)


def losses(bench: Bench, steps: Steps, kind: str, precision: str) -> dict[str, Any]:
    """Return the losses of two epochs of both trainers."""
    found: dict[str, Any] = {}
    changes: dict[str, Any] = {
        "bf16": precision == "bfloat16", "learning_rate": bench.size.rates[kind], "lr_scheduler_type": "constant",
        "logging_steps": 1, "max_steps": 2 * steps.count,
    }  # fmt: skip
    for name, micro in (("tuned", bench.size.few), ("grouped", 8 * sum(bench.size.lengths))):
        if kind == "LoRA":
            changes["peft_config"] = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = trainer_of(bench, name, steps, bench.build(torch.float32), micro, **changes)
        trainer.train()
        found[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        del trainer
        found[f"{name}_gib"] = bench.peak()
        bench.peak(reset=True)
    return found | {"apart": max(abs(one - other) for one, other in zip(found["tuned"], found["grouped"], strict=True))}


def ladder(bench: Bench) -> Work:
    """Time each rung."""
    steps = Steps.draw(bench.size, bench.size.prompts, 1 + bench.repeats)
    for name in bench.size.rungs:
        yield name, partial(rung, bench, name, steps)


def rung(bench: Bench, name: str, steps: Steps) -> dict[str, Any]:
    """Time the optimiser steps of a rung."""
    dtype = torch.float32 if bench.quick else torch.bfloat16
    model, positions = bench.build(dtype), [0]
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: positions.append(args[0].numel()))
    extra = {"ref_model": bench.build(dtype)} if name == "trl" else {}
    trainer = trainer_of(bench, name, steps, model, bench.size.rungs[name], **extra)
    clock = Clock(bench)
    trainer.add_callback(clock)
    positions.clear()
    bench.peak(reset=True)
    trainer.train()
    seconds = [after - before for before, after in zip(clock.marks, clock.marks[1:], strict=False)]
    return steps.work(model, grouped=name.startswith("grouped")) | {
        "pairs": steps.pairs, "seconds": seconds, "reference_seconds": trainer.reference_seconds / steps.count,
        "computed": sum(positions) / len(clock.marks), "gib": bench.peak(), "repeats": f"{len(seconds)} of {bench.repeats}",
    }  # fmt: skip


def summary(rows: Rows, device: str) -> Rows:
    """Return figures of the rungs that ran: rates, utilisation, an epoch, and ratios to TRL."""
    peak = next((peak for name, peak in PEAKS.items() if name in device), None)
    found: Rows = {}
    for name, row in rows.items():
        if row.get("seconds"):
            step = statistics.median(row["seconds"])
            whole = step + row["reference_seconds"]
            found[name] = {
                "pairs_per_second": row["pairs"] / whole, "pairwise_tokens_per_second": row["pairwise_tokens"] / whole,
                "positions_per_second": row["computed"] / step, "epoch_seconds": whole / row["pairs"] * EPOCH_PAIRS,
                "reference_share": row["reference_seconds"] / whole, "spread": max(row["seconds"]) / min(row["seconds"]),
                "utilisation": row["operations"] / step / peak if peak else None,
            }  # fmt: skip
    for other in GOALS:
        epochs = [entry["epoch_seconds"] for name, entry in found.items() if name.startswith(other)]
        for entry in found.values():
            entry[f"against_{other}"] = min(epochs) / entry["epoch_seconds"] if epochs else None
    return found


def packing_table(rows: Rows) -> str:
    """Format the first part."""
    lines = []
    for key, row in rows.items():
        cells = [row.get("error") or row.get("refused"), "", "", ""]
        if "apart" in row:
            layout = "grouped" if row["grouped"] else "one response per row"
            guard = f"{row['difference']:.1e} of {row['tolerance']:.0e}"
            cells = [layout + ", own head" * row["own_head"], guard, f"{row['apart']:.1e}", row["reason"]]
        cells.insert(3, f"{row['rounding']:.1e}" if "rounding" in row else "")
        lines.append([*key.split(" | "), *cells])
    head = ["architecture", "weights", "attention", "verdict", "guard, nats per token", "packed - plain, nats per response",
            "plain in this type - in float32", "reason"]  # fmt: skip
    return pipes(head, lines)


def training_table(rows: Rows) -> str:
    """Format the second part."""
    lines = []
    for key, row in rows.items():
        cells = [row.get("error", ""), "", "", ""]
        if "apart" in row:
            texts = (", ".join(f"{loss:.5f}" for loss in row[name]) for name in ("tuned", "grouped"))
            cells = [*texts, f"{row['apart']:.1e}", f"{row['tuned_gib']:.1f} / {row['grouped_gib']:.1f} GiB"]
        lines.append([*key.split(" | "), *cells])
    return pipes(["training", "precision", "losses of TRL", "losses of grouped", "apart", "peak memory"], lines)


def ladder_table(rows: Rows, figures: Rows) -> str:
    """Format the third part, and say whether the goals were met by the fastest grouped rung."""
    head = ["rung", "repeats", "pairs/s", "tokens/s as if pairwise", "positions/s", "no padding", "MFU", "peak memory",
            "of it reference", f"{EPOCH_PAIRS:,} pairs", "against trl", "against best tuned"]  # fmt: skip
    lines = []
    for name, row in rows.items():
        if name not in figures:
            lines.append([name, row.get("error", "no step timed"), *[""] * (len(head) - 2)])
            continue
        entry = figures[name]
        share, *ratios = (entry[key] for key in ("utilisation", *(f"against_{other}" for other in GOALS)))
        lines.append([
            name, f"{row['repeats']}, within {entry['spread'] - 1:.0%}", f"{entry['pairs_per_second']:,.1f}",
            f"{entry['pairwise_tokens_per_second']:,.0f}", f"{entry['positions_per_second']:,.0f}",
            f"{row['positions'] / row['computed']:.0%}", f"{share:.1%}" if share else "", f"{row['gib']:.1f} GiB",
            f"{entry['reference_share']:.0%}", f"{entry['epoch_seconds']:,.1f} s",
            *(f"{ratio:.1f}x" if ratio else "" for ratio in ratios),
        ])  # fmt: skip
    ours = [entry for name, entry in figures.items() if name.startswith("grouped")]
    best = max(ours, key=lambda entry: entry["pairs_per_second"], default={})
    said = []
    for other, least in GOALS.items():
        ratio = best.get(f"against_{other}")
        state = f"{ratio:.1f}x, {'met' if ratio >= least else 'MISSED'}" if ratio else "not measured"
        said.append(f"{least:.0f}x {other}: {state}")
    return f"{pipes(head, lines)}\n\nGoals of the fastest grouped rung: {'; '.join(said)}."


def report(content: dict[str, Any]) -> str:
    """Format everything."""
    tables = [packing_table(content["packing"]), training_table(content["training"])]
    tables.append(ladder_table(content["ladder"], content["figures"]))
    tables.append(", ".join(f"{name} {value}" for name, value in content["machine"].items() if value) + ".")
    return "\n\n".join(tables) + "\n"


PARTS: dict[str, Callable[[Bench], Work]] = {"packing": packing, "training": training, "ladder": ladder}


def main() -> None:
    """Read the command line, run the parts, and write and print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test the bench")
    parser.add_argument("--minutes", type=float, default=7.5, help="what would begin later is skipped and said")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder of train-cuda.json and .md; benchmarks/results by default")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --quick --device cpu tests the bench without one")
    if arguments.output is None and (arguments.quick or arguments.device == "cpu"):
        parser.error("a test needs --output, as it would replace the results of a GPU")
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    path, started = (arguments.output or RESULTS) / "train-cuda.json", time.monotonic()
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    content: dict[str, Any] = {name: {} for name in PARTS}
    content["machine"] = machine(device=device, accelerate=accelerate.__version__, peft=peft.__version__)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        for part, key, work in ((part, *item) for part, make in PARTS.items() for item in make(bench)):
            row = content[part][key] = bench.attempt(work)
            content["figures"] = summary(content["ladder"], device)
            write_json(path, content)
            path.with_suffix(".md").write_text(report(content))
            seconds = time.monotonic() - started
            print(f"{seconds:4.0f} s  {part}: {key}: {row.get('error', 'done')}", file=sys.stderr, flush=True)
    print(report(content))


if __name__ == "__main__":
    main()
