"""Arguments of the grouped trainer: TRL's, what grouping and weighting add, and what is refused by name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from trl import DPOConfig
from trl.trainer.callbacks import SyncRefModelCallback

from persodpo.errors import PersodpoError
from persodpo.files import versions
from persodpo.training.loss import LossSettings, Weighting

#: Arguments that look at a response's partner, change the reference, split a row or draw noise per row, with the only value
#: that can be grouped.
UNGROUPED: dict[str, object] = {
    "ld_alpha": None, "use_weighting": False, "sync_ref_model": False, "truncation_mode": "keep_start",
    "f_divergence_type": "reverse_kl", "torch_compile": False, "parallelism_config": None, "deepspeed": None,
    "deepspeed_plugin": None, "neftune_noise_alpha": None, "ddp_static_graph": None,
    "include_for_metrics": [],
}  # fmt: skip
#: Arguments that say what is done otherwise here, with the value that needs no warning.
OTHERWISE = {
    "precompute_ref_log_probs": (True, "has no effect, reference log-probabilities are computed before training"),
    "precompute_ref_batch_size": (None, "has no effect, token_budget bounds the reference pass"),
    "include_num_input_tokens_seen": ("no", "has no effect, num_tokens is logged"),
    "disable_dropout": (
        True,
        "lets the responses of a prompt share its dropout, which TRL draws for each side of a pair",
    ),
}


@dataclass
class GroupedDPOConfig(DPOConfig):  # type: ignore[misc]
    """DPOConfig with what grouping and weighting add.

    Attributes:
        weighting: ``none``, or ``sigmoid`` of the score margin (PersoDPO's formula), which needs the columns score_chosen
            and score_rejected.
        scale_weights: Divide the weights by their mean over the pairs that are trained, so that weighting is no hidden
            learning rate.
        token_budget: Most positions of a micro-batch, padding included; it bounds memory, also where one prompt has more.
        reference_cache: Folder of cached reference log-probabilities; None takes ``output_dir/reference``.
        precompute_ref_log_probs: Always true here.
    """

    weighting: Weighting = "none"
    scale_weights: bool = False
    token_budget: int = 4096
    reference_cache: str | None = None
    precompute_ref_log_probs: bool = True


def check_arguments(args: DPOConfig, callbacks: Iterable[object]) -> None:
    """Refuse arguments and callbacks that grouped rows cannot honour, and warn of those that have no effect."""
    weighting, budget, optim = option(args, "weighting"), option(args, "token_budget"), str(args.optim)
    losses = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
    refused = {
        f"weighting is {weighting!r}, not one of {', '.join(get_args(Weighting))}": weighting
        not in get_args(Weighting),
        f"token_budget is {budget}; it needs at least 1 position": budget < 1,
        f"One loss is trained on grouped rows, not {', '.join(losses)} weighted; `trl dpo` adds losses up": (
            len(losses) != 1 or args.loss_weights not in (None, [1.0])
        ),
        f"train_sampling_strategy={args.train_sampling_strategy!r} has no use, as batches are sorted anyway": (
            args.train_sampling_strategy not in {"random", "sequential"}
        ),
        f"optim={optim!r} steps in each backward pass, and a step has several here": (
            any(part in optim.lower() for part in ("layerwise", "lomo"))
        ),
        "ACCELERATE_DYNAMO_BACKEND compiles the model, which sees rows of every length here": (
            os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no"
        ),
        "dispatch_batches=True cannot send packed rows to other processes": (
            getattr(args.accelerator_config, "dispatch_batches", None)
        ),
    }
    for sentence in filter(refused.get, refused):
        raise PersodpoError(f"{sentence}; leave it out.")
    LossSettings(losses[0], args.beta, args.label_smoothing)
    for one in callbacks:
        check_callback(one)
    for name, allowed in UNGROUPED.items():
        if getattr(args, name, allowed) != allowed:
            raise PersodpoError(
                f"{name}={getattr(args, name)!r} cannot be grouped; set it to {allowed!r}, or use `trl dpo`."
            )
    for name, (value, sentence) in OTHERWISE.items():
        if getattr(args, name) != value:
            warnings.warn(f"{name}={getattr(args, name)!r} {sentence}.", stacklevel=3)


def check_callback(callback: object) -> None:
    """Refuse a callback, object or class, that moves the reference."""
    if issubclass(callback if isinstance(callback, type) else type(callback), SyncRefModelCallback):
        raise PersodpoError("SyncRefModelCallback moves the reference, which is computed once here; leave it out.")


def option(args: DPOConfig, name: str) -> Any:
    """Return an argument of `GroupedDPOConfig`, its default where another config has none."""
    return getattr(args, name, getattr(GroupedDPOConfig, name))


def described(args: DPOConfig, skipped: Mapping[str, object], *, grouped: bool) -> str:
    """Return the section of a model card that says what TRL's does not know."""
    rows = "all responses of a prompt in one row" if grouped else "one response per row"
    weighting, scaled = option(args, "weighting"), option(args, "scale_weights")
    return (
        "\n## Grouped training\n\n"
        f"- persodpo {versions().get('persodpo', '')}, `GroupedDPOTrainer`: {rows}, gradients of DPO on all pairs.\n"
        f"- Weight of a pair: {weighting}{', scaled to mean 1' if scaled and weighting != 'none' else ''}.\n"
        f"- {'; '.join(f'{name} dataset, {text}' for name, text in skipped.items())}.\n"
    )
