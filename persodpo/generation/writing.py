"""Entries on their way to the store, while the loop goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from persodpo.errors import PersodpoError
from persodpo.generation.store import Entry, Store

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Run a call that blocks on the disk in a thread, and to its end even when the run is interrupted.

    Args:
        function: The call; what it raises is raised here.
        arguments: Its arguments.

    Returns:
        What it returns.
    """
    task = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


class Writer:
    """Writes entries to the store; those that wait while others are written are written together."""

    def __init__(self, store: Store) -> None:
        """Write to ``store``."""
        self._store = store
        self._waiting: list[Entry] = []
        self._lock = asyncio.Lock()
        self._error: Exception | None = None

    async def write(self, entry: Entry) -> None:
        """Return when ``entry`` is on the disk; raises what the store raises."""
        self._waiting.append(entry)
        async with self._lock:
            batch, self._waiting = self._waiting, []
            if self._error is None and batch:
                try:
                    await in_thread(self._store.write, batch)
                except PersodpoError as error:
                    # Those whose entries were in this batch wait for the lock; they must learn of it too.
                    self._error = error
            if self._error is not None:
                raise self._error

    def write_rest(self) -> None:
        """Write what still waits, when the run was interrupted."""
        if self._waiting and self._error is None:
            self._store.write(self._waiting)
