"""The curves of a stage, read from `metrics.jsonl`: JSON objects with `step` and numbers, one a line. Torch-free."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple


class MetricPoint(NamedTuple):
    """One value of a curve."""

    name: str
    step: int
    value: float


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, without a last one that is still being written; none if there is no file."""
    if not path.is_file():
        return []
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def metric_points(lines: Iterable[bytes]) -> Iterator[MetricPoint]:
    """Every number in these lines, in their order."""
    for values in map(json.loads, lines):
        step = int(values.pop("step", 0))
        for name, value in values.items():
            if isinstance(value, int | float):
                yield MetricPoint(name, step, float(value))
