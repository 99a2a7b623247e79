"""What became of a model's requests, counted as answers come in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from persodpo.completions import read_completion
from persodpo.generation.requests import Answer

Reading = Literal["as_released", "strict"]


def outcome_of(answer: Answer, reading: Reading) -> str:
    """Return an answer's outcome class (`persodpo.completions.OUTCOMES`); what has no answer is ``api_error``."""
    return "api_error" if answer.failure is not None else read_completion(answer.completion, reading).outcome


@dataclass
class Summary:
    """What became of one model's requests.

    Attributes:
        model: The model's name.
        asked: Requests that were sent, each counted once: answered and failed.
        answered: Of these, with an answer.
        failed: Failures by class.
        outcomes: What the answers read as, and the failures as ``api_error``, in the order in which they first came.
        skipped: Requests whose answer (or failure) was stored already, or that stood twice in this run.
        busy: Requests that another process is asking.
        left: Requests still to be asked, because the model was stopped.
        truncated: Answers that reached their longest length.
        prompt_tokens: As far as the server counted them.
        completion_tokens: As above.
        cost: US dollars of this run; None if the prices are unknown.
        seconds: Wall time.
        stopped: Why the model was stopped, None if it went through.
    """

    model: str
    asked: int = 0
    answered: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    busy: int = 0
    left: int = 0
    truncated: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = 0.0
    seconds: float = 0.0
    stopped: str | None = None

    def __str__(self) -> str:
        """Return one line for logs and notebooks."""
        failed = ", ".join(f"{count:,} {name}" for name, count in sorted(self.failed.items()))
        cost = "cost unknown" if self.cost is None else f"${self.cost:,.4f}"
        parts = [
            f"{self.answered:,} answered", f"{sum(self.failed.values()):,} failed" + (f" ({failed})" if failed else ""),
            f"{self.skipped:,} stored before", f"{self.truncated:,} cut off at their longest length",
            f"{self.prompt_tokens:,} + {self.completion_tokens:,} tokens", cost, f"{self.seconds:,.1f} s",
        ]  # fmt: skip
        read = ", ".join(f"{count:,} {name}" for name, count in self.outcomes.most_common())
        parts += [f"read as {read}"] if read else []
        parts += [f"{self.busy:,} left to another process"] if self.busy else []
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
            self.failed[answer.failure] = self.failed.get(answer.failure, 0) + 1
