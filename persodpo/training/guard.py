"""May this model be given packed rows? One random group, computed packed and by plain forward passes, decides.

A list of architectures would be out of date when it is written: layers carry state along a row (convolution, recurrence,
linear attention), read positions from columns, see through a window, or scale their logits. Where packed and plain
log-probabilities differ by more than rounding, one response per row is tried, and else the model is refused.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from persodpo.errors import PersodpoError
from persodpo.training.forward import (
    PACKED_ATTENTION,
    attention_of,
    base_model,
    install_packed_forward,
    text_config,
)
from persodpo.training.packing import Group, Layout, pack

#: Nats per token that rounding may explain, by the type of the weights.
ROUNDING = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.2}
#: The same as a share of what another prompt does to the log-probabilities.
SHARE = 0.01
#: Parts of the names of config entries that hold a length from which on a model computes otherwise.
LENGTHS = ("window", "chunk", "local", "original_max", "topk", "top_k", "block", "span", "segment")
#: Tokens of the responses, and of the prompt where no window is longer.
RESPONSES, PROMPT = (9, 6, 11), 14
#: What a packed pass through an architecture that cannot be packed may raise.
FAULTS = (
    TypeError,
    ValueError,
    RuntimeError,
    KeyError,
    AttributeError,
    IndexError,
    NotImplementedError,
    AssertionError,
)


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
    """

    grouped: bool
    own_head: bool
    difference: float
    tolerance: float
    reason: str = ""


def check_packing(model: Any, max_length: int | None = 1024, token_budget: int = 4096) -> Verdict:
    """Find out how a model may be trained, and install its packed forward pass.

    The random group has three or more responses of unequal length, stands beside a shorter row, and is longer than every
    window that any config inside the model's config names and that a row can reach.

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
    groups = _random_groups(model, max_length, token_budget)
    try:
        return _verdict(model, groups, exact=True)
    except torch.OutOfMemoryError:
        return _verdict(model, groups, exact=False)


def _verdict(model: Any, groups: list[Group], *, exact: bool) -> Verdict:
    """Return the fastest layout that gives what plain passes give; ``exact`` computes half precision in float32."""
    name, attention = type(base_model(model)).__name__, attention_of(model)
    grouped = attention in PACKED_ATTENTION
    reason = "" if grouped else f"attention '{attention}' takes no mask of ours; load the model with 'sdpa' to group"
    worst = math.inf
    with _as_it_was(model, exact=exact), torch.no_grad():
        install_packed_forward(model, grouped=False)
        try:
            plain = [_plain_log_probs(model, group) for group in groups]
        except torch.OutOfMemoryError:
            raise
        except FAULTS as error:
            raise PersodpoError(
                f"{name} fails on plain text under attention '{attention}' ({type(error).__name__}: {_first_line(error)}); "
                "it cannot be trained here."
            ) from error
        tolerance = _tolerance(model, *plain)
        for layout in [True, False][not grouped :]:
            for own_head in (False, True):
                install_packed_forward(model, grouped=layout, own_head=own_head)
                difference, why = _difference(model, groups, plain, grouped=layout)
                if difference <= tolerance:
                    return Verdict(layout, own_head, difference, tolerance, reason)
                worst = min(worst, difference)
                reason = reason or why
    raise PersodpoError(
        f"{name} under attention '{attention}' gives other log-probabilities in rows of ours than in plain forward passes "
        f"({worst:.2g} nats per token apart, rounding explains {tolerance:.2g}); `trl dpo` trains it on the same pairs."
    )


def check_models(model: Any, reference: Any, *, max_length: int | None, token_budget: int, aux_loss: bool) -> Verdict:
    """Find out how a policy and its reference are trained together.

    Args:
        model: The policy.
        reference: A reference model of its own, or None.
        max_length: See `check_packing`.
        token_budget: See `check_packing`.
        aux_loss: Whether the policy's load-balancing loss is trained, too.

    Returns:
        The verdict that holds for both.

    Raises:
        PersodpoError: One of them cannot be trained here, or would be trained in part only.
    """
    name = type(base_model(model)).__name__
    if getattr(base_model(model), "_hf_peft_config_loaded", False):
        raise PersodpoError(
            "The model was loaded from a folder of adapters; merge them into their base first (peft: "
            "AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()), or their training would be lost."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PersodpoError(f"No weight of {name} can be trained; load adapters with is_trainable=True.")
    if getattr(model, "is_loaded_in_4bit", False) and model.device.type == "cpu":
        raise PersodpoError(
            "4-bit weights on a CPU cannot be trained: bitsandbytes packs them at the first evaluation, and no gradient "
            "passes them from then on; load the model on a GPU, or without quantisation."
        )
    verdicts = [check_packing(one, max_length, token_budget) for one in (model, reference) if one is not None]
    verdict = next((one for one in verdicts if not one.grouped), verdicts[0])
    if aux_loss:
        group = Group([3, 4], [[5], [6]], [0], [1], [1.0], [0])
        rows = pack([group], Layout(grouped=verdict.grouped, closed=True)).to(model.device)
        try:
            with torch.no_grad():
                loss = float(model(packed=rows, aux_loss=True)[1])
        except FAULTS as error:
            raise PersodpoError(
                f"The auxiliary loss of {name} cannot be computed ({type(error).__name__}: {_first_line(error)}); set "
                "router_aux_loss_coef=0."
            ) from error
        if not math.isfinite(loss):
            raise PersodpoError(f"The auxiliary loss of {name} is {loss}; its weights are damaged.")
    if verdict.reason:
        layout = "grouped rows, with the logits of all positions" if verdict.grouped else "one response per row"
        warnings.warn(
            f"{name} under attention '{attention_of(model)}' is trained on {layout} ({verdict.reason}): the same losses, "
            "but slower and with more memory.",
            stacklevel=2,
        )
    return verdict


def refuse_prompt_learning(model: Any) -> None:
    """Refuse adapters that put tokens of their own before the prompt, on a model or as a config.

    Raises:
        PersodpoError: The model has such an adapter.
    """
    configs = model.peft_config if hasattr(model, "peft_config") else model
    for config in configs.values() if isinstance(configs, dict) else [configs]:
        if getattr(config, "is_prompt_learning", False):
            raise PersodpoError(
                f"{type(config).__name__} cannot be trained on packed rows, as its virtual tokens stand before each "
                "sequence; use LoRA, or `trl dpo` on the same pairs."
            )


def longest_window(model: Any, limit: int) -> int:
    """Return the longest window below ``limit`` that any config inside a model's config names, 0 for none."""
    pending, windows = [base_model(model).config], [0]
    while pending:
        config = pending.pop()
        for name, value in vars(config).items():
            if hasattr(value, "to_dict"):
                pending.append(value)
            elif isinstance(value, dict):
                windows.append(int(value.get("original_max_position_embeddings") or 0))
            elif isinstance(value, int) and any(part in name for part in LENGTHS):
                windows.append(value)
    return max(window for window in windows if window < limit)


def _random_groups(model: Any, max_length: int | None, token_budget: int) -> list[Group]:
    """Return a group longer than the model's windows, and a shorter one with the same responses."""
    positions = getattr(text_config(model), "max_position_embeddings", None) or math.inf
    longest = int(min(max_length or math.inf, positions, token_budget if math.isinf(positions) else positions))
    window = longest_window(model, max(longest, token_budget))
    room = max(2, min(longest, window + sum(RESPONSES)) if window else PROMPT + max(RESPONSES))
    lengths = [min(length, max(1, room // 2)) for length in RESPONSES]
    prompt = max(1, room - max(lengths))
    # A window that no sequence reaches may still be shorter than a row.
    while prompt + sum(lengths) <= window:
        lengths.append(max(lengths))
    source = torch.Generator().manual_seed(0)
    ids = _plain_ids(model)

    def draw(count: int) -> list[int]:
        return ids[torch.randint(len(ids), (count,), generator=source)].tolist()

    responses = [draw(length) for length in lengths]
    # A response that begins as another shows a leak most clearly in a model that has learned to repeat.
    responses[2][: min(lengths)] = responses[0][: min(lengths)]
    return [Group(draw(prompt), responses), Group(draw(max(1, min(prompt // 2, PROMPT))), responses[:3])]


def _plain_ids(model: Any) -> Tensor:
    """Return the token ids that stand for nothing but text, as far as the configs tell."""
    config = text_config(model)
    special: set[int] = set()
    for owner in (base_model(model).config, config):
        for name, value in vars(owner).items():
            if name.endswith(("token_id", "token_index")):
                special.update(value if isinstance(value, list) else [value] if isinstance(value, int) else [])
    return torch.tensor([number for number in range(config.vocab_size) if number not in special])


def _plain_log_probs(model: Any, group: Group) -> Tensor:
    """Run one forward pass over prompt and response alone for each response; nats per token."""
    means = []
    for response in group.responses:
        ids = torch.tensor([group.prompt + response], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(group.prompt) - 1 : -1]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        means.append(torch.log_softmax(wide, -1).gather(-1, ids[0, len(group.prompt) :, None]).mean())
    return torch.stack(means)


def _difference(model: Any, groups: list[Group], plain: list[Tensor], *, grouped: bool) -> tuple[float, str]:
    """Return how far packed log-probabilities are from plain ones, in nats per token, and in words."""
    lengths = torch.tensor([len(response) for group in groups for response in group.responses])
    one = Group(groups[0].prompt, groups[0].responses[:1])
    try:
        packed = model(packed=pack(groups, Layout(grouped=grouped)).to(model.device))
        # Attention is another now; whoever generates with it must not notice.
        again = _plain_log_probs(model, one) - plain[0][:1] if grouped else plain[0].new_zeros(1)
    except torch.OutOfMemoryError:
        raise
    except FAULTS as error:
        return math.inf, f"a packed pass ends with {type(error).__name__}: {_first_line(error)}"
    apart = torch.cat([packed / lengths.to(packed.device) - torch.cat(plain), again]).abs().max()
    difference = float(apart) if apart.isfinite() else math.inf
    return difference, f"log-probabilities differ by {difference:.2g} nats per token"


def _tolerance(model: Any, long: Tensor, short: Tensor) -> float:
    """Return what rounding explains, nats per token: never more than a small share of what the prompt does."""
    dtype = model.dtype
    if dtype == torch.float32 and model.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        dtype = torch.float16
    effect = float((long[: len(short)] - short).square().mean().sqrt())
    if dtype in {torch.float32, torch.float64}:
        return min(ROUNDING[dtype], max(SHARE * effect, ROUNDING[dtype] / 100))
    return ROUNDING[dtype]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


@contextmanager
def _as_it_was(model: Any, *, exact: bool) -> Iterator[None]:
    """Put back each module's mode, new adapters, half precision and the random state afterwards.

    Meanwhile the model is in evaluation mode, outside mixed precision, and in float32 where it was in half precision and
    ``exact``: nothing else tells a leak from rounding. New adapters begin at zero and would hide what they do, so they are
    filled.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    halves = [
        (t, t.dtype) for t in (*model.parameters(), *model.buffers()) if t.dtype in {torch.float16, torch.bfloat16}
    ]
    asleep = [p for p in model.parameters() if p.requires_grad and isinstance(model, PeftModel) and not p.any()]
    model.train(mode=False)
    try:
        with torch.random.fork_rng(devices=devices), torch.autocast(model.device.type, enabled=False):
            torch.manual_seed(0)
            for tensor, _ in halves if exact else []:
                tensor.data = tensor.data.float()
            for parameter in asleep:
                parameter.data.normal_(0, 0.02)
            yield
    finally:
        for parameter in asleep:
            parameter.data.zero_()
        for tensor, dtype in halves:
            tensor.data = tensor.data.to(dtype)
        for module, mode in modes:
            module.training = mode
