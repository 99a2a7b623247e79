"""Scorers whose values can be told from the text, and a small run to score."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

import numpy as np
import pandas as pd

from persodpo.runfolder import RunFolder
from persodpo.scoring.score import Item, Scored
from persodpo.tables import schema_of


class Letters:
    """Scores a response by its letters; counts what it was asked, and may kill its process before a batch."""

    def __init__(
        self, name: str = "coherence", limit: int = 10**9, killed_before: int = -1, key: str = "letters"
    ) -> None:
        """Name the scorer, how many letters it reads, the batch before which it kills its process, and its key."""
        self._name, self.limit, self.killed_before, self._key = name, limit, killed_before, key
        self.batches: list[list[str]] = []

    @property
    def name(self) -> str:
        return self._name

    @property
    def key(self) -> str:
        return f"{self._key} {self.limit}"

    @property
    def asked(self) -> list[str]:
        return [text for batch in self.batches for text in batch]

    def value(self, item: Item) -> float:
        return sum(map(ord, item.response[: self.limit])) / 1000 + len(item.context)

    def score(self, items: Sequence[Item]) -> Scored:
        if len(self.batches) == self.killed_before:
            os.kill(os.getpid(), signal.SIGKILL)
        self.batches.append([item.response for item in items])
        unread = [max(0.0, 1 - self.limit / max(1, len(item.response))) for item in items]
        return Scored(np.array([self.value(item) for item in items]), np.array(unread))


def ask(*responses: str, context: str = "User1: hi", personas: tuple[str, ...] = ("I like art.",)) -> list[Item]:
    """Ask about responses to one dialogue."""
    return [Item(personas, context, "ref", text) for text in responses]


def write_run(run: RunFolder, dialogues: pd.DataFrame, responses: pd.DataFrame) -> None:
    """Write the tables that scoring reads; the held-out responses are the first half of the others."""
    half = responses.iloc[: len(responses) // 2].assign(split="valid")
    tables = {"dialogues": dialogues, "responses": responses, "evaluation/responses": half}
    tables = {name: frame.reindex(columns=schema_of(name).names) for name, frame in tables.items()}
    run.stage("given", lambda: tables, outputs=list(tables))


def small_world(dialogues: int = 4) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return dialogues and responses of three models, one of which fails to every other dialogue, once without text."""
    ids = [f"d{n}" for n in range(dialogues)]
    told = pd.DataFrame({
        "dialogue_id": ids, "split": "train", "dataset": "made up",
        "personas": [["agree x", f"deny w{n}"] for n in range(dialogues)],
        "context": [f"User1: agree x w{n}" for n in range(dialogues)], "reference": "agree x good",
    })  # fmt: skip
    rows = []
    for n, dialogue in enumerate(ids):
        for model in ("m1", "m2", "m3"):
            text = {"m1": "agree good x", "m2": f"deny good good {'x ' * n}".strip(), "m3": "agree"}[model]
            outcome = "truncated" if model == "m3" and n % 2 else "ok"
            text = None if outcome != "ok" and n == 1 else text
            rows.append((dialogue, "train", model, f'{{"response": "{text}"}}', text, outcome, None, 0.1))
    names = ["dialogue_id", "split", "model", "completion", "response", "outcome", "finish_reason", "response_time"]
    return told, pd.DataFrame(rows, columns=names)
