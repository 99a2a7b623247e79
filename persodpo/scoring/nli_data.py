"""Files of labelled examples in, examples out: SNLI, SICK, Dialogue NLI, plain JSONL, and questions of coherence.

Formats are those that the data sets are published in. Rows without a label, such as SNLI's without a majority, are
skipped and counted; anything else that does not fit is an error that names the file and the row.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from persodpo.errors import PersodpoError
from persodpo.scoring.coherence import NO, YES
from persodpo.scoring.nli_model import CLASSES, SPELLINGS

Format = Literal["snli", "sick", "dialogue_nli", "jsonl", "coherence"]

#: Fields of premise, hypothesis and label in each format; for coherence those of response, context and answer.
FIELDS: dict[Format, tuple[str, str, str]] = {
    "snli": ("sentence1", "sentence2", "gold_label"),  # Bowman et al. 2015, one JSON object a line
    "sick": ("sentence_A", "sentence_B", "entailment_judgment"),  # Marelli et al. 2014, tab separated with a header
    "dialogue_nli": ("sentence1", "sentence2", "label"),  # Welleck et al. 2019, one JSON list, whatever the file's name
    "jsonl": ("premise", "hypothesis", "label"),
    "coherence": ("response", "context", "label"),
}
#: SICK's later edition calls its label so.
_SICK_LABELS = ("entailment_judgment", "entailment_label")
#: What stands for the lack of a label.
_UNLABELLED = ("", "-")
_ANSWERS = {"yes": YES, "no": NO}


@dataclass(frozen=True)
class Examples:
    """Labelled examples.

    Attributes:
        inputs: Premise and hypothesis, or response and context.
        labels: One of `persodpo.scoring.nli_model.CLASSES`, or Yes or No.
        skipped: Rows that had no label.
    """

    inputs: tuple[tuple[str, str], ...]
    labels: tuple[str, ...]
    skipped: int = 0

    def __len__(self) -> int:
        """Return the number of labelled examples."""
        return len(self.inputs)


def read_examples(paths: Sequence[Path], kind: str, fields: tuple[str, str, str] | None = None) -> Examples:
    """Read files of one format.

    Args:
        paths: The files.
        kind: Their format.
        fields: Names of the fields, where they are not those of `FIELDS`; for ``jsonl`` and ``coherence``.

    Returns:
        The examples in their order.

    Raises:
        PersodpoError: A file cannot be read or is of another format, a row lacks a field or has an unknown label, or there
            is no labelled row; the message names the file and the row.
    """
    named = next((known for known in FIELDS if known == kind), None)
    if named is None:
        raise PersodpoError(f"There is no format '{kind}'; there are {', '.join(FIELDS)}.")
    names = fields or FIELDS[named]
    known: Mapping[str, str] = _ANSWERS if named == "coherence" else SPELLINGS
    inputs, labels, skipped = [], [], 0
    for path in paths:
        for place, row in _rows(path, named):
            first, second, label = _values(row, names, named, f"{path}, {place}")
            if label.lower() in _UNLABELLED:
                skipped += 1
            elif label.lower() in known:
                inputs.append((first, second))
                labels.append(known[label.lower()])
            else:
                allowed = (YES, NO) if kind == "coherence" else CLASSES
                raise PersodpoError(
                    f"{path}, {place}: label '{label}' is none of {', '.join(allowed)}; correct the row."
                )
    if not inputs:
        raise PersodpoError(f"{', '.join(map(str, paths))}: no row has a label, so there is nothing to learn from.")
    return Examples(tuple(inputs), tuple(labels), skipped)


def split(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Hold out examples; all that share a premise (or, asked about coherence, a context) stay together.

    Args:
        examples: All of them.
        share: Share of the groups to hold out, above 0 and below 1; at least one is.
        seed: Which.

    Returns:
        The examples to learn from, which keep the count of skipped rows, and the held-out ones.

    Raises:
        PersodpoError: There are fewer than two groups.
    """
    group = [
        given[1] if label in (YES, NO) else given[0]
        for given, label in zip(examples.inputs, examples.labels, strict=True)
    ]
    names = list(dict.fromkeys(group))
    if len(names) < 2:
        raise PersodpoError(
            "All examples share their premise or context, so none can be held out; name a held-out file."
        )
    random.Random(seed).shuffle(names)  # noqa: S311 - repeatable, not secret
    out = set(names[: min(len(names) - 1, max(1, round(share * len(names))))])
    chosen = [name in out for name in group]
    return _take(examples, [not c for c in chosen], examples.skipped), _take(examples, chosen, 0)


def _take(examples: Examples, chosen: Sequence[bool], skipped: int) -> Examples:
    kept = [n for n, take in enumerate(chosen) if take]
    return Examples(tuple(examples.inputs[n] for n in kept), tuple(examples.labels[n] for n in kept), skipped)


def _rows(path: Path, kind: Format) -> Iterator[tuple[str, Any]]:
    """Yield the place and the content of each row."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PersodpoError(
            f"{path} cannot be read as text ({type(error).__name__}); name a file of examples."
        ) from error
    if kind == "sick":
        reader = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
        yield from ((f"line {n}", row) for n, row in enumerate(reader, start=2))
    elif kind == "dialogue_nli" or text.lstrip().startswith("["):
        yield from ((f"entry {n}", row) for n, row in enumerate(_json_list(path, text), start=1))
    else:
        lines = ((n, line) for n, line in enumerate(text.splitlines(), start=1) if line.strip())
        for n, line in lines:
            yield f"line {n}", _json(path, f"line {n}", line)


def _json(path: Path, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise PersodpoError(f"{path}, {place} is not JSON ({error}); the file may be cut off.") from error


def _json_list(path: Path, text: str) -> Iterable[Any]:
    found = _json(path, "the whole file", text)
    if not isinstance(found, list):
        raise PersodpoError(f"{path} must hold one JSON list of objects with {', '.join(FIELDS['dialogue_nli'])}.")
    return found


def _values(row: Any, names: Sequence[str], kind: Format, place: str) -> tuple[str, str, str]:
    """Return the two texts and the label of a row."""
    if kind == "sick" and isinstance(row, dict):
        own = next((name for name in _SICK_LABELS if name in row), names[2])
        names = (*names[:2], own)
    found = [row.get(name) if isinstance(row, dict) else None for name in names]
    missing = [name for name, value in zip(names, found, strict=True) if not isinstance(value, str)]
    if missing:
        raise PersodpoError(f"{place} has no text under {', '.join(missing)}; format {kind} needs {', '.join(names)}.")
    first, second, label = (str(value).strip() for value in found)
    return first, second, label
