"""The paper profile with only its names swapped: paths, weights, addresses and sizes, nothing of the method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from test_dialogues import focus_entry

from persodpo.config import Profile, load_profile

#: What makes the training of hundreds of steps on a GPU one of seconds on a CPU.
SMALL_TRAINING = {
    "dialogues.train_size": 10, "training.epochs": 1, "training.warmup_steps": 1,
    "training.token_budget": 4096, "training.held_out": 0.2,
    "training.health_tokens": 8, "training.stop_when_collapsed": False,
    "scoring.accept_failed_probes": "[coherence, c_score, ue_score, persona_distance]",
}  # fmt: skip


def write_focus(folder: Path, train: int = 12, valid: int = 4) -> dict[str, Path]:
    """Write two files of FoCus's own JSON."""
    paths = {}
    for split, first, count in (("train", 0, train), ("valid", 100, valid)):
        paths[split] = folder / f"{split}_focus.json"
        entries = [focus_entry(number) for number in range(first, first + count)]
        paths[split].write_text(json.dumps({"data": entries}))
    return paths


def swapped(
    folder: Path, weights: dict[str, Path], scorers: dict[str, Path], policy: Path, url: str, **changes: Any
) -> Profile:
    """Return the paper profile with other names.

    Args:
        folder: Where the run and the FoCus files go.
        weights: Folder of each model that runs on this machine, by the model's name.
        scorers: Folder or file of each scorer.
        policy: Folder of the policy.
        url: Address of the endpoint.
        changes: Further overrides, with ``__`` for dots.
    """
    backends = []
    for entry in load_profile("paper").generation.backends:
        known = entry.model_dump(mode="json")
        swaps = {"weights": str(weights[entry.model])} if entry.kind == "transformers" else {"base_url": url}
        backends.append({**known, **swaps})
    write_focus(folder)
    settings = {
        "home": folder, "dialogues.source": folder,
        **{f"scoring.models.{metric}": path for metric, path in scorers.items()},
        "generation.backends": json.dumps(backends), "policy.model": policy, **SMALL_TRAINING,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }  # fmt: skip
    return load_profile("paper", [f"{key}={value}" for key, value in settings.items()])
