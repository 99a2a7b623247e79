"""The released scoring loop, written again to be set beside a straight one: same scores, other rows (audit A1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

WINDOW = 8


def windowed(
    score: Callable[[Sequence[T]], Sequence[float]], texts: Sequence[T], starts: int | None = None
) -> list[float]:
    """Score as the release did: take slices of 8, advance by 1, keep what comes out in a row.

    Row k then holds the score of text ``k // 8 + k % 8``, and every text is scored up to eight times.

    Args:
        score: Scores a slice of texts.
        texts: All texts.
        starts: How many slices to take; all of them, one a text, if None. Those beyond the first eighth change nothing.

    Returns:
        The first scores that came out, at most one a text.
    """
    kept: list[float] = []
    for start in range(len(texts) if starts is None else min(starts, len(texts))):
        kept += [float(value) for value in score(texts[start : start + WINDOW])]
    return kept[: len(texts)]
