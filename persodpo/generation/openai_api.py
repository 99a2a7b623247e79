"""Answers of any OpenAI-compatible endpoint: OpenAI itself, vLLM, Ollama, llama.cpp, ``transformers serve``.

The client's own retries are off. Here each attempt waits for the endpoint's pace, reserves its highest possible price,
and is classified when it fails: a fault of the prompt fails that prompt at once, a passing fault is tried again, a
lasting one stops the model. The API key is read from the environment and is handed to nothing but the client.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import openai
from openai import AsyncOpenAI

from persodpo.config import OpenAIModel
from persodpo.generation.budget import BudgetReached, Purse
from persodpo.generation.endpoint import api_key, client_for, highest_cost, request_body
from persodpo.generation.faults import FAILURES_IN_A_ROW, LASTING, CallFault, Redactor, classify, read_reply
from persodpo.generation.pacing import Pace
from persodpo.generation.requests import Answer, AnswerRequest, Limits, ModelStopped, Request

#: Attempts at an endpoint that has never answered; a wrong address is no matter for patience.
FIRST_ATTEMPTS = 2
FIRST_WAIT = 1.0
BYTES_PER_TOKEN = 4


class OpenAIBackend:
    """A backend (`persodpo.generation.requests.Backend`) over the ``openai`` client."""

    def __init__(self, settings: OpenAIModel, json_keys: tuple[str, ...] = ()) -> None:
        """Take the settings; nothing is connected yet.

        Args:
            settings: Of the endpoint.
            json_keys: Keys, all text, of the JSON object that the endpoint must hold the model to; empty: no such schema.
        """
        self.settings = settings
        self.json_keys = json_keys
        self.model = settings.model
        self.concurrency = settings.concurrency
        self.prices = settings.prices
        self.limits = Limits(settings.requests_per_minute, settings.tokens_per_minute)
        self.local = False

    def identity(self) -> Mapping[str, object]:
        """Name the served model and the enforced schema; the address may change."""
        served = self.settings.served_as or self.model
        return {"kind": "openai", "served_as": served, "json_keys": list(self.json_keys)}

    @asynccontextmanager
    async def open(self, purse: Purse) -> AsyncIterator[AnswerRequest]:
        """Read the key and make a client.

        Raises:
            PersodpoError: The key's variable is not set; it is named, never its value.
        """
        key = api_key(self.settings)
        async with client_for(self.settings, key) as client:
            yield _Session(self.settings, self.json_keys, client, Redactor(key), purse).answer


class _Session:
    """One run against one endpoint."""

    def __init__(
        self,
        settings: OpenAIModel,
        json_keys: tuple[str, ...],
        client: AsyncOpenAI,
        redactor: Redactor,
        purse: Purse,
    ) -> None:
        self._settings = settings
        self._json_keys = json_keys
        self._client = client
        self._redactor = redactor
        self._purse = purse
        self._pace = Pace(Limits(settings.requests_per_minute, settings.tokens_per_minute))
        self._stopped: str | None = None
        self._stopping = asyncio.Event()
        self._reached = False
        self._answered = False
        self._failures_in_a_row = 0

    async def answer(self, request: Request) -> Answer:
        """Answer one request, trying again where that can help; see `persodpo.generation.requests.Backend.open`."""
        fault: CallFault | None = None
        sent, lost, latency = 0, 0.0, 0.0
        while fault is None or (fault.transient and sent < self._settings.attempts):
            try:
                reservation = await self._ready(request, fault, sent)
                sent += 1
                started = time.perf_counter()
                outcome = await self._attempt(request, reservation)
                latency = time.perf_counter() - started
                if isinstance(outcome, Answer):
                    self._answered, self._failures_in_a_row = True, 0
                    return replace(outcome, attempts=sent, cost=outcome.cost + lost, latency=latency)
                self._stop_if_lasting(outcome, sent)
            except (BudgetReached, ModelStopped):
                # What earlier attempts may have cost must reach the store, so such a request ends as a failure.
                if fault is None or not lost:
                    raise
                break
            fault = outcome
            lost += self._highest_cost(request) if fault.billed else 0.0
        self._count_failure(fault)
        return Answer("failed", failure=fault.kind, error=fault.detail, cost=lost, latency=latency, attempts=sent)

    async def _ready(self, request: Request, fault: CallFault | None, sent: int) -> int:
        """Wait until the request may be sent (again), and reserve its highest possible price."""
        if fault is not None:
            longest = min(self._settings.longest_wait_seconds, FIRST_WAIT * 2 ** (sent - 1))
            await self._sleep((fault.retry_after or 0.0) + random.uniform(0, longest))  # noqa: S311
        tokens = request.prompt_bytes // BYTES_PER_TOKEN + request.max_new_tokens
        at = self._pace.slot(tokens, time.monotonic())
        while (wait := max(at, self._pace.paused_until) - time.monotonic()) > 0:
            paused = self._pace.paused_until > at
            # Those that a pause held up do not all come back at the same moment.
            await self._sleep(wait + (random.uniform(0, FIRST_WAIT) if paused else 0.0))  # noqa: S311
        self._raise_if_stopped()
        return await self._purse.reserve(self._highest_cost(request))

    async def _attempt(self, request: Request, reservation: int) -> Answer | CallFault:
        """Send a request once and settle what was reserved for it."""
        # Whatever ends the attempt from outside may come after the server has done its work.
        cost = self._highest_cost(request)
        try:
            async with asyncio.timeout(self._settings.timeout_seconds):
                reply = await self._send(request)
            answer = read_reply(reply, self._redactor)
            if self._settings.prices is None:
                cost = 0.0
            elif answer.prompt_tokens is not None and answer.completion_tokens is not None:
                cost = self._settings.prices.cost(answer.prompt_tokens, answer.completion_tokens)
            return replace(answer, cost=cost)
        except CallFault as fault:
            cost = cost if fault.billed else 0.0
            return fault
        except (openai.OpenAIError, TimeoutError, ValueError, RecursionError) as error:
            found = classify(error, self._redactor)
            cost = cost if found.billed else 0.0
            return found
        finally:
            self._purse.settle(reservation, cost)

    async def _send(self, request: Request) -> object:
        """Send a request; return the body as JSON, or as text if it is none."""
        path, body = request_body(self._settings, self._json_keys, request)
        # The client's typed methods convert every field both ways, which costs more than sending it.
        return await self._client.post(path, body=body, cast_to=object)

    def _highest_cost(self, request: Request) -> float:
        return highest_cost(self._settings, self._json_keys, request)

    def _stop_if_lasting(self, fault: CallFault, sent: int) -> None:
        """Raise ModelStopped where no further request can succeed."""
        settings = self._settings
        if fault.kind == "unreachable":
            allowed = settings.attempts if self._reached else min(FIRST_ATTEMPTS, settings.attempts)
            lasting = sent >= allowed
        else:
            self._reached = True
            lasting = fault.kind in LASTING
        if fault.kind == "denied" and self._answered:
            # Some endpoints deny single prompts in this way.
            fault.kind, lasting = "rejected", False
        reason, detail = fault.kind, fault.detail
        if fault.retry_after is not None and fault.retry_after > settings.longest_wait_seconds:
            reason, detail, lasting = "wait", f"{fault.retry_after:,.0f} s", True
        if lasting:
            self._stop(LASTING[reason].format(**self._words(), detail=detail))
            self._raise_if_stopped()
        if fault.retry_after is not None:
            self._pace.pause(time.monotonic() + fault.retry_after)

    def _count_failure(self, fault: CallFault) -> None:
        """Stop the model after too many failures in a row; the request at hand has failed by itself."""
        if fault.kind == "context_too_long":
            return
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= FAILURES_IN_A_ROW:
            self._stop(LASTING["row"].format(**self._words(), detail=f"{fault.kind}, {fault.detail}"))

    def _words(self) -> dict[str, str]:
        settings = self._settings
        key = f"the key in {settings.api_key_env}" if settings.api_key_env else "requests without a key"
        return {
            "model": settings.model, "served": settings.served_as or settings.model, "url": settings.base_url, "key": key,
        }  # fmt: skip

    def _stop(self, sentence: str) -> None:
        """Let no further request be sent; the first reason stands."""
        self._stopped = self._stopped or sentence
        self._stopping.set()

    def _raise_if_stopped(self) -> None:
        if self._stopped:
            raise ModelStopped(self._stopped)

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not on when the model has been stopped."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        self._raise_if_stopped()
