import math
import random
from itertools import product

import pytest

from specforge_core.benchmark.interval import (
    Interval,
    median_interval,
    order_rank,
    product_interval,
    ratio_interval,
    student_t,
)


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
    assert interval.value == pytest.approx(math.e)
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


def test_a_ratio_of_sums_has_the_interval_worked_by_hand():
    # Sums 9 and 3. Shares of the means, 3 and 1: 2/3 - 1, 3/3 - 1 and 4/3 - 1, which deviate by 1/3.
    interval = ratio_interval([[2, 3, 4]], [[1, 1, 1]])
    assert interval.value == 3.0
    assert math.log(interval.high / 3) == pytest.approx(4.303 / 3 / math.sqrt(3))
    assert math.log(interval.low / 3) == pytest.approx(-4.303 / 3 / math.sqrt(3))


def test_two_drafts_on_the_same_prompts_differ_by_what_the_prompts_do_not_explain():
    # One needs 5 % more steps on each prompt: certain, however different the prompts are.
    tokens, steps = [100, 80, 120, 20], [20.0, 40.0, 30.0, 10.0]
    paired = ratio_interval([tokens, steps], [[1.05 * count for count in steps], tokens])
    assert paired == pytest.approx((1 / 1.05, 1 / 1.05, 1 / 1.05))
    # Each alone is only known by a factor.
    alone = ratio_interval([tokens], [steps])
    assert alone.high / alone.value > 1.5


@pytest.mark.parametrize("num_prompts", [2, 5, 8, 40])
def test_the_interval_of_a_ratio_covers_the_true_one_as_often_as_it_says(num_prompts):
    generator = random.Random(num_prompts)
    hits = 0
    for _ in range(2000):
        # Steps of prompts of different length, each with a token of its own and one more with a chance of 0.9.
        steps = [generator.randint(60, 100) for _ in range(num_prompts)]
        tokens = [sum(1 + (generator.random() < 0.9) for _ in range(count)) for count in steps]
        interval = ratio_interval([tokens], [steps])
        hits += interval.low <= 1.9 <= interval.high
    assert hits / 2000 >= 0.95 - 0.015


def test_a_ratio_needs_two_prompts_and_something_to_divide():
    with pytest.raises(ValueError, match="1 prompts have no interval"):
        ratio_interval([[3]], [[1]])
    with pytest.raises(ValueError, match="at least two that were decoded"):
        ratio_interval([[3, 4]], [[0, 0]])


def test_limits_of_a_product_add_up_as_the_hypotenuse_does_on_each_side():
    e = math.exp
    product = product_interval([Interval(e(1), e(0.7), e(1.6)), Interval(e(2), e(1.6), e(2.8))])
    assert [math.log(value) for value in product] == pytest.approx([3, 3 - 0.5, 3 + 1.0])
    # The geometric mean of two.
    mean = product_interval([Interval(2.0, 1.0, 4.0), Interval(8.0, 4.0, 16.0)], power=0.5)
    assert mean.value == pytest.approx(4.0)
    assert mean.low == pytest.approx(4.0 * 2 ** -math.sqrt(0.5))


def test_students_quantiles_are_those_of_the_tables():
    # Two-sided 95 %, by degrees of freedom, from any table of the distribution.
    table = {1: 12.706, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 30: 2.042, 199: 1.972}
    assert {freedom: student_t(freedom + 1) for freedom in table} == pytest.approx(table, rel=2e-3)
