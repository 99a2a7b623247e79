"""Answers of any OpenAI-compatible endpoint: OpenAI itself, vLLM, Ollama, llama.cpp, ``transformers serve``.

The client's own retries are off. Here each attempt waits for the endpoint's pace, reserves its highest possible price,
and is classified when it fails: a fault of the prompt fails that prompt at once, a passing fault is tried again, a
lasting one stops the model. The API key is read from the environment and is handed to nothing but the client.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

import openai
from openai import AsyncOpenAI
from pydantic import Field

from persodpo.config import Count, Positive, Section
from persodpo.errors import PersodpoError
from persodpo.generation.budget import BudgetReached, Prices, Purse
from persodpo.generation.faults import FAILURES_IN_A_ROW, LASTING, CallFault, Redactor, classify, read_reply
from persodpo.generation.pacing import Pace
from persodpo.generation.requests import Answer, AnswerRequest, Limits, ModelStopped, Request

#: Attempts at an endpoint that has never answered; a wrong address is no matter for patience.
FIRST_ATTEMPTS = 2
FIRST_WAIT = 1.0
CONNECT_SECONDS = 10.0
#: Tokens that servers add around each message of a chat, at most.
MESSAGE_TOKENS = 16
BYTES_PER_TOKEN = 4


class OpenAIEndpoint(Section):
    """One model behind one endpoint.

    Attributes:
        model: The model's name in all tables.
        served_as: The name the endpoint knows it by; None: the same.
        base_url: Address up to ``/v1``, without user name, password or query.
        api_key_env: Environment variable that holds the key; None for a server that asks for none.
        concurrency: Requests under way at a time.
        requests_per_minute: The endpoint's limit, None for none.
        tokens_per_minute: The same, prompts and longest answers together.
        timeout_seconds: Longest wait for one attempt, from sending to the last byte.
        attempts: How often a prompt is sent at most.
        longest_wait_seconds: Longest pause between two attempts; a server that asks for a longer one stops the model.
        token_limit: The field that the endpoint reads the longest answer from; newer OpenAI models want the second.
        json_keys: Keys, all text, of the JSON object that the endpoint must hold the model to; empty: no such schema.
        prices: Prices of the tokens; None if unknown, then no budget can be kept.
    """

    model: Annotated[str, Field(min_length=1)]
    served_as: str | None
    base_url: str
    api_key_env: str | None
    concurrency: Count
    requests_per_minute: Count | None
    tokens_per_minute: Count | None
    timeout_seconds: Positive
    attempts: Count
    longest_wait_seconds: Positive
    token_limit: Literal["max_tokens", "max_completion_tokens"]
    json_keys: tuple[str, ...]
    prices: Prices | None


class OpenAIBackend:
    """A backend (`persodpo.generation.requests.Backend`) over the ``openai`` client."""

    def __init__(self, settings: OpenAIEndpoint) -> None:
        """Check the address; nothing is connected yet.

        Raises:
            PersodpoError: The address is none, or holds a secret.
        """
        _check_address(settings)
        self.settings = settings
        self.model = settings.model
        self.concurrency = settings.concurrency
        self.prices = settings.prices
        self.limits = Limits(settings.requests_per_minute, settings.tokens_per_minute)

    def identity(self, request: Request) -> Mapping[str, object]:
        """Name the served model and the enforced schema; the address may change."""
        served = self.settings.served_as or self.model
        return {"kind": "openai", "served_as": served, "json_keys": list(self.settings.json_keys)}

    @asynccontextmanager
    async def open(self, purse: Purse) -> AsyncIterator[AnswerRequest]:
        """Read the key and make a client.

        Raises:
            PersodpoError: The key's variable is not set; it is named, never its value.
        """
        key = self._key()
        # Without a key of its own the client would send OPENAI_API_KEY to whatever server base_url names.
        client = AsyncOpenAI(
            api_key=key or "none",
            base_url=self.settings.base_url,
            max_retries=0,
            timeout=openai.Timeout(
                self.settings.timeout_seconds, connect=min(CONNECT_SECONDS, self.settings.timeout_seconds)
            ),
        )
        async with client:
            yield _Session(self.settings, client, Redactor(key), purse).answer

    def _key(self) -> str | None:
        variable = self.settings.api_key_env
        if variable is None:
            return None
        key = os.environ.get(variable, "").strip()
        if not key:
            raise PersodpoError(
                f"Model {self.model} needs an API key in the environment variable {variable}, which is not set; export it "
                "and run again."
            )
        if not key.isascii() or not key.isprintable():
            raise PersodpoError(
                f"The API key in the environment variable {variable} holds characters that no key has; export it again."
            )
        return key


class _Session:
    """One run against one endpoint."""

    def __init__(self, settings: OpenAIEndpoint, client: AsyncOpenAI, redactor: Redactor, purse: Purse) -> None:
        self._settings = settings
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
            return fault
        except (openai.OpenAIError, TimeoutError, ValueError) as error:
            found = classify(error, self._redactor)
            cost = cost if found.billed else 0.0
            return found
        finally:
            self._purse.settle(reservation, cost)

    async def _send(self, request: Request) -> object:
        """Send a request in the form that its prompt asks for."""
        settings = self._settings
        served = settings.served_as or settings.model
        options: dict[str, Any] = {} if request.temperature is None else {"temperature": request.temperature}
        if request.seed is not None:
            options["seed"] = request.seed
        if isinstance(request.prompt, str):
            if settings.json_keys:
                raise CallFault("rejected", "json_keys need a chat prompt, raw text cannot be held to a schema")
            return await self._client.completions.create(
                model=served, prompt=request.prompt, max_tokens=request.max_new_tokens, **options
            )
        options[settings.token_limit] = request.max_new_tokens
        if settings.json_keys:
            options["response_format"] = _schema(settings.json_keys)
        return await self._client.chat.completions.create(
            model=served, messages=cast(Any, list(request.prompt)), **options
        )

    def _highest_cost(self, request: Request) -> float:
        """Return the most that one attempt can cost: no tokenizer makes more tokens than a text has bytes."""
        if self._settings.prices is None:
            return 0.0
        around = MESSAGE_TOKENS * (len(request.texts) + 1 + 2 * len(self._settings.json_keys))
        return self._settings.prices.cost(request.prompt_bytes + around, request.max_new_tokens)

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
        if lasting:
            self._stop(LASTING[fault.kind].format(**self._words(), detail=fault.detail))
        if fault.retry_after is not None and fault.retry_after > settings.longest_wait_seconds:
            self._stop(LASTING["wait"].format(**self._words(), detail=f"{fault.retry_after:,.0f} s"))
        if fault.retry_after is not None:
            self._pace.pause(time.monotonic() + fault.retry_after)
        self._raise_if_stopped()

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


def _check_address(settings: OpenAIEndpoint) -> None:
    """Refuse an address that is none, or that a secret would be shown with."""
    if "@" in settings.base_url or "?" in settings.base_url:
        raise PersodpoError(
            f"base_url of model {settings.model} must hold no user name, password or query; put the key into an "
            "environment variable and name it in api_key_env."
        )
    try:
        parts = urlsplit(settings.base_url)
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise PersodpoError(
            f"base_url of model {settings.model} is no address; write it like http://localhost:8000/v1."
        )


def _schema(keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the ``response_format`` that asks for one object with these keys, all text."""
    schema = {
        "type": "object", "properties": {key: {"type": "string"} for key in keys}, "required": list(keys),
        "additionalProperties": False,
    }  # fmt: skip
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
