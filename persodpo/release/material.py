"""What every check of the audit looks at, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from persodpo.config import Profile
from persodpo.release.published import SETS, PublishedSet, read_set

CONFIRMED, PARTLY, REFUTED = "confirmed", "partly", "refuted"
#: A verdict and the numbers it rests on, in a sentence or two. ``partly``: the data files show one part of the claim only.
Evidence = tuple[str, str]


def evidence(holds: bool, text: str, verdict: str = CONFIRMED) -> Evidence:
    """Confirm a claim, as a whole or partly, or refute it."""
    return (verdict if holds else REFUTED), text


@dataclass(frozen=True)
class Material:
    """What the checks look at.

    Attributes:
        files: Manifest path -> published file.
        tables: The run's tables by name, made ``as_released``.
        low: Low threshold of quality.
        high: High threshold of quality.
        profile: The profile of the run.
    """

    files: dict[str, Path]
    tables: dict[str, pd.DataFrame]
    low: float
    high: float
    profile: Profile

    @cached_property
    def sets(self) -> dict[str, tuple[PublishedSet, pd.DataFrame]]:
        """Every published set by its label, as published."""
        return {which.label: (which, read_set(self.files, which)) for which in SETS}

    @cached_property
    def pool(self) -> pd.DataFrame:
        """Ranked train responses with their scores."""
        return self.tables["responses"].merge(self.tables["scores"], on=["dialogue_id", "model"], validate="one_to_one")

    def rows(self, label: str) -> pd.DataFrame:
        """Return a published set, as published."""
        return self.sets[label][1]

    def gate(self, pair_set: str) -> dict[str, float]:
        """Return the gate's checks of a pair set."""
        gate = self.tables["pairs/gate"]
        rows = gate[gate["pair_set"] == pair_set]
        return dict(zip(rows["check"], rows["value"], strict=True))
