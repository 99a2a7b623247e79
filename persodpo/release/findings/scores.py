"""Findings about completions, scores and the quality score."""

from __future__ import annotations

import numpy as np
import pandas as pd

from persodpo.completions import count_words, is_echo, is_one_object, read_completion
from persodpo.method import SIGNALS
from persodpo.prompts import FIELDS
from persodpo.release.findings.base import (
    CONFIRMED,
    PARTLY,
    REFUTED,
    Evidence,
    Finding,
    Material,
    evidence,
)

#: Equal up to the noise of batched float32 inference.
COHERENCE_TOLERANCE = 1e-5


def scored_response(rows: int) -> np.ndarray:
    """Return which response the score of valid row k belongs to: k // 8 + k % 8.

    The released loop advances its start by 1 while it takes slices of 8, and keeps the results in a row.

    Args:
        rows: Number of valid rows.

    Returns:
        Positions among the valid rows, [rows].
    """
    k = np.arange(rows)
    return np.asarray(k // 8 + k % 8)


def check_coherence(material: Material) -> Evidence:
    """A1: rows that the formula sends to one response have one value."""
    files, groups, broken, widest, kept, known = 0, 0, 0, 0.0, 0, 0
    distinct = ""
    for label, (which, frame) in material.sets.items():
        if not which.metrics:
            continue
        values = frame.loc[frame["parsed"].notna(), "coherence"].reset_index(drop=True)
        owner = scored_response(len(values))
        spread = values.groupby(owner).agg(np.ptp)
        true = values.groupby(owner).mean()
        files += 1
        groups += len(spread)
        broken += int((spread > COHERENCE_TOLERANCE).sum())
        widest = max(widest, float(spread.max()))
        known += len(true)
        kept += int((values.iloc[true.index].to_numpy() - true.to_numpy().ravel() == 0).sum())
        if label == "gpt-4-turbo-train":
            distinct = f"gpt-4-turbo: {len(values):,} rows hold the scores of {len(spread)} responses. "
    text = (
        f"In {files} metric files, {groups:,} groups of rows that k//8 + k%8 sends to one response: {broken} with values "
        f"further apart than {COHERENCE_TOLERANCE:g} (widest {widest:.1e}). {distinct}Every file covers the first "
        f"eighth of its responses ({known:,} in all)."
    )
    return Evidence(CONFIRMED if not broken else REFUTED, text)


def check_format_bonus(material: Material) -> Evidence:
    """A3: no response gets the bonus."""
    compliance = material.tables["scores"]["compliance"].dropna()
    above = int((compliance > 1.0).sum())
    return evidence(above == 0, f"Largest compliance {compliance.max():.3f}; {above} of {len(compliance):,} above 1.")


def check_truncation(material: Material) -> Evidence:
    """A5: failures are answers that were cut off."""
    failed = material.pool[material.pool["outcome"] != "ok"]
    cut = failed[failed["outcome"] == "truncated"]
    by_model = {
        model: f"{model} {len(group[group['outcome'] == 'truncated'])}/{len(group)}"
        for model, group in failed.groupby("model")
    }
    open_models = ", ".join(text for model, text in by_model.items() if not str(model).startswith("gpt"))
    text = f"{len(cut):,} of {len(failed):,} failed train responses are an unclosed JSON string ({open_models})."
    return evidence(len(cut) > 0.9 * len(failed), text)


def check_placeholder(material: Material) -> Evidence:
    """A9: completions of API models repeat the unfilled field of the prompt they were sent."""
    pool = material.pool
    told = pool[pool["completion"].str.contains("{max_word_count}", regex=False)]
    models = ", ".join(f"{model} {count}" for model, count in told["model"].value_counts().items())
    api = bool(len(told)) and bool(told["model"].str.startswith("gpt").all())
    text = (
        f"{len(told)} completions hold the literal {{max_word_count}} ({models}), which their prompt must have held; no "
        f"open model's does. Here no prompt can leave with an unfilled field: a template must hold exactly "
        f"{', '.join(sorted(FIELDS))}."
    )
    return evidence(api, text)


def check_joined_personas(material: Material) -> Evidence:
    """A10: persona sentences stand without a space between them."""
    prompts = pd.concat([
        pd.read_csv(material.files[f"Prompts/FoCus-{split}.csv"], usecols=["personas"]) for split in ("train", "valid")
    ])  # fmt: skip
    joined = material.tables["dialogues"]["personas"].map("".join).reset_index(drop=True)
    same = (joined == prompts["personas"].reset_index(drop=True)).mean()
    spaced = material.tables["dialogues"]["personas"].map(" ".join).reset_index(drop=True)
    text = (
        f"Joining our split sentences with nothing gives {same:.1%} of the {len(prompts):,} published persona texts, "
        f"with a space {(spaced == prompts['personas'].reset_index(drop=True)).mean():.1%}. What the C and UE scorers "
        "were fed stands in a notebook and needs their checkpoints; it is not checkable from the data files."
    )
    return Evidence(PARTLY if same == 1.0 else REFUTED, text)


def check_echo(material: Material) -> Evidence:
    """A11: parsed responses that only repeat the template."""
    echoes = material.pool[material.pool["response"].map(lambda text: bool(text) and is_echo(text))]
    parsed = int((echoes["outcome"] == "ok").sum())
    by_model = ", ".join(f"{model} {count}" for model, count in echoes["model"].value_counts().items())
    high = int((echoes["quality"] >= material.high).sum())
    text = f"{len(echoes)} responses repeat the placeholder ({by_model}); {parsed} were parsed, {high} rank as chosen."
    return evidence(len(echoes) > 0, text)


def check_lenient_parse(material: Material) -> Evidence:
    """A18: many accepted completions do not end with their object."""
    parsed = material.pool[material.pool["outcome"] == "ok"]
    strict = parsed["completion"].map(lambda text: read_completion(text, "strict").outcome)
    rejected = parsed[strict != "ok"]
    by_model = ", ".join(f"{model} {count}" for model, count in rejected["model"].value_counts().head(3).items())
    classes = ", ".join(f"{name} {count:,}" for name, count in strict[strict != "ok"].value_counts().items())
    whole = int((~parsed["completion"].map(lambda text: is_one_object(text) and text.lstrip().startswith("{"))).sum())
    text = (
        f"{len(rejected):,} of {len(parsed):,} parsed completions go on after their object, loop or only repeat the "
        f"template ({classes}; {by_model}); with text before the object counted too, {whole:,} are not one JSON object "
        "and nothing else. They count as successes and can be chosen."
    )
    return evidence(len(rejected) > 0.1 * len(parsed), text)


def check_length_target(material: Material) -> Evidence:
    """A19: compliance rewards the mean length, not the stated limit."""
    words = material.pool.loc[material.pool["response"].notna(), "response"].map(count_words)
    limit = material.profile.prompts.max_words
    longest = material.pool.assign(words=words).nlargest(1, "words")["compliance"].iloc[0]
    api = material.pool["model"].str.startswith("gpt")
    closeness = material.pool.groupby(api)["compliance"].mean()
    text = (
        f"No text breaks the stated limit of {limit} words, yet the longest, {words.max()} words, gets compliance "
        f"{longest:.3f}. Mean compliance: API models {closeness[True]:.3f}, open models {closeness[False]:.3f}, "
        "failures included."
    )
    return evidence(bool(words.max() <= limit), text)


def check_imputed_agreement(material: Material) -> Evidence:
    """A24: the signals agree only about who failed."""
    scores = material.tables["scores"].dropna(subset=["quality"])
    measured = scores[~scores["imputed"]]
    strongest = []
    for rows in (measured, scores):
        correlations = rows[list(SIGNALS)].corr(method="spearman").to_numpy()
        strongest.append(float(np.abs(np.triu(correlations, 1)).max()))
    text = (
        f"Strongest rank correlation between two of the five signals: {strongest[0]:.2f} over the {len(measured):,} "
        f"measured responses, {strongest[1]:.2f} with the {len(scores) - len(measured):,} failures at their worst-case "
        "values."
    )
    return evidence(strongest[1] > 2 * strongest[0], text)


FINDINGS = [
    Finding(
        "A1",
        "The coherence column is misaligned: the scoring loop advances by 1 while it slices by 8, so valid row k carries "
        "the score of response k//8 + k%8.",
        "Coherence, 14 % of the quality score, belongs to another dialogue for nearly every response.",
        check_coherence,
        correction="A1",
    ),
    Finding(
        "A3",
        "The JSON bonus of the compliance score never fires: it is looked for in text already taken out of its JSON.",
        "Format is not part of the quality score at all; compliance is length alone.",
        check_format_bonus,
        correction="A3",
    ),
    Finding(
        "A5",
        "Nearly all failures are truncation: the prompt allows 110 words, decoding stops at 110 tokens.",
        "The failure ratio measures the token budget, not the ability to follow the format.",
        check_truncation,
        mend="a budget of new tokens that follows from the word limit (A5), when responses are generated anew",
    ),
    Finding(
        "A9",
        "The prompt sent to API models holds a literal {max_word_count}: they were never told the limit.",
        "API and open models answered different tasks.",
        check_placeholder,
        mend="no prompt can be rendered with an unfilled field",
    ),
    Finding(
        "A10",
        "Persona sentences are joined without a space; the UE score uses the gold response where its definition has the "
        "query, and the C score feeds one joined sentence to a sentence-pair model.",
        "Words run together at every joint; both NLI scores measure something else than they are named for.",
        check_joined_personas,
        correction="A10a",
    ),
    Finding(
        "A11",
        "17 parsed or recovered responses only repeat the template's placeholder.",
        "They carry metric scores like answers.",
        check_echo,
        correction="A18",
    ),
    Finding(
        "A18",
        "One in six completions counted as parsed goes on after its JSON object; three in ten are not that object alone.",
        "What follows the object (a second answer, an explanation, a loop) is rewarded as compliance.",
        check_lenient_parse,
        correction="A18",
    ),
    Finding(
        "A19",
        "Compliance rewards closeness to the mean length of 53 words, not the stated limit of 110.",
        "Obeying the limit is not what is scored, and length closeness has the largest weight (0.32).",
        check_length_target,
        mend="scoring.target_words takes any length; which one is right is open",
    ),
    Finding(
        "A24",
        "The five signals seem to agree because failures get the worst value of each; measured, they hardly correlate.",
        "Quality mostly ranks finished above unfinished answers, which simple pairs do without any score.",
        check_imputed_agreement,
        mend="correlations and results are shown with failures imputed and without",
    ),
]
