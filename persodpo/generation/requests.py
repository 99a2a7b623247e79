"""Prompt in, answer out: what asking, the store and every backend agree on.

What shapes an answer, and nothing else, is part of its key, so an answer is found again under another address or on another
day and never taken for that of another model, prompt or setting.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import pandas as pd

from persodpo.config import AskedModel, Prices, Profile
from persodpo.errors import PersodpoError
from persodpo.files import read_json, sha256
from persodpo.prompts import load_system, load_template, render, template_digest, token_budget

if TYPE_CHECKING:
    from persodpo.generation.ask import Work

#: What leads a turn; a context of nothing else says nothing.
_SPEAKER = re.compile(r"^\w+:", re.MULTILINE)
#: Files that shape what a model says, and records beside them that do not.
_WEIGHTS = {".safetensors", ".json", ".txt", ".model", ".jinja"}
_RECORDS = {"policy.json", "arm.json", "trainer_state.json"}
#: One turn of a chat: its role (``system``, ``user`` or ``assistant``) and its content.
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how it is to be answered."""

    dialogue_id: str  # that the prompt was rendered from
    prompt: str | tuple[Message, ...]  # raw text, or a chat
    max_new_tokens: int  # of the longest answer
    temperature: float | None  # 0: greedy; None: the server's own, as some models accept no other
    seed: int | None  # of sampling
    template: str  # hash of the prompt's template

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
    """What became of one request; ``answered`` if the model said something, a refusal included."""

    outcome: Literal["answered", "failed"]
    completion: str | None = None  # the text as it came, None for a failure
    finish_reason: str | None = None  # stop, length, content_filter, refusal, or another word that ends an answer
    #: None for an answer. It lies with the prompt: context_too_long, rejected; or with the call: rate_limited,
    #: server_error, timeout, connection_cut, invalid_body, no_choice, unreachable.
    failure: str | None = None
    error: str | None = None  # what went wrong, in one line without secrets
    prompt_tokens: int | None = None  # as the server counted them
    completion_tokens: int | None = None
    cost: float = 0.0  # US dollars; attempts that may have been billed without an answer count at their highest price
    latency: float = 0.0  # seconds of the last attempt
    attempts: int = 1
    batch_size: int | None = None  # prompts answered together in that time, None where only the server knows
    hardware: str | None = None  # what the model ran on, as above


class ModelStopped(PersodpoError):  # noqa: N818 - says what happened
    """No further request to this model can succeed; the other models go on."""


class Backend(ABC):
    """Where the answers of one model come from; what is said here holds for a model of this machine."""

    model: str  # its name in all tables
    concurrency: int  # how many requests it wants at a time
    prices: Prices | None = Prices(input_per_million=0, output_per_million=0)  # None if unknown
    minute: tuple[int | None, int | None] = (None, None)  # requests, and tokens, that its server takes in a minute
    local = True  # asked when no other model is, so that its times are its own

    @abstractmethod
    def identity(self) -> Mapping[str, object]:
        """Return, as JSON-like content, what shapes an answer besides its request."""

    def highest_cost(self, request: Request) -> float:
        """Return what is to be set aside before a request is sent, US dollars: the most that one attempt can cost."""
        return 0.0

    async def resume(self, work: Work) -> None:  # noqa: B027 - most have nothing to do
        """Bring in what an earlier run has paid for and never saw; called before anything is looked up."""

    @abstractmethod
    async def run(self, work: Work) -> None:
        """Connect or load the model, take requests from ``work`` until there is none, and hand in their answers.

        Raises:
            ModelStopped: The model cannot be had, or no further request can succeed.
        """


class Job(NamedTuple):
    """What one model is to answer."""

    requests: Iterable[Request]  # gone through once
    backend: Backend
    total: int | None = None  # requests, for the progress bar


def request_key(request: Request, backend: Backend) -> str:
    """Return the hex sha256 of all that shapes the answer: model, prompt, parameters, template and backend."""
    content = {
        "model": backend.model, "prompt": request.prompt, "max_new_tokens": request.max_new_tokens,
        "temperature": request.temperature, "seed": request.seed, "template": request.template,
        "backend": backend.identity(),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def requests_for(dialogues: pd.DataFrame, settings: AskedModel, profile: Profile) -> Iterator[Request]:
    """Return what one model is to answer: a request per row of the dialogues table, rendered as it is taken.

    Raises:
        PersodpoError: A template is wrong, or a dialogue has no context.
    """
    template = load_template(profile.prompts.template)
    system = load_system(profile.prompts) if settings.format == "chat_with_system" else None
    turns_text = dialogues["context"].fillna("").str.replace(_SPEAKER, "", regex=True).str.strip()
    empty = dialogues.loc[turns_text == "", "dialogue_id"]
    if len(empty):
        raise PersodpoError(
            f"Dialogue '{empty.iloc[0]}' has no context to answer ({len(empty)} such dialogues); leave it out of its file."
        )
    temperature, digest = profile.generation.temperature, template_digest(template, system)
    budget = token_budget(template, profile.prompts.max_words, fits_words=profile.corrects("A5"))
    seed = profile.seed if temperature else None
    rows = zip(dialogues["dialogue_id"], dialogues["personas"], dialogues["context"], strict=True)

    def request(dialogue_id: str, personas: list[str], context: str) -> Request:
        text = render(template, personas, context, profile.prompts, persona_lines=profile.corrects("A10a"))
        prompt = text if settings.format == "raw" else as_messages(text, system)
        return Request(dialogue_id, prompt, budget, temperature, seed, digest)

    return (request(*row) for row in rows)


def as_messages(prompt: str, system: str | None) -> tuple[Message, ...]:
    """Return a prompt as a chat of one user message, after the system message if there is one."""
    first = (Message(role="system", content=system),) if system else ()
    return (*first, Message(role="user", content=prompt))


def folder_digest(folder: Path) -> str | None:
    """Return the hex sha256 of the files that shape a model's answers, its base's too; None if there is no such folder."""
    names = {path.name for path in folder.glob("*") if path.suffix in _WEIGHTS and path.is_file()} - _RECORDS
    if not any(name.endswith(".safetensors") for name in names):
        return None
    lines = [f"{name} {sha256(folder / name)}" for name in sorted(names)]
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if isinstance(base, str) and Path(base).resolve() != folder.resolve():
        lines.append(str(folder_digest(Path(base))))
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
