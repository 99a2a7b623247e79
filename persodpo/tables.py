"""Columns and types of every table, and reading, writing and checking them as Parquet."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from persodpo.errors import PersodpoError
from persodpo.files import disk_errors

_KINDS = {
    "text": pa.string(), "texts": pa.list_(pa.string()), "real": pa.float64(), "whole": pa.int64(), "flag": pa.bool_(),
}  # fmt: skip


def _schema(columns: str) -> pa.Schema:
    """Return a schema of words such as ``quality:real``; a column without a kind holds text."""
    return pa.schema([(name, _KINDS[kind or "text"]) for name, _, kind in (c.partition(":") for c in columns.split())])


_RESPONSES = (
    "dialogue_id split model completion response outcome finish_reason response_time:real batch_size:whole hardware"
)
_SCORES = (
    "dialogue_id model coherence:real c_score:real ue_score:real persona_distance:real words:whole imputed:flag "
    "compliance:real quality:real"
)
_JUDGED = (
    "dialogue_id model rouge_l:real repeats:flag answers_question:flag fits_person:flag contradicts_nothing:flag "
    "says_once:flag grounded:flag added:whole"
)
_PAIRS = "prompt chosen rejected score_chosen:real score_rejected:real dialogue_id chosen_model rejected_model"
_ESTIMATES = (
    "arm metric reading batch_size:whole hardware seeds:whole responses:whole left_out:whole mean:real low:real high:real "
    "interval reason"
)
_COMPARISONS = (
    "arm baseline metric reading arm_seeds:whole baseline_seeds:whole seeds_paired:flag dialogues:whole left_out:whole "
    "unpaired:whole difference:real low:real high:real standard_error:real detectable:real p_value:real p_at_floor:flag "
    "p_holm:real exact_test higher:whole lower:whole ties:whole p_exact:real p_exact_holm:real family:whole reason"
)

#: Columns of every table, by its name; the file is ``<name>.parquet`` in the run folder, ``<arm>`` the name of an arm.
SCHEMAS: dict[str, pa.Schema] = {
    name: _schema(columns)
    for name, columns in {
        "dialogues": "dialogue_id split dataset personas:texts context reference",
        "responses": _RESPONSES,
        "answers": (
            f"{_RESPONSES} failure error attempts:whole prompt_tokens:whole completion_tokens:whole cost:real created"
        ),
        "scores": _SCORES,
        "extras": "dialogue_id model rouge_l:real distinct_1:real distinct_2:real words:whole repetition:real",
        "scorers": "table scorer quantity value:real",
        "probes": "scorer probe expected found passed:flag",
        "thresholds": "name value:real",
        "pairs/simple": _PAIRS,
        "pairs/perso": _PAIRS,
        "pairs/gate": "pair_set check value:real meaning",
        "evaluation/responses": _RESPONSES,
        "evaluation/scores": _SCORES,
        "evaluation/results": "model metric responses:whole mean:real std:real",
        "evaluation/estimates": _ESTIMATES,
        "evaluation/judged": _JUDGED,
        "evaluation/comparisons": _COMPARISONS,
        "ablations/pairs": "ablation pairs:whole prompts:whole shared_pairs:whole low:real high:real",
        "ablations/responses": _RESPONSES,
        "ablations/scores": _SCORES,
        "ablations/judged": _JUDGED,
        "ablations/estimates": _ESTIMATES,
        "ablations/comparisons": _COMPARISONS,
        "audit/parity": "group quantity published ours verdict source",
        "audit/findings": "id claim verdict evidence consequence setting",
        "audit/corrections": (
            "correction settings low_threshold:real high_threshold:real responses:whole pairs:whole shared_pairs:whole "
            "jaccard:real"
        ),
        "training/<arm>/log": (
            "policy kind step:whole epoch:real loss:real grad_norm:real learning_rate:real reward_margin:real "
            "reward_accuracy:real reward_chosen:real reward_rejected:real logps_chosen:real logps_rejected:real "
            "weight:real parse_rate:real words:real loops:real"
        ),
        "training/<arm>/health": "name level step:whole value:real sentence",
        "training/<arm>/generations": "step:whole prompt completion outcome",
    }.items()
}

#: Columns that may not hold nulls, wherever they occur.
KEYS = {"dialogue_id", "model", "split", "prompt", "chosen", "rejected", "chosen_model", "rejected_model"}


def schema_of(name: str) -> pa.Schema:
    """Return the columns of table ``name``, in which an arm's name stands for ``<arm>``."""
    folder, _, table = name.rpartition("/")
    return SCHEMAS[f"training/<arm>/{table}" if folder.startswith("training/") else name]


def write_table(path: Path, name: str, table: pd.DataFrame) -> None:
    """Write a table as Parquet under its schema; columns that are not of it are dropped.

    Raises:
        PersodpoError: A column is missing, cannot take its type, or has a null where a key stands.
    """
    schema = schema_of(name)
    try:
        content = pa.Table.from_pandas(table.filter(schema.names), schema=schema, preserve_index=False)
    except (KeyError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise PersodpoError(f"Table {name}, which has {', '.join(table.columns)}: {error}") from error
    for column in KEYS & set(schema.names):
        if content[column].null_count:
            raise PersodpoError(f"Table {name}: {column} must not be null.")
    with disk_errors(path):
        pq.write_table(content, path)


def check_table(path: Path, name: str) -> int:
    """Check a Parquet file's columns against the schema of a table, and return its rows.

    Raises:
        PersodpoError: The file is not Parquet, lacks a column, or has one of a wrong type.
    """
    try:
        columns, rows = pq.read_schema(path), pq.read_metadata(path).num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise PersodpoError(f"{path} is not a readable Parquet file; delete it and run its stage again.") from error
    for field in schema_of(name):
        kind = columns.field(field.name).type if field.name in columns.names else "missing"
        if kind != field.type:
            raise PersodpoError(
                f"Table {name}: column {field.name} is {kind}, it must be {field.type} ({path}); run its stage again."
            )
    return int(rows)


def with_none(frame: pd.DataFrame) -> pd.DataFrame:
    """Return ``frame`` with its text columns as Python objects, so that missing text is None and not NaN."""
    texts = {column: frame[column].astype(object) for column in frame.select_dtypes(["string", "object"]).columns}
    return frame.assign(**{column: text.where(text.notna(), None) for column, text in texts.items()})
