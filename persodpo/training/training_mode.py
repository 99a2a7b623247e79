"""Does a model train in packed rows as in plain passes? Log-probabilities and gradients in training mode decide."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from persodpo.errors import PersodpoError
from persodpo.training.forward import base_model
from persodpo.training.packing import Group
from persodpo.training.probe import (
    FAULTS,
    LEAK,
    ROUNDING,
    SMALL,
    as_it_was,
    buffers_put_back,
    first_line,
    moved_by_others,
    packed_log_probs,
    plain_log_probs,
    precision,
    random_groups,
    refusing_switches,
    without_dropout,
)

#: Length of the texts that are tried in training mode, tokens.
SHORT = 64
#: Factor of a loss that is small enough to pass any clipping.
LITTLE = 1e-3
#: Share of a gradient that rounding may explain, by the bytes of a weight; quantised weights show gross faults alone.
GRADIENT = {8: 1e-3, 4: 1e-3, 2: 0.5}


class _Pass(NamedTuple):
    """Log-probabilities, nats per token; and token ids, [positions], with the gradients of their embeddings."""

    values: Tensor
    ids: Tensor
    gradients: Tensor


class _Gaps(NamedTuple):
    """How far packed passes are from plain ones in training mode.

    Attributes:
        values: Largest difference of log-probabilities, nats per token.
        gradients: Difference of the gradients of all tokens' embeddings, as a share.
        noise: What another random state changes, nats per token.
        moved: What other tokens in a response do to others of its row, nats per token.
        by_rows: What those of another row do.
        added: Largest gradient of a loss that is 0.
        bent: How far a thousandth of the loss has other gradients than a thousandth of them, as a share.
    """

    values: float
    gradients: float
    noise: float
    moved: float
    by_rows: float
    added: float
    bent: float


def check_training(model: Any, max_length: int | None, token_budget: int, *, grouped: bool) -> None:
    """Refuse a model that trains otherwise in rows of ours than in plain passes, though evaluation shows the same values.

    Some code mixes tokens in training alone; some changes gradients alone, as hooks do, detached tokens, or a loss that is
    added in the backward pass. Dropout is off meanwhile; a model that draws other noise cannot be held against itself.

    Raises:
        PersodpoError: Log-probabilities or the gradients of all tokens differ, or there are gradients that are no loss's.
    """
    (*groups, _), _ = random_groups(model, min(max_length or SHORT, SHORT), min(token_budget, SHORT))
    name = type(base_model(model)).__name__
    try:
        with refusing_switches(model), as_it_was(model, exact=True), without_dropout(model):
            kind = precision(model)
            gaps = _compare(model, groups, grouped=grouped)
    except FAULTS as error:
        warnings.warn(
            f"{name} could not be held against plain passes in training mode, only in evaluation "
            f"({type(error).__name__}: {first_line(error)}).",
            stacklevel=2,
        )
        return
    if gaps.noise > ROUNDING[kind] / 10:
        return
    # Models in float64 compute parts in float32; of float32 it is known how little rounding does to short texts.
    allowed = ROUNDING[kind] * (0.1 if kind is torch.float32 else 1)
    if not gaps.values <= allowed or gaps.moved > LEAK * ROUNDING[kind] + 10 * gaps.by_rows:
        raise PersodpoError(
            f"{name} gives other log-probabilities in rows of ours than in plain passes while it trains "
            f"({max(gaps.values, gaps.moved):.2g} nats per token apart), not in evaluation; `trl dpo` trains it on the same "
            "pairs."
        )
    if not gaps.gradients <= GRADIENT[kind.itemsize]:
        raise PersodpoError(
            f"{name} has other gradients in rows of ours than in plain passes ({gaps.gradients:.1%} apart), though its "
            "log-probabilities are the same; `trl dpo` trains it on the same pairs."
        )
    if not gaps.bent <= GRADIENT[kind.itemsize]:
        raise PersodpoError(
            f"{name} has gradients that are not in proportion to the loss ({gaps.bent:.1%} off), as where they are clipped "
            "inside the model: those of pairs cannot be added up before; `trl dpo` trains it on the same pairs."
        )
    if gaps.added > 0:
        raise PersodpoError(
            f"{name} has gradients where the loss is 0, such as those of a loss that is added in the backward pass: it "
            "counts forward passes, which are others here; `trl dpo` trains it on the same pairs."
        )


def _compare(model: Any, groups: list[Group], *, grouped: bool) -> _Gaps:
    """Compare passes of both kinds in training mode, and put the model's mode and buffers back."""

    def plain() -> Tensor:
        return torch.cat([plain_log_probs(model, group) for group in groups])

    def packed() -> Tensor:
        return packed_log_probs(model, groups, grouped=grouped)

    with torch.no_grad():
        plain()
    with buffers_put_back(model):
        try:
            model.train()
            torch.manual_seed(0)
            expected = _with_gradients(model, plain)
            torch.manual_seed(0)
            packed_pass = _with_gradients(model, packed)
            values, gradients = _apart(expected, packed_pass)
            torch.manual_seed(0)
            small = _with_gradients(model, packed, loss=LITTLE).gradients / LITTLE
            bent = float((small - packed_pass.gradients).norm() / packed_pass.gradients.norm().clamp(min=1e-12))
            torch.manual_seed(1)
            with torch.no_grad():
                noise = float((plain() - expected.values).abs().max())
                moved, by_rows = moved_by_others(model, groups, packed(), grouped=grouped)
            added = float(_with_gradients(model, packed, loss=0.0).gradients.abs().nan_to_num().max())
        finally:
            model.train(mode=False)
            with torch.no_grad():
                plain()  # models that scale weights for evaluation scale them again, as those put back are
    return _Gaps(values, gradients, noise, moved, by_rows, added, bent)


def _with_gradients(model: Any, compute: Callable[[], Tensor], loss: float = 1.0) -> _Pass:
    """Compute log-probabilities and the gradient of a sum of them, in which each counts otherwise.

    Where ``loss``, the factor of the sum, is 0, gradients of small weights are there, too, which should be 0 as all are.
    """
    calls: list[tuple[Tensor, Tensor]] = []

    def hold(_: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Tensor], output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.requires_grad_()
        calls.append((inputs[0] if inputs else keywords["input"], output))
        return output.clone()  # may be changed in place

    hook = base_model(model).get_input_embeddings().register_forward_hook(hold, with_kwargs=True)
    try:
        with torch.enable_grad():
            values = compute()
            shares = torch.linspace(1, -2, len(values), device=values.device) * loss
            embeddings = [output for _, output in calls]
            weights = [p for p in model.parameters() if p.requires_grad and p.numel() <= SMALL and not loss]
            gradients = torch.autograd.grad((values * shares).sum(), [*embeddings, *weights], allow_unused=not loss)
    finally:
        hook.remove()
    width = embeddings[0].shape[-1] if loss else 1
    present = [gradient for gradient in gradients if gradient is not None]
    flat = [one.reshape(-1, width).to(torch.promote_types(one.dtype, torch.float32)) for one in present]
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
