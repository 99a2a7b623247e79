"""Checks of the audit on completions, scores and pairs: each recomputes one claim of ``findings.yaml``.

A check takes `Material` and returns `Evidence`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from persodpo.completions import count_words, is_echo, is_one_object, read_completion
from persodpo.config import Profile
from persodpo.dialogues import overlaps
from persodpo.method import SIGNALS
from persodpo.prompts import FIELDS
from persodpo.release.published import SETS, PublishedSet, read_set

CONFIRMED, PARTLY, REFUTED = "confirmed", "partly", "refuted"
#: Equal up to the noise of batched float32 inference.
COHERENCE_TOLERANCE = 1e-5
#: A verdict and the numbers it rests on, in a sentence or two. ``partly``: the data files show one part of the claim only.
Evidence = tuple[str, str]


def evidence(holds: bool, text: str, verdict: str = CONFIRMED) -> Evidence:
    """Confirm a claim, as a whole or partly, or refute it."""
    return (verdict if holds else REFUTED), text


@dataclass(frozen=True)
class Material:
    """What the checks look at: published files by manifest path, and the run's tables by name, made ``as_released``."""

    files: dict[str, Path]
    tables: dict[str, pd.DataFrame]
    low: float  # thresholds of quality
    high: float
    profile: Profile

    @cached_property
    def sets(self) -> dict[str, tuple[PublishedSet, pd.DataFrame]]:
        """Every published set by its label, as published."""
        return {which.label: (which, read_set(self.files, which)) for which in SETS}

    @cached_property
    def pool(self) -> pd.DataFrame:
        """Ranked train responses with their scores."""
        return self.tables["responses"].merge(self.tables["scores"], on=["dialogue_id", "model"], validate="one_to_one")

    def rows(self, label: str) -> pd.DataFrame:
        """Return a published set, as published."""
        return self.sets[label][1]

    def gate(self, pair_set: str) -> dict[str, float]:
        """Return the gate's checks of a pair set."""
        gate = self.tables["pairs/gate"]
        rows = gate[gate["pair_set"] == pair_set]
        return dict(zip(rows["check"], rows["value"], strict=True))


def scored_response(rows: int) -> np.ndarray:
    """Return which response the score of each valid row belongs to, [rows]: k // 8 + k % 8.

    The released loop advances its start by 1 while it takes slices of 8, and keeps the results in a row.
    """
    k = np.arange(rows)
    return np.asarray(k // 8 + k % 8)


def _listed(values: pd.Series) -> str:
    """Write how often each value stands, the commonest first."""
    return ", ".join(f"{value} {count:,}" for value, count in values.value_counts().items())


def coherence(material: Material) -> Evidence:
    """A1: rows that the formula sends to one response have one value."""
    columns = {
        label: frame.loc[frame["parsed"].notna(), "coherence"].reset_index(drop=True)
        for label, (which, frame) in material.sets.items()
        if which.metrics
    }
    spreads = {label: rows.groupby(scored_response(len(rows))).agg(np.ptp) for label, rows in columns.items()}
    every, one = pd.concat(spreads), "gpt-4-turbo-train"
    broken = int((every > COHERENCE_TOLERANCE).sum())
    text = (
        f"In {len(spreads)} metric files, {len(every):,} groups of rows that k//8 + k%8 sends to one response: {broken} "
        f"with values further apart than {COHERENCE_TOLERANCE:g} (widest {every.max():.1e}). gpt-4-turbo: "
        f"{len(columns[one]):,} rows hold the scores of {len(spreads[one])} responses. Every file covers the first "
        f"eighth of its responses ({len(every):,} in all)."
    )
    return evidence(not broken, text)


def format_bonus(material: Material) -> Evidence:
    """A3: no response gets the bonus."""
    compliance = material.tables["scores"]["compliance"].dropna()
    above = int((compliance > 1.0).sum())
    return evidence(above == 0, f"Largest compliance {compliance.max():.3f}; {above} of {len(compliance):,} above 1.")


def failures_rejected(material: Material) -> Evidence:
    """A4: every failure is rejected, and written as valid JSON."""
    scored, pairs = material.pool[material.pool["quality"].notna()], material.tables["pairs/perso"]
    failed, low = scored["outcome"] != "ok", scored["quality"] <= material.low
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


def truncation(material: Material) -> Evidence:
    """A5: failures are answers that were cut off."""
    failed = material.pool[material.pool["outcome"] != "ok"]
    cut = failed["outcome"] == "truncated"
    parts = {str(model): f"{model} {part.sum()}/{len(part)}" for model, part in cut.groupby(failed["model"])}
    open_models = ", ".join(text for model, text in parts.items() if not model.startswith("gpt"))
    text = f"{cut.sum():,} of {len(failed):,} failed train responses are an unclosed JSON string ({open_models})."
    return evidence(bool(cut.mean() > 0.9), text)


def placeholder(material: Material) -> Evidence:
    """A9: completions of API models repeat the unfilled field of the prompt they were sent."""
    models = material.pool.loc[material.pool["completion"].str.contains("{max_word_count}", regex=False), "model"]
    text = (
        f"{len(models)} completions hold the literal {{max_word_count}} ({_listed(models)}), which their prompt must have "
        "held; no open model's does. Here no prompt can leave with an unfilled field: a template must hold exactly "
        f"{', '.join(sorted(FIELDS))}."
    )
    return evidence(bool(len(models) and models.str.startswith("gpt").all()), text)


def joined_personas(material: Material) -> Evidence:
    """A10: persona sentences stand without a space between them."""
    published = pd.concat([
        pd.read_csv(material.files[f"Prompts/FoCus-{split}.csv"])["personas"] for split in ("train", "valid")
    ]).reset_index(drop=True)  # fmt: skip
    ours = material.tables["dialogues"]["personas"].reset_index(drop=True)
    same, spaced = ((ours.map(joint.join) == published).mean() for joint in ("", " "))
    text = (
        f"Joining our split sentences with nothing gives {same:.1%} of the {len(published):,} published persona texts, "
        f"with a space {spaced:.1%}. What the C and UE scorers "
        "were fed stands in a notebook and needs their checkpoints; it is not checkable from the data files."
    )
    return evidence(bool(same == 1.0), text, PARTLY)


def echo(material: Material) -> Evidence:
    """A11: parsed responses that only repeat the template."""
    echoes = material.pool[material.pool["response"].map(lambda text: bool(text) and is_echo(text))]
    parsed, high = (echoes["outcome"] == "ok").sum(), (echoes["quality"] >= material.high).sum()
    return evidence(
        len(echoes) > 0,
        f"{len(echoes)} responses repeat the placeholder ({_listed(echoes['model'])}); {parsed} were parsed, {high} rank as "
        "chosen.",
    )


def split_overlap(material: Material) -> Evidence:
    """A12: train and valid share dialogues."""
    dialogues, pairs = material.tables["dialogues"], material.tables["pairs/perso"]
    train, valid = (dialogues[dialogues["split"] == split] for split in ("train", "valid"))
    contexts = len(set(train["context"]) & set(valid["context"]))
    personas = len(set(train["personas"].map(tuple)) & set(valid["personas"].map(tuple)))
    leaked = train.loc[overlaps(train, valid), "dialogue_id"]
    text = (
        f"{contexts} context and {personas} persona sets stand in both splits; {len(leaked)} train dialogues, "
        f"{int(pairs['dialogue_id'].isin(leaked).sum())} of {len(pairs):,} perso pairs."
    )
    return evidence(contexts + personas > 0, text)


def lenient_parse(material: Material) -> Evidence:
    """A18: many accepted completions do not end with their object."""
    parsed = material.pool[material.pool["outcome"] == "ok"]
    strict = parsed["completion"].map(lambda text: read_completion(text, "strict").outcome)
    rejected = strict != "ok"
    by_model = ", ".join(_listed(parsed.loc[rejected, "model"]).split(", ")[:3])
    whole = int((~parsed["completion"].map(lambda text: is_one_object(text) and text.lstrip().startswith("{"))).sum())
    text = (
        f"{rejected.sum():,} of {len(parsed):,} parsed completions go on after their object, loop or only repeat the "
        f"template ({_listed(strict[rejected])}; {by_model}); with text before the object counted too, {whole:,} are not "
        "one JSON object and nothing else. They count as successes and can be chosen."
    )
    return evidence(bool(rejected.mean() > 0.1), text)


def length_target(material: Material) -> Evidence:
    """A19: compliance rewards the mean length, not the stated limit."""
    words = material.pool.loc[material.pool["response"].notna(), "response"].map(count_words)
    limit, longest = (
        material.profile.prompts.max_words,
        material.pool["compliance"].reindex(words.nlargest(1).index).iloc[0],
    )
    closeness = material.pool.groupby(material.pool["model"].str.startswith("gpt"))["compliance"].mean()
    text = (
        f"No text breaks the stated limit of {limit} words, yet the longest, {words.max()} words, gets compliance "
        f"{longest:.3f}. Mean compliance: API models {closeness[True]:.3f}, open models {closeness[False]:.3f}, "
        "failures included."
    )
    return evidence(bool(words.max() <= limit), text)


def dropped_failures(material: Material) -> Evidence:
    """A20: the worst failures never become rejected."""
    models = material.pool.loc[(material.pool["outcome"] != "ok") & material.pool["response"].isna(), "model"]
    text = f"{len(models)} completions without a readable answer are in no pair: {_listed(models)}."
    return evidence(bool((models == "Qwen2-0.5B-Instruct").mean() > 0.5), text)


def shortcuts(material: Material) -> Evidence:
    """A21: one feature alone predicts the label."""
    gates = {name: material.gate(name) for name in ("simple", "perso")}
    alone = {
        name: ", ".join(f"{feature} {gate[feature + '_alone']:.3f}" for feature in ("length", "format", "source_model"))
        for name, gate in gates.items()
    }
    text = (
        "Share of pairs predicted by one feature alone, cross-validated by prompt (0.5 is chance). "
        f"{'; '.join(f'{name}: {parts}' for name, parts in alone.items())}."
    )
    return evidence(gates["perso"]["length_alone"] > 0.75 and gates["perso"]["source_model_alone"] > 0.7, text)


def repeated_texts(material: Material) -> Evidence:
    """A22: the count of distinct sequences is by model."""
    perso, simple = material.gate("perso"), material.gate("simple")
    text = (
        f"{perso['responses']:,.0f} responses by model are {perso['distinct_texts']:,.0f} texts; {perso['duplicates']:.0f} "
        f"perso and {simple['duplicates']:.0f} simple pairs repeat another pair word for word; in {simple['ties']:.0f} "
        "simple pairs the chosen side does not score above the rejected one."
    )
    return evidence(perso["responses"] > perso["distinct_texts"], text)


def imputed_agreement(material: Material) -> Evidence:
    """A24: the signals agree only about who failed."""
    scores = material.tables["scores"].dropna(subset=["quality"])
    measured = scores[~scores["imputed"]]
    strongest = [
        float(np.abs(np.triu(rows[list(SIGNALS)].corr(method="spearman").to_numpy(), 1)).max())
        for rows in (measured, scores)
    ]
    text = (
        f"Strongest rank correlation between two of the five signals: {strongest[0]:.2f} over the {len(measured):,} "
        f"measured responses, {strongest[1]:.2f} with the {len(scores) - len(measured):,} failures at their worst-case "
        "values."
    )
    return evidence(strongest[1] > 2 * strongest[0], text)
