"""Exact tests on paired dialogues, Wilson's interval, Holm's correction, and what a comparison could have seen."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, norm
from scipy.stats import t as student

from persodpo.evaluation.observations import Floats

#: Standard normal quantile of two-sided 95 %.
Z95 = float(norm.ppf(0.975))
_TIE = 1e-12


class Signs(NamedTuple):
    """How many paired dialogues differ upwards, downwards and not at all, and the two-sided exact p-value."""

    higher: int
    lower: int
    ties: int
    p_value: float


def sign_test(differences: Floats) -> Signs:
    """Test whether differences go one way more often than the other, exactly; ties are dropped.

    On differences of two failure indicators this is McNemar's exact test: its discordant pairs are the dialogues that
    are no ties.

    Args:
        differences: One per dialogue; NaN is left out.

    Returns:
        The counts and the p-value, 1 if all are ties.
    """
    known = differences[~np.isnan(differences)]
    higher, lower = int((known > _TIE).sum()), int((known < -_TIE).sum())
    p_value = float(binomtest(higher, higher + lower).pvalue) if higher + lower else 1.0
    return Signs(higher, lower, len(known) - higher - lower, p_value)


def wilson(count: float, total: float) -> tuple[float, float]:
    """Return the 95 % interval of Wilson (1927) for a share of ``count`` in ``total``, as scipy's for whole counts.

    Args:
        count: Successes, 0 to ``total``; need not be whole, so that an effective sample size can stand in.
        total: Trials, above 0.
    """
    share, weight = count / total, Z95**2 / total
    centre = (share + weight / 2) / (1 + weight)
    half = math.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
    # The ends of an empty and of a full share are 0 and 1 exactly; sums and roots miss them by a rounding.
    return (0.0 if count == 0 else max(0.0, centre - half)), (1.0 if count == total else min(1.0, centre + half))


def holm(p_values: Floats) -> Floats:
    """Correct the p-values of a family so that the chance of any false finding stays at the level (Holm 1979).

    Args:
        p_values: One per test, 0 to 1; NaN where there was none, which does not count.

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
