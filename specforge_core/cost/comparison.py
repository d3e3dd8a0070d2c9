"""A prediction beside what was measured. Torch-free."""

from collections.abc import Callable
from typing import NamedTuple

from specforge_core.cost.units import duration, quantity

ALLOWED_ERROR = 0.25


class Check(NamedTuple):
    """One prediction."""

    what: str
    predicted: float
    measured: float
    show: Callable[[float], str] = duration

    @property
    def error(self) -> float:
        """As a share of what was measured."""
        return self.predicted / self.measured - 1

    @property
    def is_close(self) -> bool:
        """Whether it is as near as promised."""
        return abs(self.error) <= ALLOWED_ERROR


def milliseconds(seconds: float) -> str:
    """For what is about a second or shorter."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def seconds(number: float) -> str:
    """For stages, of which minutes would hide the error."""
    return f"{number:,.0f} s"


def size(num_bytes: float) -> str:
    """In units of 1000s."""
    return f"{quantity(num_bytes)}B"
