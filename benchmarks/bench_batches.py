"""Does it cost quality that all pairs of a prompt stand in the same step? Grouped against shuffled pairs, over seeds.

Run by `make bench-batches`. Both ways train the small policy one epoch on the released perso pairs, with the settings of
the profile, from the same weights, on the same pairs, with the same reference and as many pairs a step; only the order
differs: whole prompts, or pairs drawn at random, each a row of its own. A row of one pair gives the loss and gradient that
TRL's DPOTrainer gives (tests/test_trainer.py), so the second way is stock DPO. Measured on held-out prompts, the same for
all seeds: loss, reward accuracy and reward margin. Intervals are Student's t, 95 %, over seeds; the difference is paired
by seed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset, disable_progress_bars
from measuring import RESULTS, machine, pipes, save
from scipy import stats
from transformers import PrinterCallback

from persodpo.config import Profile, load_profile
from persodpo.runfolder import RunFolder
from persodpo.stages import make
from persodpo.training.arms import split_prompts
from persodpo.training.policy import load_policy
from persodpo.training.run import arguments, as_dataset
from persodpo.training.trainer import GroupedDPOTrainer

MEASURES = {"loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"}
WAYS = ("grouped", "shuffled")


def alone(rows: Dataset) -> Dataset:
    """Make a row of every pair."""
    return Dataset.from_list([
        {
            "prompt_ids": row["prompt_ids"], "response_ids": [row["response_ids"][side] for side in sides],
            "chosen": [0], "rejected": [1], "weights": [weight], "pair_ids": [pair],
            "reference": [row["reference"][side] for side in sides],
        }
        for row in rows
        for *sides, weight, pair in zip(row["chosen"], row["rejected"], row["weights"], row["pair_ids"], strict=True)
    ])  # fmt: skip


def measure(way: str, seed: int, train: pd.DataFrame, held_out: pd.DataFrame, profile: Profile) -> dict[str, Any]:
    """Train one way under one seed and evaluate."""
    run = RunFolder(profile)
    model, tokenizer = load_policy(run.root / "policy")
    with tempfile.TemporaryDirectory() as folder:
        args = arguments("perso", Path(folder), profile, train["prompt"].nunique())
        args.seed = args.data_seed = seed
        args.eval_strategy = args.save_strategy = args.logging_strategy = "no"
        args.reference_cache = str(run.root / "training" / "reference")
        trainer = GroupedDPOTrainer(
            model=model, args=args, train_dataset=as_dataset(train), eval_dataset=as_dataset(held_out),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        grouped = trainer.train_dataset
        pairs = sum(map(len, grouped["chosen"]))
        steps = -(-len(grouped) // args.per_device_train_batch_size)
        if way == "shuffled":
            trainer.train_dataset = alone(grouped)
            # Read from the arguments when the trainer was made.
            trainer._train_batch_size = -(-pairs // steps)
        trainer.train()
        found = trainer.evaluate()
        assert trainer.state.global_step == steps
    return {"way": way, "seed": seed, "steps": steps, "pairs_a_step": pairs / steps} | {
        name: found[key] for name, key in MEASURES.items()
    }


def summarise(runs: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Return mean and half of the 95 % interval of each way and of the difference grouped - shuffled."""
    found: dict[str, dict[str, float]] = {}
    for name in MEASURES:
        wide = runs.pivot_table(index="seed", columns="way", values=name)
        wide["difference"] = wide["grouped"] - wide["shuffled"]
        halves = stats.t.ppf(0.975, len(wide) - 1) * wide.sem()
        for way in (*WAYS, "difference"):
            found.setdefault(way, {}).update({name: float(wide[way].mean()), f"{name} ±": float(halves[way])})
    return found


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=320, help="prompts to train on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in `persodpo --set`")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    disable_progress_bars()
    profile = load_profile("release", [*asked.set, "training.held_out=0.1"])
    make(load_profile("release", asked.set), "train", arms=["perso"])
    pairs = RunFolder(profile).read("pairs/perso")
    train, held_out = split_prompts(pairs, profile.training.held_out, profile.seed)
    train = train[train["prompt"].isin(train["prompt"].unique()[: asked.prompts])]
    seeds = range(profile.seed, profile.seed + asked.seeds)
    measured = [measure(way, seed, train, held_out, profile) for seed in seeds for way in WAYS]
    runs = pd.DataFrame(measured)
    summary = summarise(runs)
    rows = [
        [way, *(f"{entry[name]:.3f} ± {entry[f'{name} ±']:.3f}" for name in MEASURES)] for way, entry in summary.items()
    ]
    note = (
        f"Held-out pairs ({len(held_out)} of {held_out['prompt'].nunique()} prompts) after one epoch on {len(train):,} "
        f"pairs of {train['prompt'].nunique()} prompts, {runs['steps'].iloc[0]} steps of "
        f"{runs['pairs_a_step'].iloc[0]:.0f} pairs; {asked.seeds} seeds, mean and 95 % interval."
    )
    content = {
        "machine": machine(threads=torch.get_num_threads()), "train_pairs": len(train), "held_out_pairs": len(held_out),
        "summary": summary, "runs": measured,
    }  # fmt: skip
    save("batches", content, f"{pipes(['', *MEASURES], rows)}\n\n{note}", asked.output)


if __name__ == "__main__":
    main()
