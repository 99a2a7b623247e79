"""May this model be given packed rows? One random group, computed packed and by plain forward passes, decides.

A list of architectures would be out of date when it is written: layers carry state along a row (convolution, recurrence,
linear attention), read positions from columns, see through a window, or scale their logits. Where packed and plain
log-probabilities differ by more than rounding, one response per row is tried, and else the model is refused.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftMixedModel
from torch import Tensor

from persodpo.errors import PersodpoError
from persodpo.training.forward import PACKED_ATTENTION, attention_of, base_model, install_packed_forward
from persodpo.training.packing import Group
from persodpo.training.probe import (
    FAULTS,
    LEAK,
    RESPONSES,
    ROUNDING,
    as_it_was,
    first_line,
    moved_by_others,
    packed_log_probs,
    plain_log_probs,
    precision,
    random_groups,
    refusing_switches,
)
from persodpo.training.training_mode import check_training

#: Share of what another prompt does to log-probabilities that a right row may differ from plain passes by at most.
SHARE = 0.01
#: How many times as far as by one response per row log-probabilities may be from plain ones in grouped rows.
MARGIN = 10
#: Adapters whose router takes means over a sequence or a batch, or that draw noise.
WHOLE_BATCH = ("XLORA", "LILY", "PVERA")


@dataclass(frozen=True)
class Verdict:
    """How a model's log-probabilities are computed.

    Attributes:
        grouped: All responses of a prompt in one row, or one response per row.
        own_head: The model's own forward makes the logits, at all positions, as its head is more than a projection with a
            scale and a cap.
        difference: Largest difference between packed and plain log-probabilities, nats per token.
        tolerance: What rounding explains, nats per token.
        reason: Why rows are not grouped, or the head is the model's own; empty otherwise.
        probe: What the model makes of the random group, rounded; another model or other code makes something else.
    """

    grouped: bool
    own_head: bool
    difference: float
    tolerance: float
    reason: str = ""
    probe: str = ""


def check_packing(
    model: Any,
    max_length: int | None = 1024,
    token_budget: int = 4096,
    *,
    widest: int | None = None,
    trained: bool = True,
) -> Verdict:
    """Find out how a model may be trained, and install its packed forward pass.

    The random group has three or more responses of unequal length and stands beside shorter rows. It is as long as a
    sequence can be in training up to `WHOLE` tokens; beyond that, longer than every window that any config inside the
    model's config names and that a row can reach. Another row is as wide as rows are. Texts hold the tokens that begin, end
    and pad texts.

    Args:
        model: A causal language model of transformers, PEFT-wrapped or not.
        max_length: Longest prompt and response together in training; None for no limit.
        token_budget: Most positions of a micro-batch in training.
        widest: Columns of the widest row in training, which may hold a pair that is larger than the budget; None where it
            is not known.
        trained: Also hold training mode and gradients against plain passes.

    Returns:
        The verdict. The model's parameters, mode and random state are as before.

    Raises:
        PersodpoError: Packed rows, one response per row and the model's own head all give other log-probabilities than
            plain forward passes, or those fail; or it trains otherwise than in plain passes.
    """
    refuse_prompt_learning(model)
    sizes = (max_length, token_budget, widest)
    try:
        verdict = _verdict(model, *sizes, exact=True)
    except torch.OutOfMemoryError:
        verdict = _verdict(model, *sizes, exact=False)
    if trained:
        check_training(model, max_length, token_budget, grouped=verdict.grouped)
    return verdict


def _verdict(model: Any, max_length: int | None, token_budget: int, widest: int | None, *, exact: bool) -> Verdict:
    """Return the fastest layout that gives what plain passes give; ``exact`` computes half precision in float32."""
    name, attention = type(base_model(model)).__name__, attention_of(model)
    grouped = attention in PACKED_ATTENTION and exact
    reason = "" if grouped else "there is no memory to hold half precision against float32"
    if attention not in PACKED_ATTENTION:
        reason = f"attention '{attention}' takes no mask of ours; load the model with 'sdpa' to group"
    worst = math.inf
    with refusing_switches(model), as_it_was(model, exact=exact), torch.no_grad():
        install_packed_forward(model, grouped=False)
        groups, wide, plain = _probe(model, max_length, token_budget, widest)
        tolerance = _tolerance(model, groups, plain)
        for layout in [True, False][not grouped :]:
            for own_head in (False, True):
                install_packed_forward(model, grouped=layout, own_head=own_head)
                difference, why = _difference(model, groups, plain, grouped=layout)
                if layout and difference <= tolerance:
                    difference, why = max((difference, why), _difference_in_wide_row(model, wide, plain[0]))
                if difference <= tolerance:
                    probe = " ".join(f"{value:.3f}" for value in torch.cat(plain).tolist())
                    return Verdict(layout, own_head, difference, tolerance, reason, probe)
                worst = min(worst, difference)
                reason = reason or why
        install_packed_forward(model, grouped=False)
    raise PersodpoError(
        f"{name} under attention '{attention}' gives other log-probabilities in rows of ours than in plain forward passes "
        f"({worst:.2g} nats per token apart, rounding explains {tolerance:.2g}); `trl dpo` trains it on the same pairs."
    )


def _probe(
    model: Any, max_length: int | None, token_budget: int, widest: int | None
) -> tuple[list[Group], Group, list[Tensor]]:
    """Return the random groups, the wide one, and what plain passes make of the former.

    A model may end before the length that its config names, or name it otherwise: where a text fails, a shorter one is
    tried.

    Raises:
        PersodpoError: Plain passes fail on short texts, too.
    """
    longest = max_length
    while True:
        groups, wide = random_groups(model, longest, token_budget, widest)
        try:
            return groups, wide, [plain_log_probs(model, group) for group in groups]
        except torch.OutOfMemoryError:
            raise
        except FAULTS as error:
            longest = len(groups[0].prompt) // 2
            if longest < sum(RESPONSES):
                raise PersodpoError(
                    f"{type(base_model(model)).__name__} fails on plain text under attention '{attention_of(model)}' "
                    f"({type(error).__name__}: {first_line(error)}); it cannot be trained here."
                ) from error


def refuse_prompt_learning(model: Any) -> None:
    """Refuse adapters that read a sequence or a batch as a whole, or draw noise, on a model or as a config.

    Raises:
        PersodpoError: The model has such an adapter.
    """
    configs = model.peft_config if hasattr(model, "peft_config") else model
    for config in configs.values() if isinstance(configs, dict) else [configs]:
        whole = getattr(config, "is_prompt_learning", False) or getattr(config, "alora_invocation_tokens", None)
        if whole or any(name in str(getattr(config, "peft_type", "")) for name in WHOLE_BATCH):
            raise PersodpoError(
                f"{type(config).__name__} with {config.peft_type} cannot be trained on packed rows, as it needs to see each "
                "sequence by itself; use plain LoRA, or `trl dpo` on the same pairs."
            )
    if isinstance(model, PeftMixedModel):
        raise PersodpoError(
            "A PeftMixedModel has no reference to fall back on; use a PeftModel with one kind of adapter."
        )


def _difference(model: Any, groups: list[Group], plain: list[Tensor], *, grouped: bool) -> tuple[float, str]:
    """Return how far packed log-probabilities are from plain ones, in nats per token, and in words."""
    try:
        packed = packed_log_probs(model, groups, grouped=grouped)
        # Attention is another now; whoever generates with it must not notice.
        again = plain_log_probs(model, groups[0]) - plain[0] if grouped else plain[0].new_zeros(1)
        in_row, by_rows = moved_by_others(model, groups, packed, grouped=grouped)
        # Half precision may take another kernel, or fail, which training in it would do aloud.
        in_half, rows_in_half = 0.0, 0.0
        with suppress(*FAULTS), torch.autocast(model.device.type, torch.bfloat16, enabled=grouped):
            half = packed_log_probs(model, groups[-2:], grouped=grouped)
            in_half, rows_in_half = moved_by_others(model, groups[-2:], half, grouped=grouped)
    except torch.OutOfMemoryError:
        raise
    except FAULTS as error:
        return math.inf, f"a packed pass ends with {type(error).__name__}: {first_line(error)}"
    apart = torch.cat([packed - torch.cat(plain), again]).abs().max()
    difference = float(apart) if apart.isfinite() else math.inf
    rounding = ROUNDING[precision(model)]
    if difference < math.inf and in_row > LEAK * rounding + 10 * by_rows:
        return math.inf, f"a response moves others of its row by {in_row:.2g} nats per token"
    if difference < math.inf and in_half > LEAK * ROUNDING[torch.bfloat16] + 10 * rows_in_half:
        return math.inf, f"in half precision a response moves others of its row by {in_half:.2g} nats per token"
    if difference < math.inf and by_rows > SHARE * rounding:
        return math.inf, f"a row moves other rows by {by_rows:.2g} nats per token"
    return difference, f"log-probabilities differ by {difference:.2g} nats per token"


def _difference_in_wide_row(model: Any, wide: Group, plain: Tensor) -> tuple[float, str]:
    """Return how far log-probabilities in a wide row are from plain ones, in nats per token, and in words."""
    try:
        apart = (packed_log_probs(model, [wide], grouped=True) - plain).abs().max()
    except torch.OutOfMemoryError:
        raise
    except FAULTS as error:
        return math.inf, f"a wide row ends with {type(error).__name__}: {first_line(error)}"
    difference = float(apart) if apart.isfinite() else math.inf
    return difference, f"log-probabilities in a wide row differ by {difference:.2g} nats per token"


def _tolerance(model: Any, groups: list[Group], plain: list[Tensor]) -> float:
    """Return what rounding explains, nats per token: never more than a small share of what the prompt does.

    Nor much more than it does to the same texts in rows of a batch, one response each.
    """
    kind = precision(model)
    least, most = max(ROUNDING[kind] / 100, ROUNDING[torch.float64]), ROUNDING[kind]
    if kind.itemsize == 2:
        return most
    single = math.inf
    with suppress(*FAULTS):
        single = float((packed_log_probs(model, groups, grouped=False) - torch.cat(plain)).abs().max())
    effect = float((plain[0] - plain[1]).square().mean().sqrt())
    rounding = MARGIN * single if math.isfinite(single) else most
    return min(most, max(least, min(SHARE * effect, rounding)))
