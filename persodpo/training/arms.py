"""The arms of the experiment: which pairs each trains on, what weighs them, and what becomes of its log. Loads no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from persodpo.config import ArmName
from persodpo.errors import PersodpoError

#: Column of the log table -> name in the trainer's log history, with ``eval_`` before it for evaluations.
LOG_COLUMNS = {
    "loss": "loss", "grad_norm": "grad_norm", "learning_rate": "learning_rate", "reward_margin": "rewards/margins",
    "reward_accuracy": "rewards/accuracies", "reward_chosen": "rewards/chosen", "reward_rejected": "rewards/rejected",
    "logps_chosen": "logps/chosen", "logps_rejected": "logps/rejected", "weight": "weights",
    "parse_rate": "health/parse_rate", "words": "health/words", "loops": "health/loops",
}  # fmt: skip
#: What a row of the log history is, by a name that only it has.
LOG_KINDS = {"loss": "train", "eval_loss": "eval", "health/parse_rate": "health"}


@dataclass(frozen=True)
class Arm:
    """One way to train; all arms start from the same policy.

    Attributes:
        pairs: Pair set.
        weighting: As in `persodpo.training.loss.pair_weights`.
        corrected: Make the pairs with every correction that needs neither new answers nor new scores.
        meaning: In a few words.
    """

    pairs: Literal["simple", "perso"]
    weighting: Literal["none", "sigmoid"]
    corrected: bool
    meaning: str


ARMS: dict[ArmName, Arm] = {
    "simple": Arm("simple", "none", False, "parsed against failed completions"),
    "perso": Arm("perso", "none", False, "high against low quality, unweighted: probably what the authors ran"),
    "perso_weighted": Arm("perso", "sigmoid", False, "high against low quality, weighted: what they meant"),
    "corrected": Arm("perso", "sigmoid", True, "weighted, on pairs made with every correction"),
}


def arm_name(name: str) -> ArmName:
    """Return ``name`` if it is an arm's, else refuse it."""
    if name not in ARMS:
        raise PersodpoError(f"There is no arm '{name}'; there are {', '.join(ARMS)}.")
    return name


def label_of(arm: ArmName, seed: int, seeds: Sequence[int]) -> str:
    """Return the name of an arm trained under a seed: the arm's own under the first of ``seeds``."""
    return arm if seed == seeds[0] else f"{arm}@{seed}"


def split_prompts(pairs: pd.DataFrame, share: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the pairs to train on and the held-out ones, those of a share of the prompts; no prompt is in both."""
    prompts = pairs["prompt"].unique()
    if len(prompts) < 2:
        raise PersodpoError(f"The pairs have {len(prompts)} prompt; training needs two, one of them to hold out.")
    count = min(len(prompts) - 1, max(1, round(share * len(prompts))))
    held_out = np.random.default_rng(seed).permutation(np.asarray(prompts, dtype=object))[:count]
    out = pairs["prompt"].isin(held_out)
    return pairs[~out].reset_index(drop=True), pairs[out].reset_index(drop=True)


def log_table(history: Sequence[Mapping[str, Any]], policy: str) -> pd.DataFrame:
    """Make the log table of a trainer's log history; ``policy`` says what was trained.

    Returns:
        Columns policy, kind, step, epoch and those of `LOG_COLUMNS`, NaN where a row of its kind has no such value.
    """
    rows = []
    for log in history:
        kind = next((kind for name, kind in LOG_KINDS.items() if name in log), None)
        if kind:
            before = "eval_" if kind == "eval" else ""
            values = {column: log.get(before + name, float("nan")) for column, name in LOG_COLUMNS.items()}
            rows.append(
                {"policy": policy, "kind": kind, "step": int(log["step"]), "epoch": log.get("epoch", 0.0), **values}
            )
    return pd.DataFrame(rows, columns=["policy", "kind", "step", "epoch", *LOG_COLUMNS])
