"""Means over dialogues and seeds in; percentile bootstrap intervals, standard errors, p-values and exact tests out.

One seed: the percentile bootstrap over dialogues (Efron 1979). The same dialogues are drawn for all arms, metrics and seeds,
so arms stay paired and three seeds on the same dialogues are not three times as many dialogues.

Several seeds: dialogues and seeds are crossed random effects. Seeds are too few to be drawn again themselves (three give ten
resamples), so the mean over them deviates by Student's t, with one degree of freedom less than there are seeds, as wide as
the spread of their means; that spread holds the noise of single responses too, so the dialogues' part is drawn without it.
Degrees of freedom add up as Satterthwaite's (1946).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import binomtest, norm
from scipy.stats import t as student

Floats = NDArray[np.float64]

#: Below so many dialogues a percentile interval holds the truth far less often than it says, so none is given.
FEWEST = 10
#: Standard normal quantile of two-sided 95 %.
Z95 = float(norm.ppf(0.975))
#: Counts held in memory at a time, about 32 MB.
_CHUNK = 4_000_000
#: Decimals of the mean of a resample, one less of a standard error: processors round sums otherwise, and are to write the
#: same table.
_DECIMALS = 10
#: Differences smaller than this, or than this share of a statistic's largest value, are roundings of zero.
_ROUNDING = 1e-12


class Resampling(NamedTuple):
    """How often a bootstrap draws, and which draws; the same seed gives the same tables."""

    resamples: int = 10_000
    seed: int = 0


@dataclass(frozen=True)
class Statistic:
    """A mean over seeds of means over dialogues.

    Attributes:
        values: [dialogues, seeds], or [dialogues, seeds of the one arm, seeds of the other]; the same dialogues in the same
            order in every statistic that is drawn together; NaN where a dialogue does not count.
        seeds: The seeds along each axis after the first.
    """

    values: Floats
    seeds: tuple[tuple[int, ...], ...]

    @property
    def columns(self) -> Floats:
        """The values with one axis for all seeds or pairs of seeds."""
        return self.values.reshape(len(self.values), -1)

    @property
    def dialogues(self) -> int:
        """How many dialogues count in any column."""
        return int((~np.isnan(self.columns)).any(axis=1).sum())

    @property
    def fewest(self) -> int:
        """The fewest dialogues that count in a column."""
        return int((~np.isnan(self.columns)).sum(axis=0).min())


class Spread(NamedTuple):
    """A statistic and what its resamples say; without resamples, which a column of few values has none of, NaN.

    Attributes:
        estimate: The mean.
        low: Lower end of the 95 % interval.
        high: Upper end.
        standard_error: Standard error of the estimate over dialogues and seeds.
        freedom: Its degrees of freedom: about one less than the seeds where they differ most, one less than the dialogues
            where dialogues do.
        p_value: Two-sided, of no difference from zero; never below 2 / (resamples + 1).
        at_floor: Whether it is that least value, and so a bound.
    """

    estimate: float
    low: float = np.nan
    high: float = np.nan
    standard_error: float = np.nan
    freedom: float = np.nan
    p_value: float = np.nan
    at_floor: bool = False


def bootstrap(statistics: Sequence[Statistic], sampling: Resampling) -> list[Spread]:
    """Draw all statistics again, together; each has at least one value in each column."""
    if not statistics:
        return []
    resample_means = _resampled_means(np.concatenate([statistic.columns for statistic in statistics], axis=1), sampling)
    ends = np.cumsum([statistic.columns.shape[1] for statistic in statistics])
    parts = np.split(resample_means, ends[:-1], axis=1)
    return [_spread(statistic, part, sampling) for statistic, part in zip(statistics, parts, strict=True)]


def _resampled_means(columns: Floats, sampling: Resampling) -> Floats:
    """Return the mean of each column over the values that each resample of dialogues draws, a row per resample."""
    present = ~np.isnan(columns)
    # Measured from a value of the column itself, a constant column stays exactly constant.
    origin = columns[present.argmax(axis=0), np.arange(columns.shape[1])]
    values = np.where(present, columns - origin, 0.0)
    masks, which = np.unique(present, axis=1, return_inverse=True)
    masks = masks.astype(float)
    generator, dialogues, parts = np.random.default_rng(sampling.seed), len(columns), []
    step = max(1, _CHUNK // dialogues)
    for start in range(0, sampling.resamples, step):
        rows = min(step, sampling.resamples - start)
        rows_drawn = generator.integers(dialogues, size=(rows, dialogues)) + dialogues * np.arange(rows)[:, None]
        counts = np.bincount(rows_drawn.ravel(), minlength=rows * dialogues).reshape(rows, dialogues).astype(float)
        with np.errstate(invalid="ignore"):
            means = counts @ values / (counts @ masks)[:, which.ravel()]
        parts.append(means.round(_DECIMALS) + origin)
    return np.concatenate(parts)


def _spread(statistic: Statistic, resample_means: Floats, sampling: Resampling) -> Spread:
    """Sum up the resamples of one statistic."""
    estimate = float(np.nanmean(statistic.values, axis=0).mean())
    if statistic.fewest < FEWEST:
        return Spread(estimate)
    # A resample may hold none of the few dialogues that count: one in twenty thousand where ten do, fewer where more.
    whole = ~np.isnan(resample_means).any(axis=1)
    means = resample_means[whole].mean(axis=1)
    variance = dialogue_variance = float(means.var())
    parts = list(_seed_parts(statistic, resample_means[whole]))
    if parts and variance > 0:
        dialogue_variance = max(0.0, variance - sum(noise for _, _, noise in parts))
        means = estimate + (means - estimate) * np.sqrt(dialogue_variance / variance)
    for seeds, between, _ in parts:
        generator = np.random.default_rng([sampling.seed, 1, *seeds])
        means += (generator.standard_t(len(seeds) - 1, sampling.resamples) * np.sqrt(between))[whole]
    means[np.abs(means) <= _ROUNDING * np.nanmax(np.abs(statistic.values), initial=0.0)] = 0.0
    low, high = np.quantile(means, (0.025, 0.975))
    contrary = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p_value = min(1.0, 2 * (contrary + 1) / (len(means) + 1))
    variances = [(dialogue_variance, statistic.dialogues - 1)]
    variances += [(between, len(seeds) - 1) for seeds, between, _ in parts]
    return Spread(estimate, float(low), float(high), *_standard_error(variances), p_value, contrary == 0)


def _seed_parts(statistic: Statistic, resample_means: Floats) -> Iterator[tuple[tuple[int, ...], float, float]]:
    """Yield each group of several seeds, the variance of the mean over them, and the share of responses' noise in it."""
    table = np.nanmean(statistic.values, axis=0)
    draws = resample_means.reshape(len(resample_means), *table.shape)
    for axis, seeds in enumerate(statistic.seeds):
        number = len(seeds)
        if number == 1:
            continue
        others = tuple(other for other in range(table.ndim) if other != axis)
        between = float(table.mean(axis=others).var(ddof=1))
        means = draws.mean(axis=tuple(other + 1 for other in others))
        noise = float((means - means.mean(axis=1, keepdims=True)).var(axis=0).sum()) / (number - 1)
        # Seeds may lie together by chance; the interval is never narrower than their responses' noise alone would make it.
        between = max(between, noise / stretch(number - 1) ** 2)
        yield seeds, between / number, noise / number


def _standard_error(parts: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Add variances; their joint degrees of freedom are those of Satterthwaite."""
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return 0.0, float(parts[0][1])
    return float(np.sqrt(total).round(_DECIMALS - 1)), total**2 / sum(
        variance**2 / freedom for variance, freedom in parts
    )


def sign_test(differences: Floats) -> dict[str, float]:
    """Test exactly whether paired differences go one way more often than the other; ties are counted and dropped.

    On differences of two flags this is McNemar's exact test: its discordant pairs are the dialogues that are no ties.
    """
    higher, lower = int((differences > _ROUNDING).sum()), int((differences < -_ROUNDING).sum())
    p_exact = float(binomtest(higher, higher + lower).pvalue) if higher + lower else 1.0
    return {"higher": higher, "lower": lower, "ties": len(differences) - higher - lower, "p_exact": p_exact}


def holm(p_values: pd.Series[float]) -> pd.Series[float]:
    """Correct the p-values of a family so that the chance of any false finding stays at the level (Holm 1979).

    NaN, where there was no test, does not count and stays.
    """
    ascending = p_values.dropna().sort_values()
    return (ascending * np.arange(len(ascending), 0, -1)).cummax().clip(upper=1.0).reindex(p_values.index)


def wilson(count: float, total: float) -> tuple[float, float]:
    """Return Wilson's (1927) 95 % interval of a share, as scipy's; counts need not be whole, as effective ones are not."""
    share, weight = count / total, Z95**2 / total
    centre = (share + weight / 2) / (1 + weight)
    half = math.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
    # The ends of an empty and of a full share are 0 and 1 exactly; sums and roots miss them by a rounding.
    return (0.0 if count == 0 else max(0.0, centre - half)), (1.0 if count == total else min(1.0, centre + half))


def stretch(freedom: float) -> float:
    """Return how much wider than a normal 95 % interval one of Student's t with these degrees of freedom is, 1 or more."""
    return float(student.ppf(0.975, freedom) / Z95)


def smallest_detectable(standard_error: float, freedom: float = math.inf) -> float:
    """Return the true difference that one two-sided test at 5 % finds with 80 % power.

    That is the sum of Student's 0.975 and 0.80 quantiles, in standard errors: 2.80 of many dialogues and one seed.
    """
    return float((student.ppf(0.975, freedom) + student.ppf(0.80, freedom)) * standard_error)
