"""Responses and metric values in, scores and pairs tables out: `persodpo.method` under a profile's settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
import polars as pl

from persodpo import method
from persodpo.completions import (
    count_words,
    count_words_of_any_script,
    is_one_object,
    read_completions,
    repeats_sentence,
    sentences,
    write_completion,
)
from persodpo.config import PairSet, Profile, Scoring
from persodpo.dialogues import overlaps
from persodpo.errors import PersodpoError
from persodpo.method import METRICS, Scale
from persodpo.prompts import load_template, render
from persodpo.tables import with_none

#: Metric values that the released code gives to failed responses. A cosine could be lower than this one, down to -1.
WORST_CASE = {"coherence": 0.0, "c_score": -1.0, "ue_score": 0.0, "persona_distance": 0.0}
#: What compliance gains where a completion is exactly one JSON object. As released it never comes: the check reads text
#: that was already taken out of its JSON. Correction A3 reads the completion.
FORMAT_BONUS = 0.3


class Ranking(NamedTuple):
    """Rated responses: metric values with compliance and quality, what these were measured against, the two thresholds."""

    scores: pd.DataFrame
    scale: Scale
    low: float
    high: float


class Variant(NamedTuple):
    """What other settings make of the same responses."""

    ranking: Ranking
    pairs: pd.DataFrame


def impute(
    responses: pd.DataFrame, metrics: pd.DataFrame, *, unread: bool, count: Callable[[str], int] = count_words
) -> pd.DataFrame:
    """Give failed responses the values of `WORST_CASE`, and unscored ones none.

    Args:
        responses: Responses table.
        metrics: dialogue_id, model, the four metrics, and parsed: the text that was scored.
        unread: Whether failures without any text are given them too (results tables count every failure, the pool of
            pairs leaves those out).
        count: Counts the words of a response; see `word_counter`.

    Returns:
        One row per response, in the order of ``responses``: dialogue_id, model, the four metrics (NaN: not scored),
        words, one_object and imputed. A response that reads well but whose text nobody scored is not scored.
    """
    # Published values lack a signal that was added later: it is 0 everywhere, and adds nothing.
    metrics = metrics.assign(**{metric: 0.0 for metric in METRICS if metric not in metrics})
    frame = with_none(responses).merge(metrics, on=["dialogue_id", "model"], how="left", validate="one_to_one")
    failed = frame["outcome"] != "ok"
    imputed = failed if unread else failed & frame["response"].notna()
    scored = ~failed & (frame["parsed"] == frame["response"])
    for metric in METRICS:
        frame[metric] = np.where(imputed, WORST_CASE[metric], frame[metric].where(scored))
    frame["imputed"] = imputed
    frame["words"] = [count(text or "") for text in frame["response"]]
    frame["one_object"] = [is_one_object(text) for text in frame["completion"]]
    return frame[["dialogue_id", "model", *METRICS, "words", "one_object", "imputed"]]


def word_counter(profile: Profile) -> Callable[[str], int]:
    """Return what counts words under a profile's corrections B1 and B2, as released without them."""
    count = count_words_of_any_script if profile.corrects("B2") else count_words
    if not profile.corrects("B1"):
        return count
    return lambda text: sum(count(sentence) for sentence in set(sentences(text)))


def effective_weights(profile: Profile) -> dict[str, float]:
    """Return the weights that act: where correction A1 leaves the published coherence out, the others share its weight.

    Raises:
        PersodpoError: Coherence has all the weight and is left out.
    """
    weights: dict[str, float] = profile.scoring.weights.model_dump()
    if profile.corrects("A1") and profile.scoring.source == "published":
        dropped = weights.pop("coherence")
        if dropped >= 1.0:
            raise PersodpoError("Correction A1 leaves coherence out, but it has all the weight; weigh another signal.")
        weights = {"coherence": 0.0} | {signal: weight / (1.0 - dropped) for signal, weight in weights.items()}
    return weights


def scale_of(scores: pd.DataFrame, settings: Scoring) -> Scale:
    """Measure the scale on a table with metrics and words, as the settings say."""
    frame = pl.from_pandas(scores[[*METRICS, "words"]])
    declared = settings.normalisation == "declared"
    return method.measure_scale(frame, target_words=settings.target_words, declared=declared)


def rate(values: pd.DataFrame, scale: Scale, profile: Profile) -> pd.DataFrame:
    """Add compliance and quality to metric values from `impute`, in their order."""
    bonus = FORMAT_BONUS if profile.corrects("A3") else 0.0
    rated = method.rate(pl.from_pandas(values), scale, effective_weights(profile), bonus)
    return values.assign(**{name: rated[name].to_numpy() for name in ("compliance", "quality")})


def rank(pool: pd.DataFrame, profile: Profile) -> Ranking:
    """Measure the scale on a pool of metric values from `impute`, rate it, and find the two thresholds."""
    scale = scale_of(pool, profile.scoring)
    scores, quantiles = rate(pool, scale, profile), (profile.pairs.low_quantile, profile.pairs.high_quantile)
    low, high = method.thresholds(pl.from_pandas(scores[["quality"]]), *quantiles)
    return Ranking(scores, scale, low, high)


def answers_of(
    pair_set: PairSet, responses: pd.DataFrame, scores: pd.DataFrame, prompts: pd.DataFrame, profile: Profile
) -> pl.DataFrame:
    """Return the scored train responses that can stand in a pair, with the text that stands there.

    In ``perso`` pairs as released a failed completion is written anew, as valid JSON like the chosen one; elsewhere, and
    under correction A4, it stays broken as it was generated.

    Returns:
        dialogue_id, model, outcome, quality and text; under correction B1 also repeats: whether the response says a
        sentence twice.
    """
    frame = responses[responses["split"].eq("train") & responses["response"].notna()]
    frame = frame.merge(scores[scores["quality"].notna()], on=["dialogue_id", "model"], validate="one_to_one")
    frame = frame[frame["dialogue_id"].isin(prompts["dialogue_id"])]
    rewritten = pair_set == "perso" and not profile.corrects("A4")
    texts = [write_completion(text) for text in frame["response"]] if rewritten else frame["completion"]
    kinds = dict.fromkeys(("dialogue_id", "model", "outcome", "quality", "text"), pl.String) | {"quality": pl.Float64}
    answers = pl.from_pandas(frame.assign(text=texts)[list(kinds)], schema_overrides=kinds)
    if profile.corrects("B1"):
        twice = [repeats_sentence(text) for text in frame["response"]]
        answers = answers.with_columns(pl.Series("repeats", twice, dtype=pl.Boolean))
    return answers


def build_pairs(
    pair_set: PairSet,
    *,
    responses: pd.DataFrame,
    scores: pd.DataFrame,
    dialogues: pd.DataFrame,
    limits: tuple[float, float],
    profile: Profile,
) -> pd.DataFrame:
    """Build one pair set with its texts, from the tables of all splits and the two thresholds of quality.

    Returns:
        A pairs table ordered by dialogue, chosen and rejected model; scores rounded to three decimals.
    """
    prompts = prompt_table(dialogues, profile)
    answers = answers_of(pair_set, responses, scores, prompts, profile)
    pairs = method.simple_pairs(answers) if pair_set == "simple" else method.perso_pairs(answers, *limits)
    columns = [pl.col("prompt"), pl.col("dialogue_id")]
    for side in ("chosen", "rejected"):
        score = pl.col(f"quality_{side}").round(3, mode="half_to_even")
        columns += [
            pl.col(f"text_{side}").alias(side), score.alias(f"score_{side}"), pl.col(f"model_{side}").alias(f"{side}_model"),
        ]  # fmt: skip
    table = pairs.join(pl.from_pandas(prompts), on="dialogue_id").select(columns)
    return table.sort("dialogue_id", "chosen_model", "rejected_model").to_pandas()


def prompt_table(dialogues: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Return dialogue_id and prompt of every train dialogue that may be trained on.

    Under correction A12 dialogues whose context or personas stand in another split are left out.
    """
    train = dialogues[dialogues["split"] == "train"]
    if profile.corrects("A12"):
        train = train[~overlaps(train, dialogues[dialogues["split"] != "train"])]
    template = load_template(profile.prompts.template)
    texts = [
        render(template, personas, context, profile.prompts, persona_lines=profile.corrects("A10a"))
        for personas, context in zip(train["personas"], train["context"], strict=True)
    ]
    return pd.DataFrame({"dialogue_id": train["dialogue_id"].to_numpy(), "prompt": texts})


def rebuild(
    responses: pd.DataFrame,
    metrics: pd.DataFrame,
    dialogues: pd.DataFrame,
    profile: Profile,
    pair_set: PairSet = "perso",
) -> Variant:
    """Read, rate and pair responses anew under other settings; nothing is asked or written.

    Args:
        responses: Responses table; only its completions are read.
        metrics: As of `impute`, for instance from `measured`.
        dialogues: Dialogues table, all splits.
        profile: The settings.
        pair_set: Which pairs.
    """
    read = read_completions(responses, profile.reading)
    ranking = rank(impute(read, metrics, unread=False, count=word_counter(profile)), profile)
    limits = (ranking.low, ranking.high)
    pairs = build_pairs(
        pair_set, responses=read, scores=ranking.scores, dialogues=dialogues, limits=limits, profile=profile
    )
    return Variant(ranking, pairs)


def pair_keys(pairs: pd.DataFrame) -> set[tuple[str, str, str]]:
    """Return dialogue, chosen model and rejected model of each pair."""
    return set(zip(pairs["dialogue_id"], pairs["chosen_model"], pairs["rejected_model"], strict=True))


def pair_changes(before: pd.DataFrame, after: pd.DataFrame) -> dict[str, int]:
    """Count pairs that are kept, added, dropped, and flipped (chosen and rejected exchanged) from one table to another."""
    old, new = pair_keys(before), pair_keys(after)
    flipped = len({(dialogue, rejected, chosen) for dialogue, chosen, rejected in old} & new)
    shared = len(old & new)
    changes = {"added": len(new) - shared - flipped, "dropped": len(old) - shared - flipped}
    return {"kept": shared, **changes, "flipped": flipped}


def measured(responses: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Return the metric values in a scores table that were measured and not given to failures, for `impute`."""
    parsed = scores[~scores["imputed"] & scores["quality"].notna()]
    texts = responses[["dialogue_id", "model", "response"]].rename(columns={"response": "parsed"})
    return parsed[["dialogue_id", "model", *METRICS]].merge(texts, on=["dialogue_id", "model"], validate="one_to_one")
