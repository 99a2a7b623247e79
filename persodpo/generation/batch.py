"""Prompts through the Batch API of an endpoint: submit, poll, collect, and resume after whatever happened in between.

A batch is written down before it is sent and carries our tag, so a run that was killed at any moment finds it again: by its
name, or by its tag in the endpoint's list. Answers reach the store as those of any other backend.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import openai

from persodpo.generation.ask import Work, in_thread
from persodpo.generation.client import BoundedClient, Mask, api_key, client_for, request_body
from persodpo.generation.endpoint import LASTING, OpenAIBackend, sentence
from persodpo.generation.replies import CallFault, fault_of, read_reply
from persodpo.generation.requests import Answer, ModelStopped, Request, request_key, stopping_the_model
from persodpo.generation.store import Store

#: What endpoints take in one file, bytes, with room to spare; and what is read of one at most.
FILE_BYTES, LONGEST_FILE = 90_000_000, 2**30
RETRIES = 5
ENDED = {"completed", "failed", "expired", "cancelled"}
HARDWARE = "batch API"


class Batch(NamedTuple):
    """A batch that has been written down."""

    tag: str  # ours, sent with it
    name: str | None  # the endpoint's, None where the run died before it was told
    keys: set[str]  # of its requests


class BatchBackend(OpenAIBackend):
    """Answers of an endpoint that come by the batch."""

    _under_way: tuple[Batch, ...] = ()

    def identity(self) -> Mapping[str, object]:
        """Name the served model, the schema and the way, for a batch's times are no response times."""
        return {**super().identity(), "batch": True}

    def highest_cost(self, request: Request) -> float:
        """Return what is to be set aside: nothing more for a request that is under way since an earlier run."""
        key = request_key(request, self) if self._under_way else ""
        return 0.0 if any(key in batch.keys for batch in self._under_way) else super().highest_cost(request)

    async def run(self, work: Work) -> None:
        """Find batches of earlier runs again, submit the rest, and wait for all of them."""
        with stopping_the_model():
            key = api_key(self.settings)
        self._mask, self._store = Mask(key), work.store
        http = BoundedClient(self.settings, LONGEST_FILE)
        async with client_for(self.settings, key, http, RETRIES) as self._client, self._stopping():
            await self._resume()
            while pool := await self._take(work):
                old = [(batch, {key: pool.pop(key) for key in batch.keys & pool.keys()}) for batch in self._under_way]
                new = [(await self._submit(work, part), part) for part in _parts(pool)]
                collecting = (self._collect(work, *pair) for pair in (*old, *new) if pair[1])
                # What the other batches hold is paid for.
                for error in await asyncio.gather(*collecting, return_exceptions=True):
                    if error is not None:
                        raise error

    async def _take(self, work: Work) -> dict[str, Request]:
        taken: dict[str, Request] = {}
        while len(taken) < self.concurrency and (item := await work.next(patient=not taken)) is not None:
            try:
                request_body(self.settings, self.json_keys, item[1])
            except CallFault as fault:
                await work.done(*item, Answer("failed", failure=fault.kind, error=fault.detail))
            else:
                taken.update([item])
        return taken

    async def _resume(self) -> None:
        """Learn the names of batches that were sent by a run that died before it was told; forget those never sent."""
        batches = {batch.tag: batch for batch in await in_thread(open_batches, self._store, *self._address)}
        if lost := {tag for tag, batch in batches.items() if batch.name is None}:
            async for listed in self._client.batches.list(limit=100):
                tag = (listed.metadata or {}).get("persodpo", "")
                if tag in lost:
                    batches[tag] = batches[tag]._replace(name=listed.id)
                    lost.remove(tag)
                if not lost:
                    break
        for tag, batch in batches.items():
            await (in_thread(forget, self._store, batch, True) if tag in lost else in_thread(keep, self._store, batch))
        self._under_way = tuple(batch for tag, batch in batches.items() if tag not in lost)

    @property
    def _address(self) -> tuple[str, str]:
        return self.model, self.settings.base_url

    async def _submit(self, work: Work, requests: dict[str, Request]) -> Batch:
        """Send requests as one batch."""
        lines = []
        for key, request in requests.items():
            path, body = request_body(self.settings, self.json_keys, request)
            lines.append(json.dumps({"custom_id": key, "method": "POST", "url": f"/v1{path}", "body": body}) + "\n")
        try:
            file = await self._client.files.create(file=("requests.jsonl", "".join(lines).encode()), purpose="batch")
        except BaseException:
            await work.give_back(list(requests))
            raise
        batch = Batch(uuid.uuid4().hex, None, set(requests))
        await in_thread(begin, self._store, batch, *self._address)
        made = await self._client.batches.create(
            input_file_id=file.id,
            endpoint=f"/v1{path}",  # type: ignore[arg-type] # one of two that the client knows
            completion_window="24h",
            metadata={"persodpo": batch.tag},
        )
        batch = batch._replace(name=made.id)
        await in_thread(keep, self._store, batch)
        return batch

    async def _collect(self, work: Work, batch: Batch, requests: dict[str, Request]) -> None:
        """Wait for a batch's end and hand in an answer or a failure for each of its requests."""
        while (state := await self._client.batches.retrieve(str(batch.name))).status not in ENDED:
            await asyncio.sleep(self.settings.poll_seconds)
        if state.status == "failed":
            await work.give_back(list(requests))
            await in_thread(forget, self._store, batch, True)
            said = "; ".join(error.message or error.code or "" for error in (state.errors and state.errors.data) or [])
            raise ModelStopped(
                f"{self.settings.base_url} refused a batch of model {self.model} ({self._mask.line(said)}); correct what it "
                "names and run again."
            )
        missing = f"the batch ended ({state.status}) before this prompt was answered"
        answers = dict.fromkeys(batch.keys, Answer("failed", failure="timeout", error=missing))
        for file_id in filter(None, (state.error_file_id, state.output_file_id)):
            content = (await self._client.files.content(file_id)).content
            answers.update(filter(None, map(self._read, content.split(b"\n"))))
        seconds = float((state.completed_at or state.created_at) - state.created_at)
        about: dict[str, Any] = {"latency": seconds, "batch_size": len(batch.keys), "hardware": HARDWARE}
        done = ((key, one, replace(self._priced(one, answers[key]), **about)) for key, one in requests.items())
        await asyncio.gather(*(work.done(*item) for item in done))
        await in_thread(forget, self._store, batch, False)

    def _priced(self, request: Request, answer: Answer) -> Answer:
        """Book an answer as it was counted, or at its highest price; failures are not billed."""
        if self.prices is None or answer.failure is not None:
            return answer
        if answer.prompt_tokens is None or answer.completion_tokens is None:
            return replace(answer, cost=super().highest_cost(request))
        return replace(answer, cost=self.prices.cost(answer.prompt_tokens, answer.completion_tokens))

    def _read(self, line: bytes) -> tuple[str, Answer] | None:
        """Read one line of a result file; None if it does not say whose answer it is."""
        try:
            content: dict[str, Any] = json.loads(line)
            key, response = str(content["custom_id"]), content.get("response") or {}
            status, body = response.get("status_code"), response.get("body") or {}
        except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
            return None
        try:
            if status != 200:
                raise fault_of(status, {}, content.get("error") or body or "no answer")
            return key, self._mask.withheld(read_reply(body))
        except CallFault as fault:
            kind = "rejected" if fault.kind in LASTING else fault.kind
            return key, Answer("failed", failure=kind, error=self._mask.line(fault.detail))

    @asynccontextmanager
    async def _stopping(self) -> AsyncIterator[None]:
        """Turn the client's errors into the sentence that stops the model; its own retries are over."""
        try:
            yield
        except openai.APIStatusError as error:
            fault = fault_of(error.status_code, error.response.headers, error.response.content)
            detail = self._mask.line(fault.detail)
            if fault.kind in LASTING and fault.kind != "unknown_model":
                raise ModelStopped(sentence(fault.kind, self.settings, detail)) from None
            why, then = ("failed on a batch", "run again later")
            if fault.kind == "unknown_model":
                why, then = ("has no Batch API", "set batch: false for it")
            raise ModelStopped(f"{self.settings.base_url} {why} for model {self.model} ({detail}); {then}.") from None
        except openai.OpenAIError as error:
            detail = self._mask.line(str(error.__cause__ or error))
            raise ModelStopped(sentence("unreachable", self.settings, detail)) from None


def _parts(pool: dict[str, Request]) -> Iterator[dict[str, Request]]:
    """Divide requests into files of a size that endpoints take."""
    part: dict[str, Request] = {}
    room = FILE_BYTES
    for key, request in pool.items():
        size = request.prompt_bytes * 2 + 1000  # JSON may double the size of a text, and adds its own
        if part and size > room:
            yield part
            part, room = {}, FILE_BYTES
        part[key] = request
        room -= size
    if part:
        yield part


def begin(store: Store, batch: Batch, model: str, address: str) -> None:
    """Write down a batch that is about to be sent."""
    with store.exclusive() as connection:
        row = (batch.tag, model, address, None, json.dumps(sorted(batch.keys)))
        connection.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?)", row)


def keep(store: Store, batch: Batch) -> None:
    """Write down the name of a batch, and take over what an earlier run has set aside for it."""
    with store.exclusive() as connection:
        connection.execute("UPDATE batches SET name = ? WHERE tag = ?", (batch.name, batch.tag))
        rows = [(store.run, key) for key in batch.keys]
        connection.executemany("UPDATE OR REPLACE reservations SET run = ? WHERE key = ?", rows)


def forget(store: Store, batch: Batch, unbilled: bool) -> None:
    """Forget a batch that has ended or never began; give back what was set aside for it if nothing was billed."""
    with store.exclusive() as connection:
        connection.execute("DELETE FROM batches WHERE tag = ?", (batch.tag,))
        rows = [(key,) for key in batch.keys] if unbilled else []
        connection.executemany("DELETE FROM reservations WHERE key = ?", rows)


def open_batches(store: Store, model: str, address: str) -> list[Batch]:
    """Return the batches of a model at an address that have not ended, as far as is known."""
    query = "SELECT tag, name, keys FROM batches WHERE model = ? AND address = ? ORDER BY rowid"
    with store.exclusive() as connection:
        rows = connection.execute(query, (model, address)).fetchall()
    return [Batch(tag, name, set(json.loads(keys))) for tag, name, keys in rows]
