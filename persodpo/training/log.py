"""A trainer's log history in, the log table out; and the same while training still runs, as a file of JSON lines.

The table comes when an arm is done. Until then its folder has ``live.jsonl``: what trains (process, steps in all), then an
entry of the history a line. It is for eyes alone; nothing is computed from it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from persodpo.artifacts import is_running, read_text

#: Name of the file of a running training, in the arm's folder.
LIVE = "live.jsonl"
#: Column of the log table -> name in the trainer's log history, with ``eval_`` before it for evaluations.
COLUMNS = {
    "loss": "loss", "grad_norm": "grad_norm", "learning_rate": "learning_rate", "reward_margin": "rewards/margins",
    "reward_accuracy": "rewards/accuracies", "reward_chosen": "rewards/chosen", "reward_rejected": "rewards/rejected",
    "logps_chosen": "logps/chosen", "logps_rejected": "logps/rejected", "weight": "weights",
    "parse_rate": "health/parse_rate", "words": "health/words", "loops": "health/loops",
}  # fmt: skip
#: What a row of the log history is, by a name that only it has.
KINDS = {"loss": "train", "eval_loss": "eval", "health/parse_rate": "health"}


def log_table(history: Sequence[Mapping[str, Any]], policy: str) -> pd.DataFrame:
    """Make the log table of a trainer's log history.

    Args:
        history: The log history, under TRL's names.
        policy: What was trained, for figures to say.

    Returns:
        Columns policy, kind, step, epoch and those of `COLUMNS`, NaN where a row of its kind has no such value.
    """
    rows = []
    for log in history:
        kind = next((kind for name, kind in KINDS.items() if name in log), None)
        if kind:
            before = "eval_" if kind == "eval" else ""
            values = {column: log.get(before + name, float("nan")) for column, name in COLUMNS.items()}
            rows.append(
                {"policy": policy, "kind": kind, "step": int(log["step"]), "epoch": log.get("epoch", 0.0), **values}
            )
    return pd.DataFrame(rows, columns=["policy", "kind", "step", "epoch", *COLUMNS])


@dataclass(frozen=True)
class Live:
    """A training that has not come to its end.

    Attributes:
        log: Its log table so far.
        steps: Optimiser steps in all.
        running: Whether its process still runs; False where it was interrupted.
    """

    log: pd.DataFrame
    steps: int
    running: bool

    @property
    def step(self) -> int:
        """The last logged step, 0 before the first."""
        return int(self.log["step"].max()) if len(self.log) else 0


def write_live(folder: Path, history: Sequence[Mapping[str, Any]], steps: int, *, since: int = 0) -> None:
    """Write entries of a log history for those who watch.

    Args:
        folder: The arm's folder.
        history: All of the history so far.
        steps: Optimiser steps in all.
        since: Entries that stand in the file already; 0 begins it anew.

    Raises:
        OSError: The disk fails.
    """
    head = [] if since else [{"process": os.getpid(), "steps": steps}]
    lines = [json.dumps(entry) + "\n" for entry in (*head, *history[since:])]
    with (folder / LIVE).open("a" if since else "w", encoding="utf-8") as file:
        file.writelines(lines)


def read_live(folder: Path) -> Live | None:
    """Return the training that runs, or was interrupted, in an arm's folder; None if there is none.

    A line that is just being written is left out.
    """
    lines = (read_text(folder / LIVE) or "").splitlines()
    entries = [entry for entry in map(_entry, lines) if entry]
    if not entries or "process" not in entries[0]:
        return None
    head, *history = entries
    return Live(log_table(history, ""), int(head["steps"]), is_running(int(head["process"])))


def _entry(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
