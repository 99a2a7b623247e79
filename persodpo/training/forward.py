"""Packed rows and a causal language model in, the log-probability of each response out."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from persodpo.errors import PersodpoError
from persodpo.training.packing import PackedRows

#: Attention implementations of transformers that take a mask of any shape.
MASKED_ATTENTION = ("sdpa", "eager")
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


def response_log_probs(model: Any, rows: PackedRows) -> Tensor:
    """Return the summed log-probability of each response, projecting only response positions onto the vocabulary.

    Args:
        model: A causal language model of transformers, PEFT-wrapped or not, whose attention `check_attention` accepts.
        rows: Packed groups on the model's device.

    Returns:
        Log-probabilities in nats, float32, [responses]; differentiable.
    """
    check_attention(model)
    hidden = _decoder(model)(
        input_ids=rows.input_ids,
        position_ids=rows.position_ids,
        attention_mask=rows.attention_mask,
        use_cache=False,
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
    gradients, accelerate's mixed precision applies, and PEFT's adapters are on or off as set.

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
