"""May this model be given packed rows? One random group, computed packed and by plain forward passes, decides.

A list of architectures would be out of date when it is written: layers carry state along a row (convolution, recurrence,
linear attention), read positions from columns, see through a window, or scale their logits. Where packed and plain
log-probabilities differ by more than rounding, one response per row is tried, and else the model is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftMixedModel
from torch import Tensor

from persodpo.errors import PersodpoError
from persodpo.training.forward import (
    PACKED_ATTENTION,
    attention_of,
    base_model,
    install_packed_forward,
)
from persodpo.training.packing import Group, Layout, pack
from persodpo.training.probe import RESPONSES, random_groups

#: Nats per token that rounding may explain, by the type of the weights.
ROUNDING = {torch.float64: 2e-6, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.2}
#: Share of it by which a response may move others of its row beyond what those of another row do.
LEAK = 1e-3
#: The same as a share of what another prompt does to the log-probabilities.
SHARE = 0.01
#: Standard deviation of the noise that weights get for the random group, and elements of the largest one that is moved.
NOISE, SMALL = 0.02, 2**20
#: Adapters whose router takes means over a sequence or a batch, or that draw noise.
WHOLE_BATCH = ("XLORA", "LILY", "PVERA")
#: What a packed pass through an architecture that cannot be packed may raise.
FAULTS = (
    TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError, NotImplementedError, AssertionError,
)  # fmt: skip


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
        return _verdict(model, max_length, token_budget, exact=True)
    except torch.OutOfMemoryError:
        return _verdict(model, max_length, token_budget, exact=False)


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
                if layout and difference <= tolerance and len(wide.responses) > len(groups[0].responses):
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


def _compared(group: Group) -> list[list[int]]:
    """Return the responses that are compared: the first and the last two; between them stands what fills a row."""
    return [group.responses[0], *group.responses[-2:]]


def plain_log_probs(model: Any, group: Group) -> Tensor:
    """Run one forward pass over prompt and response alone for each response; nats per token."""
    means = []
    for response in _compared(group):
        ids = torch.tensor([group.prompt + response], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(group.prompt) - 1 : -1]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        means.append(torch.log_softmax(wide, -1).gather(-1, ids[0, len(group.prompt) :, None]).mean())
    return torch.stack(means)


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


def packed_log_probs(model: Any, groups: list[Group], *, grouped: bool) -> Tensor:
    """Return the log-probabilities of the compared responses, nats per token."""
    values = model(packed=pack(groups, Layout(grouped=grouped)).to(model.device))
    parts = torch.split(values, [len(group.responses) for group in groups])
    lengths = torch.tensor([len(response) for group in groups for response in _compared(group)], device=values.device)
    return torch.cat([part[[0, -2, -1]] for part in parts]) / lengths


def precision(model: Any) -> torch.dtype:
    """Return the coarsest type that a model computes in."""
    halves = {tensor.dtype for tensor in (*model.parameters(), *model.buffers())} & {torch.float16, torch.bfloat16}
    packed = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    if packed or torch.bfloat16 in halves:
        return torch.bfloat16
    if halves or (model.device.type == "cuda" and model.dtype == torch.float32 and _tf32()):
        return torch.float16
    return torch.float64 if model.dtype == torch.float64 else torch.float32


def _tf32() -> bool:
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # set by torch's newer names
        return True


def _tolerance(model: Any, long: Tensor, short: Tensor, *_: Tensor) -> float:
    """Return what rounding explains, nats per token: never more than a small share of what the prompt does."""
    kind = precision(model)
    least, most = ROUNDING[kind] / 100, ROUNDING[kind]
    effect = float((long - short).square().mean().sqrt())
    return most if kind.itemsize == 2 else min(most, max(least, SHARE * effect))


def first_line(error: Exception) -> str:
    """Return the first line of what an error says."""
    return (str(error).strip().splitlines() or [""])[0][:160]


@contextmanager
def as_it_was(model: Any, *, exact: bool) -> Iterator[None]:
    """Put back each module's mode, weights, half precision and the random state afterwards.

    Meanwhile the model is in evaluation mode, outside mixed precision, and in float32 where it was in half precision and
    ``exact``: nothing else tells a leak from rounding. A first pass lets models scale weights for evaluation, as RWKV does,
    and training scale back what is put back here. New adapters and blocks begin at zero or as the identity and would
    hide what they do, so weights are moved: those that are zero, and those that are small, as all are that mix tokens.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    model.train(mode=False)
    with suppress(*FAULTS), torch.no_grad(), torch.random.fork_rng(devices=devices):
        model(input_ids=torch.tensor([[3, 4]], device=model.device), use_cache=False)
    halves: dict[tuple[int, torch.Size, torch.dtype], list[Tensor]] = {}
    for tensor in (*model.parameters(), *model.buffers()) if exact else ():
        if tensor.dtype in {torch.float16, torch.bfloat16}:
            halves.setdefault((tensor.data_ptr(), tensor.shape, tensor.dtype), []).append(tensor)
    trained = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    moved = [(p, p.data.clone() if p.any() else None) for p in trained if p.numel() <= SMALL or not p.any()]
    try:
        with torch.random.fork_rng(devices=devices), torch.autocast(model.device.type, enabled=False):
            torch.manual_seed(0)
            for tied in halves.values():
                _convert(tied, torch.float32)
            for parameter, _ in moved:
                parameter.data.add_(torch.randn_like(parameter.data), alpha=NOISE)
            yield
    finally:
        for (_, _, dtype), tied in halves.items():
            _convert(tied, dtype)
        for parameter, data in moved:
            parameter.data.zero_() if data is None else parameter.data.copy_(data)
        for module, mode in modes:
            module.training = mode


def _convert(tied: list[Tensor], dtype: torch.dtype) -> None:
    """Convert tensors that share their storage, so that they still do."""
    data = tied[0].data.to(dtype)
    for tensor in tied:
        tensor.data = data
