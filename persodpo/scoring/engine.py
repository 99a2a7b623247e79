"""Responses and a scorer in, one value a response out: distinct texts only, from the cache where they were scored before.

Work goes by portions, so that memory does not grow with the number of responses. Within a portion the texts that are not
in the cache are sorted by length and scored in batches, and every batch is stored before the next is asked for: a
run that is killed loses at most the batch under way.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from persodpo.errors import PersodpoError
from persodpo.imports import code_of
from persodpo.runfolder import digest_of
from persodpo.scoring.cache import ScoreCache, text_key
from persodpo.scoring.scorers import Item, Scored, Scorer

#: Responses looked at together, and texts scored together.
PORTION = 4096
BATCH = 256

Texts = tuple[str, ...]


class Backend(Protocol):
    """What scores batches.

    Attributes:
        portion: Responses to look at together; enough to be worth a start.
    """

    portion: int

    def __call__(self, scorer: Scorer, batches: Sequence[Sequence[Texts]]) -> Iterator[tuple[int, Scored]]:
        """Yield each batch's number and scores as they come, in any order."""
        ...


class Local:
    """Scores batches one after another in this process."""

    portion = PORTION

    def __call__(self, scorer: Scorer, batches: Sequence[Sequence[Texts]]) -> Iterator[tuple[int, Scored]]:
        """Yield each batch's number and scores."""
        return ((number, scorer.score(batch)) for number, batch in enumerate(batches))


LOCAL = Local()


class Asked(NamedTuple):
    """A response to score.

    Attributes:
        label: What to call it in messages, such as its dialogue and model.
        item: The response and what it answers.
    """

    label: str
    item: Item


@dataclass(frozen=True)
class Tally:
    """What a scorer saw.

    Attributes:
        scorer: Its name.
        responses: Responses that got a value.
        empty_personas: Of these, to dialogues without a persona sentence.
        distinct: Distinct texts among them.
        scored: Of these, scored in this run; the others were in the cache.
        truncated: Inputs that were cut to the model's length, over the distinct texts.
        notes: Further shares, such as out_of_vocabulary; means over the distinct texts.
        seconds: Wall time.
    """

    scorer: str
    responses: int
    empty_personas: int
    distinct: int
    scored: int
    truncated: int
    notes: Mapping[str, float]
    seconds: float

    def __str__(self) -> str:
        """Return one line for logs and notebooks."""
        parts = [
            f"{self.responses:,} responses", f"{self.distinct:,} distinct texts",
            f"{self.distinct - self.scored:,} from the cache", f"{self.truncated:,} inputs cut",
            *(f"{name.replace('_', ' ')} {share:.1%}" for name, share in self.notes.items()),
        ]  # fmt: skip
        parts += [f"{self.empty_personas:,} without a persona"] if self.empty_personas else []
        return f"{self.scorer}: {', '.join(parts)}, {self.seconds:.1f} s"


def fingerprint(scorer: Scorer) -> str:
    """Return the digest of all that shapes a scorer's values: what it says of itself, and the source it runs."""
    code = code_of(type(scorer).__module__, __package__)
    return digest_of({"name": scorer.name, "identity": dict(scorer.identity()), "code": code})


def score_items(
    scorer: Scorer,
    asked: Iterable[Asked],
    store: ScoreCache,
    *,
    backend: Backend = LOCAL,
    portion: int | None = None,
    batch: int | None = None,
    progress: bool = True,
) -> tuple[np.ndarray, Tally]:
    """Score responses.

    Args:
        scorer: The scorer.
        asked: Responses; looked at once, a portion at a time.
        store: Where scores are found and kept.
        backend: What scores the batches.
        portion: Responses looked at together, the backend's own number if None; texts are sorted by length within it.
        batch: Texts handed to the scorer, and written to the cache, together; if None, the scorer's ``batch_texts``, or
            256.
        progress: Show a progress bar, on a terminal.

    Returns:
        One float64 a response, in their order, and what the scorer saw.

    Raises:
        PersodpoError: A score is not finite, the scorer gives another number of values than texts, or the cache fails.
            Batches that were finished before stay in the cache.
    """
    started = time.perf_counter()
    number, last = store.scorer(scorer.name, fingerprint(scorer)), store.begin()
    size: int = getattr(scorer, "batch_texts", BATCH) if batch is None else batch
    values: list[np.ndarray] = []
    empty = 0
    remaining = iter(asked)
    total = len(asked) if isinstance(asked, Sized) else None
    with tqdm(
        total=total, desc=scorer.name, unit=" responses", leave=False, disable=not (progress and sys.stderr.isatty())
    ) as bar:
        while part := list(islice(remaining, portion or backend.portion)):
            values.append(_score_portion(scorer, part, store, number=number, backend=backend, batch=size))
            empty += sum(not one.item.personas for one in part)
            bar.update(len(part))
    told = store.told(number, last)
    found = np.concatenate(values) if values else np.empty(0)
    tally = Tally(
        scorer.name, len(found), empty, told.distinct, told.scored, told.truncated, told.notes,
        time.perf_counter() - started,
    )  # fmt: skip
    return found, tally


def _score_portion(
    scorer: Scorer, part: Sequence[Asked], store: ScoreCache, *, number: int, backend: Backend, batch: int
) -> np.ndarray:
    """Return the values of a portion of responses; what the cache lacks is scored and stored."""
    texts = [scorer.texts(one.item) for one in part]
    keys = [text_key(found) for found in texts]
    distinct = dict(zip(keys, range(len(keys)), strict=True))
    known = store.find(number, list(distinct))
    missing = [place for key, place in distinct.items() if key not in known]
    if len(missing) > batch:
        missing.sort(key=lambda place: sum(map(len, texts[place])), reverse=True)
    batches = [missing[start : start + batch] for start in range(0, len(missing), batch)]
    for which, scored in backend(scorer, [[texts[place] for place in places] for places in batches]):
        places = batches[which]
        _check(scorer, [part[place] for place in places], scored)
        fresh = [keys[place] for place in places]
        store.store(number, fresh, scored)
        known.update(zip(fresh, map(float, scored.values), strict=True))
    lost = [part[distinct[key]].label for key in keys if key not in known]
    if lost:
        raise PersodpoError(f"Scorer {scorer.name} gave no score to {lost[0]} and {len(lost) - 1} more; run again.")
    return np.array([known[key] for key in keys], dtype=np.float64)


def _check(scorer: Scorer, asked: Sequence[Asked], scored: Scored) -> None:
    """Refuse what is no score."""
    if np.shape(scored.values) != (len(asked),):
        raise PersodpoError(
            f"Scorer {scorer.name} gave values of shape {np.shape(scored.values)} for {len(asked)} texts; it must give "
            "one a text."
        )
    broken = np.flatnonzero(~np.isfinite(np.asarray(scored.values, dtype=np.float64)))
    if len(broken):
        raise PersodpoError(
            f"Scorer {scorer.name} gave {len(broken)} scores that are not finite, the first to the text of "
            f"{asked[broken[0]].label}; check its model, scores that were finished before are kept."
        )
