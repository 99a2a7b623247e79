"""Recorded completions as a backend: the same run again, at no cost and without the model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

from persodpo.generation.budget import Purse
from persodpo.generation.requests import Answer, AnswerRequest, Limits, Request
from persodpo.settings import Prices


class Recorded(NamedTuple):
    """One recorded answer.

    Attributes:
        completion: The text as it was generated.
        finish_reason: Why it ended, None if that was not recorded.
        latency: Seconds it took, 0 if that was not recorded.
        batch_size: Prompts answered together in that time, None if that is not known.
        hardware: What it was computed on, None if that is not known.
    """

    completion: str
    finish_reason: str | None = None
    latency: float = 0.0
    batch_size: int | None = None
    hardware: str | None = None


@dataclass(frozen=True)
class ReplayBackend:
    """Answers the dialogues of one model from a recording.

    Attributes:
        model: The recorded model's name in all tables.
        recorded: Its answers by dialogue_id.
        recording: Hash of the file they come from.
    """

    model: str
    recorded: Mapping[str, Recorded]
    recording: str = ""

    concurrency = 64
    prices = Prices(input_per_million=0, output_per_million=0)
    limits = Limits()
    local = False

    def identity(self, request: Request) -> Mapping[str, object]:
        """Name the dialogue: two dialogues with the same prompt may have been answered differently."""
        return {"kind": "replay", "recording": self.recording, "dialogue_id": request.dialogue_id}

    @asynccontextmanager
    async def open(self, purse: Purse) -> AsyncIterator[AnswerRequest]:
        """Give the function that looks answers up; ``purse`` is not touched."""

        async def answer(request: Request) -> Answer:
            found = self.recorded.get(request.dialogue_id)
            if found is None:
                error = f"There is no recorded answer of {self.model} to dialogue '{request.dialogue_id}'."
                return Answer("failed", failure="not_recorded", error=error)
            return Answer(
                "answered", found.completion, found.finish_reason, latency=found.latency, batch_size=found.batch_size,
                hardware=found.hardware,
            )  # fmt: skip

        yield answer
