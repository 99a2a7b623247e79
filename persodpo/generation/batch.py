"""Prompts through the Batch API of an endpoint: submit, poll, collect, and resume after whatever happened in between.

Before a batch is sent, what is set aside for it is handed over to a name in the store that holds the endpoint's name of its
file, and then of the batch. So a run that was killed at any moment finds its batches again. What the endpoint says is taken
as JSON of any shape: a batch that cannot be read is kept for the next run, a line that cannot is a fault of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx2
import openai

from persodpo.generation.ask import Work
from persodpo.generation.client import (
    BoundedClient,
    CallFault,
    as_count,
    as_object,
    as_text,
    fault_of,
    read_reply,
    request_body,
    shape_faults,
)
from persodpo.generation.endpoint import LASTING, OpenAIBackend
from persodpo.generation.requests import Answer, ModelStopped, Request
from persodpo.generation.store import Entry

#: Prompts of one file, bytes, of which JSON makes twice as many, with room to spare; and what is read of one at most.
FILE_BYTES, LONGEST_FILE = 40_000_000, 2**30
#: How often a batch is looked for whose making was not confirmed, for lists of batches may be behind.
LOOKS = 3
ENDED = ("completed", "failed", "expired", "cancelled")
OTHER_WORDS = {"canceled": "cancelled", "succeeded": "completed"}
HARDWARE = "batch API"


class BatchBackend(OpenAIBackend):
    """Answers of an endpoint that come by the batch."""

    poll_seconds = 60.0  # between two looks at a batch

    def identity(self) -> Mapping[str, object]:
        """Name the served model, the schema and the way, for a batch's times are no response times."""
        return {**super().identity(), "batch": True}

    async def resume(self, work: Work) -> None:
        """Wait for batches of earlier runs. What is set aside for one that is not found stays so: it may have been made."""
        if not (holders := self._batches(work)):
            return
        async with self._connected() as client:
            for holder in holders:
                *_, address, file, name = json.loads(holder)
                if address != self._address:
                    raise ModelStopped(self.sentence("elsewhere", address))
                if name := name or await self._name_of(client, file):
                    await self._collect(client, work, holder, name, {})

    async def run(self, work: Work) -> None:
        """Submit one batch after another, and wait for each."""
        async with self._connected() as client:
            while requests := dict(await work.take(self.concurrency, FILE_BYTES)):
                lines = []
                for key, request in requests.items():
                    path, body = request_body(self.settings, self.json_keys, request)
                    lines.append(json.dumps({"custom_id": key, "method": "POST", "url": path, "body": body}) + "\n")
                try:
                    content = ("requests.jsonl", "".join(lines).encode())
                    reply_to_file = await client.files.with_raw_response.create(file=content, purpose="batch")
                    file = self._name(self._object(reply_to_file.http_response))
                except BaseException:
                    work.give_back(requests)
                    raise
                prices = {key: self.highest_cost(request) for key, request in requests.items()}
                holder = self._holder(self._address, file, "")
                work.store.hand_over(prices, work.store.run, holder)
                order = {"input_file_id": file, "endpoint": path, "completion_window": "24h"}
                try:
                    # Sent once: where the endpoint's reply is lost, another attempt would make a second batch.
                    reply = await client.post(
                        "/batches", body=order, cast_to=httpx2.Response, options={"max_retries": 0}
                    )
                except openai.APIStatusError as error:
                    if 400 <= error.status_code < 500 and not fault_of(error.status_code, {}, None).billed:
                        work.store.release(prices, holder)
                    raise
                name = self._name(self._object(reply))
                with_name = self._holder(self._address, file, name)
                work.store.hand_over(prices, holder, with_name)
                await self._collect(client, work, with_name, name, requests)

    @property
    def _address(self) -> str:
        return self.settings.base_url.rstrip("/")

    def _object(self, response: httpx2.Response) -> dict[str, Any]:
        """Return the JSON object that the endpoint sent; anything else stops the model."""
        try:
            content = json.loads(response.content)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise ModelStopped(self.sentence("batch", "its reply is no JSON object"))
        return content

    def _name(self, reply: Mapping[str, Any]) -> str:
        """Return the name that the endpoint gave to a file or batch."""
        name = reply.get("id")
        if not isinstance(name, str) or self.mask.line(name) != name:
            raise ModelStopped(self.sentence("batch", "its reply names no id that can be kept"))
        return name

    async def _name_of(self, client: openai.AsyncOpenAI, file: str) -> str | None:
        """Find a batch in the endpoint's list by its file, if there is a list."""
        for look in range(LOOKS):
            await asyncio.sleep(self.poll_seconds if look else 0)
            names: list[object] = []
            more = True
            while more:
                params = {"limit": 100} | ({"after": names[-1]} if names else {})
                try:
                    reply = await client.get("/batches", cast_to=httpx2.Response, options={"params": params})
                except openai.APIStatusError as error:
                    if error.status_code in {404, 405, 501}:
                        return None
                    raise
                page = self._object(reply)
                entries = page.get("data")
                batches = [as_object(one) for one in entries] if isinstance(entries, list) else []
                for batch in batches:
                    if batch.get("input_file_id") == file:
                        return self._name(batch)
                fresh = [batch.get("id") for batch in batches if batch.get("id") not in names]
                names += fresh
                more = bool(page.get("has_more") and fresh)
        return None

    async def _collect(
        self, client: openai.AsyncOpenAI, work: Work, holder: str, name: str, requests: dict[str, Request]
    ) -> None:
        """Wait for a batch's end and store an answer or a failure for all of it; only what this run asked is counted."""
        prices = work.store.reservations(holder).get(holder, {})
        state, lines = await self._ended(client, name, given_up=work.retry_failed and not requests)
        if state["status"] == "failed" and not lines:
            work.store.release(prices, holder)
            raise ModelStopped(self.sentence("refused", self.mask.line(as_text(state.get("errors")))))
        answers: dict[str, Answer] = {}
        # What a completed batch does not show may have been billed, and so may a line that nobody can read.
        billed = state["status"] == "completed"
        for line in lines:
            key, answer = self._read(work, line, prices) or ("", None)
            billed = billed or answer is None
            if answer and (key not in answers or answers[key].failure):
                answers[key] = answer
        for key in prices.keys() - answers.keys():
            missing = f"the batch ended ({state['status']}) without a readable answer to this prompt"
            answers[key] = Answer("failed", failure="timeout", error=missing, cost=prices[key] * billed)
        start, end = as_count(state.get("created_at")), as_count(state.get("completed_at"))
        seconds = float(max(0, end - start)) if start is not None and end is not None else 0.0
        entries = []
        for key, answer in answers.items():
            request = requests.get(key)
            about = (request.template, request.prompt_bytes) if request else ("", 0)
            timed = replace(answer, latency=seconds, batch_size=len(prices), hardware=HARDWARE)
            entries.append(Entry(key, self.model, *about, timed))
        await asyncio.shield(asyncio.to_thread(work.store.write, entries, holder))
        for entry in entries:
            if entry.key in requests:
                work.count(entry.key, entry.answer)

    async def _ended(
        self, client: openai.AsyncOpenAI, name: str, *, given_up: bool
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Wait for a batch's end; return what the endpoint says of it, and the lines of its files."""
        while True:
            response = await self._found(client, f"/batches/{quote(name, safe='', errors='replace')}", given_up)
            if response is None:  # as far as anybody can tell
                return {"status": "completed"}, []
            state = self._object(response)
            if not isinstance(state.get("status"), str):
                raise ModelStopped(self.sentence("batch", "its reply names no status"))
            status = state["status"].lower()
            state["status"] = OTHER_WORDS.get(status, status)
            if state["status"] in ENDED:
                break
            await asyncio.sleep(self.poll_seconds)
        output = await self._lines(client, state.get("output_file_id"), given_up=given_up)
        errors = await self._lines(client, state.get("error_file_id"), given_up=True)
        gone = given_up and state.get("output_file_id") and not output
        if not gone and len(output) < (as_count(as_object(state.get("request_counts")).get("completed")) or 0):
            raise ModelStopped(self.sentence("batch", "its file of answers is not whole"))
        return state, [*output, *errors]

    async def _found(self, client: openai.AsyncOpenAI, path: str, given_up: bool) -> httpx2.Response | None:
        """Get a batch or a file; one that is not known stops the model, or is None if it is given up."""
        try:
            return await client.get(path, cast_to=httpx2.Response)
        except openai.NotFoundError as error:
            if given_up:
                return None
            raise ModelStopped(self.sentence("lost", self.mask.line(f"{path}: {error.message}"))) from None

    async def _lines(self, client: openai.AsyncOpenAI, file: object, *, given_up: bool) -> list[bytes]:
        """Return the lines of a result file; a page of another kind in its place stops the model."""
        name = quote(file, safe="", errors="replace") if isinstance(file, str) else ""
        response = await self._found(client, f"/files/{name}/content", given_up) if name else None
        lines = [line for line in (response.content if response else b"").split(b"\n") if line.strip()]
        if lines and not any(line.lstrip().startswith(b"{") for line in lines):
            raise ModelStopped(self.sentence("batch", "its file is none of JSON lines"))
        return lines

    def _read(self, work: Work, line: bytes, prices: Mapping[str, float]) -> tuple[str, Answer] | None:
        """Read one line of a result file; None if it does not say whose answer it is."""
        try:
            content = json.loads(line)
            key = content["custom_id"]
            price = prices[key]
        except (ValueError, RecursionError, LookupError, TypeError):
            return None
        try:
            with shape_faults():
                response = as_object(content.get("response"))
                status, body = as_text(response.get("status_code")), response.get("body")
                number = int(status) if status.isdecimal() else None
                error = content.get("error")
                if error if number is None else not 200 <= number < 300:
                    raise fault_of(number, {}, error or body or "no answer")
                answer = read_reply(body)
            return key, self.booked(work, answer, price)
        except CallFault as fault:
            kind = "rejected" if fault.kind in LASTING else fault.kind
            return key, Answer("failed", failure=kind, error=self.mask.line(fault.detail), cost=fault.billed * price)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[openai.AsyncOpenAI]:
        """Give a client, and turn its errors into the sentence that stops the model; its own retries are over."""
        try:
            async with self.client(BoundedClient(self.settings, LONGEST_FILE), self.attempts - 1) as client:
                yield client
        except openai.APIStatusError as error:
            fault = fault_of(error.status_code, error.response.headers, error.response.content)
            kind = fault.kind if fault.kind in LASTING else "batch"
            kind = "no_batches" if kind == "unknown_model" else kind
            raise ModelStopped(self.sentence(kind, self.mask.line(fault.detail))) from None
        except openai.OpenAIError as error:
            detail = str(error.__cause__ or "") or str(error)
            raise ModelStopped(self.sentence("unreachable", self.mask.line(detail))) from None
