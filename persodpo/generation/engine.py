"""Requests in, answers in the store out: many at a time, several models side by side, nothing asked twice.

Requests are taken from their iterable as they are needed, so memory does not grow with their number. What the store
holds is skipped; what is about to be asked is claimed, so that two processes do not ask the same. A request is done when
its answer is on the disk. A model that has to stop (a wrong key, a server that is gone, the budget) says so in its
summary, and the others go on. Endpoints are asked side by side; models of this machine come after them, one at a time, so
that their response times are not those of a busy machine. A model that has nothing to answer is not even loaded.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Sequence, Sized
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from persodpo.errors import PersodpoError
from persodpo.generation.budget import BudgetReached, Purse
from persodpo.generation.requests import AnswerRequest, Backend, ModelStopped, Request, request_key
from persodpo.generation.store import Entry, Store
from persodpo.generation.summary import Reading, Summary
from persodpo.generation.writing import Writer, in_thread

#: Requests looked up and claimed at a time.
CHUNK = 64
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What one model is to answer.

    Attributes:
        requests: The prompts, in any iterable; it is gone through once.
        backend: Where the answers come from.
        total: How many there are, for the progress bar; None if the iterable knows it itself or nobody does.
    """

    requests: Iterable[Request]
    backend: Backend
    total: int | None = None


def generate(
    requests: Iterable[Request],
    backend: Backend,
    store: Store,
    *,
    budget_usd: float | None = None,
    retry_failed: bool = False,
    progress: bool = True,
    reading: Reading = "as_released",
) -> Summary:
    """Ask one model all that is not stored yet; arguments and errors as `generate_all`."""
    job = Job(requests, backend)
    return generate_all(
        [job], store, budget_usd=budget_usd, retry_failed=retry_failed, progress=progress, reading=reading
    )[0]


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
        budget_usd: What may be spent in US dollars, together with all that the store's answers have cost; None for no
            limit. It is never passed: the run stops before.
        retry_failed: Ask again what has failed in earlier runs.
        progress: Show a bar for each model if standard error is a terminal.
        reading: How completions are read for the count of outcomes; the store keeps them as they were generated.

    Returns:
        A summary for each job, in their order. A model that had to stop says why in ``stopped``.

    Raises:
        PersodpoError: The store failed; what had been stored is safe.
    """
    purse = Purse(budget_usd, store.spent() if budget_usd is not None else 0.0)
    runs = [_ModelRun(job, store, purse, retry_failed=retry_failed, reading=reading) for job in jobs]
    _run(_generate_all(runs, [_bar(job, row, progress) for row, job in enumerate(jobs)]))
    return [run.summary for run in runs]


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, in a thread of its own if this one runs a loop already, as notebooks do."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    found: list[T] = []
    errors: list[BaseException] = []
    tasks: list[asyncio.Task[None]] = []

    async def run() -> None:
        tasks.append(asyncio.ensure_future(collect()))
        await tasks[0]

    async def collect() -> None:
        found.append(await coroutine)

    def target() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target, name="generate")
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        # The interrupt reaches this thread alone; the other would go on asking, and paying.
        for task in tasks:
            task.get_loop().call_soon_threadsafe(task.cancel)
        thread.join()
        raise
    if errors:
        raise errors[0]
    return found[0]


async def _generate_all(runs: Sequence[_ModelRun], bars: Sequence[tqdm[NoReturn]]) -> None:
    """Go through all runs. Nobody is cancelled when one fails; its error is raised when all have ended."""
    all_runs = list(zip(runs, bars, strict=True))
    try:
        side_by_side = [run.run(bar) for run, bar in all_runs if not run.local]
        ended = await asyncio.gather(*side_by_side, return_exceptions=True)
        for run, bar in all_runs:
            if run.local:
                ended += await asyncio.gather(run.run(bar), return_exceptions=True)
    finally:
        for bar in bars:
            bar.close()
    for error in ended:
        if isinstance(error, BaseException):
            raise error


def _bar(job: Job, row: int, progress: bool) -> tqdm[NoReturn]:
    """Make a bar that is shown on a terminal only."""
    total = len(job.requests) if job.total is None and isinstance(job.requests, Sized) else job.total
    return tqdm(total=total, desc=job.backend.model, unit=" prompts", position=row, disable=None if progress else True)


class _ModelRun:
    """One model's way through its requests."""

    def __init__(self, job: Job, store: Store, purse: Purse, *, retry_failed: bool, reading: Reading) -> None:
        self.local = job.backend.local
        self.summary = Summary(job.backend.model, cost=None if job.backend.prices is None else 0.0)
        self._backend = job.backend
        self._requests = iter(job.requests)
        self._store = store
        self._purse = purse
        self._retry_failed = retry_failed
        self._reading = reading
        self._writer = Writer(store)
        self._feeding = asyncio.Lock()
        self._ready: deque[tuple[str, Request]] = deque()
        self._claimed: set[str] = set()

    async def run(self, bar: tqdm[NoReturn]) -> None:
        """Answer all requests, or stop and count what is left."""
        started = time.perf_counter()
        try:
            await self._fill(bar)
            if self._ready:
                await self._open_and_work(bar)
        finally:
            self._writer.write_rest()
            self._store.release(self._claimed)
        if self.summary.stopped:
            self.summary.left = len(self._claimed) + await in_thread(self._count_rest)
        self.summary.seconds = time.perf_counter() - started

    async def _open_and_work(self, bar: tqdm[NoReturn]) -> None:
        async with AsyncExitStack() as stack:
            try:
                self._require_prices()
                answer = await stack.enter_async_context(self._backend.open(self._purse))
            except PersodpoError as error:
                self._stop(error)
            else:
                await self._work(answer, bar)

    def _require_prices(self) -> None:
        if self._purse.budget is not None and self._backend.prices is None:
            raise PersodpoError(
                f"Model {self._backend.model} has no prices, so the budget cannot be kept; set its prices (0 for a server "
                "of your own) or no budget."
            )

    def _stop(self, reason: PersodpoError) -> None:
        self.summary.stopped = self.summary.stopped or str(reason)

    async def _work(self, answer: AnswerRequest, bar: tqdm[NoReturn]) -> None:
        """Keep as many requests under way as the backend wants."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._backend.concurrency):
                    group.create_task(self._worker(answer, bar))
        except BaseExceptionGroup as errors:
            first = errors.exceptions[0]
            raise first from first.__cause__

    async def _worker(self, answer: AnswerRequest, bar: tqdm[NoReturn]) -> None:
        """Answer one request after another."""
        summary = self.summary
        while (item := await self._next(bar)) is not None:
            key, request = item
            try:
                found = await answer(request)
            except (ModelStopped, BudgetReached) as reason:
                self._stop(reason)
                return
            await self._writer.write(Entry(key, self._backend.model, request.template, request.prompt_bytes, found))
            self._claimed.discard(key)
            summary.count(found, self._reading)
            bar.set_postfix({**summary.outcomes, "stored": summary.skipped}, refresh=False)
            bar.update()

    async def _next(self, bar: tqdm[NoReturn]) -> tuple[str, Request] | None:
        """Return the next request that is to be asked, None when there is none or the model was stopped."""
        async with self._feeding:
            await self._fill(bar)
            return self._ready.popleft() if self._ready and not self.summary.stopped else None

    async def _fill(self, bar: tqdm[NoReturn]) -> None:
        """Look requests up until one is to be asked or none is left."""
        while not self._ready and not self.summary.stopped:
            passed = self._passed()
            chunk = self._chunk()
            if not chunk:
                return
            await in_thread(self._claim, chunk)
            bar.update(self._passed() - passed)

    def _chunk(self) -> dict[str, Request]:
        """Take the next requests from the iterable; those that stand twice are one."""
        chunk: dict[str, Request] = {}
        try:
            for request in islice(self._requests, CHUNK):
                key = request_key(request, self._backend)
                self.summary.skipped += key in chunk
                chunk[key] = request
        except PersodpoError as error:
            self._stop(error)
        return chunk

    def _passed(self) -> int:
        """Return how many requests need not be asked."""
        return self.summary.skipped + self.summary.busy

    def _claim(self, chunk: dict[str, Request]) -> None:
        """Sort out what is to be asked."""
        claim = self._store.claim(list(chunk), self._retry_failed)
        self._claimed |= claim.granted
        self._ready.extend((key, request) for key, request in chunk.items() if key in claim.granted)
        self.summary.skipped += len(claim.stored)
        self.summary.busy += len(claim.busy)

    def _count_rest(self) -> int:
        """Count the requests that nobody has looked at yet and that are not stored."""
        try:
            keys = (request_key(request, self._backend) for request in self._requests)
            return sum(1 for _ in self._store.missing(keys, self._retry_failed))
        except PersodpoError as error:
            self._stop(error)
            return 0
