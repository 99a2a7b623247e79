"""Batches under way at an endpoint, kept in mind in the store: a killed run finds them again and pays for none twice."""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field

from persodpo.generation.store import Store


@dataclass
class Batch:
    """One batch.

    Attributes:
        tag: Our own name for it, sent with it as metadata and written down before it is sent.
        batch_id: The endpoint's name; None if the process died before it was told.
        since: When it was written down, seconds since 1970.
        keys: The keys of its requests.
    """

    tag: str
    batch_id: str | None
    since: float
    keys: set[str] = field(default_factory=set)


class Batches:
    """The batches of one model at one address."""

    def __init__(self, store: Store, model: str, address: str) -> None:
        """Read and write the batches of ``model`` at ``address`` in ``store``."""
        self._store = store
        self._model = model
        self._address = address

    def begin(self, keys: Collection[str]) -> Batch:
        """Write down a batch that is about to be sent."""
        batch = Batch(uuid.uuid4().hex, None, time.time(), set(keys))
        with self._store.exclusive() as connection:
            row = (batch.tag, self._model, self._address, None, batch.since)
            connection.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?)", row)
            connection.executemany("INSERT INTO batch_keys VALUES (?, ?)", [(batch.tag, key) for key in batch.keys])
        return batch

    def sent(self, batch: Batch, batch_id: str) -> None:
        """Write down the endpoint's name of a batch."""
        batch.batch_id = batch_id
        with self._store.exclusive() as connection:
            connection.execute("UPDATE batches SET batch_id = ? WHERE tag = ?", (batch_id, batch.tag))

    def forget(self, batch: Batch) -> None:
        """Remove a batch that never reached the endpoint, or ended there without answers."""
        with self._store.exclusive() as connection:
            for table in ("batch_keys", "batches"):
                connection.execute(f"DELETE FROM {table} WHERE tag = ?", (batch.tag,))

    def open(self) -> list[Batch]:
        """Return the batches with requests that are not stored yet, the oldest first, and forget the others."""
        done = "tag NOT IN (SELECT tag FROM batch_keys WHERE key NOT IN (SELECT key FROM answers))"
        with self._store.exclusive() as connection:
            for table in ("batches", "batch_keys"):
                connection.execute(f"DELETE FROM {table} WHERE {done}")
            query = "SELECT tag, batch_id, since FROM batches WHERE model = ? AND address = ? ORDER BY since, tag"
            found = [Batch(*row) for row in connection.execute(query, (self._model, self._address))]
            for batch in found:
                rows = connection.execute("SELECT key FROM batch_keys WHERE tag = ?", (batch.tag,))
                batch.keys = {key for (key,) in rows}
        return found
