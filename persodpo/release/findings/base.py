"""What every check of the audit takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from persodpo.config import Profile
from persodpo.corrections import Correction
from persodpo.release.published import SETS, PublishedSet, read_set

CONFIRMED, PARTLY, REFUTED = "confirmed", "partly", "refuted"


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

    def gate(self, pair_set: str) -> dict[str, float]:
        """Return the gate's checks of a pair set."""
        gate = self.tables["pairs/gate"]
        rows = gate[gate["pair_set"] == pair_set]
        return dict(zip(rows["check"], rows["value"], strict=True))


@dataclass(frozen=True)
class Evidence:
    """What a check saw.

    Attributes:
        verdict: ``confirmed``, ``refuted``, or ``partly`` where the published data files show one part of the claim only.
        text: The numbers, in a sentence or two.
    """

    verdict: str
    text: str


def evidence(holds: bool, text: str) -> Evidence:
    """Confirm or refute a claim."""
    return Evidence(CONFIRMED if holds else REFUTED, text)


@dataclass(frozen=True)
class Finding:
    """A claim about the release and its executable check.

    Attributes:
        id: A1, A2, ...
        claim: What is claimed.
        consequence: What it means for the method or the paper.
        correction: The entry of ``corrections`` in a profile that mends it; None if there is none.
        mend: Where there is none, what mends it.
        check: Recomputes the claim from the published files.
    """

    id: str
    claim: str
    consequence: str
    check: Callable[[Material], Evidence]
    correction: Correction | None = None
    mend: str = ""

    @property
    def setting(self) -> str:
        """The setting that mends it, else what does."""
        return f"corrections: [{self.correction}]" if self.correction else self.mend
