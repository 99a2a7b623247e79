"""Prompt in, answer out: what the engine, the store and every backend agree on.

A backend says how it is to be treated (its model's name, how many prompts at a time, its prices and limits) and, once
opened, answers one request after another. What shapes an answer, and nothing else, is part of its key, so an answer is
found again under another address or on another day and never taken for that of another model, prompt or setting.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, TypedDict

from persodpo.config import Prices
from persodpo.errors import PersodpoError
from persodpo.generation.budget import Purse

#: Why a request was not answered. The first two lie with the prompt, the others with the call.
FAILURES = (
    "context_too_long", "rejected", "rate_limited", "server_error", "timeout", "connection_cut", "invalid_body",
    "no_choice", "unreachable",
)  # fmt: skip


class Message(TypedDict):
    """One turn of a chat.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        content: Its text.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how it is to be answered.

    Attributes:
        dialogue_id: The dialogue that the prompt was rendered from.
        prompt: Raw text, or the messages of a chat.
        max_new_tokens: Longest answer, tokens.
        temperature: 0 is greedy; None leaves it to the server, as some models accept no other than their own.
        seed: Of sampling; None for none.
        template: Hash of the template that the prompt was rendered with.

    Raises:
        PersodpoError: The prompt holds no text.
    """

    dialogue_id: str
    prompt: str | tuple[Message, ...]
    max_new_tokens: int
    temperature: float | None
    seed: int | None
    template: str

    def __post_init__(self) -> None:
        """Refuse an empty prompt, which some servers answer nevertheless."""
        if not any(text.strip() for text in self.texts):
            raise PersodpoError(
                f"The prompt of dialogue '{self.dialogue_id}' is empty; give the dialogue a context or leave it out."
            )

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompt's texts, one a message."""
        return (self.prompt,) if isinstance(self.prompt, str) else tuple(turn["content"] for turn in self.prompt)

    @property
    def prompt_bytes(self) -> int:
        """Size of the prompt's texts in UTF-8."""
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in self.texts)


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request.

    Attributes:
        outcome: ``answered`` if the model said something, a refusal included; else ``failed``.
        completion: The generated text, None for a failure.
        finish_reason: ``stop``, ``length``, ``content_filter``, ``refusal`` or the server's own word; None if unknown.
        failure: One of `FAILURES`, None for an answer.
        error: What went wrong, in one line without secrets; None for an answer.
        prompt_tokens: As the server counted them; None if it did not say.
        completion_tokens: As above.
        cost: US dollars. Attempts that may have been billed without an answer count with their highest possible price.
        latency: Seconds of the last attempt.
        attempts: How often the request was sent.
        batch_size: Prompts answered together with this one, itself included, in ``latency`` seconds; None where only
            the server knows.
        hardware: What the model ran on, None where only the server knows.
    """

    outcome: Literal["answered", "failed"]
    completion: str | None = None
    finish_reason: str | None = None
    failure: str | None = None
    error: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float = 0.0
    latency: float = 0.0
    attempts: int = 1
    batch_size: int | None = None
    hardware: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a server takes in a minute; None for no limit.

    Attributes:
        requests_per_minute: Requests, repeated ones included.
        tokens_per_minute: Tokens of prompts and longest answers together.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class ModelStopped(PersodpoError):  # noqa: N818 - says what happened, like BudgetReached
    """No further request to this model can succeed; the other models go on."""


AnswerRequest = Callable[[Request], Awaitable[Answer]]


class Backend(Protocol):
    """Where the answers of one model come from."""

    @property
    def model(self) -> str:
        """Name of the model in all tables."""

    @property
    def concurrency(self) -> int:
        """How many requests it wants at a time."""

    @property
    def prices(self) -> Prices | None:
        """Prices of its tokens; None if unknown."""

    @property
    def limits(self) -> Limits:
        """What its server takes in a minute."""

    @property
    def local(self) -> bool:
        """True for a model of this machine, which is asked when no other is, so that its times are its own."""

    def identity(self) -> Mapping[str, object]:
        """Return, as JSON-like content, what shapes an answer besides its request."""

    def open(self, purse: Purse) -> AbstractAsyncContextManager[AnswerRequest]:
        """Connect or load the model; gives the function that answers one request, called `concurrency` times at once.

        Whatever costs money is reserved in ``purse`` before it is spent. The function returns failures as answers. It
        raises `ModelStopped` or `BudgetReached` where no further request can be made; that request was then not
        answered and counts as left to do. Opening raises PersodpoError if the model cannot be had at all.
        """


def request_key(request: Request, backend: Backend) -> str:
    """Return the hex sha256 of all that shapes the answer: model, prompt, parameters, template and backend."""
    content = {
        "model": backend.model, "prompt": request.prompt, "max_new_tokens": request.max_new_tokens,
        "temperature": request.temperature, "seed": request.seed, "template": request.template,
        "backend": backend.identity(),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
