"""Prompts through the Batch API of an endpoint: submit, poll, collect, and resume after whatever happened in between.

Before a batch is sent, what is set aside for it is handed over to a name in the store that holds our tag, which the batch
carries, and then the endpoint's name for it. So a run that was killed at any moment finds its batches again.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace

import openai

from persodpo.generation.ask import Work
from persodpo.generation.client import BoundedClient, CallFault, fault_of, read_reply, request_body
from persodpo.generation.endpoint import LASTING, OpenAIBackend
from persodpo.generation.requests import Answer, ModelStopped, Request
from persodpo.generation.store import Entry

#: Prompts of one file, bytes, of which JSON makes twice as many, with room to spare; and what is read of one at most.
FILE_BYTES, LONGEST_FILE = 40_000_000, 2**30
ENDED = {"completed", "failed", "expired", "cancelled"}
HARDWARE = "batch API"


class BatchBackend(OpenAIBackend):
    """Answers of an endpoint that come by the batch."""

    def identity(self) -> Mapping[str, object]:
        """Name the served model, the schema and the way, for a batch's times are no response times."""
        return {**super().identity(), "batch": True}

    async def resume(self, work: Work) -> None:
        """Wait for batches of earlier runs; forget those that were never sent."""
        if not (held := work.store.reservations(self._mark)):
            return
        async with self._connected() as client:
            for holder, prices in held.items():
                *_, tag, name = holder.split(" ")
                if not name:  # the run died before it was told the name
                    listed = client.batches.list(limit=100)
                    found = [one.id async for one in listed if (one.metadata or {}).get("persodpo") == tag]
                    name = found[0] if found else ""
                if name:
                    await self._collect(client, work, holder, name, {})
                else:
                    work.store.release(prices, holder)

    async def run(self, work: Work) -> None:
        """Submit one batch after another, and wait for each."""
        async with self._connected() as client:
            while requests := dict(await work.take(self.concurrency, FILE_BYTES)):
                lines = []
                for key, request in requests.items():
                    path, body = request_body(self.settings, self.json_keys, request)
                    lines.append(json.dumps({"custom_id": key, "method": "POST", "url": path, "body": body}) + "\n")
                try:
                    file = await client.files.create(file=("requests.jsonl", "".join(lines).encode()), purpose="batch")
                except BaseException:
                    work.give_back(requests)
                    raise
                prices = {key: self.highest_cost(request) for key, request in requests.items()}
                tag = uuid.uuid4().hex
                holder = f"{self._mark}{tag} "
                work.store.hand_over(prices, work.store.run, holder)
                # Sent once: where the endpoint's reply is lost, another attempt would make a second batch.
                made = await client.with_options(max_retries=0).batches.create(
                    input_file_id=file.id,
                    endpoint=path,  # type: ignore[arg-type] # one of two that the client knows
                    completion_window="24h",
                    metadata={"persodpo": tag},
                )
                work.store.hand_over(prices, holder, holder + made.id)
                await self._collect(client, work, holder + made.id, made.id, requests)

    @property
    def _mark(self) -> str:
        """How the names begin that batches of this model have in the store; our tag and the endpoint's name follow."""
        return f"batch {self.model} {self.settings.base_url} "

    async def _collect(
        self, client: openai.AsyncOpenAI, work: Work, holder: str, name: str, requests: dict[str, Request]
    ) -> None:
        """Wait for a batch's end and store an answer or a failure for all of it; only what this run asked is counted."""
        prices = work.store.reservations(holder)[holder]
        while (state := await client.batches.retrieve(name)).status not in ENDED:
            await asyncio.sleep(self.settings.poll_seconds)
        if state.status == "failed":
            work.store.release(prices, holder)
            said = "; ".join(error.message or error.code or "" for error in (state.errors and state.errors.data) or [])
            raise ModelStopped(self.sentence("refused", self.mask.line(said)))
        answers: dict[str, Answer] = {}
        unread = False
        for file_id in filter(None, (state.error_file_id, state.output_file_id)):
            for line in (await client.files.content(file_id)).content.split(b"\n"):
                if found := self._read(work, line, prices):
                    answers[found[0]] = found[1]
                else:
                    unread |= bool(line.strip())
        for key in prices.keys() - answers.keys():
            # A line that nobody can read may be the answer, and be billed.
            missing = f"the batch ended ({state.status}) without a readable answer to this prompt"
            answers[key] = Answer("failed", failure="timeout", error=missing, cost=prices[key] * unread)
        start, end = state.created_at, state.completed_at
        seconds = float(end - start) if start and end else 0.0
        entries = []
        for key, answer in answers.items():
            asked = requests.get(key)
            about = (asked.template, asked.prompt_bytes) if asked else ("", 0)
            timed = replace(answer, latency=seconds, batch_size=len(prices), hardware=HARDWARE)
            entries.append(Entry(key, self.model, *about, timed))
        await asyncio.shield(asyncio.to_thread(work.store.write, entries, holder))
        for entry in entries:
            if entry.key in requests:
                work.count(entry.key, entry.answer)

    def _read(self, work: Work, line: bytes, prices: Mapping[str, float]) -> tuple[str, Answer] | None:
        """Read one line of a result file; None if it does not say whose answer it is."""
        try:
            content = json.loads(line)
            key, response = content["custom_id"], content.get("response") or {}
            price, status, body = prices[key], response.get("status_code"), response.get("body") or {}
        except (ValueError, RecursionError, LookupError, AttributeError, TypeError):
            return None
        try:
            if status != 200:
                raise fault_of(status, {}, content.get("error") or body or "no answer")
            return key, self.booked(work, read_reply(body), price)
        except CallFault as fault:
            kind = "rejected" if fault.kind in LASTING else fault.kind
            return key, Answer("failed", failure=kind, error=self.mask.line(fault.detail), cost=fault.billed * price)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[openai.AsyncOpenAI]:
        """Give a client, and turn its errors into the sentence that stops the model; its own retries are over."""
        try:
            async with self.client(BoundedClient(self.settings, LONGEST_FILE), self.settings.attempts - 1) as client:
                yield client
        except openai.APIStatusError as error:
            fault = fault_of(error.status_code, error.response.headers, error.response.content)
            kind = fault.kind if fault.kind in LASTING else "batch"
            kind = "no_batches" if kind == "unknown_model" else kind
            raise ModelStopped(self.sentence(kind, self.mask.line(fault.detail))) from None
        except openai.OpenAIError as error:
            raise ModelStopped(self.sentence("unreachable", self.mask.line(str(error.__cause__ or error)))) from None
