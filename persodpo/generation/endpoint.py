"""Answers of any OpenAI-compatible endpoint: OpenAI itself, vLLM, Ollama, llama.cpp, ``transformers serve``.

The ``openai`` client sends, waits and tries again. `_Wire` below it sees each attempt: it keeps to the endpoint's pace,
knows which attempts may have been billed, and tells the client whether another one can help.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import httpx2
import openai

from persodpo.config import OpenAIModel
from persodpo.generation.ask import Work
from persodpo.generation.client import (
    BoundedClient,
    CallFault,
    Mask,
    api_key,
    fault_of,
    proxy_logins,
    read_reply,
    request_body,
    shape_faults,
)
from persodpo.generation.requests import Answer, Backend, ModelStopped, Request
from persodpo.generation.summary import BYTES_PER_TOKEN

#: Longest body that is read, bytes as decoded.
LONGEST_BODY = 16 * 2**20
#: Longest wait that the client takes from a server, seconds; one that asks for more stops its model.
LONGEST_WAIT = 120.0
#: Seconds by which a request may be late and yet not delay those after it; after a stall nothing is made up for.
LATE = 0.05
#: Attempts at an endpoint that has never answered; a wrong address is no matter for patience.
FIRST_ATTEMPTS = 2
#: Tokens that servers add around each message of a chat, at most.
MESSAGE_TOKENS = 16
#: As many failures in a row, with no answer between, stop the model: something is wrong that no prompt can help.
FAILURES_IN_A_ROW = 20
#: Why a model is stopped, by the kind of fault: what its endpoint does, and what helps.
LASTING = {
    "key": ("refuses {key}", "set api_key_env to a variable that holds a valid key"),
    "denied": ("denies {key} this model", "ask for access or choose another model"),
    "quota": ("has no credit left for {key}", "top up the account and run again"),
    "unknown_model": ("does not know '{served}'", "correct served_as, or base_url, which usually ends in /v1"),
    "redirect": ("sends its callers elsewhere", "nothing was sent there, correct base_url"),
    "unreachable": ("cannot be reached", "start the server or correct base_url"),
    "wait": ("asks for a long wait", "run again then, answers are kept"),
    "usage": ("reports more use than was allowed", "what it says is booked, check its bill"),
    "row": (f"failed for {FAILURES_IN_A_ROW} prompts in a row", "mend that and run again, with failures retried"),
    "elsewhere": ("has a batch under way at another address", "set base_url back until it is collected"),
    "batch": ("failed on a batch", "run again later"),
    "lost": ("does not find a batch with {key}", "run again with its own key, or give it up as paid: --retry-failed"),
    "no_batches": ("has no Batch API", "set batch: false"),
    "refused": ("refused a batch", "correct what it names and run again"),
}


class OpenAIBackend(Backend):
    """Answers over the ``openai`` client."""

    local = False
    attempts = 6  # how often a prompt is sent at most

    def __init__(self, settings: OpenAIModel, json_keys: tuple[str, ...] = ()) -> None:
        """Take the settings, and the keys of the JSON object that the endpoint must hold the model to; none: no schema."""
        self.settings = settings
        self.json_keys = json_keys
        self.model = settings.model
        self.concurrency = settings.concurrency
        self.prices = settings.prices
        self.minute = (None, None) if settings.batch else (settings.requests_per_minute, settings.tokens_per_minute)
        self.mask = Mask(None)

    def identity(self) -> Mapping[str, object]:
        """Name the served model and the enforced schema; the address may change."""
        served = self.settings.served_as or self.model
        return {"kind": "openai", "served_as": served, "json_keys": list(self.json_keys)}

    def highest_cost(self, request: Request) -> float:
        """Return the most that one attempt can cost, US dollars: no tokenizer makes more tokens than a text has bytes."""
        if self.prices is None:
            return 0.0
        around = MESSAGE_TOKENS * (len(request.texts) + 1 + 2 * len(self.json_keys))
        return self.prices.cost(request.prompt_bytes + around, request.max_new_tokens)

    def client(self, http: BoundedClient, retries: int) -> openai.AsyncOpenAI:
        """Read the key, which is handed to nothing but the client, and return one that is to be closed."""
        key = api_key(self.settings)
        self.mask = Mask(key, *proxy_logins())
        client = openai.AsyncOpenAI(
            api_key=key or "none", http_client=http, base_url=self.settings.base_url, max_retries=retries,
            timeout=http.timeout,
        )  # fmt: skip
        # Left to itself the client would send keys and headers of the environment to whatever server base_url names.
        client._custom_headers = {"Authorization": f"Bearer {key or 'none'}"}
        return client

    def sentence(self, kind: str, detail: str) -> str:
        """Return why the model is stopped: by a kind of `LASTING`, with what was said, without secrets."""
        settings, (does, remedy) = self.settings, LASTING[kind]
        key = f"the key in {settings.api_key_env}" if settings.api_key_env else "requests without a key"
        does = does.format(key=key, served=settings.served_as or settings.model)
        return f"{settings.base_url}, asked for model {settings.model}, {does} ({detail}); {remedy}."

    def booked(self, work: Work, answer: Answer, price: float) -> Answer:
        """Return an answer with its cost, as counted or at the highest price; one that costs more stops the model."""
        cost = price
        if self.prices and answer.prompt_tokens is not None and answer.completion_tokens is not None:
            cost = self.prices.cost(answer.prompt_tokens, answer.completion_tokens)
            if cost > price > 0:  # not where the prices came after the request
                detail = f"{answer.prompt_tokens:,} + {answer.completion_tokens:,} tokens, ${cost:,.4f}"
                work.stop(self.sentence("usage", f"{detail} where ${price:,.4f} was the most"))
        return self.mask.withheld(replace(answer, cost=cost))

    async def resume(self, work: Work) -> None:
        """Stop where a batch of this model is under way, of which nothing would be collected.

        Raises:
            ModelStopped: There is one.
        """
        if self._batches(work):
            raise ModelStopped(
                f"A batch of model {self.model} is under way; set batch: true and run again, which collects it."
            )

    def _holder(self, *names: str) -> str:
        """Return what a batch of this model is called in the store: by its endpoint, the names of its file and its own."""
        return json.dumps(["batch", self.model, *names])

    def _batches(self, work: Work) -> dict[str, dict[str, float]]:
        """Return what is set aside for batches of this model that are under way."""
        return work.store.reservations(self._holder()[:-1] + ",")

    async def run(self, work: Work) -> None:
        """Read the key, make a client and keep as many requests under way as the settings say."""
        wire = _Wire(self, work)
        async with self.client(wire, self.attempts - 1) as client, asyncio.TaskGroup() as group:
            for _ in range(self.concurrency):
                group.create_task(wire.work(client))


@dataclass
class _Call:
    """One request on its way."""

    key: str
    price: float  # the most that one attempt can cost, US dollars
    tokens: int  # of prompt and longest answer, as the pace counts them
    attempts: int = 0
    billed: int = 0  # attempts that may have been billed, the one under way included
    latency: float = 0.0  # seconds of the last one
    answer: Answer | None = None
    fault: CallFault | None = None  # what the last attempt lacked


_CALL: ContextVar[_Call] = ContextVar("call")


class _Wire(BoundedClient):
    """One run against one endpoint, attempt by attempt."""

    def __init__(self, backend: OpenAIBackend, work: Work) -> None:
        super().__init__(backend.settings, LONGEST_BODY)
        self._backend, self._settings, self._work = backend, backend.settings, work
        self._pace = Pace(*backend.minute)
        self._reached = self._answered = False
        self._failures_in_a_row = 0

    async def work(self, client: openai.AsyncOpenAI) -> None:
        """Answer one request after another."""
        while item := await self._work.take():
            ((key, request),) = item
            tokens = request.prompt_bytes // BYTES_PER_TOKEN + request.max_new_tokens
            call = _Call(key, self._backend.highest_cost(request), tokens)
            answer = None
            try:
                answer = await self._ask(client, call, request)
            finally:  # also where it is interrupted
                if answer is None and not call.billed:
                    self._work.give_back([key])
            if answer is not None:
                await self._work.done(key, request, answer)

    async def _ask(self, client: openai.AsyncOpenAI, call: _Call, request: Request) -> Answer | None:
        """Answer one request; None where it is left to do, because the model was stopped."""
        _CALL.set(call)
        path, body = request_body(self._settings, self._backend.json_keys, request)
        try:
            # The client's typed methods convert every field both ways, which costs more than sending it.
            await client.post(path.removeprefix("/v1"), body=body, cast_to=object)
        except CallFault as error:
            call.fault = error
        except UnicodeEncodeError:
            call.fault = CallFault("rejected", "the prompt holds half a character", billed=False)
        except openai.APIStatusError:
            pass  # the last attempt's fault may pass, but there was no further attempt
        lost_cost = (call.billed - (call.answer is not None)) * call.price
        if call.answer is not None:
            self._answered, self._failures_in_a_row = True, 0
            answer = self._backend.booked(self._work, call.answer, call.price)
            return replace(answer, cost=answer.cost + lost_cost, latency=call.latency, attempts=call.attempts)
        fault = call.fault or CallFault("invalid_body", "no answer")
        self._stop_if_lasting(fault)
        if self._work.summary.stopped and not call.billed and (fault.kind in LASTING or fault.transient):
            return None
        kind = "rejected" if fault.kind in LASTING and fault.kind != "unreachable" else fault.kind
        return Answer(
            "failed", failure=kind, error=fault.detail, cost=lost_cost, latency=call.latency, attempts=call.attempts
        )

    def _stop_if_lasting(self, fault: CallFault) -> None:
        """Stop the model where no further request can succeed, or none has for long."""
        kind, detail = fault.kind, fault.detail
        self._failures_in_a_row += kind != "context_too_long"
        if fault.retry_after is not None and fault.retry_after > LONGEST_WAIT:
            kind, detail = "wait", f"{fault.retry_after:,.0f} s"
        # Some endpoints deny single prompts in this way.
        if kind in LASTING and not (kind == "denied" and self._answered):
            self._work.stop(self._backend.sentence(kind, detail))
        elif self._failures_in_a_row >= FAILURES_IN_A_ROW:
            self._work.stop(self._backend.sentence("row", f"{kind}, {detail}"))

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Make one attempt; the client is told whether it gave an answer or another one can help, and nothing else."""
        call = _CALL.get()
        await self._pace.wait(call.tokens)
        if self._work.summary.stopped:
            raise call.fault or CallFault("unreachable", "not sent", transient=True, billed=False)
        if call.fault and call.billed and not self._work.pay_again(call.key, call.price):
            raise call.fault
        started = time.perf_counter()
        call.attempts += 1
        call.billed += 1
        try:
            call.answer = await self._attempt(call, request, options)
        except CallFault as fault:
            fault.detail = self._backend.mask.line(fault.detail)
            call.fault = fault
            call.billed -= not fault.billed
            if not fault.transient:
                raise
            wait = {} if fault.retry_after is None else {"retry-after": str(fault.retry_after)}
            return httpx2.Response(503, headers=wait, request=request)
        finally:
            call.latency = time.perf_counter() - started
        return httpx2.Response(200, json={}, request=request)

    async def _attempt(self, call: _Call, request: httpx2.Request, options: dict[str, Any]) -> Answer:
        """Return an answer; whatever comes in its place is a fault."""
        try:
            response = await super().send(request, **options)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.UnsupportedProtocol, httpx2.ProxyError) as error:
            patient = self._reached or call.attempts < FIRST_ATTEMPTS
            raise CallFault(
                "unreachable", str(error) or type(error).__name__, transient=patient, billed=False
            ) from None
        except httpx2.TimeoutException:
            raise CallFault("timeout", "no answer in time", transient=True) from None
        except httpx2.DecodingError as error:
            raise CallFault("invalid_body", str(error)) from None
        except Exception as error:  # whatever goes wrong on the way is a fault of this request
            raise CallFault("connection_cut", str(error) or type(error).__name__, transient=True) from None
        self._reached = True
        with shape_faults():
            if not 200 <= response.status_code < 300:
                raise fault_of(response.status_code, response.headers, response.content)
            return read_reply(response.content)


class Pace:
    """Spaces requests evenly, because servers hold their limits over seconds as well as over minutes.

    In any 60 seconds no more than the limit of requests are sent, and no more tokens beside those of the last request.
    """

    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        """Start without a history: the first request may go at once."""
        self._request_seconds = 60 / requests_per_minute if requests_per_minute else 0.0
        self._token_seconds = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._free_at = float("-inf")
        self._turn = asyncio.Lock()

    def slot(self, tokens: int, now: float) -> float:
        """Return the time at which a request of this many tokens may be sent, and keep that time for it."""
        at = max(now, self._free_at)
        self._free_at = at + max(self._request_seconds, tokens * self._token_seconds)
        return at

    async def wait(self, tokens: int) -> None:
        """Wait until a request of this many tokens may be sent."""
        async with self._turn:
            due = self._free_at
            await asyncio.sleep(due - time.monotonic())
            now = time.monotonic()
            self.slot(tokens, due if now - due < LATE else now)
