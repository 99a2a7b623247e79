"""Means over dialogues and seeds in, bootstrap intervals and p-values out.

What is drawn again is the dialogue, once for all arms, metrics and seeds: every arm answers the same dialogues, so arms stay
paired, and three seeds on the same dialogues are not three times as many dialogues.

Over several seeds, a resample is a draw of the seeds and a draw of the dialogues together. Seeds are too few to be drawn
again themselves: three of them give ten different resamples, and where seeds differ most, an interval called 95 % would
hold the truth three times in four. So their deviation is drawn from Student's t with one degree of freedom less than there
are seeds, as wide as the spread of their means; and as that spread holds the noise of single responses too, the dialogues'
part is drawn without it. With dialogues that all agree, the interval is the t interval over seeds; with seeds that all
agree, it is the interval of one seed. Few seeds cost much: after a correction for many tests, three can show large
differences only.

The interval is the percentile one. BCa is a little better on skewed samples of one seed, but wants a jackknife, which few
seeds do not bear; the percentile interval is one rule for means, differences and seeds, and the p-value counts the same
resamples: but for a rounding, it is under 0.05 where the interval leaves out zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from persodpo.errors import PersodpoError
from persodpo.evaluation.intervals import Z95
from persodpo.evaluation.observations import Floats

#: Below so many dialogues a percentile interval holds the truth far less often than it says, so none is given.
FEWEST = 10

_LEVELS = (0.025, 0.975)
#: Counts held in memory at a time, about 32 MB.
_CHUNK = 4_000_000
#: Differences smaller than this share of a statistic's largest value are roundings of zero.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Resampling:
    """How a bootstrap draws.

    Attributes:
        resamples: How often, at least 100.
        seed: Which draws; the same seed gives the same tables.
    """

    resamples: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what gives no interval.

        Raises:
            PersodpoError: There are fewer than 100 resamples, or the seed is negative.
        """
        if self.resamples < 100 or self.seed < 0:
            raise PersodpoError(
                f"A bootstrap needs 100 resamples at least and a seed of 0 or more, not {self.resamples} and {self.seed}."
            )


@dataclass(frozen=True)
class Statistic:
    """A mean over seeds of means over dialogues.

    Attributes:
        columns: A row a dialogue (the same ones, in the same order, in every statistic that is drawn together), a column
            a seed, or a pair of seeds in the order of `itertools.product`; NaN where a dialogue does not count.
        seeds: The seeds of the columns; where two arms have different seeds, those of each.
    """

    columns: Floats
    seeds: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Spread:
    """A statistic and what its resamples say.

    Attributes:
        estimate: The mean.
        low: Lower end of the 95 % interval; NaN, as all that follows, if a column has fewer than `FEWEST` values.
        high: Upper end.
        standard_error: Standard error of the estimate over dialogues and seeds.
        freedom: Its degrees of freedom (Satterthwaite 1946): about one less than the seeds where they differ most, one
            less than the dialogues where dialogues do.
        p_value: Two-sided, of no difference from zero; never below 2 / (resamples + 1).
        at_floor: Whether it is that least value, and so a bound.
    """

    estimate: float
    low: float
    high: float
    standard_error: float
    freedom: float
    p_value: float
    at_floor: bool = False

    @property
    def stretch(self) -> float:
        """How much wider than a normal interval one of these degrees of freedom is, 1 or more."""
        return _stretch(self.freedom)


def _stretch(freedom: float) -> float:
    return float(student.ppf(0.975, freedom) / Z95)


def bootstrap(statistics: Sequence[Statistic], sampling: Resampling) -> list[Spread]:
    """Draw all statistics again, together.

    Args:
        statistics: At least one value in each column.
        sampling: How often, and which draws.

    Returns:
        A spread for each statistic.
    """
    if not statistics:
        return []
    columns = np.concatenate([statistic.columns for statistic in statistics], axis=1)
    drawn = _resampled_means(columns, sampling)
    ends = np.cumsum([statistic.columns.shape[1] for statistic in statistics])
    parts = np.split(drawn, ends[:-1], axis=1)
    return [_spread(statistic, part, sampling) for statistic, part in zip(statistics, parts, strict=True)]


def _spread(statistic: Statistic, drawn: Floats, sampling: Resampling) -> Spread:
    """Sum up the resamples of one statistic."""
    seed_means = np.nanmean(statistic.columns, axis=0)
    estimate = float(seed_means.mean())
    if (~np.isnan(statistic.columns)).sum(axis=0).min() < FEWEST:
        return Spread(estimate, np.nan, np.nan, np.nan, np.nan, np.nan)
    # A resample may hold none of the few dialogues that count: one in twenty thousand where ten do, fewer where more.
    whole = ~np.isnan(drawn).any(axis=1)
    parts = _seed_parts(seed_means, drawn[whole], statistic.seeds)
    means = drawn[whole].mean(axis=1)
    variance = float(means.var())
    own = max(0.0, variance - sum(part.noise for part in parts))
    if parts and variance > 0:
        means = estimate + (means - estimate) * np.sqrt(own / variance)
    means += sum(part.draw(sampling)[whole] for part in parts)
    means[np.abs(means) <= _ROUNDING * np.nanmax(np.abs(statistic.columns), initial=0.0)] = 0.0
    low, high = np.quantile(means, _LEVELS)
    below, above = (int(side.sum()) for side in (means <= 0, means >= 0))
    p_value = min(1.0, 2 * (min(below, above) + 1) / (len(means) + 1))
    dialogues = int((~np.isnan(statistic.columns)).any(axis=1).sum())
    error, freedom = _standard_error([(own, dialogues - 1), *((part.variance, len(part.seeds) - 1) for part in parts)])
    return Spread(estimate, float(low), float(high), error, freedom, p_value, min(below, above) == 0)


@dataclass(frozen=True)
class _SeedPart:
    """What a group of several seeds adds to the spread of a mean.

    Attributes:
        seeds: The seeds.
        variance: Of the mean over them, the noise of their responses included.
        noise: The noise's share of that variance.
    """

    seeds: tuple[int, ...]
    variance: float
    noise: float

    def draw(self, sampling: Resampling) -> Floats:
        """Return how far the mean over the seeds deviates, one number a resample."""
        generator = np.random.default_rng([sampling.seed, 1, *self.seeds])
        deviation: Floats = generator.standard_t(len(self.seeds) - 1, sampling.resamples) * np.sqrt(self.variance)
        return deviation


def _seed_parts(seed_means: Floats, drawn: Floats, seeds: Sequence[tuple[int, ...]]) -> list[_SeedPart]:
    """Measure how far the means of several seeds lie apart, and how far noise alone would drive them apart."""
    shape = [len(group) for group in seeds]
    table, draws = seed_means.reshape(shape), drawn.reshape([len(drawn), *shape])
    parts = []
    for axis, group in enumerate(seeds):
        number = len(group)
        if number == 1:
            continue
        others = tuple(other for other in range(len(shape)) if other != axis)
        between = float(table.mean(axis=others).var(ddof=1))
        own = draws.mean(axis=tuple(other + 1 for other in others))
        apart = own - own.mean(axis=1, keepdims=True)
        noise = float(apart.var(axis=0).sum()) / (number - 1)
        # Seeds may lie together by chance; the interval is never narrower than their responses' noise alone would make it.
        between = max(between, noise / _stretch(number - 1) ** 2)
        parts.append(_SeedPart(group, between / number, noise / number))
    return parts


def _standard_error(parts: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Add variances; their joint degrees of freedom are those of Satterthwaite."""
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return 0.0, float(parts[0][1])
    return float(np.sqrt(total)), total**2 / sum(variance**2 / freedom for variance, freedom in parts)


def _dialogue_counts(dialogues: int, sampling: Resampling) -> Iterator[Floats]:
    """Yield how often each dialogue is drawn, a row a resample, in chunks."""
    generator = np.random.default_rng(sampling.seed)
    step = max(1, _CHUNK // dialogues)
    for start in range(0, sampling.resamples, step):
        rows = min(step, sampling.resamples - start)
        drawn = generator.integers(dialogues, size=(rows, dialogues)) + dialogues * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * dialogues)
        yield counts.reshape(rows, dialogues).astype(float)


def _resampled_means(columns: Floats, sampling: Resampling) -> Floats:
    """Return the mean of each column over the values that each resample draws, a row a resample."""
    counted = ~np.isnan(columns)
    # Measured from a value of the column itself, a constant column stays exactly constant.
    origin = columns[counted.argmax(axis=0), np.arange(columns.shape[1])]
    values = np.where(counted, columns - origin, 0.0)
    masks, which = np.unique(counted, axis=1, return_inverse=True)
    masks = masks.astype(float)
    parts = []
    for counts in _dialogue_counts(len(columns), sampling):
        with np.errstate(invalid="ignore"):
            parts.append(counts @ values / (counts @ masks)[:, which.ravel()] + origin)
    return np.concatenate(parts)
