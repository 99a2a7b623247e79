"""FoCus files in, dialogues table out.

A dialogue is five or so persona sentences about User1, the turns so far (one a line, led by ``User1: `` or ``User2: ``)
and the reference: the turn of User2 that people wrote next, without its speaker.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from persodpo.errors import PersodpoError
from persodpo.files import without_surrogates

COLUMNS = ["dialogue_id", "split", "dataset", "personas", "context", "reference"]
SPEAKERS = ("User1: ", "User2: ")
FOCUS_SENTENCES = 5

Split = Literal["train", "valid"]

# A sentence ends at its mark when text follows at once; not inside U.S.A. or S.p.A. (single letters), nor in a quote.
_SENTENCE_END = re.compile(r"(?<=[.!?])(?=[^\s.!?\"')])(?!(?<=\b[A-Za-z]\.)[A-Za-z]\.)(?!(?<=\b[A-Z]\.)[A-HJ-Z]\b)")
# Where an author typed a comma or nothing: "...history,I enjoy", "...interestingI live". Used only to reach five.
_MISSED_END = re.compile(r"(?<=[^\sA-Z])(?=I(?:m|ve|d)? )")


def split_personas(joined: str, expected: int | None = None) -> list[str]:
    """Split persona sentences that were joined without a space, as in ``"I love art.I have a dog."``.

    Ends that the author left unmarked are looked for only if fewer sentences than ``expected`` were found. Joined again
    the sentences give ``joined``.
    """
    sentences = [s for s in _SENTENCE_END.split(joined) if s]
    if expected and len(sentences) < expected:
        sentences = [part for s in sentences for part in _MISSED_END.split(s) if part]
    return sentences


def published_focus(path: Path, split: Split) -> pd.DataFrame:
    """Read published FoCus prompts, ``Prompts/FoCus-train.csv`` or ``Prompts/FoCus-valid.csv`` of the release.

    The files' sha256 is checked where they are fetched. The row number becomes the dialogue's id.
    """
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    return pd.DataFrame({
        "dialogue_id": [f"focus-{split}-{row:04d}" for row in range(len(frame))],
        "split": split,
        "dataset": "FoCus",
        "personas": [split_personas(joined, FOCUS_SENTENCES) for joined in frame["personas"]],
        "context": frame["context"],
        "reference": frame["act_response"].str.removeprefix(SPEAKERS[1]),
    })  # fmt: skip


def focus_json(
    path: Path,
    split: Split,
    *,
    size: int | None = None,
    seed: int = 0,
    max_reference_words: int | None = None,
) -> pd.DataFrame:
    r"""Read FoCus's own JSON (``data[]`` with ``dialogID``, ``persona``, ``utterance[]``) as the authors prepared it.

    A dialogue's turns are the list under the last ``dialogueN`` of its last ``utterance``; the last turn is the
    reference. ``**``, ``\r`` and ``'`` are removed everywhere.

    Args:
        path: The file.
        split: Its split.
        size: Draw so many dialogues with pandas' ``sample``; None keeps all, in the file's order.
        seed: ``random_state`` of that draw.
        max_reference_words: Leave out dialogues whose reference has more words, before drawing; None keeps all.

    Raises:
        PersodpoError: The file is not FoCus JSON (the message names the dialogue), two dialogues share an id, or fewer
            than ``size`` are left.
    """
    try:
        data = [*json.loads(path.read_text(encoding="utf-8"))["data"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PersodpoError(f"{path} is not FoCus JSON with a list under 'data': {error}.") from error
    frame = pd.DataFrame([_focus_dialogue(item, n, path, split) for n, item in enumerate(data)], columns=COLUMNS)
    twice = frame["dialogue_id"][frame["dialogue_id"].duplicated()].tolist()
    if twice:
        raise PersodpoError(f"{path}: dialogID '{twice[0]}' stands twice; ids must be unique.")
    if max_reference_words is not None:
        frame = frame[frame["reference"].map(lambda text: len(text.split())) <= max_reference_words]
    if size is not None:
        if len(frame) < size:
            raise PersodpoError(f"{path} has {len(frame)} usable dialogues, {size} are to be drawn; lower train_size.")
        frame = frame.sample(n=size, random_state=seed)
    return frame.reset_index(drop=True)


def _focus_dialogue(item: Any, number: int, path: Path, split: Split) -> dict[str, Any]:
    """Turn one entry of FoCus's ``data`` into a row."""
    try:
        dialogue_id, sentences, last = str(item["dialogID"]), item["persona"], item["utterance"][-1]
        turns = last[max((k for k in last if re.fullmatch(r"dialogue\d+", k)), key=lambda k: int(k[8:]))]
        personas = [clean(sentence) for sentence in sentences]
        spoken = [clean(turn) for turn in turns]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise PersodpoError(f"{path}: dialogue number {number + 1} is not FoCus's shape ({error!r}).") from error
    if len(spoken) < len(SPEAKERS) or not personas:
        raise PersodpoError(f"{path}: dialogue '{dialogue_id}' needs a persona, a query and an answer.")
    lines = [SPEAKERS[place % 2] + turn for place, turn in enumerate(spoken[:-1])]
    values = [dialogue_id, split, "FoCus", personas, "\n".join(lines), spoken[-1]]
    return dict(zip(COLUMNS, values, strict=True))


def clean(text: str) -> str:
    r"""Remove the markers ``**``, ``\r`` and ``'``, as the authors did."""
    return without_surrogates(text.replace("**", "").replace("\r", "").replace("'", ""))


def overlaps(train: pd.DataFrame, held_out: pd.DataFrame) -> pd.Series[bool]:
    """Mark train dialogues whose context, or whose whole set of personas, stands in the held-out dialogues."""
    personas = set(held_out["personas"].map(tuple))
    return train["context"].isin(held_out["context"]) | train["personas"].map(lambda p: tuple(p) in personas)
