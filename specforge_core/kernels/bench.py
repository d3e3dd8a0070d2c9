"""Time every kernel on a GPU: eager PyTorch, torch.compile and ours, against what the device itself can do.

    python -m specforge_core.kernels.bench [--only NAME] [--out DIR]

A case is checked before it is timed, and not timed if it is wrong. What is timed are replays of a CUDA graph, so the
host's share of a call is in no number but those of a rival that waits for the device, and the cache is flushed before
each. `--out` writes <gpu>.json and <gpu>.md.
"""

import argparse
import gc
import logging
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import torch
import triton.testing
from torch import Tensor

from specforge_core.artifacts import write_result
from specforge_core.benchmark.tables import markdown_table
from specforge_core.environment import environment, hardware_stem
from specforge_core.facts import Environment, Record
from specforge_core.kernels.cases import Case, Inputs, all_cases, as_tuple, check, gradients_of

logger = logging.getLogger(__name__)

Direction = Literal["forward", "forward + backward", "call"]
"""A call, where gradients come with it or there are none."""
Bound = Literal["memory", "arithmetic"]

WARMUP_MS, REPEAT_MS = 25, 100
WARMUP_CALLS = 3
COPY_BYTES = 2**30
MATMUL_WIDTH = 8192
MS_PER_S = 1e3
GIGA, TERA = 1e9, 1e12


class Ceilings(Record):
    """What the device reaches on the simplest work."""

    copy_bytes_per_s: float
    """Of a large copy, read and written."""
    matmul_flops_per_s: float
    """Of a large product of random bfloat16 matrices."""

    def bound(self, num_bytes: int, num_flops: int) -> tuple[float, Bound]:
        """The milliseconds of so many bytes or FLOPs, whichever take longer, and which they are."""
        memory_s, arithmetic_s = num_bytes / self.copy_bytes_per_s, num_flops / self.matmul_flops_per_s
        return MS_PER_S * max(memory_s, arithmetic_s), "memory" if memory_s > arithmetic_s else "arithmetic"


class Timing(Record):
    """Milliseconds of one call."""

    median: float
    p10: float
    p90: float
    num_repeats: int


class Row(Record):
    """One case in one direction."""

    case: str
    direction: Direction
    shapes: dict[str, int]
    num_bytes: int
    """The least that must be moved to and from memory."""
    num_flops: int
    least_ms: float
    """What these bytes or FLOPs take at the device's ceilings, whichever take longer."""
    bound: Bound
    """Which that is."""
    eager_ms: Timing | None
    """None if it could not run."""
    eager_is_captured: bool
    """Or else calls were timed, and not replays: it waits for the device."""
    compiled_ms: Timing | None
    """None if it could not run, or if the case is none for torch.compile."""
    ours_ms: Timing


class KernelReport(Record):
    """All that a benchmark of the kernels found."""

    environment: Environment
    ceilings: Ceilings
    dtype: str
    rows: tuple[Row, ...]
    failures: dict[str, str]
    """Cases that were wrong or could not be checked, and why."""
    seconds: float


def measure_ceilings() -> Ceilings:
    """Bandwidth of a copy of 1 GiB, FLOP/s of a product of two 8192 x 8192 matrices."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_(0, 255)
    target = torch.empty_like(source)
    a, b = (torch.randn(MATMUL_WIDTH, MATMUL_WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return Ceilings(
        copy_bytes_per_s=2 * COPY_BYTES * MS_PER_S / time_calls(lambda: target.copy_(source)).median,
        matmul_flops_per_s=2 * MATMUL_WIDTH**3 * MS_PER_S / time_calls(lambda: a @ b).median,
    )


def measure_case(case: Case, ceilings: Ceilings) -> tuple[Row, ...]:
    """The rows of a case. Raises: AssertionError if it is wrong."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    check(case, device, dtype)
    # Shapes of another case must not count as recompilations of this one.
    torch._dynamo.reset()
    compiled = torch.compile(case.reference, dynamic=False) if case.has_compiled_rival else None
    directions: tuple[Direction, ...] = ("forward", "forward + backward") if case.bytes.backward else ("call",)
    return tuple(_measure_row(case, compiled, direction, ceilings) for direction in directions)


def _measure_row(case: Case, compiled: Callable[..., Any] | None, direction: Direction, ceilings: Ceilings) -> Row:
    def timing(function: Callable[..., Any], *, as_graph: bool = True) -> Timing:
        def make_call() -> Callable[[], Any]:
            return CALLS[direction](function, case.make_inputs(torch.device("cuda"), torch.bfloat16))

        return time_calls(captured(make_call).replay if as_graph else make_call())

    def timing_of_rival(name: str, function: Callable[..., Any] | None, *, as_graph: bool = True) -> Timing | None:
        if function is None:
            return None
        try:
            return timing(function, as_graph=as_graph)
        except RuntimeError as error:  # out of memory, or what torch.compile cannot compile
            logger.warning("%s, %s: %s does not run: %s", case.name, direction, name, str(error).partition("\n")[0])
            return None

    works = (case.bytes, case.flops)
    num_bytes, num_flops = (sum(work) if direction == "forward + backward" else work.forward for work in works)
    least_ms, bound = ceilings.bound(num_bytes, num_flops)
    return Row(
        case=case.name,
        direction=direction,
        shapes=case.shapes,
        num_bytes=num_bytes,
        num_flops=num_flops,
        least_ms=least_ms,
        bound=bound,
        eager_ms=timing_of_rival("eager PyTorch", case.reference, as_graph=not case.reference_waits),
        eager_is_captured=not case.reference_waits,
        compiled_ms=timing_of_rival("torch.compile", compiled),
        ours_ms=timing(case.op),
    )


def forward(function: Callable[..., Any], inputs: Inputs) -> Callable[[], Any]:
    """A call without gradients."""
    return torch.no_grad()(partial(function, **inputs))


def forward_and_backward(function: Callable[..., Any], inputs: Inputs) -> Callable[[], None]:
    """A call and its backward pass, which starts from gradients that are there."""
    leaves = [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]

    def outputs() -> list[Tensor]:
        return [output for output in as_tuple(function(**inputs)) if output.requires_grad]

    gradients = gradients_of(outputs())

    def call() -> None:
        # Leaves with an accumulator get their gradient there.
        torch.autograd.grad(outputs(), leaves, gradients, allow_unused=True)

    return call


CALLS: dict[Direction, Callable[[Callable[..., Any], Inputs], Callable[[], Any]]] = {
    "forward": forward,
    "forward + backward": forward_and_backward,
    "call": lambda function, inputs: partial(function, **inputs),
}


def captured(make_call: Callable[[], Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """What `make_call` makes, a call that does not wait for the device, as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Inputs too: a backward pass goes on the stream on which its leaves were first used, and another may not capture.
    with torch.cuda.stream(stream):
        call = make_call()
        for _ in range(WARMUP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph


def time_calls(call: Callable[[], Any]) -> Timing:
    """The timing of repeated calls, each with nothing of use in the device's cache."""
    times = triton.testing.do_bench(call, warmup=WARMUP_MS, rep=REPEAT_MS, return_mode="all")
    deciles = quantiles(times, n=10) if len(times) > 1 else times * 9
    return Timing(median=median(times), p10=deciles[0], p90=deciles[-1], num_repeats=len(times))


def measure(cases: Sequence[Case], made_on: Environment) -> KernelReport:
    """The report of these cases; one that is wrong does not keep the others from being timed."""
    started_at = time.monotonic()
    ceilings = measure_ceilings()
    rows: list[Row] = []
    failures: dict[str, str] = {}
    for case in cases:
        try:
            rows += measure_case(case, ceilings)
        except (AssertionError, torch.OutOfMemoryError) as error:
            failures[case.name] = str(error)
            logger.error("%s fails its check and is not timed: %s", case.name, error)
        # Only here no exception, and so none of its frames, holds the tensors of a case that failed.
        gc.collect()
        torch.cuda.empty_cache()
        logger.info("%s: %.0f s since the start", case.name, time.monotonic() - started_at)
    return KernelReport(
        environment=made_on,
        ceilings=ceilings,
        dtype="bfloat16",
        rows=tuple(rows),
        failures=failures,
        seconds=time.monotonic() - started_at,
    )


def markdown(report: KernelReport) -> str:
    """The report for people."""
    made_on, ceilings = report.environment, report.ceilings
    failures = "".join(
        f"* **{name}** failed its check and was not timed: {message}\n" for name, message in report.failures.items()
    )
    table = markdown_table([_cells(row) for row in report.rows])
    copy = f"{ceilings.copy_bytes_per_s / GIGA:,.0f} GB/s"
    matmul = f"{ceilings.matmul_flops_per_s / TERA:,.0f} TFLOP/s"
    legend = (
        "Milliseconds: median of repeated replays of a CUDA graph, the cache flushed before each (10th to 90th "
        f"percentile); {report.dtype}, float32 inside. Of ceiling: the least bytes or FLOPs at the device's own rate, "
        f"over our time; a copy of {COPY_BYTES / 2**30:.0f} GiB reads and writes {copy}, a product of two matrices of "
        f"{MATMUL_WIDTH} rows and columns runs at {matmul}. Speedup: over torch.compile, or over eager PyTorch where "
        "there is none. Every case was first checked against float64. *: calls in the place of replays, the host's "
        "share included, as it waits for the device."
    )
    return (
        f"# Kernels on {made_on.gpu}\n\n{table}\n\n{failures}{legend}\n\n"
        f"{made_on.packages}; commit {made_on.commit or 'unknown'}; {report.seconds:.0f} s in all.\n\n"
        f"```\n{made_on.command}\n```\n"
    )


def _cells(row: Row) -> dict[str, str]:
    ours_s = row.ours_ms.median / MS_PER_S
    rate = (
        f"{row.num_bytes / ours_s / GIGA:,.0f} GB/s"
        if row.bound == "memory"
        else f"{row.num_flops / ours_s / TERA:,.0f} TFLOP/s"
    )
    rival = row.compiled_ms or row.eager_ms
    return {
        "case": row.case,
        "direction": row.direction,
        "eager": _milliseconds(row.eager_ms) + ("" if row.eager_is_captured or row.eager_ms is None else " *"),
        "torch.compile": _milliseconds(row.compiled_ms),
        "ours": _milliseconds(row.ours_ms),
        "rate": rate,
        "of ceiling": f"{row.least_ms / row.ours_ms.median:.0%}",
        "speedup": "" if rival is None else f"{rival.median / row.ours_ms.median:.2f}x",
    }


def _milliseconds(timing: Timing | None) -> str:
    return "" if timing is None else f"{timing.median:.3f} ({timing.p10:.3f} to {timing.p90:.3f})"


def write_report(directory: Path, report: KernelReport) -> Path:
    """The markdown file written; its typed twin lies beside it."""
    return write_result(directory, hardware_stem(report.environment), report, markdown(report))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="time the cases whose name contains this")
    parser.add_argument("--out", type=Path, help="folder of <gpu>.json and <gpu>.md")
    parser.add_argument("--commit", help="of this project, where its files lie without git")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cases = [case for case in all_cases() if arguments.only in case.name]
    if not cases:
        raise SystemExit(f"no case has {arguments.only!r} in its name: {[case.name for case in all_cases()]}")
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; on a CPU the tests run the kernels, and time says nothing")
    made_on = environment(
        num_threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name(),
        more_versions=("triton",),
        named_commit=arguments.commit,
    )
    versions = made_on.versions | {"cuda": str(torch.version.cuda)}
    report = measure(cases, made_on.model_copy(update={"versions": versions}))
    print(markdown(report))  # noqa: T201
    if arguments.out is not None:
        logger.info("written: %s", write_report(arguments.out, report))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
