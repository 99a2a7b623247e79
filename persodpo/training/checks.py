"""What of a policy, its reference and its tokens is refused before anything is trained."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from persodpo.errors import PersodpoError
from persodpo.training.forward import attention_of, base_model
from persodpo.training.guard import Verdict, check_packing
from persodpo.training.packing import Group, Layout, pack
from persodpo.training.probe import FAULTS, buffers_put_back, first_line, plain_ids


def unwrapped(model: Any) -> Any:
    """Return a model without what an earlier trainer of this process left around it.

    Accelerate puts mixed precision around a model once; one that it takes for prepared would be trained without. A deep copy
    keeps forward passes that trainers made for the model that it was copied from, and would compute with its weights.
    """
    for one in (model, base_model(model)) if isinstance(model, nn.Module) else ():
        vars(one).pop("_is_accelerate_prepared", None)
        own = vars(one).pop("_original_forward", None)
        if own is not None:
            one.forward = own
        if _is_of_another(vars(one).get("forward"), one):
            del one.forward
    return model


def _is_of_another(forward: Any, model: nn.Module) -> bool:
    """Tell whether a forward pass holds one of another model of this kind."""
    owner, cells = getattr(forward, "__self__", None), getattr(forward, "__closure__", None) or ()
    other = type(owner) is type(model) and owner is not model
    return other or any(_is_of_another(cell.cell_contents, model) for cell in cells if callable(cell.cell_contents))


def check_models(
    model: Any,
    reference: Any,
    *,
    max_length: int | None,
    token_budget: int,
    aux_loss: bool,
    widest: int | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Verdict:
    """Find out how a policy and its reference are trained together.

    Args:
        model: The policy.
        reference: A reference model of its own, or None.
        max_length: See `check_packing`.
        token_budget: See `check_packing`.
        aux_loss: Whether the policy's load-balancing loss is trained, too.
        widest: See `check_packing`.
        autocast: Gives the mixed precision of the training; without it a model of several number types may not run.

    Returns:
        The verdict that holds for both.

    Raises:
        PersodpoError: One of them cannot be trained here, or would be trained in part only.
    """
    name = type(base_model(model)).__name__
    if getattr(base_model(model), "_hf_peft_config_loaded", False):
        raise PersodpoError(
            "The model has adapters of transformers' own, as one that is loaded from a folder of adapters: pass a PeftModel "
            "or peft_config, or merge them into their base (peft: "
            "AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload())."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PersodpoError(f"No weight of {name} can be trained; load adapters with is_trainable=True.")
    if getattr(model, "is_loaded_in_4bit", False) and model.device.type == "cpu":
        raise PersodpoError(
            "4-bit weights on a CPU cannot be trained: bitsandbytes packs them at the first evaluation, and no gradient "
            "passes them from then on; load the model on a GPU, or without quantisation."
        )
    # TRL has put the reference under mixed precision already, which the trainer does around each pass of its own.
    reference = unwrapped(reference)
    verdicts = [
        (one, check_packing(one, max_length, token_budget, widest=widest, trained=one is model))
        for one in (model, reference)
        if one is not None
    ]
    decisive, verdict = next((both for both in verdicts if not both[1].grouped), verdicts[0])
    # The reference's own probe is the last: active adapters and the like show in no weight.
    verdict = replace(verdict, probe=verdicts[-1][1].probe)
    with autocast():
        noisy = _draws_noise(model, verdict)
        if aux_loss:
            _check_auxiliary_loss(model, verdict)
    _warn(model, verdict, decisive, noisy=noisy)
    return verdict


def _warn(model: Any, verdict: Verdict, decisive: Any, *, noisy: bool) -> None:
    """Say in which way a model is trained otherwise than by TRL, or at more cost; ``decisive`` is what the verdict is of."""
    name = type(base_model(model)).__name__
    if noisy and verdict.grouped:
        warnings.warn(
            f"{name} draws noise in training that disable_dropout does not switch off, such as attention dropout or router "
            "jitter of its config: the pairs of a prompt share it, where TRL draws it for each side of each pair.",
            stacklevel=3,
        )
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters()):
        warnings.warn(
            f"Weights of {name} have gradient hooks: they see the gradients of each micro-batch, which are others than "
            "those of TRL; with a token_budget that holds a whole step they see the step's.",
            stacklevel=3,
        )
    if verdict.reason:
        whose = f"{name}, as its reference {type(base_model(decisive)).__name__}," if decisive is not model else name
        layout = "grouped rows, with the logits of all positions" if verdict.grouped else "one response per row"
        warnings.warn(
            f"{whose} under attention '{attention_of(decisive)}' is trained on {layout} ({verdict.reason}): the same "
            "losses, but slower and with more memory.",
            stacklevel=3,
        )


def _check_auxiliary_loss(model: Any, verdict: Verdict) -> None:
    name = type(base_model(model)).__name__
    prompt, first, second = itertools.islice(itertools.cycle(plain_ids(model).tolist()), 3)
    group = Group([prompt], [[first], [second, first]], [0], [1], [1.0], [0])
    rows = pack([group], Layout(grouped=verdict.grouped, closed=True)).to(model.device)
    try:
        with torch.no_grad():
            loss = float(model(packed=rows, aux_loss=True)[1])
    except FAULTS as error:
        raise PersodpoError(
            f"The auxiliary loss of {name} cannot be computed ({type(error).__name__}: {first_line(error)}); set "
            "router_aux_loss_coef=0."
        ) from error
    if not math.isfinite(loss):
        raise PersodpoError(f"The auxiliary loss of {name} is {loss}; its weights are damaged.")


def _draws_noise(model: Any, verdict: Verdict) -> bool:
    """Tell whether training draws noise by other means than dropout modules, which a warning of their own is about.

    Raises:
        PersodpoError: Training changes a buffer, so rows of ours would leave other statistics behind than TRL's.
    """
    training, devices = model.training, [model.device] if model.device.type == "cuda" else []
    text = list(itertools.islice(itertools.cycle(plain_ids(model).tolist()), 4))
    rows = pack([Group(text[:2], [text[2:], text[3:]])], Layout(grouped=verdict.grouped)).to(model.device)
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        model.eval()
        model(packed=rows)
        values = []
        with buffers_put_back(model) as buffers:
            model.train()
            for seed in range(3):
                torch.manual_seed(seed)
                values.append(model(packed=rows))
            model.eval()
            model(packed=rows)  # some scale weights for evaluation
    model.train(training)
    if buffers:
        raise PersodpoError(
            f"{type(base_model(model)).__name__} changes {buffers[0]} in training, a statistic of the batch that packed "
            "rows would change otherwise; use `trl dpo`."
        )
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return False
    return any(float((value - values[0]).abs().max()) > verdict.tolerance / 10 for value in values[1:])


def check_vocabulary(model: Any, groups: Sequence[Group]) -> None:
    """Refuse tokens that a model has no embedding for.

    Raises:
        PersodpoError: There is one.
    """
    largest = max(token for group in groups for ids in (group.prompt, *group.responses) for token in ids)
    embeddings = getattr(model.get_input_embeddings(), "num_embeddings", math.inf)
    if largest >= embeddings:
        raise PersodpoError(
            f"Token {largest} has no embedding in {type(base_model(model)).__name__}, which has {embeddings}."
        )


def trains_adapters_alone(model: Any) -> bool:
    """Tell whether a model without its adapters is still what it was before training."""
    if not isinstance(model, PeftModel):
        return False
    own = (getattr(model.base_model, "prefix", "lora_"), "modules_to_save", "trainable_tokens")
    return all(any(part in name for part in own) for name, weight in model.named_parameters() if weight.requires_grad)
