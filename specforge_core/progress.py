"""Progress bars that are readable on a terminal and in a log file."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LOG_INTERVAL_S = 10.0
TERMINAL_INTERVAL_S = 0.1


class _LinePerUpdate:
    """A text stream for tqdm under a pipe: a carriage return becomes a line end, so every update is a log line."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n\x1b[A ")
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(
    items: Iterable[Any] | None = None, *, desc: str, total: int | None = None, unit: str, **kwargs: Any
) -> Any:
    """A tqdm bar over `items` (or to be moved by `.update`): redrawn on a terminal, one line every 10 s in a log.

    Args: desc: what is counted, for people; total: number of units, if known; unit: what one step is ("token").
    """
    is_terminal = sys.stderr.isatty()
    return tqdm(
        items,
        desc=desc,
        total=total,
        unit=f" {unit}",
        unit_scale=True,
        mininterval=TERMINAL_INTERVAL_S if is_terminal else LOG_INTERVAL_S,
        file=sys.stderr if is_terminal else _LinePerUpdate(),
        dynamic_ncols=is_terminal,
        **kwargs,
    )
