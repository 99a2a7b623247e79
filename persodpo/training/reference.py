"""Reference log-probabilities, once per response: computed by the policy's own forward pass, and cached on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from trl.trainer.utils import use_adapter

from persodpo.errors import PersodpoError
from persodpo.files import write_atomically
from persodpo.imports import code_of
from persodpo.progress import bar
from persodpo.training.forward import attention_of, base_model
from persodpo.training.groups import micro_batches, split_responses
from persodpo.training.guard import Verdict
from persodpo.training.packing import Group, Layout, PackedRows, pack


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
    """Return the cache key: the sha256 of all that a log-probability depends on, token ids and ``settings`` by name."""
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
    tuner: Any = model.base_model
    active = list(model.active_adapters)
    with use_adapter(model, "ref" if "ref" in model.peft_config else None):
        yield
    if len(active) > 1:  # TRL puts back the first alone
        tuner.set_adapter(active)
    # PEFT lets the whole adapter be trained again, also what the user had frozen of it.
    for parameter, was_trained in trained:
        parameter.requires_grad_(was_trained)


def reference_log_probs(
    compute: Callable[[PackedRows], Tensor],
    groups: Sequence[Group],
    *,
    token_budget: int,
    layout: Layout,
    accelerator: Accelerator,
) -> list[float]:
    """Compute the log-probability of each response in order, each process its share.

    Args:
        compute: Packed rows to log-probabilities, [responses].
        groups: What to compute it for.
        token_budget: Most positions of a micro-batch; a larger group is split.
        layout: How groups become rows.
        accelerator: Of the trainer.
    """
    parts = [part for group in groups for part in split_responses(group, token_budget, layout)]
    batches, count = list(micro_batches(parts, token_budget, layout)), accelerator.num_processes
    # Sharded models gather weights in each pass, so every process makes as many.
    rounds = itertools.islice(itertools.cycle(batches), math.ceil(len(batches) / count) * count)
    mine = list(itertools.islice(rounds, accelerator.process_index, None, count))
    values: dict[int, list[float]] = {}
    for places in bar(mine, "reference log-probs", hidden=not accelerator.is_main_process):
        rows = pack([parts[place] for place in places], layout).to(accelerator.device)
        with torch.no_grad(), accelerator.autocast():
            log_probs = iter(compute(rows).float().tolist())
        values |= {place: [next(log_probs) for _ in parts[place].responses] for place in places}
    merged = {place: part for share in gather_object([values]) for place, part in share.items()}
    flat = [value for place in sorted(merged) for value in merged[place]]
    if not all(map(math.isfinite, flat)):
        raise PersodpoError("A reference log-probability is not a number; the model's weights are damaged.")
    return flat


def known_or_computed(
    cache: Path | None,
    groups: Sequence[Group],
    compute: Callable[[Sequence[Group]], list[float]],
    *,
    token_budget: int,
    tolerance: float,
    **described: object,
) -> list[float]:
    """Return the log-probability of each response in order, from the cache where it is there and still true.

    Args:
        cache: The file; None to compute anew and keep nothing.
        groups: What is asked for.
        compute: Computes it.
        token_budget: Positions of the sample that is computed to confirm the cache, about.
        tolerance: By how much the sample may be off, nats per token.
        **described: What the file's name stands for, written into it.
    """
    values = _load(cache, sum(len(group.responses) for group in groups)) if cache else None
    # One process may have read the file while another found none.
    absent = any(gather_object([values is None]))
    if absent or values is None or not _still_true(values, groups, compute, token_budget, tolerance):
        values = compute(groups)
        if cache and PartialState().is_main_process:
            _save(cache, values, described)
    return values


def _load(path: Path, count: int) -> list[float] | None:
    """Read ``count`` cached values; None if there are none, or the file is damaged."""
    try:
        values: list[float] = load_file(path)["log_probs"].tolist()
    except (OSError, SafetensorError, KeyError):
        return None
    return values if len(values) == count else None


def _still_true(
    values: Sequence[float],
    groups: Sequence[Group],
    compute: Callable[[Sequence[Group]], list[float]],
    token_budget: int,
    tolerance: float,
) -> bool:
    """Tell whether a model gives cached values to a sample of groups: a hook, or code changed by hand, shows in no key."""
    starts = [0, *itertools.accumulate(len(group.responses) for group in groups)]
    positions = sum(len(group.prompt) + sum(map(len, group.responses)) for group in groups)
    sample = range(0, len(groups), math.ceil(positions / token_budget))
    cached = [value for place in sample for value in values[starts[place] : starts[place + 1]]]
    lengths = [len(response) for place in sample for response in groups[place].responses]
    computed = compute([groups[place] for place in sample])
    return all(abs(a - b) <= tolerance * size for a, b, size in zip(computed, cached, lengths, strict=True))


def _save(path: Path, values: Sequence[float], settings: Mapping[str, object]) -> None:
    """Write values with the settings that name them, atomically."""
    tensor = torch.tensor(values, dtype=torch.float32)
    described = {name: str(value) for name, value in settings.items()}
    write_atomically(path, lambda temporary: save_file({"log_probs": tensor}, temporary, metadata=described))
