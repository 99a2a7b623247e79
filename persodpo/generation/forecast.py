"""What a run would take, before the first call: requests, tokens, money and time of one model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from persodpo.generation.requests import Backend, Request, request_key
from persodpo.generation.store import CHUNK, Experience, Store

#: Bytes of English text to a token, where no stored answer says better.
BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Forecast:
    """What one model's run would take.

    Attributes:
        model: The model's name.
        requests: All requests.
        stored: Of these, answered or failed already.
        to_ask: Requests that would be sent.
        sample: Stored answers that the expectation rests on; 0: four bytes a token, and every answer at its longest.
        prompt_tokens: Expected.
        completion_tokens: Expected.
        cost: Expected US dollars, None if the prices are unknown.
        highest_cost: US dollars if every answer reaches its longest length, None if the prices are unknown.
        seconds: Expected wall time; None without a sample, unless the endpoint's limits decide.
    """

    model: str
    requests: int
    stored: int
    to_ask: int
    sample: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    highest_cost: float | None
    seconds: float | None

    def __str__(self) -> str:
        """Return one line for the command and notebooks."""
        basis = f"from {self.sample:,} stored answers" if self.sample else "from text lengths, nothing is stored yet"
        cost = "cost unknown" if self.cost is None else f"${self.cost:,.2f} (at most ${self.highest_cost:,.2f})"
        took = "time unknown" if self.seconds is None else f"{self.seconds:,.0f} s"
        return (
            f"{self.model}: {self.to_ask:,} of {self.requests:,} requests to ask, {self.prompt_tokens:,} + "
            f"{self.completion_tokens:,} tokens, {cost}, {took}; {basis}"
        )


@dataclass
class _Missing:
    """What is not stored, counted as it passes."""

    requests: int = 0
    to_ask: int = 0
    prompt_bytes: int = 0
    longest: int = 0
    template: str = ""


def forecast(requests: Iterable[Request], backend: Backend, store: Store, *, retry_failed: bool = False) -> Forecast:
    """Forecast what `persodpo.generation.engine.generate` would do; nothing is sent and nothing written.

    Args:
        requests: As for ``generate``; gone through once, in flat memory.
        backend: Its prices, limits and concurrency are used, it is not opened.
        store: Stored answers are not asked again, and those of this model to the same template say how many tokens and
            seconds an answer takes.
        retry_failed: As for ``generate``.

    Returns:
        The forecast.

    Raises:
        PersodpoError: The store fails.
    """
    missing = _count(requests, backend, store, retry_failed)
    known = store.experience(backend.model, missing.template, backend.concurrency)
    prompt_tokens = round(missing.prompt_bytes * (known.tokens_per_byte if known else 1 / BYTES_PER_TOKEN))
    expected = min(missing.longest, round(missing.to_ask * known.completion_tokens)) if known else missing.longest
    prices = backend.prices
    return Forecast(
        model=backend.model,
        requests=missing.requests,
        stored=missing.requests - missing.to_ask,
        to_ask=missing.to_ask,
        sample=known.answers if known else 0,
        prompt_tokens=prompt_tokens,
        completion_tokens=expected,
        cost=prices.cost(prompt_tokens, expected) if prices else None,
        highest_cost=prices.cost(prompt_tokens, missing.longest) if prices else None,
        seconds=_seconds(missing, prompt_tokens, backend, known),
    )


def _count(requests: Iterable[Request], backend: Backend, store: Store, retry_failed: bool) -> _Missing:
    """Go through all requests, some hundred at a time."""
    missing = _Missing()
    remaining = iter(requests)
    while chunk := list(islice(remaining, CHUNK)):
        by_key = {request_key(request, backend): request for request in chunk}
        missing.template = missing.template or chunk[0].template
        missing.requests += len(chunk)
        for key in store.missing(by_key, retry_failed):
            missing.to_ask += 1
            missing.prompt_bytes += by_key[key].prompt_bytes
            missing.longest += by_key[key].max_new_tokens
    return missing


def _seconds(missing: _Missing, prompt_tokens: int, backend: Backend, known: Experience | None) -> float | None:
    """Return the longest of what answering and the endpoint's limits take, None if neither is known."""
    limits = backend.limits
    bounds = [missing.to_ask * known.seconds] if known else []
    if limits.requests_per_minute:
        bounds.append(60 * missing.to_ask / limits.requests_per_minute)
    if limits.tokens_per_minute:
        bounds.append(60 * (prompt_tokens + missing.longest) / limits.tokens_per_minute)
    return max(bounds, default=None)
