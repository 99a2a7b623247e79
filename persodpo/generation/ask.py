"""Requests in, answers in the store out: many at a time, several models side by side, nothing asked twice.

Requests are taken from their iterable as they are needed, so memory does not grow with their number. What the store holds
is skipped; for what is about to be asked, money is set aside in the store first. A request is done when its answer is on the
disk. A model that has to stop (a wrong key, a server that is gone, the budget) says so in its summary, and the others go on.
Endpoints are asked side by side; models of this machine come after them, one at a time, so that their response times are not
those of a busy machine. A model that has nothing to answer is not even loaded.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from persodpo.errors import PersodpoError
from persodpo.generation.requests import Answer, Backend, Job, ModelStopped, Request, request_key
from persodpo.generation.store import Entry, Store
from persodpo.generation.summary import Reading, Summary
from persodpo.progress import bar

#: Requests looked up at a time, at least.
CHUNK = 64
#: The key of a request, and the request.
Item = tuple[str, Request]


def generate(requests: Iterable[Request], backend: Backend, store: Store, **options: Any) -> Summary:
    """Ask one model all that is not stored yet; options and errors as `generate_all`."""
    return generate_all([Job(requests, backend)], store, **options)[0]


def generate_all(
    jobs: Sequence[Job],
    store: Store,
    *,
    budget_usd: float | None = None,
    retry_failed: bool = False,
    progress: bool = True,
    reading: Reading = "as_released",
) -> list[Summary]:
    """Ask several models all that is not stored yet.

    Args:
        jobs: One for each model and way of asking it.
        store: Where answers are looked up and written.
        budget_usd: What may be spent in US dollars, together with all that the store's answers have cost and all that is set
            aside for others, of whatever process; None for no limit. It is never passed: the run stops before.
        retry_failed: Ask again what has failed in earlier runs.
        progress: Show a bar for each model where somebody watches.
        reading: How completions are read for the count of outcomes; the store keeps them as they were generated.

    Returns:
        A summary for each job, in their order. A model that had to stop says why in ``stopped``.

    Raises:
        PersodpoError: The store failed; what had been stored is safe.
    """
    run = _Run(store, budget_usd, retry_failed, reading)
    with store.asking(job.backend.model for job in jobs), ExitStack() as bars:
        works = [
            Work(job, run, bars.enter_context(
                bar(what=job.backend.model, hidden=not progress, total=job.total, unit=" prompts", position=row, leave=True)
            ))
            for row, job in enumerate(jobs)
        ]  # fmt: skip
        _in_thread(_ask_all(works))
    return [work.summary for work in works]


def _in_thread(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in a thread of its own, for a notebook's runs a loop already; an interrupt ends it in good order."""
    started: Future[Callable[[], object]] = Future()

    async def run() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        started.set_result(lambda: task and loop.call_soon_threadsafe(task.cancel))
        await coroutine

    with ThreadPoolExecutor(1, "generate") as thread:
        ended = thread.submit(asyncio.run, run())
        try:
            # A wait without an end is not interrupted where a library (polars) has the system restart its calls.
            while not wait([ended], timeout=0.2).done:
                pass
            ended.result()
        except KeyboardInterrupt:
            cancel = started.result()
            with suppress(RuntimeError):  # it came to its end at that moment
                cancel()
            raise


async def _ask_all(works: Sequence[Work]) -> None:
    """Go through all models. Nobody is cancelled when one fails; its error is raised when all have ended."""
    together = [work for work in works if not work.backend.local]
    alone = [[work] for work in works if work.backend.local]
    ended = [
        error for group in (together, *alone)
        for error in await asyncio.gather(*(work.run() for work in group), return_exceptions=True)
    ]  # fmt: skip
    for error in ended:
        if error is not None:
            raise error


@dataclass
class _Run:
    """What the models of a run share."""

    store: Store
    budget: float | None
    retry_failed: bool
    reading: Reading
    claimed: set[str] = field(default_factory=set)  # keys of all that was found; none is asked twice in a run
    paid: set[str] = field(default_factory=set)  # keys that money is set aside for, until they are answered
    settled: asyncio.Event = field(default_factory=asyncio.Event)

    def settle(self, keys: Collection[str]) -> None:
        """Let those go on that wait for money."""
        self.paid.difference_update(keys)
        self.settled.set()


class Work:
    """One model's requests that are still to be answered, as its backend takes them, and what came of them."""

    def __init__(self, job: Job, run: _Run, shown: Any) -> None:
        """Take a job, and what it shares with others."""
        self.backend = job.backend
        self.store, self.retry_failed = run.store, run.retry_failed
        self.summary = Summary(job.backend.model, cost=None if job.backend.prices is None else 0.0)
        self._requests = iter(job.requests)
        self._run, self._bar = run, shown
        self._found: deque[Item] = deque()  # not stored, no money set aside yet
        self._ready: deque[Item] = deque()  # money is set aside
        self._open: set[str] = set()  # keys of all that was found and is not done
        self._waiting: list[Entry] = []
        self._turn, self._writing = asyncio.Lock(), threading.Lock()

    async def run(self) -> None:
        """Answer all requests, or stop and count what is left."""
        started = time.perf_counter()
        try:
            await self.backend.resume(self)
            if self._look_up():
                if self._run.budget is not None and self.backend.prices is None:
                    raise ModelStopped(
                        f"Model {self.backend.model} has no prices, so the budget cannot be kept; set its prices (0 for a "
                        "server of your own) or no budget."
                    )
                await self.backend.run(self)
        except ModelStopped as reason:
            self.stop(str(reason))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            try:
                if error := self._write():  # the run was interrupted, or the disk failed for a while
                    raise error
                self.store.release([key for key, _ in self._ready])
            finally:
                self._run.settle(self._open)
        if self.summary.stopped:
            while self._look_up():
                self._found.clear()
            self.summary.left = len(self._open)
        self.summary.seconds = time.perf_counter() - started

    async def take(self, count: int = 1, size: float = float("inf")) -> list[Item]:
        """Return requests that are to be sent next, their highest cost set aside.

        Args:
            count: How many at most.
            size: Bytes of their prompts together, but for the last one's.

        Returns:
            As many as there are, and as there is money for. For the first one it waits while requests under way may turn
            out cheaper. None of them if none is left, there is no money for it, or the model was stopped.
        """
        items: list[Item] = []
        while len(items) < count and size > 0 and not self.summary.stopped:
            if self._ready:
                items.append(self._ready.popleft())
                size -= items[-1][1].prompt_bytes
            elif not self._look_up():
                break
            elif self._pay():
                continue
            elif items:
                break
            elif self._run.paid:
                self._run.settled.clear()
                await self._run.settled.wait()
            else:
                usd = self.backend.highest_cost(self._found[0][1])
                self.stop(
                    f"The budget of ${self._run.budget:,} is used up: ${self.store.spent():,.4f} are spent or set aside and "
                    f"the next request may cost ${usd:,.4f}; raise generation.budget_usd to go on."
                )
        return items

    def pay_again(self, key: str, usd: float) -> bool:
        """Set money aside for another attempt, where the one before may have been billed; False if there is none."""
        return self.store.reserve([(key, usd)], self._run.budget) == 1

    async def done(self, key: str, request: Request, answer: Answer) -> None:
        """Take an answer in; it is on the disk when this returns, together with others that waited."""
        entry = Entry(key, self.backend.model, request.template, request.prompt_bytes, answer)
        self._waiting.append(entry)
        async with self._turn:
            if entry in self._waiting and (error := await asyncio.shield(asyncio.to_thread(self._write))):
                raise error
        self.count(key, answer)

    def _write(self) -> Exception | None:
        """Write the answers that wait, or return why they go on waiting; a write may outlive the one that asked for it."""
        with self._writing:
            try:
                if entries := self._waiting[:]:
                    self.store.write(entries)
                    del self._waiting[: len(entries)]
            except Exception as error:
                return error
        return None

    def count(self, key: str, answer: Answer) -> None:
        """Count a request whose answer is on the disk."""
        self._open.discard(key)
        self._run.settle([key])
        self.summary.count(answer, self._run.reading)
        self._bar.set_postfix({**self.summary.outcomes, "stored": self.summary.skipped}, refresh=False)
        self._bar.update()

    def give_back(self, keys: Collection[str]) -> None:
        """Take requests back that were not sent, or that nobody can have billed: they are left to do."""
        self.store.release(keys)
        self._run.settle(keys)

    def stop(self, reason: str) -> None:
        """Hand out no further request; the first reason stands."""
        self.summary.stopped = self.summary.stopped or reason

    def _look_up(self) -> bool:
        """Go on through the requests until one is to be asked; False if none is left."""
        while not self._found:
            chunk: dict[str, Request] = {}
            count = 0
            try:
                for request in islice(self._requests, max(CHUNK, self.backend.concurrency)):
                    count += 1
                    chunk[request_key(request, self.backend)] = request
            except PersodpoError as error:
                self.stop(str(error))
            if not count:
                return False
            missing = [key for key in self.store.missing(chunk, self._run.retry_failed) if key not in self._run.claimed]
            self._run.claimed.update(missing)
            self._open.update(missing)
            self._found.extend((key, chunk[key]) for key in missing)
            self.summary.skipped += count - len(missing)
            self._bar.update(count - len(missing))
        return True

    def _pay(self) -> bool:
        """Set money aside for what was found, from the first on as far as it goes."""
        items = list(islice(self._found, self.backend.concurrency))
        granted = self.store.reserve([(key, self.backend.highest_cost(one)) for key, one in items], self._run.budget)
        self._ready.extend(self._found.popleft() for _ in range(granted))
        self._run.paid.update(key for key, _ in items[:granted])
        return granted > 0
