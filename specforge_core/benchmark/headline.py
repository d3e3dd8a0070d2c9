"""One line about a draft: what stands in the tables that compare drafts."""

import statistics
from typing import NamedTuple

from specforge_core.facts import BenchmarkResult


class Headline(NamedTuple):
    """Means over the suites, each suite counting the same, at the first serving configuration of the manifest."""

    acceptance_length: float
    """Arithmetic mean, tokens per verification step."""
    speedup: float
    """Geometric mean, because it is of ratios."""


def headline(result: BenchmarkResult) -> Headline | None:
    """The headline of a result; None for one without measurements."""
    if not result.measurements:
        return None
    first = [m for m in result.measurements if m.serving == result.measurements[0].serving]
    return Headline(
        acceptance_length=statistics.fmean(m.acceptance_length for m in first),
        speedup=statistics.geometric_mean(m.speedup for m in first),
    )
