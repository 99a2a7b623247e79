"""Scores in, scores out: one SQLite file that keeps what every scorer has said about every text.

A score is found again by the scorer's name, the digest of all that shapes it (`persodpo.scoring.engine.fingerprint`) and
the sha256 of its texts, so that another checkpoint, setting or code never answers for this one. What was cut or unknown
is known of a batch of texts, not of each, and is kept with the batch. The file holds nothing that cannot be computed
again; it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from persodpo.errors import PersodpoError
from persodpo.scoring.scorers import Scored
from persodpo.sqlite import Sentences, connect, lay_out, transaction

APPLICATION = 0x50445343  # "PDSC", in the file's header, tells the cache from any other SQLite file
VERSION = 1
CHUNK = 500

_SCHEMA = f"""
CREATE TABLE scorers (id INTEGER PRIMARY KEY, name TEXT NOT NULL, fingerprint TEXT NOT NULL, UNIQUE (name, fingerprint));
CREATE TABLE batches (
    id INTEGER PRIMARY KEY AUTOINCREMENT, texts INTEGER NOT NULL, truncated INTEGER NOT NULL, notes TEXT NOT NULL
);
CREATE TABLE scores (
    scorer INTEGER NOT NULL, key BLOB NOT NULL, value REAL NOT NULL, batch INTEGER NOT NULL, PRIMARY KEY (scorer, key)
) WITHOUT ROWID;
CREATE TABLE verdicts (scorer INTEGER NOT NULL, code TEXT NOT NULL, verdicts TEXT NOT NULL, PRIMARY KEY (scorer, code));
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
"""
_FAILING = (
    "The disk holding {path} is full or refuses to write; free some space and run again, scores that were stored are "
    "safe."
)
_SENTENCES = Sentences(
    locked="The cached scores in {path} are locked by another process; wait for it.",
    damaged="The cached scores in {path} are damaged; delete the file, they will be computed again.",
    full=_FAILING,
    refusing=_FAILING,
    closed="{path} cannot be opened for writing; make the file and its folder writable.",
)


class Told(NamedTuple):
    """What was said about the texts of one run.

    Attributes:
        distinct: Distinct texts.
        scored: Of these, scored in this run; the rest were stored before.
        truncated: Inputs that were cut to the model's length.
        notes: Further shares, means over the texts.
    """

    distinct: int
    scored: int
    truncated: int
    notes: dict[str, float]


def text_key(texts: Sequence[str]) -> bytes:
    """Return the sha256 of a text tuple; texts with other bounds give another one."""
    # A lone surrogate is no Unicode text, but a model may write one.
    parts = [text.encode("utf-8", "surrogatepass") for text in texts]
    return hashlib.sha256(b"".join([len(part).to_bytes(8, "little") + part for part in parts])).digest()


class ScoreCache:
    """The scores of all scorers, in one file; several processes may use it at once."""

    def __init__(self, path: Path, wait_seconds: float = 30.0) -> None:
        """Open a cache, or make one where there is none.

        Args:
            path: The file.
            wait_seconds: How long to wait for another process that is writing.

        Raises:
            PersodpoError: The file is damaged, locked, of another program or version, or cannot be made.
        """
        self.path = path
        self._connection = connect(path, wait_seconds, self._prepare, sentences=_SENTENCES)

    def __enter__(self) -> Self:
        """Return the open cache."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self._connection.close()

    def scorer(self, name: str, fingerprint: str) -> int:
        """Return the number under which the scores of a scorer are kept.

        Args:
            name: The scorer's name.
            fingerprint: Digest of all that shapes its scores.
        """
        query = "SELECT id FROM scorers WHERE name = ? AND fingerprint = ?"
        with _SENTENCES.of(self.path):
            row = self._connection.execute(query, (name, fingerprint)).fetchone()
            if row is None:
                with transaction(self._connection):
                    self._connection.execute(
                        "INSERT OR IGNORE INTO scorers (name, fingerprint) VALUES (?, ?)", (name, fingerprint)
                    )
                    row = self._connection.execute(query, (name, fingerprint)).fetchone()
        return int(row[0])

    def begin(self) -> int:
        """Start to count the texts of a run; returns the number of the last batch before it."""
        with _SENTENCES.of(self.path):
            self._connection.execute("DELETE FROM temp.asked")
            return int(self._connection.execute("SELECT coalesce(max(id), 0) FROM batches").fetchone()[0])

    def find(self, scorer: int, keys: Sequence[bytes]) -> dict[bytes, float]:
        """Return the stored scores of ``keys``, and count these keys as asked for in this run."""
        found: dict[bytes, float] = {}
        with _SENTENCES.of(self.path), transaction(self._connection):
            # In the order of the index, which is twice as fast.
            self._connection.executemany("INSERT OR IGNORE INTO temp.asked VALUES (?)", zip(sorted(keys)))
            if self._connection.execute("SELECT 1 FROM scores WHERE scorer = ? LIMIT 1", (scorer,)).fetchone() is None:
                return found
            for start in range(0, len(keys), CHUNK):
                part = keys[start : start + CHUNK]
                marks = ", ".join("?" * len(part))
                query = f"SELECT key, value FROM scores WHERE scorer = ? AND key IN ({marks})"
                found.update(self._connection.execute(query, (scorer, *part)).fetchall())
        return found

    def store(self, scorer: int, keys: Sequence[bytes], scored: Scored) -> None:
        """Write the scores of a batch in one transaction; when this returns they outlive the process.

        Raises:
            PersodpoError: The file is locked or damaged, or the disk is full; nothing of the batch is written then.
        """
        with _SENTENCES.of(self.path), transaction(self._connection):
            notes = json.dumps(dict(scored.notes), sort_keys=True)
            batch = self._connection.execute(
                "INSERT INTO batches (texts, truncated, notes) VALUES (?, ?, ?)", (len(keys), scored.truncated, notes)
            ).lastrowid
            values = np.asarray(scored.values, dtype=np.float64).tolist()
            rows = ((scorer, key, value, batch) for key, value in sorted(zip(keys, values, strict=True)))
            self._connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?)", rows)

    def told(self, scorer: int, last_before: int) -> Told:
        """Sum up the texts asked for since `begin`.

        What was cut is known by batch: where a batch's texts are used in part, they count as its average text.

        Args:
            scorer: From `scorer`.
            last_before: From `begin`.
        """
        query = """
            SELECT batches.id, count(*), batches.texts, batches.truncated, batches.notes
            FROM temp.asked JOIN scores ON scores.scorer = ? AND scores.key = asked.key
            JOIN batches ON batches.id = scores.batch GROUP BY batches.id
        """
        distinct, scored, truncated = 0, 0, 0.0
        sums: dict[str, float] = {}
        weights: dict[str, int] = {}
        with _SENTENCES.of(self.path):
            for batch, used, texts, cut, notes in self._connection.execute(query, (scorer,)):
                distinct += used
                scored += used if batch > last_before else 0
                truncated += cut * used / texts
                for name, share in json.loads(notes).items():
                    sums[name] = sums.get(name, 0.0) + share * used
                    weights[name] = weights.get(name, 0) + used
        return Told(distinct, scored, round(truncated), {name: sums[name] / weights[name] for name in sorted(sums)})

    def verdicts(self, scorer: int, code: str) -> list[dict[str, Any]] | None:
        """Return what the probes found about a scorer; None if they did not run, or were others (``code``)."""
        query = "SELECT verdicts FROM verdicts WHERE scorer = ? AND code = ?"
        with _SENTENCES.of(self.path):
            row = self._connection.execute(query, (scorer, code)).fetchone()
        return json.loads(row[0]) if row else None

    def keep_verdicts(self, scorer: int, code: str, verdicts: Sequence[Mapping[str, Any]]) -> None:
        """Keep what the probes found."""
        with _SENTENCES.of(self.path), transaction(self._connection):
            text = json.dumps([dict(verdict) for verdict in verdicts])
            self._connection.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", (scorer, code, text))

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Check that the file is a cache of this version, and make it one if it is empty."""
        with transaction(connection):
            application, version, tables = lay_out(connection, _SCHEMA)
        if application != APPLICATION or version != VERSION or not tables:
            raise PersodpoError(
                f"{self.path} holds no cached scores of this version of persodpo; move it away, or delete it if it is a "
                "cache: its scores will be computed again."
            )
        connection.execute("PRAGMA journal_mode = WAL")
        # Scores outlive a killed process; those of the last moments before a power cut are computed again.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA temp_store = FILE")
        connection.execute("CREATE TEMP TABLE asked (key BLOB PRIMARY KEY) WITHOUT ROWID")
