"""The trainer on one GPU: packed rows against plain passes, the ladder against TRL, and losses beside TRL's.

For a machine without a network; `gpu.md` says how to prepare and run it. Three parts, of which each row is reported whether
or not the others work:

- packing: small models of eight architectures with random weights. The guard's verdict, and the log-probabilities of packed
  rows beside those of plain forward passes, in bf16 and fp32, with eager and sdpa attention;
- ladder: the shape of Qwen2-0.5B with random weights in bf16. TRL as it comes (reference model in the loop, gradient
  checkpointing), TRL tuned (reference computed once, no checkpointing) and `GroupedDPOTrainer` at several token budgets;
- training: two epochs of three optimiser steps, full training and LoRA, and the losses of TRL on the same steps.

Pairs are random tokens in the shape of the released ones. All rungs take the same pairs in the same optimiser steps, the
pairs of a prompt side by side, with sdpa attention and fused AdamW. A timed repeat is one optimiser step on new tokens of
the same lengths, after one step that is not timed. Reference log-probabilities are timed apart; an epoch holds both.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
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

import torch
import transformers
from gpu_pairs import FULL, QUICK, Steps
from gpu_report import described, report, summary
from gpu_wheels import PROJECT
from transformers import AutoModelForCausalLM, Qwen2Config, TrainerCallback
from transformers.trainer_callback import PrinterCallback

Work = Iterator[tuple[str, Callable[[], dict[str, Any]]]]
#: Share of the time after which a part starts nothing more.
ENDS = {"packing": 0.25, "ladder": 0.75, "training": 0.95}
LEARNING_RATES = {"full": 1e-5, "LoRA": 1e-3}


SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW = {"sliding_window": 16, "head_dim": 16}
TURNS = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 16}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("Qwen2Config", {}),
    "Llama": ("LlamaConfig", {}),
    "Mistral, window": ("MistralConfig", WINDOW),
    "Gemma 2": ("Gemma2Config", TURNS),
    "Gemma 3": ("Gemma3TextConfig", TURNS),
    "Granite": ("GraniteConfig", {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}),
    "Mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "LFM2, hybrid": ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * 2}),
}


class Bench:
    """Sizes, device and time of a run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Read them off the command line."""
        self.device, self.repeats = arguments.device, arguments.repeats
        self.quick, self.size = arguments.quick, QUICK if arguments.quick else FULL
        self.dtype = torch.float32 if self.quick else torch.bfloat16
        self.started, self.seconds = time.monotonic(), 60 * arguments.minutes
        self.folder = Path(tempfile.mkdtemp())
        self.prepared: dict[tuple[int, bool], Any] = {}

    def left(self, part: str) -> float:
        """Return the seconds before a part must start nothing more."""
        return float(self.started + ENDS[part] * self.seconds - time.monotonic())

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

    def usable(self) -> bool:
        """Tell whether the device still computes; some errors leave it unusable for the rest of the process."""
        try:
            return float(torch.ones(2, device=self.device).sum()) == 2
        except RuntimeError:
            return False

    def attempt(self, part: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what the work returns, or why there is nothing."""
        if self.left(part) <= 0:
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
    for name in ARCHITECTURES:
        for dtype in ("float32", "bfloat16"):
            for attention in ("eager", "sdpa"):
                yield f"{name} | {dtype} | {attention}", partial(compared, bench, name, dtype, attention)


@torch.no_grad()
def compared(bench: Bench, name: str, dtype: str, attention: str) -> dict[str, Any]:
    """Return the guard's verdict on a model, and how far its packed log-probabilities are from plain ones, in nats."""
    # A module that does not load is reported, and costs no other part.
    from persodpo.errors import PersodpoError  # noqa: PLC0415
    from persodpo.training.guard import check_packing  # noqa: PLC0415
    from persodpo.training.packing import Group, Layout, pack  # noqa: PLC0415

    kind, extra = ARCHITECTURES[name]
    config = getattr(transformers, kind)(**SMALL | extra)

    def build(dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)

    torch.manual_seed(0)
    try:
        model = build(torch.float32)
    except ValueError as error:
        return {"refused": f"transformers: {str(error).split('. ')[0]}"}
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.2)
    source = torch.Generator().manual_seed(1)
    lengths = ((40, 9, 5, 13), (21, 7, 17))
    drawn = [[torch.randint(3, 256, (length,), generator=source).tolist() for length in row] for row in lengths]
    groups = [Group(prompt, responses) for prompt, *responses in drawn]
    exact = plain_log_probs(model.to(bench.device).eval(), groups)
    # Not by `model.to`, which would round what is to stay in float32, such as the frequencies of positions.
    weights, model = model.state_dict(), build(getattr(torch, dtype)).to(bench.device).eval()
    model.load_state_dict(weights)
    plain = plain_log_probs(model, groups)
    found = {"rounding": float((plain - exact).abs().max())}
    try:
        verdict = check_packing(model, max_length=64, token_budget=256)
    except PersodpoError as refusal:
        return found | {"refused": str(refusal)}
    packed = model(packed=pack(groups, Layout(grouped=verdict.grouped)).to(bench.device))
    return found | vars(verdict) | {"apart": float((packed - plain).abs().max())}


def plain_log_probs(model: Any, groups: list[Any]) -> torch.Tensor:
    """Return the log-probability of each response by a forward pass of its own."""
    sums = []
    for prompt, response in ((group.prompt, response) for group in groups for response in group.responses):
        ids = torch.tensor([prompt + response], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        sums.append(torch.log_softmax(logits, -1).gather(-1, ids[0, len(prompt) :, None]).sum())
    return torch.stack(sums)


class Clock(TrainerCallback):
    """Notes when optimiser steps end, and ends training when the time is over and one step is timed."""

    def __init__(self, bench: Bench, end: float) -> None:
        """Take the time at which to end."""
        self.bench, self.end, self.marks = bench, end, list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the time."""
        self.bench.wait()
        self.marks.append(time.perf_counter())
        control.should_training_stop |= len(self.marks) > 1 and time.monotonic() > self.end


def trainer_of(bench: Bench, name: str, steps: Steps, model: Any, extra: dict[str, Any], **changes: Any) -> Any:
    """Make the trainer of a rung; ``reference_seconds`` holds what its reference pass took, if it makes one ahead."""
    from datasets import Dataset, disable_progress_bars  # noqa: PLC0415
    from trl import DPOConfig, DPOTrainer  # noqa: PLC0415

    from persodpo.training.trainer import GroupedDPOConfig, GroupedDPOTrainer  # noqa: PLC0415

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

    disable_progress_bars()
    settings: dict[str, Any] = {
        "output_dir": str(bench.folder / str(time.monotonic_ns())), "use_cpu": bench.device == "cpu", "report_to": "none",
        "save_strategy": "no", "max_steps": steps.count, "disable_tqdm": True, "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": bench.device == "cuda", "bf16": not bench.quick,
    }  # fmt: skip
    if name != "trl":
        settings |= {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
    if grouped:
        settings |= {"per_device_train_batch_size": len(steps.prompts), "token_budget": changes.pop("micro")}
    else:
        micro = changes.pop("micro")
        settings |= {"per_device_train_batch_size": micro, "gradient_accumulation_steps": steps.pairs // micro}
    args = (GroupedDPOConfig if grouped else DPOConfig)(**settings | changes)
    data = Dataset.from_dict(steps.texts())
    # In place of a digest of all weights, which takes long and is not timed; no trainer finds another's reference.
    with patch("trl.trainer.dpo_trainer.hash_module", return_value=settings["output_dir"]):
        trainer = Timed(model=model, args=args, train_dataset=data, processing_class=steps.tokenizer(), **extra)
    trainer.remove_callback(PrinterCallback)
    return trainer


def ladder(bench: Bench) -> Work:
    """Time each rung."""
    steps = Steps.draw(bench.size, bench.size.prompts, 1 + bench.repeats)
    for name in bench.size.rungs:
        yield name, partial(rung, bench, name, steps)


def rung(bench: Bench, name: str, steps: Steps) -> dict[str, Any]:
    """Time the optimiser steps of a rung."""
    model, positions = bench.build(bench.dtype), [0]
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: positions.append(args[0].numel()))
    extra = {"ref_model": bench.build(bench.dtype)} if name == "trl" else {}
    trainer = trainer_of(bench, name, steps, model, extra, micro=bench.size.rungs[name])
    clock = Clock(bench, time.monotonic() + bench.left("ladder") / 2)
    trainer.add_callback(clock)
    positions.clear()
    resident = bench.peak(reset=True)
    trainer.train()
    seconds = [after - before for before, after in zip(clock.marks, clock.marks[1:], strict=False)]
    return steps.work(grouped=name.startswith("grouped")) | {
        "pairs": steps.pairs, "seconds": seconds, "reference_seconds": trainer.reference_seconds / steps.count,
        "computed": sum(positions) / len(clock.marks), "gib": bench.peak(), "resident_gib": resident,
        "repeats": f"{len(seconds)} of {bench.repeats}",
    }  # fmt: skip


def training(bench: Bench) -> Work:
    """Train with TRL and grouped, in full and by LoRA, in float32 and under bf16 autocast."""
    steps = Steps.draw(bench.size, 4, 3)
    for kind in LEARNING_RATES:
        for precision in ("float32", "bfloat16"):
            yield f"{kind} | {precision}", partial(losses, bench, steps, kind, precision)


def losses(bench: Bench, steps: Steps, kind: str, precision: str) -> dict[str, Any]:
    """Return the losses of two epochs of both trainers."""
    from peft import LoraConfig  # noqa: PLC0415

    found: dict[str, Any] = {}
    changes = {"bf16": precision == "bfloat16", "learning_rate": LEARNING_RATES[kind] * bench.size.rates,
               "lr_scheduler_type": "constant", "logging_steps": 1, "max_steps": 2 * steps.count}  # fmt: skip
    for name, micro in (("tuned", bench.size.few), ("grouped", 8 * sum(bench.size.lengths))):
        lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        extra = {"peft_config": lora} if kind == "LoRA" else {}
        model = bench.build(torch.float32)
        trainer = trainer_of(bench, name, steps, model, extra, micro=micro, **changes)
        trainer.train()
        found[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer = model = None
        found[f"{name}_gib"] = bench.peak()
        bench.peak(reset=True)
    return found | {"apart": max(abs(one - other) for one, other in zip(found["tuned"], found["grouped"], strict=True))}


PARTS: dict[str, Callable[[Bench], Work]] = {"packing": packing, "ladder": ladder, "training": training}


def main(argv: list[str] | None = None) -> None:
    """Read the command line, run the parts, and write and print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to test the bench")
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="after loading; what does not fit is skipped and said"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder of train-cuda.json and .md; benchmarks/results by default")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an earlier run in the output folder")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --quick --device cpu tests the bench without one")
    if arguments.output is None and (arguments.quick or arguments.device == "cpu"):
        parser.error("a test needs --output, as it would replace the results of a GPU")
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    bench = Bench(arguments)
    path = (arguments.output or PROJECT / "benchmarks" / "results") / "train-cuda.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text()) if arguments.resume and path.exists() else {name: {} for name in PARTS}
    content["machine"] = described(arguments.device)
    for part, key, work in ((part, *item) for part, make in PARTS.items() for item in make(bench)):
        if key in content[part]:
            continue
        row = content[part][key] = bench.attempt(part, work)
        content["figures"] = summary(content["ladder"], content["machine"]["device"])
        path.write_text(json.dumps(content, indent=1) + "\n")
        path.with_suffix(".md").write_text(report(content))
        seconds = time.monotonic() - bench.started
        print(f"{seconds:4.0f} s  {part}: {key}: {row.get('error', 'done')}", file=sys.stderr, flush=True)
        if "error" in row and not bench.usable():
            # The rest in a new process, which finds the rows so far.
            given = sys.argv[1:] if argv is None else argv
            left = ["--resume", "--minutes", f"{(bench.seconds - seconds) / 60:.2f}"]
            os.execv(sys.executable, [sys.executable, __file__, *given, *left])  # noqa: S606
    shutil.rmtree(bench.folder, ignore_errors=True)
    print(report(content))


if __name__ == "__main__":
    main()
