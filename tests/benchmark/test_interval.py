import math
import random
from itertools import product

import pytest

from specforge_core.benchmark.interval import median_interval, order_rank


# The smallest share of orders that miss the median, both tails together, by counting all 2^n patterns of
# "below" and "above"; 6 values are the first whose extremes miss in less than 5 % of them: 2 of 64.
@pytest.mark.parametrize("num_values", range(6, 15))
def test_the_rank_is_the_largest_that_misses_in_less_than_five_percent_of_all_patterns(num_values):
    def missed(rank: int) -> float:
        below = [sum(pattern) for pattern in product((0, 1), repeat=num_values)]
        return sum(count < rank or num_values - count < rank for count in below) / len(below)

    rank = order_rank(num_values)
    assert rank >= 1
    assert missed(rank) <= 0.05 < missed(rank + 1)


def test_ten_values_give_the_second_and_the_ninth():
    assert median_interval([5, 1, 9, 3, 7, 2, 8, 4, 6, 10]) == (5.5, 2, 9)


def test_three_values_give_students_interval_worked_by_hand():
    # Logs 0, 1, 2: mean 1, deviation 1, so 1 -+ 4.303 / sqrt(3).
    interval = median_interval([1.0, math.e**2, math.e])
    assert interval.median == pytest.approx(math.e)
    assert math.log(interval.low) == pytest.approx(1 - 4.303 / math.sqrt(3))
    assert math.log(interval.high) == pytest.approx(1 + 4.303 / math.sqrt(3))


@pytest.mark.parametrize("num_values", [2, 3, 5, 8, 20])
def test_the_interval_covers_the_true_median_as_often_as_it_says(num_values):
    generator = random.Random(num_values)
    hits = 0
    for _ in range(2000):
        interval = median_interval([math.exp(generator.gauss(0.5, 0.2)) for _ in range(num_values)])
        hits += interval.low <= math.exp(0.5) <= interval.high
    # Three standard errors of 2,000 trials are 1.5 %.
    assert hits / 2000 >= 0.95 - 0.015


def test_one_value_has_no_interval():
    with pytest.raises(ValueError, match="measure at least twice"):
        median_interval([1.5])
