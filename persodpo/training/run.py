"""Pairs and a policy in; a trained model, its log, health verdicts and generations out.

Training goes on from its last checkpoint where it was interrupted, and only if pairs, policy and settings are still the
same. What the arm was trained from, and what it is, stands in ``arm.json`` beside the model.
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import pandas as pd
import torch
from peft import LoraConfig
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback

from persodpo.config import ArmName, Profile
from persodpo.files import disk_errors, make_folder, name_and_revision, read_json, sha256, write_json
from persodpo.progress import watched
from persodpo.training.arms import ARMS, log_table, split_prompts
from persodpo.training.guard import Verdict
from persodpo.training.health import Health
from persodpo.training.policy import RECORD, load_policy
from persodpo.training.trainer import GroupedDPOConfig, GroupedDPOTrainer

ARM_RECORD = "arm.json"
#: Names the sha256 of each file of a checkpoint; written last.
CHECKPOINT_RECORD = "persodpo.json"
#: Evaluations, health checks and checkpoints of a training, but no two within so many steps.
EVALUATIONS, FEWEST_STEPS = 10, 20
#: Held-out prompts that a health check has answered.
HEALTH_PROMPTS = 16


class Trained(NamedTuple):
    """What training gave.

    Attributes:
        log: A row a logged step (kind train), evaluation (eval) and health check (health).
        health: The last verdicts.
        generations: What the policy wrote to held-out prompts at each health check of this process.
        notes: A line that says what was trained on and how it ended, and what was warned of meanwhile.
    """

    log: pd.DataFrame
    health: pd.DataFrame
    generations: pd.DataFrame
    notes: tuple[str, ...]


def is_trained(folder: Path, key: str) -> bool:
    """Tell whether ``folder`` holds the weights that were trained to their end from what ``key`` stands for."""
    record = read_json(folder / ARM_RECORD)
    weights = record.get("weights")
    return record.get("key") == key and bool(weights) and weights == _digests(folder, "*.safetensors")


def _digests(folder: Path, pattern: str) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.glob(pattern)) if path.is_file()}


def train_arm(
    pairs: pd.DataFrame, arm: ArmName, policy: str | Path, folder: Path, *, profile: Profile, key: str
) -> Trained:
    """Train one arm.

    Args:
        pairs: A pairs table.
        arm: A name of `ARMS`.
        policy: Folder or Hub name of the model to start from.
        folder: Where model, tokenizer, ``trainer_state.json`` and ``arm.json`` go, with TRL's card of its checkpoints,
            until `persodpo.cards` writes one from the run's tables. Reference log-probabilities are cached beside it.
        profile: Its ``training`` section, reading of completions and seed.
        key: Stands for everything that the outcome depends on.
    """
    settings = profile.training
    train, held_out = split_prompts(pairs, settings.held_out, profile.seed)
    checkpoint = _prepare(folder, key)
    model, tokenizer = load_policy(policy)
    described = _described(policy, model.num_parameters())
    health = Health(
        held_out["prompt"].tolist(),
        count=HEALTH_PROMPTS,
        max_new_tokens=settings.health_tokens,
        reading=profile.reading,
        stop=settings.stop_when_collapsed,
    )
    with _without_chatter() as warned, disk_errors(folder):
        trainer = GroupedDPOTrainer(
            model=model,
            args=arguments(arm, folder, profile, train["prompt"].nunique()),
            train_dataset=as_dataset(train),
            eval_dataset=as_dataset(held_out),
            processing_class=tokenizer,
            peft_config=_adapters(settings.lora_rank, str(policy)),
            callbacks=[health, _CheckpointRecord()],
        )
        trainer.remove_callback(PrinterCallback)
        left_out = {name: str(skipped) for name, skipped in trainer.skipped.items()}
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        history: list[dict[str, Any]] = trainer.state.log_history
        if not any(log.get("step") == trainer.state.global_step and "eval_loss" in log for log in history):
            trainer.evaluate()
        _save(trainer, folder)
        record = {
            "key": key, "arm": arm, "policy": described, "parameters": model.num_parameters(),
            "steps": trainer.state.global_step, "train_pairs": len(train), "held_out_pairs": len(held_out),
            "left_out": left_out,
            "weights": _digests(folder, "*.safetensors"),
            "packing": asdict(cast(Verdict, trainer.packing)),
            # Of training, evaluations and health checks included, the reference pass not.
            "seconds": next((log["train_runtime"] for log in reversed(history) if "train_runtime" in log), 0.0),
            "threads": torch.get_num_threads(), "device": str(trainer.args.device),
        }  # fmt: skip
        write_json(folder / ARM_RECORD, record)
    summary = f"{described}, {len(train):,} pairs, {_summary(trainer, len(held_out), settings.warmup_steps)}"
    generations = health.generations.assign(prompt=lambda frame: [health.prompts[number] for number in frame["prompt"]])
    notes = (summary, *(f"warning: {text}" for text in dict.fromkeys(warned)))
    return Trained(log_table(history, described), health.summary(), generations, notes)


@contextmanager
def _without_chatter() -> Iterator[list[str]]:
    """Leave out progress bars where nobody watches, and warnings that TRL's code is to heed; give those that were shown."""
    if not watched():
        datasets.disable_progress_bars()
    with warnings.catch_warnings():
        # TRL 1.16 reads attributes that transformers 5 is renaming.
        warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning)
        texts: list[str] = []
        show = warnings.showwarning

        def note(message: Warning | str, *where: Any, **more: Any) -> None:
            texts.append(" ".join(str(message).split())[:300])
            show(message, *where, **more)

        warnings.showwarning = note
        yield texts


def _described(policy: str | Path, parameters: int) -> str:
    """Say plainly which policy it is, with its true size."""
    made_here = (Path(policy) / RECORD).is_file()
    return f"{'small policy' if made_here else Path(policy).name}, {parameters / 1e6:,.1f} M parameters"


class _CheckpointRecord(TrainerCallback):
    """Writes down the sha256 of a checkpoint's files, so that a damaged one is known before it is read."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(folder / CHECKPOINT_RECORD, _digests(folder, "*"))


def _summary(trainer: GroupedDPOTrainer, held_out: int, warmup: int) -> str:
    """Say how long a training went, and how it ended on the pairs that were held out."""
    last = next(log for log in reversed(trainer.state.log_history) if "eval_loss" in log)
    steps = trainer.state.global_step
    text = (
        f"{steps:,} steps; on {held_out:,} held out: loss {last['eval_loss']:.3f}, accuracy "
        f"{last['eval_rewards/accuracies']:.3f}, margin {last['eval_rewards/margins']:.3f}"
    )
    short = f"; the warm-up of {warmup} steps left it no full learning rate: lower training.warmup_steps"
    return text + (short if steps <= warmup else "")


def _prepare(folder: Path, key: str) -> Path | None:
    """Make ``folder`` ready for what ``key`` stands for; return the checkpoint to go on from, if there is one."""
    record = read_json(folder / ARM_RECORD)
    with disk_errors(folder):
        make_folder(folder)
        if record.get("key") != key or "steps" in record:
            _remove_checkpoints(folder)
            write_json(folder / ARM_RECORD, {"key": key})
        for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
            content = _digests(path, "*")
            content.pop(CHECKPOINT_RECORD, None)
            if content and content == read_json(path / CHECKPOINT_RECORD):
                return path
            aside = folder / f"damaged-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            tqdm.write(f"{path} is damaged or was not finished, and is set aside as {aside.name}.")
    return None


def arguments(arm: ArmName, folder: Path, profile: Profile, prompts: int) -> GroupedDPOConfig:
    """Return the trainer's arguments for an arm under a profile, on so many prompts."""
    settings = profile.training
    steps = math.ceil(settings.epochs * math.ceil(prompts / settings.prompts_per_step))
    between = max(FEWEST_STEPS, steps // EVALUATIONS)
    return GroupedDPOConfig(
        output_dir=str(folder),
        weighting=ARMS[arm].weighting,
        scale_weights=settings.scale_weights,
        token_budget=settings.token_budget,
        reference_cache=str(folder.parent / "reference"),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.prompts_per_step,
        per_device_eval_batch_size=settings.prompts_per_step,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        beta=settings.beta,
        max_length=settings.max_length,
        bf16=torch.cuda.is_available(),
        # It saves memory for half as much work again; on a CPU there is memory enough.
        gradient_checkpointing=torch.cuda.is_available(),
        seed=profile.seed,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=between,
        save_strategy="steps",
        save_steps=between,
        save_total_limit=2,
        report_to=list(settings.report_to),
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=not watched(),
    )


def as_dataset(pairs: pd.DataFrame) -> datasets.Dataset:
    """Return what the trainer needs of a pairs table."""
    columns = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
    return datasets.Dataset.from_dict({column: pairs[column].tolist() for column in columns})


def _adapters(rank: int | None, policy: str) -> LoraConfig | None:
    if rank is None:
        return None
    _, revision = name_and_revision(policy)
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM", revision=revision
    )  # fmt: skip


def _save(trainer: GroupedDPOTrainer, folder: Path) -> None:
    """Write model, tokenizer and state; remove what only a running training needs."""
    # Transformers switches the cache off for its training; who loads the model answers with it.
    trainer.model.config.use_cache = True
    trainer.save_model()
    # Transformers writes its arguments in a format that runs code when read; they stand in the profile.
    (folder / "training_args.bin").unlink(missing_ok=True)
    trainer.save_state()
    _remove_checkpoints(folder)


def _remove_checkpoints(folder: Path) -> None:
    for pattern in ("checkpoint-*", "damaged-checkpoint-*"):
        for checkpoint in folder.glob(pattern):
            shutil.rmtree(checkpoint)
