"""A user's own dialogues and completions: two CSV files in, a dialogues table and a responses table out.

Files are UTF-8, separated by commas, with a first row of column names; further columns are ignored. Every fault is one
sentence that names the file, the line (of a text editor) and the remedy.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pandas as pd

from persodpo.completions import read_completions, write_completion
from persodpo.dialogues import COLUMNS, SPEAKERS
from persodpo.errors import PersodpoError

DIALOGUES = ("dialogue_id", "split", "personas", "context")
RESPONSES = ("dialogue_id", "model", "completion")
TEXTS = ("completion", "response")
SPLITS = ("train", "valid")

Row = dict[str, str]


def read_dialogues(path: Path) -> pd.DataFrame:
    r"""Read own dialogues.

    Args:
        path: A CSV file of the columns `DIALOGUES` and, if there is one, ``reference``. ``split`` is train or valid;
            ``personas`` a JSON list of sentences, or one sentence a line; ``context`` the turns so far, one a line, each
            led by ``User1: `` (whom the personas describe) or ``User2: ``; ``reference`` what people answered.

    Returns:
        A dialogues table in the file's order; a reference that is not there is None.

    Raises:
        PersodpoError: The file or a row is not as above, a dialogue_id stands twice, or no dialogue is of the train split.
    """
    found: list[tuple[object, ...]] = []
    lines: dict[str, int] = {}
    for line, row in _rows(path, DIALOGUES):
        place, key = f"{path}, line {line}", row["dialogue_id"]
        if key in lines:
            raise PersodpoError(
                f"{place}: dialogue '{key}' stands in line {lines[key]} already; give it an id of its own."
            )
        lines[key] = line
        if row["split"] not in SPLITS:
            raise PersodpoError(
                f"{place}: split is '{row['split']}'; write train (to be answered and ranked) or valid."
            )
        personas, reference = (
            _personas(row["personas"], place),
            row.get("reference", "").removeprefix("User2: ").strip(),
        )
        _check_turns(row["context"], place)
        found.append((key, row["split"], path.stem, personas, row["context"], reference or None))
    table = pd.DataFrame(found, columns=COLUMNS)
    if not table["split"].eq("train").any():
        raise PersodpoError(
            f"{path} has no dialogue of the train split to rank answers of; write train in column split."
        )
    return table


def read_responses(path: Path, dialogues: pd.DataFrame, reading: Literal["as_released", "strict"]) -> pd.DataFrame:
    """Read own completions.

    Args:
        path: A CSV file of the columns `RESPONSES`; all of its models are ranked. A completion is the text as the model
            wrote it, which holds its answer as ``{"response": "..."}``. Where a column ``response`` stands in the place
            of ``completion``, its texts are answers that need no reading. A blank completion is an answer that failed.
        dialogues: Dialogues table.
        reading: How completions are read, see `persodpo.completions`.

    Returns:
        A responses table, a dialogue's answers side by side; times and ends of the answers are not known.

    Raises:
        PersodpoError: The file or a row is not as above, a model answers a dialogue twice, a dialogue is unknown or held
            out, or no completion at all holds an answer.
    """
    names = _header(path)
    plain = "response" in names and "completion" not in names
    text = TEXTS[plain]
    splits = dict(zip(dialogues["dialogue_id"], dialogues["split"], strict=True))
    lines: dict[tuple[str, str], int] = {}
    found: list[tuple[str, str, str]] = []
    for line, row in _rows(path, (*RESPONSES[:2], text), blank=() if plain else (text,)):
        place, key = f"{path}, line {line}", (row["dialogue_id"], row["model"])
        if key in lines:
            raise PersodpoError(
                f"{place}: model '{key[1]}' answers dialogue '{key[0]}' in line {lines[key]} already; keep one of the two."
            )
        lines[key] = line
        if key[0] not in splits:
            raise PersodpoError(
                f"{place}: there is no dialogue '{key[0]}'; add it to the dialogues or remove the line."
            )
        if splits[key[0]] != "train":
            raise PersodpoError(
                f"{place}: dialogue '{key[0]}' is held out (split {splits[key[0]]}), where only trained policies answer; "
                "remove the line or make it a train dialogue."
            )
        found.append((*key, row[text]))
    table = pd.DataFrame(found, columns=RESPONSES)
    table = _as_answers(table) if plain else read_completions(table, reading)
    if not table["outcome"].eq("ok").any():
        raise PersodpoError(
            f'{path}: no completion holds its answer as {{"response": "..."}}; if these are plain answers, call the column '
            "response instead of completion."
        )
    unknown = {"split": "train", "finish_reason": None, "response_time": None, "batch_size": None, "hardware": None}
    return table.assign(**unknown).sort_values("dialogue_id", kind="stable", ignore_index=True)


def _as_answers(table: pd.DataFrame) -> pd.DataFrame:
    """Take each text for an answer that was read from a completion of the form asked for."""
    texts = table["completion"]
    written = [write_completion(text) for text in texts]
    return table.assign(completion=written, response=texts, outcome="ok")


def _check_turns(context: str, place: str) -> None:
    """Check that turns are told apart, and that there is one to answer."""
    turns = context.splitlines()
    if not turns[0].startswith(SPEAKERS):
        raise PersodpoError(
            f"{place}: context begins with '{turns[0][:30]}'; lead each turn by 'User1: ' or 'User2: '."
        )
    last = next(turn for turn in reversed(turns) if turn.startswith(SPEAKERS))
    if not last.startswith(SPEAKERS[0]):
        raise PersodpoError(
            f"{place}: the last turn of context is User2's, whose answer is asked for; end it with a turn of User1."
        )


def _personas(text: str, place: str) -> list[str]:
    """Read a JSON list of sentences, or one sentence a line."""
    if not text.lstrip().startswith("["):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        sentences = json.loads(text)
    except ValueError:
        sentences = None
    if not (isinstance(sentences, list) and sentences and all(isinstance(s, str) and s.strip() for s in sentences)):
        raise PersodpoError(
            f'{place}: personas are no JSON list of sentences; write ["I like art.", "I have a dog."] with double quotes '
            "(each doubled inside a quoted CSV field), or one sentence a line."
        )
    return [sentence.strip() for sentence in sentences]


def _header(path: Path) -> list[str]:
    """Return the names of a file's columns."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [name.strip() for name in next(csv.reader(file, strict=True), [])]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, 1, error) from error


def _rows(path: Path, needed: Sequence[str], blank: Sequence[str] = ()) -> Iterator[tuple[int, Row]]:
    """Yield each row by the names of its columns, with the line that it begins in; what is needed may be blank by name."""
    names = _header(path)
    _check_header(path, names, needed)
    filled = [name for name in needed if name not in blank]
    end, empty = 0, True
    try:
        # A byte order mark, as spreadsheets write it, says nothing and is skipped.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for number, values in enumerate(reader):
                line, end = end + 1, reader.line_num
                if number and values:
                    empty = False
                    yield line, _row(f"{path}, line {line}", names, values, filled)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, end + 1, error) from error
    if empty:
        raise PersodpoError(f"{path} has no row under its column names in line 1; add one.")


def _check_header(path: Path, names: Sequence[str], needed: Sequence[str]) -> None:
    missing = [name for name in needed if name not in names]
    if not missing:
        if twice := [name for name in needed if names.count(name) > 1]:
            raise PersodpoError(f"{path}, line 1: column {twice[0]} stands twice; keep one.")
        return
    if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
        mark = "semicolons" if ";" in names[0] else "tabs"
        raise PersodpoError(f"{path}, line 1: columns are separated by {mark}; save the file as CSV with commas.")
    raise PersodpoError(
        f"{path}, line 1: column {', '.join(missing)} is missing, there are {', '.join(names) or 'none'}; the first line "
        f"must name {', '.join(needed)}."
    )


def _row(place: str, names: Sequence[str], values: Sequence[str], needed: Sequence[str]) -> Row:
    """Match a row's values with the columns."""
    if len(values) != len(names):
        raise PersodpoError(
            f"{place}: {len(values)} fields for {len(names)} columns; put double quotes around texts that hold commas or "
            "line ends."
        )
    row = dict(zip(names, values, strict=True))
    if blank := [name for name in needed if not row[name].strip()]:
        raise PersodpoError(f"{place}: {blank[0]} is empty; fill it in or remove the line.")
    # What a model wrote stays as it wrote it.
    return {name: value if name in TEXTS else value.replace("\r\n", "\n").strip() for name, value in row.items()}


def _unreadable(path: Path, line: int, error: Exception) -> PersodpoError:
    """Say why a file cannot be read."""
    if isinstance(error, OSError):
        return PersodpoError(f"{path} cannot be read ({error.strerror}); name a CSV file that is there.")
    if isinstance(error, UnicodeDecodeError):
        return PersodpoError(f"{path}, line {line} or after: this is not UTF-8; save the file as CSV in UTF-8.")
    return PersodpoError(f"{path}, line {line}: {error}; put each text between double quotes, and double those within.")
