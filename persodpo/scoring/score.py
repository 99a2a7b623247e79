"""Responses and scorers in, one value each out: every distinct text once, from the cache where it was scored before.

Scores are kept in one SQLite file under the scorer's name, key, code and texts, so that another checkpoint, setting or code
never answers for this one. What is not there is scored in batches of like length, here or on a Ray cluster, and each batch
is written before the next is asked for: a run that is killed loses at most the batch under way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import pandas as pd

from persodpo.completions import count_words
from persodpo.errors import PersodpoError
from persodpo.files import digest_of
from persodpo.imports import code_of
from persodpo.progress import bar
from persodpo.sqlite import Content, connect, transaction

#: Texts scored, and written to the cache, together.
BATCH = 256
_CONTENT = Content(
    "cached scores",
    "delete the file, they will be computed again",
    application=0x50445343,  # "PDSC"
    version=2,
    schema="CREATE TABLE scores (key BLOB PRIMARY KEY, value REAL NOT NULL, unread REAL NOT NULL) WITHOUT ROWID",
)
Value = TypeVar("Value", bound=Hashable)
#: How persona and response are asked about: as the authors' code does, or mended.
Way = Literal["as_released", "corrected"]
#: Length of the word sequences whose return counts as repetition.
REPEATED = 4


class Item(NamedTuple):
    """A response and what it answers: a person, the turns so far (``User1: ...``, one a line), and the gold answer."""

    personas: tuple[str, ...]
    context: str
    reference: str
    response: str


class Scored(NamedTuple):
    """A finite number for each item, and the share of it that was not read, 0..1: cut tokens, unknown words; [items]."""

    values: np.ndarray
    unread: np.ndarray


class Scorer(Protocol):
    """One signal. A score depends on its item alone, not on order, batch or padding, to 1e-5."""

    @property
    def name(self) -> str:
        """Column of the scores table."""

    @property
    def key(self) -> str:
        """Digest of all that shapes a score besides texts and code: checkpoint, settings, number type."""

    def score(self, items: Sequence[Item]) -> Scored:
        """Score items; a model is loaded on first use."""


#: Scores batches in any order and yields each one's number and scores.
Engine = Callable[[Scorer, Sequence[Sequence[Item]]], Iterable[tuple[int, Scored]]]


def one_by_one(scorer: Scorer, batches: Sequence[Sequence[Item]]) -> Iterator[tuple[int, Scored]]:
    """Score batches one after another in this process."""
    return ((number, scorer.score(batch)) for number, batch in enumerate(batches))


def distinct(values: Sequence[Value]) -> tuple[list[Value], np.ndarray]:
    """Return the different values in the order of their first, and the place of each value among them, [values]."""
    place = {value: row for row, value in enumerate(dict.fromkeys(values))}
    return list(place), np.array([place[value] for value in values], dtype=int)


def fingerprint(scorer: Scorer) -> str:
    """Return the digest of all that shapes a scorer's values, the source that it runs included."""
    code = code_of(type(scorer).__module__, "persodpo.scoring")
    return digest_of({"name": scorer.name, "key": scorer.key, "code": code})


class _RayWorker:
    def __init__(self, make: Callable[[str], Scorer], name: str, expected: str) -> None:
        self.scorer = make(name)
        if fingerprint(self.scorer) != expected:
            raise PersodpoError(f"A Ray worker has other files, packages or number types for scorer {name}.")

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        items = [Item(tuple(personas), *texts) for personas, *texts in json.loads(rows["batch"][0])]
        values, unread = self.scorer.score(items)
        return {"number": [rows["number"][0]], "values": [values.tolist()], "unread": [unread.tolist()]}


def ray_engine(make: Callable[[str], Scorer], workers: int) -> Engine:
    """Return an engine that scores on the Ray cluster that RAY_ADDRESS names, else on one that is started here.

    Args:
        make: Makes a scorer by its name, in a worker and from its disk; a function of a module, or a partial of one.
        workers: How many scorers run at once; GPUs of the cluster are shared among them.
    """
    try:
        import ray.data  # noqa: PLC0415 - optional, and slow to load
    except ImportError as error:
        raise PersodpoError(
            "Ray is not installed; pip install 'persodpo[ray]', or set scoring.ray_workers=null."
        ) from error

    def engine(scorer: Scorer, batches: Sequence[Sequence[Item]]) -> Iterator[tuple[int, Scored]]:
        rows = [{"number": number, "batch": json.dumps(batch)} for number, batch in enumerate(batches)]
        if not rows:
            return
        ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0) / workers)
        scored = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _RayWorker, fn_constructor_args=(make, scorer.name, fingerprint(scorer)), batch_size=1, num_gpus=gpus or None,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows))),
        )  # fmt: skip
        try:
            for row in scored.iter_rows():
                yield int(row["number"]), Scored(np.array(row["values"]), np.array(row["unread"]))
        except ray.exceptions.RayError as error:
            raise PersodpoError(
                f"A Ray worker of scorer {scorer.name} failed ({error}); look at Ray's logs."
            ) from error

    return engine


class ScoreCache:
    """The scores of all scorers, in one file; several processes may use it at once."""

    def __init__(self, path: Path, wait_seconds: float = 30.0) -> None:
        """Open a cache, or make one, and wait for another process that is writing."""
        self.path = path
        # Scores outlive a killed process; those of the last moments before a power cut are computed again.
        self._connection = connect(path, wait_seconds, _CONTENT, synchronous="NORMAL")

    def __enter__(self) -> Self:
        """Return the open cache."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self._connection.close()

    def find(self, keys: Sequence[bytes]) -> dict[bytes, tuple[float, float]]:
        """Return value and unread share of those keys that are stored."""
        query = "SELECT value, unread FROM scores WHERE key = ?"
        with _CONTENT.faults(self.path):
            rows = {key: self._connection.execute(query, (key,)).fetchone() for key in keys}
        return {key: row for key, row in rows.items() if row}

    def store(self, keys: Sequence[bytes], scored: Scored) -> None:
        """Write a batch in one transaction; when this returns, its scores outlive the process."""
        rows = zip(keys, map(float, scored.values), map(float, scored.unread), strict=True)
        with _CONTENT.faults(self.path), transaction(self._connection):
            self._connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", sorted(rows))


class Tally(NamedTuple):
    """What a scorer saw: ``scored`` are the distinct items that were not in the cache, ``unread`` is a mean share."""

    scorer: str
    responses: int
    distinct: int
    scored: int
    unread: float
    seconds: float

    def __str__(self) -> str:
        """Return one line for logs and notebooks."""
        return (
            f"{self.scorer}: {self.responses:,} responses, {self.distinct:,} distinct texts, "
            f"{self.distinct - self.scored:,} from the cache, {self.unread:.1%} of a text unread, {self.seconds:.1f} s"
        )


def item_key(scorer: str, item: Item) -> bytes:
    """Return the sha256 of a scorer's fingerprint and an item; texts with other bounds give another one."""
    return bytes.fromhex(digest_of({"scorer": scorer, "item": item}))


def score_items(
    scorer: Scorer, items: Sequence[Item], cache: ScoreCache, engine: Engine = one_by_one
) -> tuple[np.ndarray, Tally]:
    """Return a score of each item, float64, and what the scorer saw; batches before an error stay in the cache."""
    started, name = time.perf_counter(), fingerprint(scorer)
    keys = [item_key(name, item) for item in items]
    by_key = dict(zip(keys, items, strict=True))
    scored_by_key = cache.find(list(by_key))
    missing = sorted((key for key in by_key if key not in scored_by_key), key=lambda key: -len(by_key[key].response))
    batches = [missing[start : start + BATCH] for start in range(0, len(missing), BATCH)]
    batches_of_items = [[by_key[key] for key in batch] for batch in batches]
    with bar(what=scorer.name, total=len(missing), unit=" texts") as progress:
        for number, scored in engine(scorer, batches_of_items):
            _check(scorer.name, batches_of_items[number], scored)
            cache.store(batches[number], scored)
            scored_by_key.update(zip(batches[number], np.column_stack(scored).tolist(), strict=True))
            progress.update(len(batches[number]))
    if missing_count := len(by_key) - len(scored_by_key):
        raise PersodpoError(f"Scorer {scorer.name} gave no score to {missing_count} texts; run again.")
    values = np.array([scored_by_key[key][0] for key in keys], dtype=float)
    unread = float(np.mean([share for _, share in scored_by_key.values()])) if scored_by_key else 0.0
    return values, Tally(scorer.name, len(items), len(by_key), len(missing), unread, time.perf_counter() - started)


def _check(name: str, items: Sequence[Item], scored: Scored) -> None:
    """Refuse what is no score."""
    if any(np.shape(part) != (len(items),) for part in scored):
        raise PersodpoError(
            f"Scorer {name} gave values of another shape for {len(items)} texts; it must give one a text."
        )
    broken = np.flatnonzero(~np.isfinite(np.asarray(scored.values, dtype=float)))
    if len(broken):
        raise PersodpoError(
            f"Scorer {name} gave {len(broken)} scores that are not finite, the first to the response "
            f"{items[broken[0]].response[:60]!r}; check its model, scores that were finished before are kept."
        )


def readable(responses: pd.DataFrame, dialogues: pd.DataFrame) -> tuple[pd.DataFrame, list[Item]]:
    """Return the responses that could be read (dialogue_id, model, parsed), and the item of each."""
    there = responses["outcome"].eq("ok") & responses["response"].notna()
    table = responses.loc[there, ["dialogue_id", "model", "response"]].rename(columns={"response": "parsed"})
    if unknown := set(table["dialogue_id"]) - set(dialogues["dialogue_id"]):
        raise PersodpoError(
            f"Response to dialogue {min(unknown)}: there is no such dialogue; make both tables again with "
            "`persodpo generate`."
        )
    both = table.merge(dialogues[["dialogue_id", "personas", "context", "reference"]], on="dialogue_id", how="left")
    rows = both[["personas", "context", "reference", "parsed"]].itertuples(index=False)
    items = [Item(tuple(personas), context or "", reference or "", text) for personas, context, reference, text in rows]
    return table.reset_index(drop=True), items


def computed_metrics(
    responses: pd.DataFrame,
    dialogues: pd.DataFrame,
    scorers: Sequence[Scorer],
    cache: ScoreCache,
    engine: Engine = one_by_one,
) -> tuple[pd.DataFrame, pd.DataFrame, list[Tally]]:
    """Score the readable responses of a table; what failed ones are given is decided by `persodpo.pairs.impute`.

    Returns:
        Columns dialogue_id, model, parsed and one for each scorer; what there is to report, columns scorer, quantity and
        value; and each scorer's tally.
    """
    metrics, items = readable(responses, dialogues)
    rows, tallies = [], []
    for scorer in scorers:
        metrics[scorer.name], tally = score_items(scorer, items, cache, engine)
        tallies.append(tally)
        quantities = {
            "responses": len(items), "not_read": len(responses) - len(items),
            "without_text": responses["response"].isna().sum(),
            "empty_personas": sum(not "".join(item.personas).strip() for item in items),
            "distinct_texts": tally.distinct, "unread": tally.unread,
        }  # fmt: skip
        rows += [(scorer.name, quantity, float(value)) for quantity, value in quantities.items()]
    return metrics, pd.DataFrame(rows, columns=["scorer", "quantity", "value"]), tallies


def distinct_share(text: str, size: int) -> float:
    """Return distinct-n of one text: different n-grams over all n-grams, 0..1 (Li et al. 2016); NaN without any."""
    words = text.lower().split()
    grams = list(zip(*(words[start:] for start in range(size)), strict=False))
    return len(set(grams)) / len(grams) if grams else float("nan")


def extras_table(responses: pd.DataFrame, dialogues: pd.DataFrame) -> pd.DataFrame:
    """Measure every response that has a text, recovered failures included, for what is shown beside the quality score.

    Nothing here knows what a good answer is: a reference is one answer of many, and variety grows as texts get shorter.

    Returns:
        One row a response, in their order: dialogue_id, model; rouge_l, the F-measure of the longest common subsequence of
        words with the reference (Lin 2004), 0..1, without stemming; distinct_1 and distinct_2; repetition, the share of
        4-grams that stood in the response before (seq-rep-4, Welleck et al. 2020), 0 if it has none; and words. NaN where
        there is no text, and words 0.
    """
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415 - loads nltk

    rouge = RougeScorer(["rougeL"], use_stemmer=False)
    references = dialogues.set_index("dialogue_id")["reference"]
    rows = []
    for dialogue_id, model, text in responses[["dialogue_id", "model", "response"]].itertuples(index=False):
        reference, there = references.get(dialogue_id), isinstance(text, str)
        row = {"dialogue_id": dialogue_id, "model": model, "words": count_words(text) if there else 0}
        if there and isinstance(reference, str):
            row["rouge_l"] = float(rouge.score(reference, text)["rougeL"].fmeasure)
            row |= {f"distinct_{size}": distinct_share(text, size) for size in (1, 2)}
            row["repetition"] = 1.0 - distinct_share(text, REPEATED) if row["words"] >= REPEATED else 0.0
        rows.append(row)
    columns = ["dialogue_id", "model", "rouge_l", "distinct_1", "distinct_2", "repetition", "words"]
    return pd.DataFrame(rows, columns=columns)
