"""What asking a model would take, what came of it, and its answers as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Literal

import pandas as pd

from persodpo.completions import read_completion
from persodpo.generation.requests import Answer, Backend, Job, Request, request_key
from persodpo.generation.store import CHUNK, Store
from persodpo.tables import schema_of, with_none

Reading = Literal["as_released", "strict"]
#: Bytes of English text to a token, where no stored answer says better.
BYTES_PER_TOKEN = 4


@dataclass
class Summary:
    """What became of one model's requests."""

    model: str
    asked: int = 0  # requests that were sent, each counted once: answered and failed
    answered: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # by class
    outcomes: Counter[str] = field(default_factory=Counter)  # what the answers read as; failures are api_error
    skipped: int = 0  # stored already, or a second time in this run
    left: int = 0  # still to be asked, because the model was stopped
    truncated: int = 0  # answers that reached their longest length
    prompt_tokens: int = 0  # as far as the server counted them
    completion_tokens: int = 0
    cost: float | None = 0.0  # US dollars of this run; None if the prices are unknown
    seconds: float = 0.0
    stopped: str | None = None  # why the model was stopped

    def __str__(self) -> str:
        """Return one line for logs and notebooks."""
        failed = ", ".join(f"{count:,} {name}" for name, count in sorted(self.failed.items()))
        parts = [
            f"{self.answered:,} answered", f"{self.failed.total():,} failed" + (f" ({failed})" if failed else ""),
            f"{self.skipped:,} stored before", f"{self.truncated:,} cut off at their longest length",
            f"{self.prompt_tokens:,} + {self.completion_tokens:,} tokens",
            "cost unknown" if self.cost is None else f"${self.cost:,.4f}", f"{self.seconds:,.1f} s",
        ]  # fmt: skip
        read = ", ".join(f"{count:,} {name}" for name, count in self.outcomes.most_common())
        parts += [f"read as {read}"] if read else []
        parts += [f"{self.left:,} left to do: {self.stopped}"] if self.stopped else []
        return f"{self.model}: {', '.join(parts)}"

    def count(self, answer: Answer, reading: Reading) -> None:
        """Add one request's outcome."""
        self.asked += 1
        self.outcomes[outcome_of(answer, reading)] += 1
        self.prompt_tokens += answer.prompt_tokens or 0
        self.completion_tokens += answer.completion_tokens or 0
        self.truncated += answer.finish_reason == "length"
        if self.cost is not None:
            self.cost += answer.cost
        if answer.failure is None:
            self.answered += 1
        else:
            self.failed[answer.failure] += 1


def outcome_of(answer: Answer, reading: Reading) -> str:
    """Return an answer's outcome class (`persodpo.completions.OUTCOMES`); what has no answer is ``api_error``."""
    return "api_error" if answer.failure is not None else read_completion(answer.completion, reading).outcome


@dataclass(frozen=True)
class Forecast:
    """What one model's run would take."""

    model: str
    requests: int
    to_ask: int  # of these, neither answered nor failed yet
    sample: int  # stored answers that the expectation rests on; 0: four bytes a token, every answer at its longest
    prompt_tokens: int
    completion_tokens: int
    cost: float | None  # US dollars, None if the prices are unknown
    highest_cost: float | None  # if every byte is a token and every answer reaches its longest length
    seconds: float | None  # None without a sample, unless the endpoint's limits decide

    def __str__(self) -> str:
        """Return one line for the command and notebooks."""
        basis = f"from {self.sample:,} stored answers" if self.sample else "from text lengths, nothing is stored yet"
        cost = "cost unknown" if self.cost is None else f"${self.cost:,.2f} (at most ${self.highest_cost:,.2f})"
        took = "time unknown" if self.seconds is None else f"{self.seconds:,.0f} s"
        return (
            f"{self.model}: {self.to_ask:,} of {self.requests:,} requests to ask, {self.prompt_tokens:,} + "
            f"{self.completion_tokens:,} tokens, {cost}, {took}; {basis}"
        )


def forecast(requests: Iterable[Request], backend: Backend, store: Store, *, retry_failed: bool = False) -> Forecast:
    """Forecast what `persodpo.generation.ask.generate` would do; nothing is sent and nothing written.

    Stored answers are not asked again, and those of this model to the same template say how many tokens and seconds an
    answer takes. Requests are gone through once, and only their keys are kept.
    """
    total = to_ask = prompt_bytes = longest = 0
    most, keys = 0.0, set[str]()
    template, remaining = "", iter(requests)
    while chunk := list(islice(remaining, CHUNK)):
        by_key = {request_key(request, backend): request for request in chunk}
        template, total = template or chunk[0].template, total + len(chunk)
        missing = [by_key[key] for key in store.missing(by_key, retry_failed) if key not in keys]
        keys |= by_key.keys()
        to_ask += len(missing)
        prompt_bytes += sum(request.prompt_bytes for request in missing)
        longest += sum(request.max_new_tokens for request in missing)
        most += sum(map(backend.highest_cost, missing))
    experience = store.experience(backend.model, template, backend.concurrency)
    prompt_tokens = round(prompt_bytes * (experience.tokens_per_byte if experience else 1 / BYTES_PER_TOKEN))
    expected = min(longest, round(to_ask * experience.completion_tokens)) if experience else longest
    requests_a_minute, tokens_a_minute = backend.minute
    bounds = [to_ask * experience.seconds] if experience else []
    bounds += [60 * to_ask / requests_a_minute] if requests_a_minute else []
    bounds += [60 * (prompt_tokens + longest) / tokens_a_minute] if tokens_a_minute else []
    prices = backend.prices
    return Forecast(
        model=backend.model, requests=total, to_ask=to_ask, sample=experience.answers if experience else 0,
        prompt_tokens=prompt_tokens, completion_tokens=expected,
        cost=prices.cost(prompt_tokens, expected) if prices else None,
        highest_cost=most if prices else None,
        seconds=max(bounds, default=None),
    )  # fmt: skip


def stored_answers(store: Store, jobs: Iterable[tuple[Job, Sequence[str]]], reading: Reading) -> pd.DataFrame:
    """Return what the store holds of some jobs, each given with the splits of its dialogues.

    Returns:
        An answers table (`persodpo.tables.SCHEMAS`), a row for each request that was answered or has failed.
    """
    rows = []
    for job, splits in jobs:
        requests = list(job.requests)
        entries = store.entries(request_key(request, job.backend) for request in requests)
        for request, split, (_, entry) in zip(requests, splits, entries, strict=True):
            if entry is not None:
                rows.append({
                    **asdict(entry.answer), "dialogue_id": request.dialogue_id, "split": split,
                    "model": job.backend.model, "response": read_completion(entry.answer.completion, reading).response,
                    "outcome": outcome_of(entry.answer, reading), "response_time": entry.answer.latency,
                    "created": entry.created,
                })  # fmt: skip
    frame = pd.DataFrame(rows, columns=schema_of("answers").names)
    whole = {
        name: frame[name].astype("Int64") for name in ("batch_size", "prompt_tokens", "completion_tokens", "attempts")
    }
    return with_none(frame.assign(**whole))
