"""Prompts through the Batch API of an endpoint: submit, poll, collect, and resume after whatever happened in between.

Requests that wait at the same time become one batch. It is written down before it is sent and carries our tag, so a run
that was killed at any moment finds it again: by its name, or by its tag in the endpoint's list. Answers reach the store as
those of any other backend.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import openai
from openai import AsyncOpenAI

from persodpo.config import OpenAIModel
from persodpo.generation.batches import Batch, Batches
from persodpo.generation.budget import Purse
from persodpo.generation.endpoint import api_key, client_for, highest_cost, request_body
from persodpo.generation.faults import LASTING, CallFault, Redactor, classify, read_reply
from persodpo.generation.requests import Answer, AnswerRequest, Limits, ModelStopped, Request, request_key
from persodpo.generation.store import Store
from persodpo.generation.writing import in_thread

#: A batch is made when no further request has come in for this many seconds.
QUIET_SECONDS = 0.5
#: What endpoints take in one file, bytes, with room to spare.
FILE_BYTES = 90_000_000
RETRIES = 5
ENDED = {"completed", "failed", "expired", "cancelled"}
HARDWARE = "batch API"
_NO_BATCHES = "{url} has no Batch API for model {model} ({detail}); set batch: false for it."
#: How far back a batch whose name was never learnt is looked for, seconds before it was written down (clocks differ).
CLOCKS = 3600.0


class OpenAIBatchBackend:
    """A backend (`persodpo.generation.requests.Backend`) that answers whole batches."""

    def __init__(self, settings: OpenAIModel, json_keys: tuple[str, ...], store: Store) -> None:
        """Take the settings; nothing is connected yet.

        Args:
            settings: Of the endpoint.
            json_keys: Keys of the JSON object that the endpoint must hold the model to; empty: no such schema.
            store: Where batches under way are kept in mind.
        """
        self.settings = settings
        self.json_keys = json_keys
        self.model = settings.model
        self.concurrency = settings.concurrency
        self.prices = settings.prices
        self.limits = Limits()
        self.local = False
        self._batches = Batches(store, settings.model, settings.base_url)

    def identity(self) -> Mapping[str, object]:
        """Name the served model, the schema and the way, for a batch's times are no response times."""
        served = self.settings.served_as or self.model
        return {"kind": "openai", "served_as": served, "json_keys": list(self.json_keys), "batch": True}

    @asynccontextmanager
    async def open(self, purse: Purse) -> AsyncIterator[AnswerRequest]:
        """Read the key, make a client and find the batches of earlier runs again.

        Raises:
            PersodpoError: The key's variable is not set, or the endpoint does not list its batches.
        """
        key = api_key(self.settings)
        async with client_for(self.settings, key, RETRIES) as client:
            session = _Session(self, client, Redactor(key), purse, self._batches)
            await session.resume()
            try:
                yield session.answer
            finally:
                await session.close()


class _Session:
    """One run: requests that wait for a batch, and batches that are waited for."""

    def __init__(
        self, backend: OpenAIBatchBackend, client: AsyncOpenAI, redactor: Redactor, purse: Purse, batches: Batches
    ) -> None:
        self._backend = backend
        self._settings = backend.settings
        self._client = client
        self._redactor = redactor
        self._purse = purse
        self._batches = batches
        self._pool: dict[str, Request] = {}
        self._waiting: dict[str, asyncio.Future[Answer]] = {}
        self._resumed: list[Batch] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._quiet: asyncio.Task[None] | None = None

    async def answer(self, request: Request) -> Answer:
        """Answer one request; see `persodpo.generation.requests.Backend.open`."""
        most = highest_cost(self._settings, self._backend.json_keys, request)
        reservation = await self._purse.reserve(most)
        cost = most
        try:
            key = request_key(request, self._backend)
            self._waiting[key] = asyncio.get_running_loop().create_future()
            self._pool[key] = request
            if self._quiet is not None:
                self._quiet.cancel()
            self._quiet = asyncio.create_task(self._when_quiet())
            answer = await self._waiting[key]
            prices = self._settings.prices
            if prices is None or answer.failure is not None:
                cost = 0.0
            elif answer.prompt_tokens is not None and answer.completion_tokens is not None:
                cost = prices.cost(answer.prompt_tokens, answer.completion_tokens)
            return replace(answer, cost=cost)
        except ModelStopped:
            cost = 0.0
            raise
        finally:
            self._purse.settle(reservation, cost)

    async def resume(self) -> None:
        """Learn the names of batches that were sent by a run that died before it was told; forget those never sent."""
        self._resumed = await in_thread(self._batches.open)
        nameless = {batch.tag: batch for batch in self._resumed if batch.batch_id is None}
        if not nameless:
            return
        oldest = min(batch.since for batch in nameless.values()) - CLOCKS
        async with self._stopping():
            async for listed in self._client.batches.list(limit=100):
                batch = nameless.pop((listed.metadata or {}).get("persodpo", ""), None)
                if batch is not None:
                    await in_thread(self._batches.sent, batch, listed.id)
                if not nameless or listed.created_at < oldest:
                    break
        for batch in nameless.values():
            await in_thread(self._batches.forget, batch)
            self._resumed.remove(batch)

    async def close(self) -> None:
        """Stop waiting; batches under way stay with the endpoint and are found again."""
        tasks = [*self._tasks, *([self._quiet] if self._quiet else [])]
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task

    async def _when_quiet(self) -> None:
        """Make batches of all that wait, when no further request comes in."""
        await asyncio.sleep(QUIET_SECONDS)
        pool, self._pool = self._pool, {}
        for batch in self._resumed:
            if mine := batch.keys & pool.keys():
                self._start(batch, {key: pool.pop(key) for key in mine})
        for part in self._parts(pool):
            self._start(None, part)

    def _start(self, batch: Batch | None, requests: dict[str, Request]) -> None:
        task = asyncio.create_task(self._see_through(batch, requests))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _parts(self, pool: dict[str, Request]) -> Iterator[dict[str, Request]]:
        """Divide requests into files of a size that endpoints take."""
        part: dict[str, Request] = {}
        size = 0
        for key, request in pool.items():
            if part and size + request.prompt_bytes * 2 > FILE_BYTES:
                yield part
                part, size = {}, 0
            part[key] = request
            # JSON may double the size of a text, and adds its own.
            size += request.prompt_bytes * 2 + 1000
        if part:
            yield part

    async def _see_through(self, batch: Batch | None, requests: dict[str, Request]) -> None:
        """Send a batch if it is new, wait for its end and hand its answers out."""
        try:
            async with self._stopping():
                if batch is None:
                    batch = await self._submit(requests)
                answers = await self._collect(batch)
        except Exception as error:
            # Whoever waits must learn of it, whatever it is.
            for key in requests:
                if not self._waiting[key].done():
                    self._waiting[key].set_exception(error)
            return
        for key in requests:
            if not self._waiting[key].done():
                self._waiting[key].set_result(answers[key])

    async def _submit(self, requests: dict[str, Request]) -> Batch:
        """Send requests as one batch."""
        lines, endpoint = [], ""
        for key, request in requests.items():
            path, body = request_body(self._settings, self._backend.json_keys, request)
            endpoint = f"/v1{path}"
            lines.append(json.dumps({"custom_id": key, "method": "POST", "url": endpoint, "body": body}))
        file = io.BytesIO(("\n".join(lines) + "\n").encode())
        sent = await self._client.files.create(file=("requests.jsonl", file), purpose="batch")
        batch = await in_thread(self._batches.begin, list(requests))
        made = await self._client.batches.create(
            input_file_id=sent.id,
            endpoint=endpoint,  # type: ignore[arg-type] # one of two that the client knows
            completion_window="24h",
            metadata={"persodpo": batch.tag},
        )
        await in_thread(self._batches.sent, batch, made.id)
        return batch

    async def _collect(self, batch: Batch) -> dict[str, Answer]:
        """Wait for a batch's end; return an answer or a failure for each of its keys."""
        assert batch.batch_id is not None  # noqa: S101 - it was sent or found again
        while (found := await self._client.batches.retrieve(batch.batch_id)).status not in ENDED:
            await asyncio.sleep(self._settings.poll_seconds)
        if found.status == "failed":
            await in_thread(self._batches.forget, batch)
            said = "; ".join(error.message or error.code or "" for error in (found.errors and found.errors.data) or [])
            raise ModelStopped(
                f"{self._settings.base_url} refused a batch of model {self._settings.model} "
                f"({self._redactor.line(said)}); correct what it names and run again."
            )
        seconds = float((found.completed_at or found.created_at) - found.created_at)
        missing = f"the batch ended ({found.status}) before this prompt was answered"
        answers = dict.fromkeys(batch.keys, Answer("failed", failure="timeout", error=missing, hardware=HARDWARE))
        for file_id in (found.error_file_id, found.output_file_id):
            if file_id:
                content = await self._client.files.content(file_id)
                for line in content.text.splitlines():
                    key, answer = self._read(line)
                    answers[key] = replace(answer, latency=seconds, batch_size=len(batch.keys), hardware=HARDWARE)
        return answers

    def _read(self, line: str) -> tuple[str, Answer]:
        """Read one line of a result file."""
        try:
            content: dict[str, Any] = json.loads(line)
            key = str(content["custom_id"])
            response = content.get("response") or {}
            if response.get("status_code") != 200:
                said = content.get("error") or response.get("body") or "no answer"
                return key, Answer("failed", failure="rejected", error=self._redactor.line(json.dumps(said)))
            return key, read_reply(response["body"], self._redactor)
        except CallFault as fault:
            return key, Answer("failed", failure=fault.kind, error=fault.detail)
        except (ValueError, KeyError, AttributeError, TypeError):
            return "", Answer("failed", failure="invalid_body", error="a line of the result file is no answer")

    @asynccontextmanager
    async def _stopping(self) -> AsyncIterator[None]:
        """Turn the client's errors into the sentence that stops the model; its own retries are over."""
        try:
            yield
        except openai.OpenAIError as error:
            fault = classify(error, self._redactor)
            words = {
                "model": self._settings.model, "served": self._settings.served_as or self._settings.model,
                "url": self._settings.base_url, "key": f"the key in {self._settings.api_key_env}",
            }  # fmt: skip
            lasting = LASTING | {"unknown_model": _NO_BATCHES}
            sentence = lasting.get(fault.kind, "{url} failed on a batch of model {model} ({detail}); run again later.")
            raise ModelStopped(sentence.format(**words, detail=fault.detail)) from error
