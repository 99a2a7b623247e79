"""What every scorer is: texts in, one number each out, whatever the order, the batch or the padding.

A scorer is asked through three doors. `Scorer.texts` says which texts of an item its score depends on, so that equal
texts are scored once and found again in the cache; `Scorer.identity` says what else shapes a score; `Scorer.score`
gives the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

#: How a scorer reads its texts: as the authors' does, or mended.
Way = Literal["as_released", "corrected"]


class Item(NamedTuple):
    """A response and what it answers.

    Attributes:
        personas: Persona sentences of User1.
        context: The turns so far, one a line, each led by its speaker (``User1: ...``).
        reference: The gold answer, without its speaker.
        response: What is scored.
    """

    personas: tuple[str, ...]
    context: str
    reference: str
    response: str


class Scored(NamedTuple):
    """What a scorer says about some texts.

    Attributes:
        values: One finite float64 a text tuple, in the order of the texts, [texts].
        truncated: How many inputs were cut to the model's length.
        notes: Further shares to report, such as ``{"out_of_vocabulary": 0.03}``.
    """

    values: np.ndarray
    truncated: int
    notes: Mapping[str, float]


class Scorer(Protocol):
    """One signal. Its values do not depend on order, batch size or padding, to 1e-5."""

    @property
    def name(self) -> str:
        """Column of the scores table: coherence, c_score, ue_score or persona_distance; or an extra's name."""
        ...

    def identity(self) -> Mapping[str, object]:
        """Return all that shapes a score besides the texts, JSON-like: kind, checkpoint sha256, settings, dtype."""
        ...

    def texts(self, item: Item) -> tuple[str, ...]:
        """Return exactly the texts that the score of ``item`` depends on."""
        ...

    def score(self, texts: Sequence[tuple[str, ...]]) -> Scored:
        """Score text tuples as `texts` makes them; the model is loaded on first use, batches are sorted by length."""
        ...
