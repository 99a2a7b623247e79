"""What is said about one thing that a run needs: whether it is there, and what to do if it is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        state: ``ok``, ``missing``, or ``unknown`` where this machine cannot tell without loading or asking.
        sentence: What it is, and the remedy if it is not there; no secret.
    """

    state: Literal["ok", "missing", "unknown"]
    sentence: str

    def __str__(self) -> str:
        """Return the line, its state first."""
        return f"{self.state:<8} {self.sentence}"


def ok(sentence: str) -> Finding:
    """Return a finding of something that is there."""
    return Finding("ok", sentence)


def missing(sentence: str) -> Finding:
    """Return a finding of something that the run would stop at, or would have to fetch."""
    return Finding("missing", sentence)


def unknown(sentence: str) -> Finding:
    """Return a finding of something that cannot be told here."""
    return Finding("unknown", sentence)


def gib(size: float) -> str:
    """Return a number of bytes in GiB, to a tenth."""
    return f"{size / GIB:,.1f} GiB"
