"""The perso pairs of a run under other settings, from responses and metric values that are there: nothing is asked anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd

from persodpo.generation.published import read_completions
from persodpo.pairs import build_pairs
from persodpo.scoring.quality import METRICS, connect
from persodpo.scoring.run import Ranking, impute, rank
from persodpo.settings import Profile

#: Dialogue, chosen model and rejected model of each pair.
PairKeys = set[tuple[str, str, str]]


@dataclass(frozen=True)
class Variant:
    """What other settings make of the same responses.

    Attributes:
        ranking: Scores, scale and thresholds.
        pairs: A pairs table.
    """

    ranking: Ranking
    pairs: pd.DataFrame


def rebuild(
    responses: pd.DataFrame,
    metrics: pd.DataFrame,
    dialogues: pd.DataFrame,
    profile: Profile,
    pair_set: Literal["simple", "perso"] = "perso",
) -> Variant:
    """Read, rate and pair responses anew, without writing anything.

    Args:
        responses: Responses table; only its completions are read.
        metrics: Metric values of parsed responses, see `persodpo.scoring.run.impute`.
        dialogues: Dialogues table, all splits.
        profile: The settings.
        pair_set: Which pairs.

    Returns:
        Ranking and pairs.

    Raises:
        PersodpoError: No response is scored, or a score is not finite.
    """
    connection = connect(profile.engine, "")
    read = read_completions(responses, profile.completions)
    values = impute(read, metrics, profile.scoring.worst_case, unread=False)
    ranking = rank(connection, values, profile.scoring, profile.pairs)
    limits = ranking.low, ranking.high
    pairs = build_pairs(
        connection, pair_set, responses=read, scores=ranking.scores, dialogues=dialogues, limits=limits, profile=profile
    )  # fmt: skip
    return Variant(ranking, pairs)


def pair_keys(pairs: pd.DataFrame) -> PairKeys:
    """Return the keys of a pairs table."""
    return set(zip(pairs["dialogue_id"], pairs["chosen_model"], pairs["rejected_model"], strict=True))


def measured(responses: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Return the metric values in a scores table that were measured and not given to failures.

    Args:
        responses: Responses table.
        scores: Scores table of the same responses.

    Returns:
        Columns dialogue_id, model, the four metrics, and parsed: the text that was scored.
    """
    known = scores[~scores["imputed"] & scores["quality"].notna()]
    texts = responses[["dialogue_id", "model", "response"]].rename(columns={"response": "parsed"})
    return known[["dialogue_id", "model", *METRICS]].merge(texts, on=["dialogue_id", "model"], validate="one_to_one")
