"""Numbers as people read them. Torch-free."""

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
MINUTE_S, HOUR_S = 60, 3600


def quantity(number: float) -> str:
    """Three digits and a unit of 1000s, to be followed by the name of what is counted."""
    for size, unit in UNITS:
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return f"{number:.0f} "


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    if seconds >= HOUR_S:
        return f"{seconds / HOUR_S:,.1f} h"
    return f"{seconds / MINUTE_S:.0f} min" if seconds >= MINUTE_S else f"{seconds:.0f} s"
