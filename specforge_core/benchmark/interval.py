"""How sure a median of few values is. Torch-free."""

import math
from collections.abc import Sequence
from statistics import fmean, median, stdev
from typing import NamedTuple

CONFIDENCE = 0.95
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Two-sided 95 % quantiles of Student's t, by number of values (one more than its degrees of freedom)."""


class Interval(NamedTuple):
    """A median and its 95 % interval."""

    median: float
    low: float
    high: float


def median_interval(ratios: Sequence[float]) -> Interval:
    """The median of positive ratios with an interval that covers the true one with at least 95 % confidence.

    Six values or more: from the k-th smallest to the k-th largest, k as large as the binomial distribution allows,
    whatever the distribution of the values. Two to five cannot give 95 % that way (five: 94 %), so theirs is Student's
    t interval of the mean logarithm, which takes the ratios for log-normal, and is wide.

    Raises: ValueError for a single value.
    Source: order statistics as in Conover, Practical Nonparametric Statistics, section 3.2.
    """
    num_values = len(ratios)
    middle = median(ratios)
    if num_values < 2:
        raise ValueError(f"{num_values} value has no interval; measure at least twice")
    if num_values in STUDENT_T:
        logs = [math.log(ratio) for ratio in ratios]
        half_width = STUDENT_T[num_values] * stdev(logs) / math.sqrt(num_values)
        low, high = math.exp(fmean(logs) - half_width), math.exp(fmean(logs) + half_width)
        return Interval(middle, min(low, middle), max(high, middle))
    ordered = sorted(ratios)
    rank = order_rank(num_values)
    return Interval(middle, ordered[rank - 1], ordered[-rank])


def order_rank(num_values: int) -> int:
    """The largest k for which the k-th smallest and the k-th largest value enclose the median with 95 % confidence."""
    rank = 0
    # Both tails: the median is below the k-th smallest value if fewer than k values fell below the median.
    tail = 0.0
    while (tail := tail + math.comb(num_values, rank) / 2**num_values) <= (1 - CONFIDENCE) / 2:
        rank += 1
    return rank
