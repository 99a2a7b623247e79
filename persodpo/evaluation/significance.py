"""The sign test and McNemar's exact test, Wilson's interval, Holm's correction, and what a comparison could have seen."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
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
    p_exact: float


def sign_test(differences: Floats) -> Signs:
    """Test whether differences, one per dialogue, go one way more often than the other, exactly; ties are dropped.

    On differences of two flags this is McNemar's exact test: its discordant pairs are the dialogues that are no ties.
    """
    higher, lower = int((differences > _TIE).sum()), int((differences < -_TIE).sum())
    p_exact = float(binomtest(higher, higher + lower).pvalue) if higher + lower else 1.0
    return Signs(higher, lower, len(differences) - higher - lower, p_exact)


def holm(p_values: pd.Series[float]) -> pd.Series[float]:
    """Correct the p-values of a family so that the chance of any false finding stays at the level (Holm 1979).

    NaN, where there was no test, does not count and stays.
    """
    ascending = p_values.dropna().sort_values()
    return (ascending * np.arange(len(ascending), 0, -1)).cummax().clip(upper=1.0).reindex(p_values.index)


def wilson(count: float, total: float) -> tuple[float, float]:
    """Return the 95 % interval of Wilson (1927) for a share of ``count`` in ``total``, as scipy's for whole counts.

    Counts need not be whole, so that an effective sample size can stand in.
    """
    share, weight = count / total, Z95**2 / total
    centre = (share + weight / 2) / (1 + weight)
    half = math.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
    # The ends of an empty and of a full share are 0 and 1 exactly; sums and roots miss them by a rounding.
    return (0.0 if count == 0 else max(0.0, centre - half)), (1.0 if count == total else min(1.0, centre + half))


def stretch(freedom: float) -> float:
    """Return how much wider than a normal 95 % interval one of Student's t with these degrees of freedom is, 1 or more."""
    return float(student.ppf(0.975, freedom) / Z95)


def smallest_detectable(standard_error: float, freedom: float = math.inf) -> float:
    """Return the true difference that a two-sided test at 5 % finds with 80 % power, of one comparison by itself.

    It is the sum of Student's 0.975 and 0.80 quantiles, in standard errors: 2.80 of them where there are many dialogues and
    one seed.
    """
    return float((student.ppf(0.975, freedom) + student.ppf(0.80, freedom)) * standard_error)
