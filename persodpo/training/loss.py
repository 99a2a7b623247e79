"""Log-probability ratios of pairs in, weighted DPO losses out: pure functions of tensors, names and formulas of TRL 1.16.

A response's log-probability does not depend on its partner, so a loss here is a function of two log-ratios and two
lengths per pair. Losses that sort or average over the batch, and f-divergences, are left to TRL (``trl dpo``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from persodpo.errors import PersodpoError

Weighting = Literal["none", "sigmoid"]
LOSSES = ("sigmoid", "hinge", "ipo", "robust")


@dataclass(frozen=True)
class LossSettings:
    """Which loss, with TRL's names and defaults.

    Attributes:
        loss_type: One of `LOSSES`.
        beta: Strength of the pull to the reference, over 0.
        label_smoothing: Chance that a label is wrong, 0 to 0.5; only ``robust`` reads it.

    Raises:
        PersodpoError: The loss is not computed here, or its label smoothing is out of range.
    """

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is not computed here."""
        if self.loss_type not in LOSSES:
            raise PersodpoError(
                f"loss_type '{self.loss_type}' is not computed on grouped rows, only {', '.join(LOSSES)} are; "
                "`trl dpo` trains with it on the same pairs."
            )
        if self.loss_type == "robust" and not 0 <= self.label_smoothing < 0.5:
            raise PersodpoError(f"loss_type 'robust' needs a label_smoothing in 0..0.5, not {self.label_smoothing}.")


class Pairs(NamedTuple):
    """What a loss sees: log-probability minus the reference's, in nats, and tokens of each side, [pairs] each."""

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor


def pair_weights(score_chosen: Tensor, score_rejected: Tensor, weighting: Weighting) -> Tensor:
    """Return the weight of each pair's loss, [pairs]: 1, or the sigmoid of its score margin, which is PersoDPO's formula.

    Args:
        score_chosen: Quality of the chosen response, [pairs].
        score_rejected: Quality of the rejected response, [pairs].
        weighting: ``none`` or ``sigmoid`` (0.5 to 0.73 for scores in 0..1).
    """
    margin = score_chosen - score_rejected
    return torch.sigmoid(margin) if weighting == "sigmoid" else torch.ones_like(margin)


def pair_losses(pairs: Pairs, settings: LossSettings) -> Tensor:
    """Return the unweighted loss of each pair, in nats, [pairs].

    ``sigmoid`` is equation 7 of DPO (arXiv 2305.18290), ``hinge`` that of SLiC (2305.10425), ``ipo`` equation 17 of IPO
    (2310.12036) with log-ratios per token as TRL has them, ``robust`` that of robust DPO (2403.00409).
    """
    logit = settings.beta * (pairs.chosen - pairs.rejected)
    if settings.loss_type == "sigmoid":
        return -logsigmoid(logit)
    if settings.loss_type == "hinge":
        return torch.relu(1 - logit)
    if settings.loss_type == "ipo":
        per_token = pairs.chosen / pairs.chosen_length - pairs.rejected / pairs.rejected_length
        return (per_token - 1 / (2 * settings.beta)) ** 2
    flip = settings.label_smoothing
    return (-(1 - flip) * logsigmoid(logit) + flip * logsigmoid(-logit)) / (1 - 2 * flip)
