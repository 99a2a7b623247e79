"""Packed rows and a causal language model in, the log-probability of each response out."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from persodpo.errors import PersodpoError
from persodpo.training.packing import PackedRows

#: Name under which `shared_prompt_attention` is registered with transformers.
SHARED_PROMPT = "shared_prompt"
#: Attention implementations that take a mask of any shape.
MASKED_ATTENTION = ("sdpa", "eager", SHARED_PROMPT)
#: Label positions projected onto the vocabulary at a time; bounds the memory of the logits.
CHUNK = 2048


def check_attention(model: nn.Module) -> None:
    """Refuse attention that would read packed rows wrongly, and silently.

    Raises:
        PersodpoError: The model's attention takes no mask of its own, such as flash attention.
    """
    config: Any = model.config
    name = config._attn_implementation
    if name not in MASKED_ATTENTION:
        raise PersodpoError(
            f"Attention '{name}' takes no mask that keeps the responses of a row apart; load the model with "
            "attn_implementation='sdpa'."
        )


def shared_prompt_attention(  # noqa: PLR0917 - transformers' order
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prompt: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as ``sdpa`` does, but without the mask where rows are still in their prompts.

    There attention is plainly causal: half the work, no mask to read, and on a GPU the fast kernels. Any other call,
    such as one made while generating, is left to ``sdpa``.

    Args:
        module: The attention layer.
        query: [rows, heads, length, width]; key and value alike, with their own heads.
        key: See query.
        value: See query.
        attention_mask: [rows, 1, length, length].
        shared_prompt: Positions at the start of every row that stand in its prompt.
        **kwargs: Scaling, dropout and the like.

    Returns:
        [rows, length, heads, width], and no weights.
    """
    if attention_mask is None or shared_prompt < 1 or key.shape[2] != query.shape[2]:
        whole: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return whole
    inside = slice(None, shared_prompt)
    first, _ = sdpa_attention_forward(
        module, query[:, :, inside], key[:, :, inside], value[:, :, inside], None, **kwargs | {"is_causal": True}
    )
    branches = attention_mask[:, :, shared_prompt:]
    second, _ = sdpa_attention_forward(module, query[:, :, shared_prompt:], key, value, branches, **kwargs)
    return torch.cat([first, second], dim=1), None


AttentionInterface.register(SHARED_PROMPT, shared_prompt_attention)
AttentionMaskInterface.register(SHARED_PROMPT, sdpa_mask)


def response_log_probs(model: Any, rows: PackedRows) -> Tensor:
    """Return the summed log-probability of each response, projecting only response positions onto the vocabulary.

    Args:
        model: A causal language model of transformers, PEFT-wrapped or not, whose attention `check_attention` accepts.
        rows: Packed groups on the model's device.

    Returns:
        Log-probabilities in nats, float32, [responses]; differentiable.
    """
    check_attention(model)
    known = {"shared_prompt": rows.shared} if model.config._attn_implementation == SHARED_PROMPT else {}
    hidden = _decoder(model)(
        input_ids=rows.input_ids,
        position_ids=rows.position_ids,
        attention_mask=rows.attention_mask,
        use_cache=False,
        **known,
    ).last_hidden_state
    labelled = rows.owner >= 0
    log_probs = token_log_probs(hidden[labelled], model.get_output_embeddings(), rows.labels[labelled], _softcap(model))
    sums = torch.zeros(len(rows.lengths), dtype=torch.float32, device=log_probs.device)
    return sums.index_add(0, rows.owner[labelled], log_probs)


def _decoder(model: Any) -> Any:
    """Return the part of a causal language model below its head, under any PEFT wrapper."""
    return base_model(model).get_decoder()


def base_model(model: Any) -> Any:
    """Return the causal language model under any PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def install_packed_forward(model: Any) -> None:
    """Let ``model(packed=rows)`` return `response_log_probs`; any other call stays what it was.

    Going through the model's own forward is what makes wrappers work: DistributedDataParallel sees the call and reduces
    gradients, accelerate's mixed precision applies, and PEFT's adapters are on or off as set. Attention ``sdpa`` becomes
    `shared_prompt_attention` where the model hands extra arguments down to it.

    Args:
        model: A causal language model, PEFT-wrapped or not. Installing twice does nothing.
    """
    base = base_model(model)
    plain = base.forward
    if getattr(plain, "takes_packed", False):
        return

    @wraps(plain)
    def forward(*args: Any, packed: PackedRows | None = None, **kwargs: Any) -> Any:
        return plain(*args, **kwargs) if packed is None else response_log_probs(base, packed)

    forward.takes_packed = True  # type: ignore[attr-defined]
    base.forward = forward
    parameters = inspect.signature(base.get_decoder().forward).parameters.values()
    if base.config._attn_implementation == "sdpa" and any(p.kind is p.VAR_KEYWORD for p in parameters):
        base.set_attn_implementation(SHARED_PROMPT)


def _softcap(model: Any) -> float | None:
    cap: float | None = getattr(model.config, "final_logit_softcapping", None)
    return cap


def token_log_probs(hidden: Tensor, head: nn.Module, labels: Tensor, softcap: float | None = None) -> Tensor:
    """Return the log-probability of each label, a chunk at a time.

    The logits of a chunk are recomputed in the backward pass, so that only one chunk of them is ever held.

    Args:
        hidden: Hidden states, [tokens, width].
        head: The output projection.
        labels: Token ids, [tokens].
        softcap: Bound of the logits where the architecture has one.

    Returns:
        Log-probabilities, float32, [tokens].
    """

    def project(states: Tensor, targets: Tensor) -> Tensor:
        logits = head(states).float()
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        return torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]

    pieces = zip(torch.split(hidden, CHUNK), torch.split(labels, CHUNK), strict=True)
    if not (torch.is_grad_enabled() and len(labels) > CHUNK):
        return torch.cat([project(states, targets) for states, targets in pieces])
    return torch.cat([checkpoint(project, states, targets, use_reentrant=False) for states, targets in pieces])
