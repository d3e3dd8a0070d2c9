"""How sure a median of few values is, and a ratio of sums. Torch-free."""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, median, stdev
from typing import NamedTuple

CONFIDENCE = 0.95
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Two-sided 95 % quantiles of Student's t, by number of values (one more than its degrees of freedom)."""


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
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


def ratio_interval(numerators: Sequence[Sequence[float]], denominators: Sequence[Sequence[float]]) -> Interval:
    """The product of the numerators' sums over that of the denominators', each a series with a value for each prompt.

    One of each is a ratio of sums, such as tokens per step; two of each compare two such ratios on the same prompts,
    where what makes one prompt harder than another cancels. Prompts count as drawn at random. The logarithm of the
    ratio is taken for linear in the means, which is good where they vary by less than a tenth, and for normal.

    Raises: ValueError for fewer than two prompts, or a series that sums to nothing.
    Source: the ratio estimator's linearized variance, Cochran, Sampling Techniques, section 2.11.
    """
    series = [(values, sign) for sign, group in ((1, numerators), (-1, denominators)) for values in group]
    num_prompts = len(series[0][0])
    if num_prompts < 2 or any(sum(values) <= 0 for values, _ in series):
        raise ValueError(f"{num_prompts} prompts have no interval; at least two that were decoded do")
    ratio = math.prod(math.fsum(values) ** sign for values, sign in series)
    shares = [
        math.fsum(sign * value / fmean(values) for value, (values, sign) in zip(prompt, series, strict=True))
        for prompt in zip(*(values for values, _ in series), strict=True)
    ]
    half_width = student_t(num_prompts) * stdev(shares) / math.sqrt(num_prompts)
    return Interval(ratio, ratio * math.exp(-half_width), ratio * math.exp(half_width))


def product_interval(factors: Sequence[Interval], *, power: float = 1.0) -> Interval:
    """The product of positive values that were measured apart from each other, raised to a positive power.

    On each side the distances of the limits add up as the hypotenuse does, in logarithms.
    Source: the method of variance estimates recovery, Zou and Donner, Statistics in Medicine 27 (2008).
    """
    value = math.prod(factor.value for factor in factors) ** power
    below = math.hypot(*(math.log(factor.value / factor.low) for factor in factors))
    above = math.hypot(*(math.log(factor.high / factor.value) for factor in factors))
    return Interval(value, value * math.exp(-power * below), value * math.exp(power * above))


def student_t(num_values: int) -> float:
    """The two-sided 95 % quantile of Student's t for the mean of so many values, to 0.2 %.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5, which few values need not use.
    """
    if num_values in STUDENT_T:
        return STUDENT_T[num_values]
    z, freedom = NormalDist().inv_cdf((1 + CONFIDENCE) / 2), num_values - 1
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
