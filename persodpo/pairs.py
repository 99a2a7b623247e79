"""Responses and scores in, chosen/rejected pairs out.

``simple`` pairs set every parsed completion of a prompt against every failed one, as generated. ``perso`` pairs set
every response at or above the high threshold of quality against every one at or below the low threshold. Both are a
prompt's cross product. Everything runs in DuckDB over Parquet and spills to disk, so a hundred million responses fit
a laptop.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import duckdb
import pandas as pd

from persodpo.prompts import load_template, render
from persodpo.scoring.quality import measure_scale, one_row, rate_sql, thresholds
from persodpo.settings import Pairs, Profile, Scoring

#: A response that can stand in a pair: read or recovered text, with a quality.
_USABLE = "quality IS NOT NULL AND response IS NOT NULL"


@dataclass(frozen=True)
class IndexedPairs:
    """What `index_pairs` wrote.

    Attributes:
        pairs: Number of pairs.
        responses: Number of scored responses.
        low: Threshold at or below which a response may be rejected.
        high: Threshold at or above which it may be chosen.
    """

    pairs: int
    responses: int
    low: float
    high: float


def perso_condition(low: float, high: float) -> str:
    """Return the condition under which response ``c`` is chosen over response ``r`` of the same dialogue.

    The last part only matters where both thresholds are equal: a response never stands against itself or its equal.
    """
    return f"c.quality >= {high!r}::DOUBLE AND r.quality <= {low!r}::DOUBLE AND c.quality > r.quality"


SIMPLE_CONDITION = "c.outcome = 'ok' AND r.outcome <> 'ok'"


def index_pairs(
    connection: duckdb.DuckDBPyConnection, source: Path, target: Path, scoring: Scoring, pairs: Pairs
) -> IndexedPairs:
    """Go from a table of metric values to ``perso`` pairs in index form, without touching any text.

    Args:
        connection: An open DuckDB (see `persodpo.scoring.quality.connect`); what exceeds its memory spills.
        source: Parquet file with dialogue_id, the four metrics (null: not scored), words and one_object.
        target: Parquet file to write: dialogue_id, chosen and rejected (row numbers of ``source``, from 0).
        scoring: Weights, normalisation and compliance settings.
        pairs: The two quantiles.

    Returns:
        Counts and thresholds.

    Raises:
        PersodpoError: No response is scored, or a score is not finite.
    """
    relation = f"read_parquet('{_quoted(source)}', file_row_number = true)"
    scale = measure_scale(connection, relation, scoring)
    connection.execute("SET preserve_insertion_order = false")
    rated = rate_sql(relation, scale, scoring, keep="dialogue_id, file_row_number")
    columns = "dialogue_id, file_row_number::UINTEGER AS row, quality"
    connection.execute(f"CREATE OR REPLACE TEMP TABLE rated AS SELECT {columns} FROM ({rated})")
    low, high = thresholds(connection, "rated", (pairs.low_quantile, pairs.high_quantile))
    written = one_row(
        connection,
        f"COPY (SELECT dialogue_id, c.row AS chosen, r.row AS rejected FROM rated c JOIN rated r USING (dialogue_id) "
        f"WHERE {perso_condition(low, high)}) TO '{_quoted(target)}' (FORMAT parquet)",
    )[0]
    connection.execute("DROP TABLE rated")
    return IndexedPairs(written, scale.responses, low, high)


def _quoted(path: Path) -> str:
    """Escape a path for a SQL string."""
    return str(path).replace("'", "''")


def build_pairs(
    connection: duckdb.DuckDBPyConnection,
    pair_set: str,
    *,
    responses: pd.DataFrame,
    scores: pd.DataFrame,
    dialogues: pd.DataFrame,
    limits: tuple[float, float],
    profile: Profile,
) -> pd.DataFrame:
    """Build one pair set with its texts.

    Args:
        connection: An open DuckDB.
        pair_set: ``simple`` or ``perso``.
        responses: Responses table.
        scores: Scores table; joined on dialogue_id and model.
        dialogues: Dialogues table, all splits.
        limits: Low and high threshold of quality.
        profile: Prompt and pair settings.

    Returns:
        A pairs table ordered by dialogue, chosen and rejected model; scores rounded to three decimals. Pairs whose two
        sides are the same text are left out.
    """
    prompts = prompt_table(dialogues, profile)
    for name, frame in (("responses", responses), ("scores", scores), ("prompts", prompts)):
        connection.register(name, frame)
    low, high = limits
    # As generated, a failed completion stays broken; re-written, it becomes valid JSON like the chosen one (A4).
    rewritten = pair_set == "perso" and profile.pairs.serialisation == "as_released"
    side = "'{\"response\": ' || to_json(response)::VARCHAR || '}'" if rewritten else "completion"
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE answers AS SELECT dialogue_id, model, outcome, quality, {side} AS text "
        f"FROM responses JOIN scores USING (dialogue_id, model) WHERE split = 'train' AND {_USABLE}"
    )
    condition = SIMPLE_CONDITION if pair_set == "simple" else perso_condition(low, high)
    return connection.execute(
        f"SELECT prompt, c.text AS chosen, r.text AS rejected, round_even(c.quality, 3) AS score_chosen, "
        f"round_even(r.quality, 3) AS score_rejected, dialogue_id, c.model AS chosen_model, r.model AS rejected_model "
        f"FROM answers c JOIN answers r USING (dialogue_id) JOIN prompts USING (dialogue_id) "
        f"WHERE {condition} AND c.text <> r.text ORDER BY dialogue_id, chosen_model, rejected_model"
    ).df()


def prompt_table(dialogues: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Render the prompt of every train dialogue that may be trained on.

    Args:
        dialogues: Dialogues table, all splits.
        profile: With ``pairs.split_overlap: corrected`` dialogues whose context or personas stand in another split are
            left out (audit A12).

    Returns:
        Columns dialogue_id and prompt.
    """
    train = dialogues[dialogues["split"] == "train"]
    if profile.pairs.split_overlap == "corrected":
        train = train[~overlaps(train, dialogues[dialogues["split"] != "train"])]
    template = load_template(profile.prompts.template)
    texts = [
        render(template, personas, context, profile.prompts)
        for personas, context in zip(train["personas"], train["context"], strict=True)
    ]
    return pd.DataFrame({"dialogue_id": train["dialogue_id"].to_numpy(), "prompt": texts})


def overlaps(train: pd.DataFrame, held_out: pd.DataFrame) -> pd.Series[bool]:
    """Mark train dialogues whose context, or whose whole set of personas, stands in the held-out dialogues."""
    known = set(held_out["personas"].map(tuple))
    return train["context"].isin(held_out["context"]) | train["personas"].map(lambda p: tuple(p) in known)
