"""Packed rows and a causal language model in, the log-probability of each response out.

Whether a model may be given packed rows at all is for `persodpo.training.guard` to find out.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from persodpo.errors import PersodpoError
from persodpo.training.packing import PackedRows

#: transformers' attention -> name under which the same attention on packed rows is registered with transformers.
PACKED_ATTENTION = {"sdpa": "shared_prompt", "eager": "shared_prompt_eager"}
#: Label positions projected onto the vocabulary at a time; bounds the memory of the logits.
CHUNK = 2048


def shared_prompt_attention(  # noqa: PLR0917 - transformers' order
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_rows: PackedRows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as ``sdpa`` does, but without a mask where rows are still in their prompts.

    There attention is plainly causal: half the work, no mask to read, and on a GPU the fast kernels. A layer with a window
    gets it as a band over positions, and in the prompts only if they are longer than it. Calls without ``packed_rows``, such
    as those made while generating, are left to ``sdpa``.

    Args:
        module: The attention layer.
        query: [rows, heads, length, width]; key and value alike, with their own heads.
        key: See query.
        value: See query.
        attention_mask: What the model made of its mask.
        packed_rows: The rows, handed down by the model.
        **kwargs: Scaling, dropout, ``sliding_window`` and the like.

    Returns:
        [rows, length, heads, width], and no weights.
    """
    if packed_rows is None or key.shape[2] != query.shape[2]:
        whole: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return whole
    window, shared = kwargs.get("sliding_window"), packed_rows.shared
    mask = packed_rows.mask(window)
    if shared < 1 or (window is not None and shared > window):
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    inside = slice(None, shared)
    prompt, _ = sdpa_attention_forward(
        module, query[:, :, inside], key[:, :, inside], value[:, :, inside], None, **kwargs | {"is_causal": True}
    )
    branches, _ = sdpa_attention_forward(module, query[:, :, shared:], key, value, mask[:, :, shared:], **kwargs)
    return torch.cat([prompt, branches], dim=1), None


def shared_prompt_eager(  # noqa: PLR0917 - transformers' order
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_rows: PackedRows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as the model's own eager code does, with a mask that is added; arguments as `shared_prompt_attention`."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    if packed_rows is not None and key.shape[2] == query.shape[2]:
        attention_mask = packed_rows.mask(kwargs.get("sliding_window"), query.dtype)
    out: tuple[Tensor, Tensor | None] = eager(module, query, key, value, attention_mask, **kwargs)
    return out


AttentionInterface.register(PACKED_ATTENTION["sdpa"], shared_prompt_attention)
AttentionInterface.register(PACKED_ATTENTION["eager"], shared_prompt_eager)
AttentionMaskInterface.register(PACKED_ATTENTION["sdpa"], sdpa_mask)
AttentionMaskInterface.register(PACKED_ATTENTION["eager"], eager_mask)


def base_model(model: Any) -> Any:
    """Return the causal language model under any PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(model: Any) -> Any:
    """Return the config of the language model, under that of a multimodal one."""
    return base_model(model).config.get_text_config()


def install_packed_forward(model: Any, *, grouped: bool = True, own_head: bool = False) -> None:
    """Let ``model(packed=rows)`` return the log-probability of each response; any other call stays what it was.

    With ``aux_loss=True`` it returns the auxiliary loss of a mixture of experts, too. Going through the model's own forward
    is what makes wrappers work: DistributedDataParallel sees the call and reduces gradients, accelerate's mixed precision
    applies, and PEFT's adapters are on or off as set.

    Args:
        model: A causal language model, PEFT-wrapped or not. A second call changes the options alone.
        grouped: Rows hold several responses, so attention becomes that of `PACKED_ATTENTION`; else it is the model's own.
        own_head: Let the model's own forward make the logits of all positions, for heads that are not a projection with a
            scale and a cap; costs memory.
    """
    base = base_model(model)
    base.packed_own_head, base.packed_grouped = own_head, grouped
    plain_name = attention_of(base)
    name = PACKED_ATTENTION.get(plain_name, plain_name) if grouped else plain_name
    if name != base.config._attn_implementation and _hands_arguments_down(base):
        base.set_attn_implementation(name)
    base.packed_attention = base.config._attn_implementation
    # Accelerate puts its mixed precision around the forward pass, and keeps what was there by this name.
    plain = vars(base).get("_original_forward", base.forward)
    if hasattr(plain, "packs_for"):
        if plain.packs_for is not base:
            raise PersodpoError(
                "The model is a copy of one that a trainer has, and its forward pass is still that of the original; load it "
                "anew instead."
            )
        return
    plain = base.forward

    @wraps(plain)
    def forward(*args: Any, packed: PackedRows | None = None, aux_loss: bool = False, **kwargs: Any) -> Any:
        if packed is None:
            with _own_attention(base):
                return plain(*args, **kwargs)
        return (log_probs_and_auxiliary_loss if aux_loss else response_log_probs)(base, packed)

    forward.packs_for = base  # type: ignore[attr-defined]
    base.forward = forward


def layout_of(model: Any) -> dict[str, bool]:
    """Return the options of `install_packed_forward` that hold for a model now; none where it was not called."""
    base = base_model(model)
    names = {"grouped": "packed_grouped", "own_head": "packed_own_head"}
    return {option: getattr(base, name) for option, name in names.items() if hasattr(base, name)}


@contextmanager
def _own_attention(base: Any) -> Iterator[None]:
    """Give attention its own name back meanwhile: some models choose by it what a long sequence attends to."""
    name = base.config._attn_implementation
    if name not in PACKED_ATTENTION.values():
        yield
        return
    base.set_attn_implementation(attention_of(base))
    try:
        yield
    finally:
        base.set_attn_implementation(name)


def attention_of(model: Any) -> str:
    """Return the attention implementation that a model was loaded with."""
    name: str = base_model(model).config._attn_implementation
    return {packed: plain for plain, packed in PACKED_ATTENTION.items()}.get(name, name)


def _hands_arguments_down(base: Any) -> bool:
    """Tell whether attention can be set, and be told of the rows."""
    parameters = inspect.signature(base.base_model.forward).parameters.values()
    return bool(base._can_set_attn_implementation()) and any(one.kind is one.VAR_KEYWORD for one in parameters)


def response_log_probs(model: Any, rows: PackedRows) -> Tensor:
    """Return the summed log-probability of each response, projecting only response positions onto the vocabulary.

    Args:
        model: A causal language model of transformers, PEFT-wrapped or not.
        rows: Packed groups on the model's device.

    Returns:
        Log-probabilities in nats, float32 or wider, [responses]; differentiable.
    """
    return _log_probs_and_outputs(base_model(model), rows)[0]


def _log_probs_and_outputs(base: Any, rows: PackedRows, **inputs: Any) -> tuple[Tensor, Any]:
    inputs |= {"input_ids": rows.input_ids, "use_cache": False}
    if rows.grouped:
        if base.config._attn_implementation != getattr(base, "packed_attention", base.config._attn_implementation):
            raise PersodpoError(
                f"Attention was set to '{base.config._attn_implementation}' after the trainer was made; set it before."
            )
        eager = attention_of(base) == "eager"
        inputs |= {"position_ids": rows.position_ids, "attention_mask": rows.mask(dtype=base.dtype if eager else None)}
        if base.config._attn_implementation in PACKED_ATTENTION.values():
            inputs["packed_rows"] = rows
    else:
        # Some models take a token of the text for padding where no mask tells them otherwise; what fills rows comes last.
        inputs["attention_mask"] = torch.ones_like(rows.input_ids)
    labelled = rows.owner >= 0
    if getattr(base, "packed_own_head", False):
        outputs = type(base).forward(base, **inputs)
        log_probs = _of_labels(outputs.logits[labelled], rows.labels[labelled])
    else:
        outputs = base.base_model(**inputs)
        hidden = outputs.last_hidden_state[labelled]
        log_probs = token_log_probs(hidden, base.get_output_embeddings(), rows.labels[labelled], *head_rule(base))
    sums = torch.zeros(len(rows.lengths), dtype=log_probs.dtype, device=log_probs.device)
    return sums.index_add(0, rows.owner[labelled], log_probs), outputs


def log_probs_and_auxiliary_loss(model: Any, rows: PackedRows) -> tuple[Tensor, Tensor]:
    """Return `response_log_probs` and the load-balancing loss of a mixture of experts, weighted as in TRL's batch.

    TRL computes the loss over the sequences of both sides of all pairs, with the prompt repeated, so each position counts
    for as many sides as it belongs to.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # noqa: PLC0415 - slow to load

    log_probs, outputs = _log_probs_and_outputs(base_model(model), rows, output_router_logits=True)
    config = text_config(model)
    loss = load_balancing_loss_func(outputs.router_logits, config.num_experts, config.num_experts_per_tok, rows.sides)
    return log_probs, torch.as_tensor(loss)


def _of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probability of each label, float32 or wider, [tokens]."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide, -1).gather(-1, labels[:, None])[:, 0]


def head_rule(model: Any) -> tuple[float, float | None]:
    """Return what a model does to its logits after the projection, by the config entries that TRL reads.

    Returns:
        A factor (Cohere, Granite, Falcon-H1 and others), and a bound (Gemma) or None.
    """
    config = text_config(model)
    factors = (getattr(config, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"))
    scale = next((factor for factor in factors if factor is not None), None)
    divisor = getattr(config, "logits_scaling", None)
    if scale is None and divisor is not None:
        # HyperCLOVA X multiplies by what others divide by.
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    return 1.0 if scale is None else scale, getattr(config, "final_logit_softcapping", None)


def token_log_probs(
    hidden: Tensor, head: nn.Module, labels: Tensor, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Return the log-probability of each label, a chunk at a time.

    The logits of a chunk are recomputed in the backward pass, so that only one chunk of them is ever held.

    Args:
        hidden: Hidden states, [tokens, width].
        head: The output projection.
        labels: Token ids, [tokens].
        scale: Factor of the logits.
        softcap: Bound of the scaled logits where the architecture has one.

    Returns:
        Log-probabilities, float32 or wider, [tokens].
    """
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point() and not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(weight.dtype)

    def project(states: Tensor, targets: Tensor) -> Tensor:
        logits = head(states)
        logits = logits * scale if scale != 1 else logits
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        return _of_labels(logits, targets)

    pieces = zip(torch.split(hidden, CHUNK), torch.split(labels, CHUNK), strict=True)
    if not (torch.is_grad_enabled() and len(labels) > CHUNK):
        return torch.cat([project(states, targets) for states, targets in pieces])
    return torch.cat([checkpoint(project, states, targets, use_reentrant=False) for states, targets in pieces])
