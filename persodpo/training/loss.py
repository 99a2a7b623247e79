"""Log-probability ratios of pairs in, weighted DPO losses out: pure functions of tensors.

A response's log-probability does not depend on its partner, so every loss here is a function of four numbers a pair: two
log-ratios and two lengths. Losses that look at the partner or at the batch before that (`REFUSED`) cannot be computed
from responses that were each processed once, and are refused by name. Names and formulas follow TRL 1.16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from persodpo.errors import PersodpoError

Weighting = Literal["none", "sigmoid", "offset"]

#: Why a loss of TRL's is refused.
REFUSED = {
    "aot": "it sorts log-ratios over the batch",
    "aot_unpaired": "it sorts log-ratios over the batch",
    "sft": "it averages over the tokens of the batch, not over pairs",
}


@dataclass(frozen=True)
class LossSettings:
    """Which loss, with TRL's names and defaults.

    Attributes:
        loss_type: Names of losses that are added up.
        loss_weights: One factor a loss; empty for 1 each.
        beta: Strength of the pull to the reference, over 0.
        label_smoothing: Chance that a label is wrong, 0 to 0.5.
        f_divergence_type: ``reverse_kl`` (DPO), ``forward_kl``, ``js_divergence`` or ``alpha_divergence``.
        f_alpha_divergence_coef: The alpha of the last.
        discopop_tau: Temperature of the ``discopop`` loss.
    """

    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] = ()
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        """Refuse what cannot be computed.

        Raises:
            PersodpoError: A loss is unknown or refused, or its settings contradict each other.
        """
        for name in self.loss_type:
            if name in REFUSED:
                raise PersodpoError(
                    f"loss_type '{name}' cannot be grouped: {REFUSED[name]}; use TRL's DPOTrainer for it."
                )
            if name not in LOSSES:
                raise PersodpoError(f"loss_type '{name}' is unknown; there are {', '.join(LOSSES)}.")
        if self.loss_weights and len(self.loss_weights) != len(self.loss_type):
            raise PersodpoError(f"loss_weights has {len(self.loss_weights)} values for {len(self.loss_type)} losses.")
        if "exo_pair" in self.loss_type and not 0 < self.label_smoothing < 1:
            raise PersodpoError("loss_type 'exo_pair' needs a label_smoothing above 0, such as 1e-3.")
        if "robust" in self.loss_type and not 0 <= self.label_smoothing < 0.5:
            raise PersodpoError(f"loss_type 'robust' needs a label_smoothing in 0..0.5, not {self.label_smoothing}.")
        if self.f_divergence_type not in DIVERGENCES:
            raise PersodpoError(
                f"f_divergence_type is one of {', '.join(DIVERGENCES)}, not '{self.f_divergence_type}'."
            )


class Pairs(NamedTuple):
    """What a loss sees of each pair.

    Attributes:
        chosen: Log-probability of the chosen response minus the reference's, in nats, [pairs].
        rejected: The same of the rejected response, [pairs].
        chosen_length: Tokens of the chosen response, [pairs].
        rejected_length: Tokens of the rejected response, [pairs].
    """

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor


def pair_weights(
    score_chosen: Tensor, score_rejected: Tensor, weighting: Weighting, *, scale_to_mean_one: bool = False
) -> Tensor:
    """Return the weight of each pair's loss.

    Args:
        score_chosen: Quality of the chosen response, [pairs].
        score_rejected: Quality of the rejected response, [pairs].
        weighting: ``sigmoid``: the sigmoid of the score margin, which is PersoDPO's formula (0.5 to 0.73 for scores in
            0..1); ``none`` and ``offset``: 1 (the offset acts in the logit, see `pair_losses`).
        scale_to_mean_one: Divide by the mean, so that weighting is not a hidden learning rate.

    Returns:
        Weights, [pairs].
    """
    margin = score_chosen - score_rejected
    weights = torch.sigmoid(margin) if weighting == "sigmoid" else torch.ones_like(margin)
    return weights / weights.mean() if scale_to_mean_one else weights


def pair_losses(pairs: Pairs, settings: LossSettings, offset: Tensor | None = None) -> Tensor:
    """Return the unweighted loss of each pair.

    Equation 7 of DPO (arXiv 2305.18290) for ``sigmoid``: -log sigmoid(beta * (chosen - rejected)).

    Args:
        pairs: Log-ratios and lengths.
        settings: Which loss.
        offset: Subtracted inside the logit of losses that have one, beta * (chosen - rejected) - offset, so that a pair
            must win by its score margin (ODPO, arXiv 2402.10571), [pairs].

    Returns:
        Losses in nats, [pairs].
    """
    reward = DIVERGENCES[settings.f_divergence_type]
    scores = pairs._replace(chosen=reward(pairs.chosen, settings), rejected=reward(pairs.rejected, settings))
    weights = settings.loss_weights or (1.0,) * len(settings.loss_type)
    shift = torch.zeros_like(pairs.chosen) if offset is None else offset
    total = torch.zeros_like(pairs.chosen)
    for name, weight in zip(settings.loss_type, weights, strict=True):
        total = total + weight * LOSSES[name](scores, settings, shift)
    return total


def _logit(pairs: Pairs, settings: LossSettings, offset: Tensor) -> Tensor:
    return settings.beta * (pairs.chosen - pairs.rejected) - offset


def _average(pairs: Pairs) -> Tensor:
    """Difference of the log-ratios a token."""
    return pairs.chosen / pairs.chosen_length.clamp(min=1) - pairs.rejected / pairs.rejected_length.clamp(min=1)


def _sigmoid(pairs: Pairs, settings: LossSettings, offset: Tensor) -> Tensor:
    return -logsigmoid(_logit(pairs, settings, offset))


def _hinge(pairs: Pairs, settings: LossSettings, offset: Tensor) -> Tensor:
    return torch.relu(1 - _logit(pairs, settings, offset))


def _ipo(pairs: Pairs, settings: LossSettings, _: Tensor) -> Tensor:
    """Equation 17 of IPO (arXiv 2310.12036), with log-ratios a token as TRL does."""
    return (_average(pairs) - 1 / (2 * settings.beta)) ** 2


def _exo_pair(pairs: Pairs, settings: LossSettings, offset: Tensor) -> Tensor:
    """Equation 16 of EXO (arXiv 2402.00856)."""
    logit, epsilon = _logit(pairs, settings, offset), settings.label_smoothing
    win, lose = torch.sigmoid(logit), torch.sigmoid(-logit)
    return win * (logsigmoid(logit) - math.log1p(-epsilon)) + lose * (logsigmoid(-logit) - math.log(epsilon))


def _nca_pair(pairs: Pairs, settings: LossSettings, _: Tensor) -> Tensor:
    """NCA (arXiv 2402.05369)."""
    chosen, rejected = settings.beta * pairs.chosen, settings.beta * pairs.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _robust(pairs: Pairs, settings: LossSettings, offset: Tensor) -> Tensor:
    """Robust DPO (arXiv 2403.00409)."""
    logit, flip = _logit(pairs, settings, offset), settings.label_smoothing
    return (-(1 - flip) * logsigmoid(logit) + flip * logsigmoid(-logit)) / (1 - 2 * flip)


def _bco_pair(pairs: Pairs, settings: LossSettings, _: Tensor) -> Tensor:
    """BCO on pairs (arXiv 2404.04656), as TRL 1.16 computes it: without a running mean."""
    return -logsigmoid(settings.beta * pairs.chosen) - logsigmoid(-settings.beta * pairs.rejected)


def _sppo_hard(pairs: Pairs, settings: LossSettings, _: Tensor) -> Tensor:
    """SPPO with hard labels (arXiv 2405.00675)."""
    return (pairs.chosen - 0.5 / settings.beta) ** 2 + (pairs.rejected + 0.5 / settings.beta) ** 2


def _apo_zero(pairs: Pairs, settings: LossSettings, _: Tensor) -> Tensor:
    """Equation 7 of APO (arXiv 2408.06266)."""
    return 1 - torch.sigmoid(settings.beta * pairs.chosen) + torch.sigmoid(settings.beta * pairs.rejected)


def _apo_down(pairs: Pairs, settings: LossSettings, offset: Tensor) -> Tensor:
    """Equation 8 of APO (arXiv 2408.06266)."""
    return torch.sigmoid(settings.beta * pairs.chosen) + 1 - torch.sigmoid(_logit(pairs, settings, offset))


def _discopop(pairs: Pairs, settings: LossSettings, offset: Tensor) -> Tensor:
    """Equation 5 of DiscoPOP (arXiv 2406.08414)."""
    logit = _logit(pairs, settings, offset)
    blend = torch.sigmoid(logit / settings.discopop_tau)
    return -logsigmoid(logit) * (1 - blend) + torch.exp(-logit) * blend


def _sigmoid_norm(pairs: Pairs, settings: LossSettings, offset: Tensor) -> Tensor:
    """DPO on log-ratios a token."""
    return -logsigmoid(settings.beta * _average(pairs) - offset)


LOSSES = {
    "sigmoid": _sigmoid, "hinge": _hinge, "ipo": _ipo, "exo_pair": _exo_pair, "nca_pair": _nca_pair, "robust": _robust,
    "bco_pair": _bco_pair, "sppo_hard": _sppo_hard, "apo_zero": _apo_zero, "apo_down": _apo_down,
    "discopop": _discopop, "sigmoid_norm": _sigmoid_norm,
}  # fmt: skip


def _reverse_kl(ratio: Tensor, _: LossSettings) -> Tensor:
    return ratio


def _forward_kl(ratio: Tensor, _: LossSettings) -> Tensor:
    return 1 - torch.exp(-ratio)


def _js_divergence(ratio: Tensor, _: LossSettings) -> Tensor:
    return math.log(2) + logsigmoid(ratio)


def _alpha_divergence(ratio: Tensor, settings: LossSettings) -> Tensor:
    power = settings.f_alpha_divergence_coef - 1.0
    if abs(power) < 1e-6:
        return ratio
    return torch.expm1(torch.clamp(power * ratio.float(), max=80.0)).to(ratio.dtype) / power


#: Reward of a log-ratio under each f-divergence (arXiv 2309.16240).
DIVERGENCES = {
    "reverse_kl": _reverse_kl, "forward_kl": _forward_kl, "js_divergence": _js_divergence,
    "alpha_divergence": _alpha_divergence,
}  # fmt: skip
