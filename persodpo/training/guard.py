"""May this model be given packed rows? One random group, computed packed and by plain forward passes, decides.

A list of architectures would be out of date when it is written: layers carry state along a row (convolution, recurrence,
linear attention), read positions from columns, see through a window, or scale their logits. Where packed and plain
log-probabilities differ by more than rounding, one response per row is tried, and else the model is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from peft import PeftMixedModel
from torch import Tensor, nn

from persodpo.errors import PersodpoError
from persodpo.training.forward import PACKED_ATTENTION, attention_of, base_model, install_packed_forward
from persodpo.training.packing import Group
from persodpo.training.probe import (
    FAULTS,
    RESPONSES,
    ROUNDING,
    as_it_was,
    buffers_put_back,
    first_line,
    packed_log_probs,
    plain_log_probs,
    precision,
    random_groups,
)

#: Share of it by which a response may move others of its row beyond what those of another row do.
LEAK = 1e-3
#: The same as a share of what another prompt does to the log-probabilities.
SHARE = 0.01
#: Length of the texts that are tried in training mode, tokens.
SHORT = 64
#: Share of a gradient that rounding may explain, by the bytes of a weight; quantised weights show gross faults alone.
GRADIENT = {8: 0.01, 4: 0.01, 2: 0.5}
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


def check_packing(model: Any, max_length: int | None = 1024, token_budget: int = 4096) -> Verdict:
    """Find out how a model may be trained, and install its packed forward pass.

    The random group has three or more responses of unequal length and stands beside shorter rows. It is as long as a
    sequence can be in training, and its row as long as a row, up to `WHOLE` tokens; beyond that, longer than every window
    that any config inside the model's config names and that a row can reach. It holds the tokens that begin and end texts.

    Args:
        model: A causal language model of transformers, PEFT-wrapped or not.
        max_length: Longest prompt and response together in training; None for no limit.
        token_budget: Most positions of a micro-batch in training.

    Returns:
        The verdict. The model's parameters, mode and random state are as before.

    Raises:
        PersodpoError: Packed rows, one response per row and the model's own head all give other log-probabilities than
            plain forward passes, or those fail.
    """
    refuse_prompt_learning(model)
    try:
        verdict = _verdict(model, max_length, token_budget, exact=True)
    except torch.OutOfMemoryError:
        verdict = _verdict(model, max_length, token_budget, exact=False)
    _check_training(model, verdict, min(max_length or SHORT, SHORT), min(token_budget, SHORT))
    return verdict


def _verdict(model: Any, max_length: int | None, token_budget: int, *, exact: bool) -> Verdict:
    """Return the fastest layout that gives what plain passes give; ``exact`` computes half precision in float32."""
    name, attention = type(base_model(model)).__name__, attention_of(model)
    grouped = attention in PACKED_ATTENTION and exact
    reason = "" if grouped else "there is no memory to hold half precision against float32"
    if attention not in PACKED_ATTENTION:
        reason = f"attention '{attention}' takes no mask of ours; load the model with 'sdpa' to group"
    worst = math.inf
    with as_it_was(model, exact=exact), torch.no_grad():
        install_packed_forward(model, grouped=False)
        groups, wide, plain = _probe(model, max_length, token_budget)
        tolerance = _tolerance(model, *plain)
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


def _probe(model: Any, max_length: int | None, token_budget: int) -> tuple[list[Group], Group, list[Tensor]]:
    """Return the random groups, the wide one, and what plain passes make of the former.

    A model may end before the length that its config names, or name it otherwise: where a text fails, a shorter one is
    tried.

    Raises:
        PersodpoError: Plain passes fail on short texts, too.
    """
    longest = max_length
    while True:
        groups, wide = random_groups(model, longest, token_budget)
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
        moved, by_rows = _moved(model, groups, packed, grouped=grouped)
        # Half precision may take another kernel, or fail, which training in it would do aloud.
        in_half, rows_in_half = 0.0, 0.0
        with suppress(*FAULTS), torch.autocast(model.device.type, torch.bfloat16, enabled=grouped):
            half = packed_log_probs(model, groups[-2:], grouped=grouped)
            in_half, rows_in_half = _moved(model, groups[-2:], half, grouped=grouped)
    except torch.OutOfMemoryError:
        raise
    except FAULTS as error:
        return math.inf, f"a packed pass ends with {type(error).__name__}: {first_line(error)}"
    apart = torch.cat([packed - torch.cat(plain), again]).abs().max()
    difference = float(apart) if apart.isfinite() else math.inf
    rounding = ROUNDING[precision(model)]
    if difference < math.inf and moved > LEAK * rounding + 10 * by_rows:
        return math.inf, f"a response moves others of its row by {moved:.2g} nats per token"
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


def _moved(model: Any, groups: list[Group], packed: Tensor, *, grouped: bool) -> tuple[float, float]:
    """Return how far other tokens in a response move the rest of its row, and those in other rows; nats per token.

    Right rows move by nothing, or no more than by other rows: experts compute tokens together, so that even other rows
    move by rounding.
    """
    *rest, last = (replace(group, responses=_other_first(group)) for group in groups)
    in_row, in_others = (
        float((packed_log_probs(model, changed, grouped=grouped) - packed)[-2:].abs().max())
        for changed in ([*groups[:-1], last], [*rest, groups[-1]])
    )
    return in_row, in_others


def _other_first(group: Group) -> list[list[int]]:
    """Return the responses with other tokens in the first."""
    first, last = group.responses[0], group.responses[-1][::-1]
    return [(last * len(first))[: len(first)], *group.responses[1:]]


def _tolerance(model: Any, long: Tensor, short: Tensor, *_: Tensor) -> float:
    """Return what rounding explains, nats per token: never more than a small share of what the prompt does."""
    kind = precision(model)
    least, most = ROUNDING[kind] / 100, ROUNDING[kind]
    effect = float((long - short).square().mean().sqrt())
    return most if kind.itemsize == 2 else min(most, max(least, SHARE * effect))


class _Pass(NamedTuple):
    """Log-probabilities, nats per token; and token ids, [positions], with the gradients of their embeddings."""

    values: Tensor
    ids: Tensor
    gradients: Tensor


def _check_training(model: Any, verdict: Verdict, max_length: int, token_budget: int) -> None:
    """Refuse a model that trains otherwise in rows of ours than in plain passes, though evaluation shows the same values.

    Some code mixes tokens in training alone; some changes gradients alone, as hooks do, detached tokens, or a loss that is
    added in the backward pass. Models that draw noise cannot be held against themselves, and those that fail say so later.

    Raises:
        PersodpoError: Log-probabilities or the gradients of all tokens differ.
    """
    (*groups, _), _ = random_groups(model, max_length, token_budget)

    def plain() -> Tensor:
        return torch.cat([plain_log_probs(model, group) for group in groups])

    def packed() -> Tensor:
        return packed_log_probs(model, groups, grouped=verdict.grouped)

    noise = apart = gap = math.nan
    kind, name = torch.float32, type(base_model(model)).__name__
    with suppress(*FAULTS), as_it_was(model, exact=True):
        kind = precision(model)
        with torch.no_grad():
            plain()
        with buffers_put_back(model):
            try:
                model.train()
                torch.manual_seed(0)
                expected = _with_gradients(model, plain)
                torch.manual_seed(0)
                apart, gap = _apart(expected, _with_gradients(model, packed))
                torch.manual_seed(1)
                with torch.no_grad():
                    noise = float((plain() - expected.values).abs().max())
            finally:
                model.train(mode=False)
                with torch.no_grad():
                    plain()  # models that scale weights for evaluation scale them again, as those are that are put back
    if not noise <= ROUNDING[kind] / 10:
        return
    if not apart <= ROUNDING[kind]:
        raise PersodpoError(
            f"{name} gives other log-probabilities in rows of ours than in plain passes while it trains ({apart:.2g} nats "
            "per token apart), not in evaluation; `trl dpo` trains it on the same pairs."
        )
    if not gap <= GRADIENT[kind.itemsize]:
        raise PersodpoError(
            f"{name} has other gradients in rows of ours than in plain passes ({gap:.0%} apart), though its "
            "log-probabilities are the same; `trl dpo` trains it on the same pairs."
        )


def _with_gradients(model: Any, compute: Callable[[], Tensor]) -> _Pass:
    """Compute log-probabilities and the gradient of a sum of them, in which each counts otherwise."""
    calls: list[tuple[Tensor, Tensor]] = []

    def hold(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.requires_grad_()
        calls.append((inputs[0], output))
        return output.clone()  # may be changed in place

    hook = base_model(model).get_input_embeddings().register_forward_hook(hold)
    try:
        with torch.enable_grad():
            values = compute()
            shares = torch.linspace(1, -2, len(values), device=values.device)
            gradients = torch.autograd.grad((values * shares).sum(), [output for _, output in calls])
    finally:
        hook.remove()
    flat = [gradient.flatten(0, -2).to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in gradients]
    return _Pass(values.detach(), torch.cat([ids.flatten() for ids, _ in calls]), torch.cat(flat))


def _apart(one: _Pass, other: _Pass) -> tuple[float, float]:
    """Return how far two passes are apart: in nats per token, and in the gradients of each token id as a share."""
    tokens, places = torch.unique(torch.cat([one.ids, other.ids]), return_inverse=True)
    sums = []
    for part, of_part in zip((one, other), places.split([len(one.ids), len(other.ids)]), strict=True):
        zeros = part.gradients.new_zeros(len(tokens), part.gradients.shape[1])
        sums.append(zeros.index_add(0, of_part, part.gradients))
    share = (sums[0] - sums[1]).norm() / sums[0].norm().clamp(min=1e-12)
    return float((one.values - other.values).abs().max()), float(share)
