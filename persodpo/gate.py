"""Pairs table in, gate report out: what a pair set would teach besides the preference it is meant to teach.

DPO learns whatever tells chosen from rejected. If length alone, the format alone or the source model alone predicts the
label, the policy may learn that instead; the gate says how well each does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold
from sklearn.tree import DecisionTreeClassifier

from persodpo.completions import count_words, is_one_object, read_completion
from persodpo.dialogues import overlaps

FOLDS = 5
#: Size of the tree: fine enough for a length or a handful of names, coarse enough not to learn single responses.
LEAVES, LEAF_SIZE = 32, 20


def inspect_pairs(pairs: pd.DataFrame, dialogues: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Inspect a pair set.

    Args:
        pairs: Pairs table.
        dialogues: Dialogues table, all splits.
        seed: Seed of the cross-validation's classifier.

    Returns:
        Columns check, value and meaning, one row a check.
    """
    rows = [*_counts(pairs), *_leakage(pairs, dialogues), *_shortcuts(pairs, seed)]
    return pd.DataFrame(rows, columns=["check", "value", "meaning"])


def _counts(pairs: pd.DataFrame) -> list[tuple[str, float, str]]:
    fan_out = pairs.groupby("dialogue_id").size()
    sides = pd.concat([pairs[["dialogue_id", f"{side}_model", side]].set_axis(["d", "m", "t"], axis=1)
                       for side in ("chosen", "rejected")])  # fmt: skip
    tied = pairs["score_chosen"] <= pairs["score_rejected"]
    return [
        ("pairs", len(pairs), "rows"),
        ("prompts", len(fan_out), "prompts with a pair"),
        ("responses", len(sides[["d", "m"]].drop_duplicates()), "distinct responses, by prompt and model"),
        ("distinct_texts", len(sides[["d", "t"]].drop_duplicates()), "distinct responses, by prompt and text"),
        ("fan_out_median", fan_out.median(), "pairs a prompt, median"),
        ("fan_out_max", fan_out.max(), "pairs a prompt, largest"),
        ("identical_sides", (pairs["chosen"] == pairs["rejected"]).sum(), "pairs whose chosen is their rejected"),
        ("ties", tied.sum(), "pairs whose chosen does not score above their rejected (three decimals)"),
        ("duplicates", pairs.duplicated(["prompt", "chosen", "rejected"]).sum(), "pairs that repeat an earlier one"),
        ("contradictions", _contradictions(pairs), "texts chosen in one pair and rejected in another of the prompt"),
    ]


def _contradictions(pairs: pd.DataFrame) -> int:
    chosen = set(zip(pairs["dialogue_id"], pairs["chosen"], strict=True))
    return len(chosen & set(zip(pairs["dialogue_id"], pairs["rejected"], strict=True)))


def _leakage(pairs: pd.DataFrame, dialogues: pd.DataFrame) -> list[tuple[str, float, str]]:
    used = dialogues[dialogues["dialogue_id"].isin(pairs["dialogue_id"])]
    held_out = dialogues[dialogues["split"] == "valid"]
    leaked = used.loc[overlaps(used, held_out), "dialogue_id"]
    share = pairs["dialogue_id"].isin(leaked).sum()
    return [
        ("leaked_prompts", len(leaked), "prompts whose context or personas stand in a held-out split"),
        ("leaked_pairs", share, "pairs of those prompts"),
    ]


def _response_words(text: str, _: str) -> float:
    return float(count_words(read_completion(text).response or text))


def _is_one_object(text: str, _: str) -> float:
    return float(is_one_object(text))


def _source_model(_: str, model: str) -> str:
    return model


#: What may predict the label by itself: a feature of a side's text and model.
FEATURES: dict[str, Callable[[str, str], float | str]] = {
    "length": _response_words,
    "format": _is_one_object,
    "source_model": _source_model,
}


def _shortcuts(pairs: pd.DataFrame, seed: int) -> list[tuple[str, float, str]]:
    """Say how often one feature alone picks the chosen side (0.5 is chance)."""
    rows = []
    for name, feature in FEATURES.items():
        sides = [
            np.array([feature(text, model) for text, model in zip(pairs[side], pairs[f"{side}_model"], strict=True)])
            for side in ("chosen", "rejected")
        ]
        accuracy = label_accuracy(sides[0], sides[1], pairs["dialogue_id"].to_numpy(), seed)
        meaning = f"share of pairs whose chosen side {name.replace('_', ' ')} alone predicts"
        rows.append((f"{name}_alone", accuracy, meaning))
    return rows


def label_accuracy(
    chosen: NDArray[np.generic], rejected: NDArray[np.generic], groups: NDArray[np.generic], seed: int
) -> float:
    """Return how well one feature alone tells chosen from rejected, cross-validated by prompt.

    A decision tree learns the chance of being chosen from the feature, on the prompts of four folds; on
    the fifth, a pair counts as right if its chosen side gets the higher chance, and half if both get the same.

    Args:
        chosen: The feature of each pair's chosen side, numbers or names, [pairs].
        rejected: The feature of its rejected side, [pairs].
        groups: The prompt of each pair, [pairs]; a prompt never stands in two folds.
        seed: Seed of the classifier.

    Returns:
        Accuracy in 0..1, NaN with fewer than two prompts.
    """
    folds = min(FOLDS, len(np.unique(groups)))
    if folds < 2:
        return float("nan")
    named = chosen.dtype.kind not in "fiu"
    values = np.concatenate([chosen, rejected])
    if named:
        values = pd.factorize(values, sort=True)[0]
    first, second = np.split(np.asarray(values, dtype=float).reshape(-1, 1), 2)
    right = np.zeros(len(chosen))
    for train, test in GroupKFold(folds).split(first, groups=groups):
        model = DecisionTreeClassifier(max_leaf_nodes=LEAVES, min_samples_leaf=LEAF_SIZE, random_state=seed)
        model.fit(np.vstack([first[train], second[train]]), np.repeat([1, 0], len(train)))
        ahead = model.predict_proba(first[test])[:, 1] - model.predict_proba(second[test])[:, 1]
        right[test] = np.where(ahead > 0, 1.0, np.where(ahead < 0, 0.0, 0.5))
    return float(right.mean())
