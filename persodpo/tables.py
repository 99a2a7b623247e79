"""Columns and types of every table, and reading, writing and checking them as Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from persodpo.errors import PersodpoError, disk_errors

_text, _real, _whole, _flag = pa.string(), pa.float64(), pa.int64(), pa.bool_()
_RESPONSES = [
    ("dialogue_id", _text), ("split", _text), ("model", _text), ("completion", _text), ("response", _text),
    ("outcome", _text), ("finish_reason", _text), ("response_time", _real),
    ("batch_size", _whole), ("hardware", _text),
]  # fmt: skip
_SCORES = [
    ("dialogue_id", _text), ("model", _text), ("coherence", _real), ("c_score", _real), ("ue_score", _real),
    ("persona_distance", _real), ("words", _whole), ("imputed", _flag), ("compliance", _real), ("quality", _real),
]  # fmt: skip
_JUDGED = [
    ("dialogue_id", _text), ("model", _text), ("rouge_l", _real), ("repeats", _flag), ("answers_question", _flag),
    ("fits_person", _flag), ("contradicts_nothing", _flag), ("says_once", _flag), ("grounded", _flag), ("added", _whole),
]  # fmt: skip
_PAIRS = [
    ("prompt", _text), ("chosen", _text), ("rejected", _text), ("score_chosen", _real), ("score_rejected", _real),
    ("dialogue_id", _text), ("chosen_model", _text), ("rejected_model", _text),
]  # fmt: skip
_ESTIMATES = [
    ("arm", _text), ("metric", _text), ("reading", _text), ("batch_size", _whole), ("hardware", _text),
    ("seeds", _whole), ("responses", _whole), ("left_out", _whole), ("mean", _real), ("low", _real),
    ("high", _real), ("interval", _text), ("reason", _text),
]  # fmt: skip

_COMPARISONS = [
    ("arm", _text), ("baseline", _text), ("metric", _text), ("reading", _text), ("arm_seeds", _whole),
    ("baseline_seeds", _whole), ("seeds_paired", _flag), ("dialogues", _whole), ("left_out", _whole),
    ("unpaired", _whole), ("difference", _real), ("low", _real), ("high", _real), ("standard_error", _real),
    ("detectable", _real), ("p_value", _real), ("p_at_floor", _flag), ("p_holm", _real), ("exact_test", _text),
    ("higher", _whole), ("lower", _whole), ("ties", _whole), ("p_exact", _real), ("p_exact_holm", _real), ("family", _whole),
    ("reason", _text),
]  # fmt: skip

#: Columns of every table, by its name; the file is ``<name>.parquet`` in the run folder, ``<arm>`` the name of an arm.
SCHEMAS: dict[str, pa.Schema] = {
    "dialogues": pa.schema([
        ("dialogue_id", _text), ("split", _text), ("dataset", _text), ("personas", pa.list_(_text)),
        ("context", _text), ("reference", _text),
    ]),
    "responses": pa.schema(_RESPONSES),
    "answers": pa.schema([
        *_RESPONSES, ("failure", _text), ("error", _text), ("attempts", _whole), ("prompt_tokens", _whole),
        ("completion_tokens", _whole), ("cost", _real), ("created", _text),
    ]),
    "scores": pa.schema(_SCORES),
    "extras": pa.schema([
        ("dialogue_id", _text), ("model", _text), ("rouge_l", _real), ("distinct_1", _real), ("distinct_2", _real),
        ("words", _whole), ("repetition", _real),
    ]),
    "scorers": pa.schema([("table", _text), ("scorer", _text), ("quantity", _text), ("value", _real)]),
    "probes": pa.schema([
        ("scorer", _text), ("probe", _text), ("expected", _text), ("found", _text), ("passed", _flag),
    ]),
    "thresholds": pa.schema([("name", _text), ("value", _real)]),
    "pairs/simple": pa.schema(_PAIRS),
    "pairs/perso": pa.schema(_PAIRS),
    "pairs/gate": pa.schema([("pair_set", _text), ("check", _text), ("value", _real), ("meaning", _text)]),
    "evaluation/responses": pa.schema(_RESPONSES),
    "evaluation/scores": pa.schema(_SCORES),
    "evaluation/results": pa.schema([
        ("model", _text), ("metric", _text), ("responses", _whole), ("mean", _real), ("std", _real),
    ]),
    "evaluation/estimates": pa.schema(_ESTIMATES),
    "evaluation/judged": pa.schema(_JUDGED),
    "evaluation/comparisons": pa.schema(_COMPARISONS),
    "ablations/pairs": pa.schema([
        ("ablation", _text), ("pairs", _whole), ("prompts", _whole), ("shared_pairs", _whole), ("low", _real),
        ("high", _real),
    ]),
    "ablations/responses": pa.schema(_RESPONSES),
    "ablations/scores": pa.schema(_SCORES),
    "ablations/judged": pa.schema(_JUDGED),
    "ablations/estimates": pa.schema(_ESTIMATES),
    "ablations/comparisons": pa.schema(_COMPARISONS),
    "audit/parity": pa.schema([
        ("group", _text), ("quantity", _text), ("published", _text), ("ours", _text), ("verdict", _text),
        ("source", _text),
    ]),
    "audit/findings": pa.schema([
        ("id", _text), ("claim", _text), ("verdict", _text), ("evidence", _text), ("consequence", _text),
        ("setting", _text),
    ]),
    "audit/corrections": pa.schema([
        ("correction", _text), ("settings", _text), ("low_threshold", _real), ("high_threshold", _real),
        ("responses", _whole), ("pairs", _whole), ("shared_pairs", _whole), ("jaccard", _real),
    ]),
    "training/<arm>/log": pa.schema([
        ("policy", _text), ("kind", _text), ("step", _whole), ("epoch", _real), ("loss", _real),
        ("grad_norm", _real), ("learning_rate", _real), ("reward_margin", _real), ("reward_accuracy", _real),
        ("reward_chosen", _real), ("reward_rejected", _real), ("logps_chosen", _real), ("logps_rejected", _real),
        ("weight", _real), ("parse_rate", _real), ("words", _real), ("loops", _real),
    ]),
    "training/<arm>/health": pa.schema([
        ("name", _text), ("level", _text), ("step", _whole), ("value", _real), ("sentence", _text),
    ]),
    "training/<arm>/generations": pa.schema([
        ("step", _whole), ("prompt", _text), ("completion", _text), ("outcome", _text),
    ]),
}  # fmt: skip

#: Columns that may not hold nulls, wherever they occur.
KEYS = ("dialogue_id", "model", "split", "prompt", "chosen", "rejected", "chosen_model", "rejected_model")


def schema_of(name: str) -> pa.Schema:
    """Return the columns of table ``name``, in which an arm's name stands for ``<arm>``."""
    folder, _, table = name.rpartition("/")
    return SCHEMAS[f"training/<arm>/{table}" if folder.startswith("training/") else name]


def write_table(path: Path, name: str, table: pd.DataFrame) -> None:
    """Write a table as Parquet under its schema; columns that are not of it are dropped.

    Raises:
        PersodpoError: A column is missing or cannot take its type.
    """
    schema = schema_of(name)
    _require_columns(name, list(table.columns))
    try:
        content = pa.Table.from_pandas(table[schema.names], schema=schema, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise PersodpoError(f"Table {name}: {error}") from error
    with disk_errors(path):
        pq.write_table(content, path)


def _require_columns(name: str, columns: Sequence[str]) -> None:
    missing = [column for column in schema_of(name).names if column not in columns]
    if missing:
        raise PersodpoError(f"Table {name} lacks {', '.join(missing)}; it has {', '.join(columns)}.")


def check_table(path: Path, name: str) -> int:
    """Check a Parquet file against the schema of a table, reading only its footer, and return its rows.

    Raises:
        PersodpoError: The file is not Parquet, lacks a column, has one of a wrong type, or has nulls in a key.
    """
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise PersodpoError(f"{path} is not a readable Parquet file; delete it and run its stage again.") from error
    with file:
        columns = file.schema_arrow
        _require_columns(name, columns.names)
        for field in schema_of(name):
            kind = columns.field(field.name).type
            if kind != field.type:
                raise PersodpoError(f"Table {name}: column {field.name} is {kind}, it must be {field.type} ({path}).")
            if field.name in KEYS and _null_count(file.metadata, field.name):
                raise PersodpoError(f"Table {name}: {field.name} must not be null ({path}).")
        return int(file.metadata.num_rows)


def _null_count(metadata: Any, column: str) -> int:
    """Sum the null counts that the writer left in the footer."""
    index = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == column)
    groups = (metadata.row_group(g).column(index).statistics for g in range(metadata.num_row_groups))
    return sum(stats.null_count or 0 for stats in groups if stats is not None)


def with_none(frame: pd.DataFrame) -> pd.DataFrame:
    """Return ``frame`` with its text columns as Python objects, so that missing text is None and not NaN."""
    texts = {column: frame[column].astype(object) for column in frame.select_dtypes(["string", "object"]).columns}
    return frame.assign(**{column: text.where(text.notna(), None) for column, text in texts.items()})
