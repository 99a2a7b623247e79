"""The interval of a share."""

from __future__ import annotations

import math

from scipy.stats import norm

#: Standard normal quantile of two-sided 95 %.
Z95 = float(norm.ppf(0.975))


def wilson(count: float, total: float) -> tuple[float, float]:
    """Return the 95 % interval of Wilson (1927) for a share of ``count`` in ``total``.

    Args:
        count: Successes, 0 to ``total``; need not be whole, so that an effective sample size can stand in.
        total: Trials, above 0.

    Returns:
        The two ends, within 0..1; never the share alone, even where it is 0 or 1.
    """
    share, weight = count / total, Z95**2 / total
    centre = (share + weight / 2) / (1 + weight)
    half = math.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
    # The ends of an empty and of a full share are 0 and 1 exactly; sums and roots miss them by a rounding.
    return (0.0 if count == 0 else max(0.0, centre - half)), (1.0 if count == total else min(1.0, centre + half))
