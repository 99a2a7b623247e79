"""Findings about the pairs."""

from __future__ import annotations

from persodpo.completions import is_one_object
from persodpo.dialogues import overlaps
from persodpo.release.findings.base import Evidence, Finding, Material, evidence


def check_failures_rejected(material: Material) -> Evidence:
    """A4: every failure is rejected, and written as valid JSON."""
    scored = material.pool[material.pool["quality"].notna()]
    failed = scored["outcome"] != "ok"
    low = scored["quality"] <= material.low
    pairs = material.tables["pairs/perso"]
    valid = {side: pairs[side].map(is_one_object).mean() for side in ("chosen", "rejected")}
    imputed = scored.set_index(["dialogue_id", "model"])["imputed"]
    share = imputed.reindex(list(zip(pairs["dialogue_id"], pairs["rejected_model"], strict=True))).mean()
    text = (
        f"{int((failed & low).sum()):,} of {int(failed.sum()):,} failed responses are at or below the low threshold, "
        f"{(failed & low).sum() / low.sum():.0%} of the {int(low.sum()):,} there, and the rejected side of {share:.0%} of "
        f"the perso pairs. Of the {len(pairs):,} pairs, "
        f"{valid['chosen']:.0%} of chosen and {valid['rejected']:.0%} of rejected sides are one valid JSON object."
    )
    return evidence(bool((low | ~failed).all() and min(valid.values()) == 1.0), text)


def check_split_overlap(material: Material) -> Evidence:
    """A12: train and valid share dialogues."""
    dialogues = material.tables["dialogues"]
    train, valid = (dialogues[dialogues["split"] == split] for split in ("train", "valid"))
    contexts = len(set(train["context"]) & set(valid["context"]))
    personas = len(set(train["personas"].map(tuple)) & set(valid["personas"].map(tuple)))
    pairs = material.tables["pairs/perso"]
    leaked = train.loc[overlaps(train, valid), "dialogue_id"]
    text = (
        f"{contexts} context and {personas} persona sets stand in both splits; {len(leaked)} train dialogues, "
        f"{int(pairs['dialogue_id'].isin(leaked).sum())} of {len(pairs):,} perso pairs."
    )
    return evidence(contexts + personas > 0, text)


def check_dropped_failures(material: Material) -> Evidence:
    """A20: the worst failures never become rejected."""
    dropped = material.pool[(material.pool["outcome"] != "ok") & material.pool["response"].isna()]
    by_model = ", ".join(f"{model} {count}" for model, count in dropped["model"].value_counts().items())
    base = int((dropped["model"] == "Qwen2-0.5B-Instruct").sum())
    text = f"{len(dropped)} completions without a readable answer are in no pair: {by_model}."
    return evidence(base > len(dropped) / 2, text)


def check_shortcuts(material: Material) -> Evidence:
    """A21: one feature alone predicts the label."""
    parts = []
    for pair_set in ("simple", "perso"):
        gate = material.gate(pair_set)
        named = ", ".join(f"{name} {gate[f'{name}_alone']:.3f}" for name in ("length", "format", "source_model"))
        parts.append(f"{pair_set}: {named}")
    perso = material.gate("perso")
    text = (
        f"Share of pairs predicted by one feature alone, cross-validated by prompt (0.5 is chance). {'; '.join(parts)}."
    )
    return evidence(perso["length_alone"] > 0.75 and perso["source_model_alone"] > 0.7, text)


def check_repeated_texts(material: Material) -> Evidence:
    """A22: the count of distinct sequences is by model."""
    perso, simple = material.gate("perso"), material.gate("simple")
    text = (
        f"{perso['responses']:,.0f} responses by model are {perso['distinct_texts']:,.0f} texts; {perso['duplicates']:.0f} "
        f"perso and {simple['duplicates']:.0f} simple pairs repeat another pair word for word; in {simple['ties']:.0f} "
        "simple pairs the chosen side does not score above the rejected one."
    )
    return evidence(perso["responses"] > perso["distinct_texts"], text)


FINDINGS = [
    Finding(
        "A4",
        "All failed responses land below the low threshold and are written again as valid JSON.",
        'Perso pairs teach "complete beats cut off", never "valid JSON beats broken JSON".',
        check_failures_rejected,
        correction="A4",
    ),
    Finding(
        "A12",
        "Train and valid prompts overlap a little.",
        "A few held-out prompts were seen in training.",
        check_split_overlap,
        correction="A12",
    ),
    Finding(
        "A20",
        "The completions that hold no JSON at all are dropped, and most of them are the trained model's own.",
        "The policy is never shown its worst failure as rejected.",
        check_dropped_failures,
        mend="a pair set that takes completions without a response as rejected; none is built yet",
    ),
    Finding(
        "A21",
        "Length alone, or the source model alone, predicts which side is chosen.",
        "DPO can lower its loss by learning length or a model's voice, without any persona.",
        check_shortcuts,
        mend="no setting removes it; the gate reports it for every pair set",
    ),
    Finding(
        "A22",
        "The 7,428 distinct sequences are counted by model; a few texts repeat within a prompt.",
        "Small: some pairs weigh twice, and a few simple pairs prefer the lower score.",
        check_repeated_texts,
        mend="a trainer that keeps each distinct response once a prompt",
    ),
]
