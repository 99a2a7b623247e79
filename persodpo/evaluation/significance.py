"""Exact tests on paired dialogues, Holm's correction, and what a comparison could have seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest
from scipy.stats import t as student

from persodpo.evaluation.observations import Floats

_TIE = 1e-12


@dataclass(frozen=True)
class Signs:
    """Which way paired dialogues differ.

    Attributes:
        higher: Dialogues with a difference above zero.
        lower: Dialogues with one below.
        ties: Dialogues without one; they say nothing about the direction and are dropped.
        p_value: Two-sided exact p-value, 1 if all are ties.
    """

    higher: int
    lower: int
    ties: int
    p_value: float


def sign_test(differences: Floats) -> Signs:
    """Test whether differences go one way more often than the other, exactly.

    On differences of two failure indicators this is McNemar's exact test: its discordant pairs are the dialogues that
    are no ties.

    Args:
        differences: One a dialogue; NaN is left out.

    Returns:
        The counts and the p-value.
    """
    known = differences[~np.isnan(differences)]
    higher, lower = int((known > _TIE).sum()), int((known < -_TIE).sum())
    p_value = float(binomtest(higher, higher + lower, 0.5).pvalue) if higher + lower else 1.0
    return Signs(higher, lower, len(known) - higher - lower, p_value)


def holm(p_values: Floats) -> Floats:
    """Correct the p-values of a family so that the chance of any false finding stays at the level (Holm 1979).

    Args:
        p_values: One a test, 0 to 1; NaN where there was none, which does not count.

    Returns:
        The corrected p-values: in the same order, never below the raw ones, at most 1.
    """
    adjusted = np.full(len(p_values), np.nan)
    known = np.flatnonzero(~np.isnan(p_values))
    order = known[np.argsort(p_values[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p_values[order] * factors))
    return adjusted


def smallest_detectable(standard_error: float, freedom: float = math.inf) -> float:
    """Return the true difference that a two-sided test at 5 % finds with 80 % power, of one comparison by itself.

    Args:
        standard_error: Of the mean paired difference.
        freedom: Its degrees of freedom.

    Returns:
        The sum of Student's 0.975 and 0.80 quantiles, in standard errors: 2.80 of them where there are many dialogues and
        one seed.
    """
    return float((student.ppf(0.975, freedom) + student.ppf(0.80, freedom)) * standard_error)
