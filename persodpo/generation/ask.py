"""Requests in, answers in the store out: many at a time, several models side by side, nothing asked twice.

Requests are taken from their iterable as they are needed, so memory does not grow with their number. What the store holds
is skipped; for what is about to be asked, money is set aside in the store first. A request is done when its answer is on the
disk. A model that has to stop (a wrong key, a server that is gone, the budget) says so in its summary, and the others go on.
Endpoints are asked side by side; models of this machine come after them, one at a time, so that their response times are not
those of a busy machine. A model that has nothing to answer is not even loaded.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from persodpo.errors import PersodpoError
from persodpo.generation.requests import Answer, Backend, Job, ModelStopped, Request, request_key
from persodpo.generation.store import Entry, Store
from persodpo.generation.summary import Reading, Summary

#: Requests looked up, and paid for, at a time, at most.
CHUNK = 64
T = TypeVar("T")


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
        jobs: One for each model.
        store: Where answers are looked up and written.
        budget_usd: What may be spent in US dollars, together with all that the store's answers have cost and all that is set
            aside for others, of whatever process; None for no limit. It is never passed: the run stops before.
        retry_failed: Ask again what has failed in earlier runs.
        progress: Show a bar for each model if standard error is a terminal.
        reading: How completions are read for the count of outcomes; the store keeps them as they were generated.

    Returns:
        A summary for each job, in their order. A model that had to stop says why in ``stopped``.

    Raises:
        PersodpoError: The store failed; what had been stored is safe.
    """
    shared = _Run(budget_usd)
    with store.asking(job.backend.model for job in jobs):
        works = [Work(job, store, shared, retry_failed=retry_failed, reading=reading) for job in jobs]
        for row, (job, work) in enumerate(zip(jobs, works, strict=True)):
            work.bar = _bar(job, row, progress)
        try:
            _run(_ask_all(works))
        finally:
            for work in works:
                work.bar.close()
    return [work.summary for work in works]


def _run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in a thread of its own, for a notebook's runs a loop already; an interrupt ends it in good order."""
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[None] | None]] = Future()

    async def run() -> None:
        started.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        await coroutine

    with ThreadPoolExecutor(1, "generate") as thread:
        ended = thread.submit(asyncio.run, run())
        try:
            ended.result()
        except KeyboardInterrupt:
            loop, task = started.result()
            if task is not None:
                with suppress(RuntimeError):  # it came to its end at that moment
                    loop.call_soon_threadsafe(task.cancel)
            raise


async def _ask_all(works: Sequence[Work]) -> None:
    """Go through all models. Nobody is cancelled when one fails; its error is raised when all have ended."""
    ended = await asyncio.gather(*(work.run() for work in works if not work.local), return_exceptions=True)
    for work in works:
        if work.local:
            ended += await asyncio.gather(work.run(), return_exceptions=True)
    for error in ended:
        if isinstance(error, BaseException):
            raise error


def _bar(job: Job, row: int, progress: bool) -> tqdm[NoReturn]:
    """Make a bar that is shown on a terminal only."""
    total = len(job.requests) if job.total is None and isinstance(job.requests, Sized) else job.total
    return tqdm(total=total, desc=job.backend.model, unit=" prompts", position=row, disable=None if progress else True)


class _Run:
    """What the models of a run share: its budget, and where the requests are that money is set aside for."""

    def __init__(self, budget: float | None) -> None:
        self.budget = budget
        self.under_way = 0  # requests that money is set aside for
        self.taken = 0  # of these, taken by a backend
        self.stuck = 0  # of these, waiting for more
        self.settled = 0  # that have ended
        self.open: set[str] = set()  # keys that are being asked, or are about to
        self._event = asyncio.Event()

    def settle(self, requests: int, taken: int) -> None:
        """Let those go on that wait for money."""
        self.under_way -= requests
        self.taken -= taken
        self.settled += requests
        self._event.set()

    async def change(self) -> None:
        """Wait until some request is settled."""
        self._event.clear()
        await self._event.wait()


class Work:
    """One model's requests that are still to be answered, as its backend takes them, and what came of them."""

    def __init__(self, job: Job, store: Store, shared: _Run, *, retry_failed: bool, reading: Reading) -> None:
        """Take a job; ``shared`` is what it shares with others, the rest is as of `generate_all`."""
        self.local = job.backend.local
        self.summary = Summary(job.backend.model, cost=None if job.backend.prices is None else 0.0)
        self.store = store
        self.bar: tqdm[NoReturn]
        self._backend = job.backend
        self._requests = iter(job.requests)
        self._shared = shared
        self._retry_failed = retry_failed
        self._reading = reading
        self._writer = _Writer(store)
        self._taking = asyncio.Lock()
        self._found: deque[tuple[str, Request]] = deque()  # not stored, no money set aside yet
        self._ready: deque[tuple[str, Request]] = deque()  # paid for
        self._open: set[str] = set()  # keys of all that was taken from the iterable and is not done
        self._paid = 0

    async def run(self) -> None:
        """Answer all requests, or stop and count what is left."""
        started = time.perf_counter()
        try:
            if await self._look_up():
                self._require_prices()
                await self._backend.run(self)
        except ModelStopped as reason:
            self.stop(str(reason))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            self._writer.write_rest()
            self._shared.settle(self._paid, self._paid - len(self._ready))
            self.store.release([key for key, _ in (*self._ready, *self._found)])
        if self.summary.stopped:
            self.summary.left = len(self._open) + await in_thread(self._count_rest)
        self.summary.seconds = time.perf_counter() - started

    async def next(self, *, patient: bool = True) -> tuple[str, Request] | None:
        """Return the key and the request that is to be sent next, its highest cost set aside.

        Args:
            patient: Wait for money while requests under way may still turn out cheaper.

        Returns:
            None if there is none, there is no money for it, or the model was stopped.
        """
        async with self._taking:
            while not self.summary.stopped and not self._ready and await self._look_up():
                settled = self._shared.settled
                if await self._pay() or self._shared.settled != settled:
                    continue
                if not self._shared.under_way:
                    self.stop(await self._used_up(self._backend.highest_cost(self._found[0][1])))
                elif patient:
                    await self._shared.change()
                else:
                    return None
            if self.summary.stopped or not self._ready:
                return None
            self._shared.taken += 1
            return self._ready.popleft()

    async def pay_again(self, key: str, usd: float) -> bool:
        """Set money aside for another attempt, where the one before may have been billed; False if there is none."""
        shared = self._shared
        shared.stuck += 1
        try:
            while True:
                settled = shared.settled
                if await in_thread(self.store.reserve, [(key, usd)], shared.budget):
                    return True
                if shared.settled == settled:
                    if shared.taken == shared.stuck:
                        return False
                    await shared.change()
        finally:
            shared.stuck -= 1

    async def done(self, key: str, request: Request, answer: Answer) -> None:
        """Take an answer in; it is on the disk when this returns."""
        await self._writer.write(Entry(key, self._backend.model, request.template, request.prompt_bytes, answer))
        self._settle([key])
        self._open.discard(key)
        self._shared.open.discard(key)
        self.summary.count(answer, self._reading)
        self.bar.set_postfix({**self.summary.outcomes, "stored": self.summary.skipped}, refresh=False)
        self.bar.update()

    async def give_back(self, keys: Sequence[str]) -> None:
        """Take requests back that were not sent, or that nobody can have billed: they are left to do."""
        await in_thread(self.store.release, keys)
        self._settle(keys)

    def stop(self, reason: str) -> None:
        """Hand out no further request; the first reason stands."""
        self.summary.stopped = self.summary.stopped or reason

    def _settle(self, keys: Sequence[str]) -> None:
        self._paid -= len(keys)
        self._shared.settle(len(keys), len(keys))

    def _require_prices(self) -> None:
        if self._shared.budget is not None and self._backend.prices is None:
            raise ModelStopped(
                f"Model {self._backend.model} has no prices, so the budget cannot be kept; set its prices (0 for a server "
                "of your own) or no budget."
            )

    async def _look_up(self) -> bool:
        """Go on through the requests until one is to be asked; False if none is left."""
        while not self._found:
            chunk: dict[str, Request] = {}
            taken = 0
            try:
                for request in islice(self._requests, min(CHUNK, 2 * self._backend.concurrency)):
                    taken += 1
                    key = request_key(request, self._backend)
                    if key not in self._shared.open:
                        chunk[key] = request
            except PersodpoError as error:
                self.stop(str(error))
            if not taken:
                return False
            self._shared.open |= chunk.keys()
            missing = await in_thread(lambda: list(self.store.missing(chunk, self._retry_failed)))  # noqa: B023
            self._open.update(missing)
            self._shared.open -= chunk.keys() - set(missing)
            self._found.extend((key, chunk[key]) for key in missing)
            self.summary.skipped += taken - len(missing)
            self.bar.update(taken - len(missing))
        return True

    async def _pay(self) -> bool:
        """Set money aside for what was found, from the first on as far as it goes."""
        prices = [(key, self._backend.highest_cost(request)) for key, request in self._found]
        granted = await in_thread(self.store.reserve, prices, self._shared.budget)
        self._ready.extend(self._found.popleft() for _ in range(granted))
        self._paid += granted
        self._shared.under_way += granted
        return granted > 0

    async def _used_up(self, usd: float) -> str:
        spent = await in_thread(self.store.spent)
        return (
            f"The budget of ${self._shared.budget:,} is used up: ${spent:,.4f} are spent or set aside and the next request "
            f"may cost ${usd:,.4f}; raise generation.budget_usd to go on."
        )

    def _count_rest(self) -> int:
        """Count the requests that nobody has looked at yet and that are not stored."""
        try:
            keys = (request_key(request, self._backend) for request in self._requests)
            return sum(1 for _ in self.store.missing(keys, self._retry_failed))
        except PersodpoError as error:
            self.stop(str(error))
            return 0


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Run a call that blocks on the disk in a thread, and to its end even when the run is interrupted."""
    task = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


class _Writer:
    """Writes entries to the store; those that wait while others are written are written together."""

    def __init__(self, store: Store) -> None:
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
