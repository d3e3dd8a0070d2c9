"""Stage `benchmark`: what a draft does for its target.

An interrupted benchmark begins again: the figures of one result are of one session on one machine.
"""

from pathlib import Path

from specforge_core.benchmark.in_process import measure_in_process
from specforge_core.benchmark.served import measure_served
from specforge_core.facts import BenchmarkResult
from specforge_core.stages import BenchmarkSpec


def main(spec: BenchmarkSpec, out: Path) -> BenchmarkResult:
    """The result, which `out` holds too, beside every single answer (`requests.jsonl`).

    Raises: ValueError for a draft of another target, an unusable suite, or a target or server that cannot be measured.
    """
    return measure_served(spec, out) if spec.engine.name == "sglang" else measure_in_process(spec, out)
