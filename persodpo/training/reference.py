"""Reference log-probabilities, once per response: computed by the policy's own forward pass, and cached on disk."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from trl.trainer.utils import use_adapter

from persodpo.imports import code_of
from persodpo.runfolder import write_atomically
from persodpo.training.forward import attention_of, base_model
from persodpo.training.groups import micro_batches, split_responses
from persodpo.training.guard import Verdict
from persodpo.training.packing import Group, Layout, PackedRows, pack

Forward = Callable[[PackedRows], Tensor]


def describe(model: Any, verdict: Verdict) -> dict[str, object]:
    """Return what else than weights a model's log-probabilities depend on, without where they came from."""
    config = base_model(model).config.to_dict() | {"_name_or_path": None, "transformers_version": None}
    return {
        "config": json.dumps(config, sort_keys=True, default=str),
        "adapters": {name: str(adapter) for name, adapter in getattr(model, "peft_config", {}).items()},
        "dtype": model.dtype, "attention": attention_of(model), "grouped": verdict.grouped, "probe": verdict.probe,
        "code": code_of(__name__, "persodpo.training"),
        "versions": [module.__version__ for module in (torch, transformers, peft, trl)],
    }  # fmt: skip


def reference_key(groups: Sequence[Group], **settings: object) -> str:
    """Return the cache key: everything that a reference log-probability depends on.

    Args:
        groups: Token ids of prompts and responses (so of the template and the length limit too).
        **settings: The rest, by name: the model's weights and config, dtype, attention, code and versions.

    Returns:
        A hex sha256.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for group in groups:
        digest.update(json.dumps([group.prompt, group.responses]).encode())
    return digest.hexdigest()


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Let a PEFT policy be its own reference meanwhile; nothing is done to any other model."""
    if not isinstance(model, peft.PeftModel):
        yield
        return
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with use_adapter(model, "ref" if "ref" in model.peft_config else None):
        yield
    # PEFT lets the whole adapter be trained again, also what the user had frozen of it.
    for parameter, was_trained in trained:
        parameter.requires_grad_(was_trained)


def reference_log_probs(
    compute: Forward, rows: Sequence[Group], *, token_budget: int, layout: Layout, share: tuple[int, int] = (0, 1)
) -> dict[int, list[float]]:
    """Compute the log-probability of each response.

    Args:
        compute: Packed rows to log-probabilities, [responses].
        rows: What to compute it for.
        token_budget: Most positions of a micro-batch; a larger group is split.
        layout: How groups become rows.
        share: This process's number and how many there are; each takes its share of the micro-batches.

    Returns:
        Number of a part of a group -> one value per response, for this process's share.
    """
    number, count = share
    parts = [part for group in rows for part in split_responses(group, token_budget, layout)]
    values: dict[int, list[float]] = {}
    batches = list(micro_batches(parts, token_budget, layout))
    # Sharded models gather weights in each pass, so every process makes as many.
    batches += batches[: -len(batches) % count]
    mine = tqdm(
        batches[number::count], desc="reference log-probs", leave=False, disable=number > 0 or not sys.stderr.isatty()
    )
    for places in mine:
        with torch.no_grad():
            log_probs = iter(compute(pack([parts[place] for place in places], layout)).float().tolist())
        values |= {place: [next(log_probs) for _ in parts[place].responses] for place in places}
    return values


def by_group(values: Iterable[float], groups: Sequence[Group]) -> list[list[float]]:
    """Return one list per group from the values of all responses in order."""
    rest = iter(values)
    return [[next(rest) for _ in group.responses] for group in groups]


def load_reference(path: Path, groups: Sequence[Group]) -> list[list[float]] | None:
    """Read cached values; None if there are none, or the file is damaged."""
    try:
        values = load_file(path)["log_probs"].tolist()
    except (OSError, SafetensorError, KeyError):
        return None
    return by_group(values, groups) if len(values) == sum(len(group.responses) for group in groups) else None


def save_reference(path: Path, values: Sequence[Sequence[float]], **settings: object) -> None:
    """Write values with the settings that name them, atomically."""
    tensor = torch.tensor(list(chain.from_iterable(values)), dtype=torch.float32)
    described = {name: str(value) for name, value in settings.items()}
    write_atomically(path, lambda temporary: save_file({"log_probs": tensor}, temporary, metadata=described))
