"""A user's own dialogues and completions: two CSV files in, a dialogues table and a responses table out.

Files are UTF-8, separated by commas, with a first line of column names; further columns are ignored. A fault is one
sentence with the file, the line (as a text editor counts) and the fix.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from persodpo.completions import read_completions, write_completion
from persodpo.dialogues import COLUMNS, SPEAKERS
from persodpo.errors import PersodpoError
from persodpo.files import without_surrogates

DIALOGUES = ("dialogue_id", "split", "personas", "context")
RESPONSES = ("dialogue_id", "model", "completion")
_SPEAKER = re.compile(r"\s*user\s*\d+\s*:", re.IGNORECASE)

Row = dict[str, str]


class _FaultError(Exception):
    """What is wrong with a row, to be reported with its line."""


def read_dialogues(path: Path) -> pd.DataFrame:
    """Read a CSV file with the columns `DIALOGUES` and perhaps ``reference``; ``docs/your-data.md`` says what they hold.

    Returns:
        A dialogues table in the file's order; a missing reference is None.

    Raises:
        PersodpoError: The file or a row is malformed, an id is repeated, or no dialogue is of the train split.
    """

    def record(row: Row) -> tuple[object, ...]:
        if row["split"] not in {"train", "valid"}:
            raise _FaultError(f"split is '{row['split']}'; write train (to be answered and ranked) or valid")
        _check_turns(row["context"])
        reference = row.get("reference", "").removeprefix("User2: ").strip() or None
        return row["dialogue_id"], row["split"], path.stem, _personas(row["personas"]), row["context"], reference

    table = pd.DataFrame(_records(path, DIALOGUES, DIALOGUES[:1], record), columns=COLUMNS)
    if not table["split"].eq("train").any():
        raise PersodpoError(
            f"{path} has no dialogue of the train split, so nothing is ranked; write train as its split."
        )
    return table


def read_responses(path: Path, dialogues: pd.DataFrame, reading: Literal["as_released", "strict"]) -> pd.DataFrame:
    """Read a CSV file with the columns `RESPONSES`; a column ``response`` in place of ``completion`` holds plain answers.

    Returns:
        A responses table, sorted by dialogue; response times and finish reasons are None.

    Raises:
        PersodpoError: The file or a row is malformed, a model answers a dialogue twice, a dialogue is unknown or held out,
            or no completion holds an answer.
    """
    _, names = next(_lines(path), (1, []))
    text = "response" if "response" in names and "completion" not in names else "completion"
    splits = dict(zip(dialogues["dialogue_id"], dialogues["split"], strict=True))

    def record(row: Row) -> tuple[str, str, str]:
        dialogue = row["dialogue_id"]
        if dialogue not in splits:
            raise _FaultError(f"there is no dialogue '{dialogue}'; add it to the dialogues or remove the line")
        if splits[dialogue] != "train":
            raise _FaultError(f"dialogue '{dialogue}' is held out (split {splits[dialogue]}), for trained policies alone; "
                              "remove the line or make it a train dialogue")  # fmt: skip
        return dialogue, row["model"], row[text]

    columns = (*RESPONSES[:2], text)
    table = pd.DataFrame(_records(path, columns, columns[:2], record), columns=RESPONSES)
    if text == "response":
        completions = [write_completion(answer) for answer in table["completion"]]
        table = table.assign(response=table["completion"], outcome="ok", completion=completions)
    else:
        table = read_completions(table, reading)
    if not table["outcome"].eq("ok").any():
        raise PersodpoError(f'{path}: no completion holds its answer as {{"response": "..."}}; if these are plain answers, '
                            "name the column response instead of completion.")  # fmt: skip
    unknown = dict.fromkeys(("finish_reason", "response_time", "batch_size", "hardware"))
    return table.assign(split="train", **unknown).sort_values("dialogue_id", kind="stable", ignore_index=True)


def _check_turns(context: str) -> None:
    """Check that every turn names its speaker as in `SPEAKERS`, and that the last one is User1's."""
    lines = context.splitlines()
    turns = [line for number, line in enumerate(lines) if number == 0 or _SPEAKER.match(line)]
    if unlike := [turn for turn in turns if not turn.startswith(SPEAKERS)]:
        raise _FaultError(f"a turn of context begins with '{unlike[0][:30]}'; begin each with 'User1: ' or 'User2: '")
    if not turns[-1].startswith(SPEAKERS[0]):
        raise _FaultError("the last turn of context is User2's, whose answer is asked for; end with a turn of User1")


def _personas(text: str) -> list[str]:
    """Read a JSON list of sentences, or one sentence per line."""
    if not text.startswith("["):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        sentences = json.loads(text)
    except (ValueError, RecursionError):
        sentences = None
    if not (isinstance(sentences, list) and sentences and all(isinstance(s, str) and s.strip() for s in sentences)):
        raise _FaultError('personas are no JSON list of sentences; write ["I like art.", "I have a dog."] (inside a quoted '
                          "field with each double quote doubled), or one sentence per line")  # fmt: skip
    return [without_surrogates(sentence.strip()) for sentence in sentences]


def _records(path: Path, needed: Sequence[str], key: Sequence[str], record: Callable[[Row], Any]) -> list[Any]:
    """Return what ``record`` makes of each row; no two rows agree in ``key``, and only a completion may be empty."""
    rows = _lines(path)
    _, names = next(rows, (1, []))
    if odd := [name for name in needed if names.count(name) != 1]:
        raise PersodpoError(f"{path}, line 1: column {', '.join(odd)} must be there once, not {', '.join(names)}; name "
                            f"{', '.join(needed)} in the first line, separated by commas.")  # fmt: skip
    lines: dict[tuple[str, ...], int] = {}
    records = []
    for line, values in rows:
        try:
            if len(values) != len(names):
                raise _FaultError(f"{len(values)} fields for {len(names)} columns; put double quotes around texts that hold "
                                  "commas or line ends")  # fmt: skip
            row = dict(zip(names, values, strict=True))
            # What a model wrote stays as it is.
            row |= {name: row[name].replace("\r\n", "\n").strip() for name in row.keys() - {"completion", "response"}}
            if empty := [name for name in needed if name != "completion" and not row[name].strip()]:
                raise _FaultError(f"{empty[0]} is empty; fill it in or remove the line")
            if (identity := tuple(row[name] for name in key)) in lines:
                raise _FaultError(f"{', '.join(identity)} is in line {lines[identity]} already; keep one of the two")
            records.append(record(row))
        except _FaultError as fault:
            raise PersodpoError(f"{path}, line {line}: {fault}.") from None
        lines[identity] = line
    if not records:
        raise PersodpoError(f"{path} has no row below its column names; add one.")
    return records


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield each row, the column names first, with the line that it begins in."""
    csv.field_size_limit(2**31 - 1)  # a text may be long
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte order mark
            reader = csv.reader(file, strict=True)
            for values in reader:
                if values:
                    yield line, [name.strip() for name in values] if line == 1 else values
                line = reader.line_num + 1
    except OSError as error:
        raise PersodpoError(f"{path} cannot be read ({error.strerror}); name a CSV file that is there.") from error
    except UnicodeDecodeError as error:
        raise PersodpoError(f"{path}, line {line} or after: not UTF-8; save the file as CSV in UTF-8.") from error
    except csv.Error as error:
        raise PersodpoError(f"{path}, line {line}: {error}; put each text between double quotes, and double those "
                            "within.") from error  # fmt: skip
