"""Pairs table in, gate report out: what a pair set would teach besides the preference it is meant to teach.

DPO learns whatever tells chosen from rejected. If length alone, the format alone or the source model alone predicts the
label, the policy may learn that instead; the gate says how well each does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.tree import DecisionTreeClassifier

from persodpo.completions import count_words, is_one_object, read_completion
from persodpo.dialogues import overlaps

FOLDS = 5
#: Size of the tree: fine enough for a length or a handful of names, coarse enough not to learn single responses.
LEAVES, LEAF_SIZE = 32, 20


def inspect_pairs(pairs: pd.DataFrame, dialogues: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Inspect a pair set beside the dialogues of all splits; return check, value and meaning, one row a check."""
    fan_out = pairs.groupby("dialogue_id").size()
    chosen, rejected = (
        pairs[["dialogue_id", f"{side}_model", side]].set_axis(["dialogue_id", "model", "text"], axis=1)
        for side in ("chosen", "rejected")
    )
    both, texts = pd.concat([chosen, rejected]), ["dialogue_id", "text"]
    contradictions = chosen[texts].drop_duplicates().merge(rejected[texts].drop_duplicates())
    used = dialogues[dialogues["dialogue_id"].isin(pairs["dialogue_id"])]
    leaked = used.loc[overlaps(used, dialogues[dialogues["split"] == "valid"]), "dialogue_id"]
    tied = pairs["score_chosen"] <= pairs["score_rejected"]
    rows = [
        ("pairs", len(pairs), "rows"),
        ("prompts", len(fan_out), "prompts with a pair"),
        ("responses", len(both.drop_duplicates(["dialogue_id", "model"])), "distinct responses, by prompt and model"),
        ("distinct_texts", len(both.drop_duplicates(texts)), "distinct responses, by prompt and text"),
        ("fan_out_median", fan_out.median(), "pairs a prompt, median"),
        ("fan_out_max", fan_out.max(), "pairs a prompt, largest"),
        ("identical_sides", (pairs["chosen"] == pairs["rejected"]).sum(), "pairs whose chosen is their rejected"),
        ("ties", tied.sum(), "pairs whose chosen does not score above their rejected (three decimals)"),
        ("duplicates", pairs.duplicated(["prompt", "chosen", "rejected"]).sum(), "pairs that repeat an earlier one"),
        ("contradictions", len(contradictions), "texts chosen in one pair and rejected in another of the prompt"),
        ("leaked_prompts", len(leaked), "prompts whose context or personas stand in a held-out split"),
        ("leaked_pairs", pairs["dialogue_id"].isin(leaked).sum(), "pairs of those prompts"),
    ]
    for name, feature in FEATURES.items():
        sides = [np.array([*map(feature, pairs[side], pairs[f"{side}_model"])]) for side in ("chosen", "rejected")]
        accuracy = label_accuracy(sides[0], sides[1], pairs["dialogue_id"].to_numpy(), seed)
        meaning = f"share of pairs whose chosen side is predicted by {name.replace('_', ' ')} alone"
        rows.append((f"{name}_alone", accuracy, meaning))
    return pd.DataFrame(rows, columns=["check", "value", "meaning"])


#: What may predict the label by itself: a feature of a side's text and model.
FEATURES: dict[str, Callable[[str, str], float | str]] = {
    "length": lambda text, _: float(count_words(read_completion(text).response or text)),
    "format": lambda text, _: float(is_one_object(text)),
    "source_model": lambda _, model: model,
}


def label_accuracy(
    chosen: NDArray[np.generic], rejected: NDArray[np.generic], groups: NDArray[np.generic], seed: int
) -> float:
    """Return how well one feature alone tells chosen from rejected, cross-validated by prompt; 0.5 is chance.

    A decision tree learns the chance of being chosen from the feature, on the prompts of four folds; on the fifth, a pair
    counts as right if its chosen side gets the higher chance, and half if both get the same.

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
    values = np.concatenate([chosen, rejected])
    if values.dtype.kind not in "fiu":
        values = pd.factorize(values, sort=True)[0]
    features, labels = np.asarray(values, dtype=float).reshape(-1, 1), np.repeat([1, 0], len(chosen))
    model = DecisionTreeClassifier(max_leaf_nodes=LEAVES, min_samples_leaf=LEAF_SIZE, random_state=seed)
    chances = cross_val_predict(
        model, features, labels, groups=np.tile(groups, 2), cv=GroupKFold(folds), method="predict_proba"
    )[:, 1]
    first, second = np.split(chances, 2)
    return float(((1 + np.sign(first - second)) / 2).mean())
