"""What the benchmark of several GPUs records, as JSON and as markdown. Torch-free."""

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from specforge_core.benchmark.tables import markdown_table
from specforge_core.facts import Environment, Record
from specforge_core.training.bench.lengths import Lengths
from specforge_core.training.bench.results import GIB, MILLISECONDS

OURS, FSDP2 = "ours", "conventional, FSDP2"


class SeveralRow(Record):
    """One mesh at work."""

    path: str = OURS
    shape: str
    lengths: Lengths = "uniform"
    document_tokens: int
    """Of each document, if lengths are uniform."""
    share: float
    """Of the tokens that were to be in answers."""
    micro_batches: int
    """Of a step: of each replica, or of all together if lengths are real."""
    steps: int = 1
    """Steps of a repeat, each with documents of its own."""
    dp: int
    cp: int
    tp: int
    num_tokens: int
    """Of a repeat, all replicas together, like the next three."""
    num_supervised: int
    dense_flops: float
    useful_flops: float
    ms: tuple[float, ...]
    """By repeat, like the next three, which are empty where exchanges were not timed."""
    communication_ms: tuple[float, ...] = ()
    slowest_ms: tuple[float, ...] = ()
    """Computing, of the slowest process between each two exchanges."""
    mean_ms: tuple[float, ...] = ()
    """Of all processes."""
    peak_bytes: int | None
    """On the GPU that needs most; None on a CPU."""

    @property
    def num_gpus(self) -> int:
        return self.dp * self.cp * self.tp

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """By the median repeat."""
        return self.num_tokens * MILLISECONDS / median(self.ms) / self.num_gpus

    @property
    def work(self) -> tuple[Any, ...]:
        """What rows must agree on to be compared."""
        return (
            self.path, self.shape, self.lengths, self.document_tokens, self.share, self.micro_batches, self.steps
        )  # fmt: skip


class SeveralBench(Record):
    """A run."""

    environment: Environment
    num_steps: int
    """Of training-time test, S."""
    num_warm_ups: int
    """At most."""
    dtype: str
    peak_flops: float | None
    rows: tuple[SeveralRow, ...] = ()


class Distance(NamedTuple):
    """What a row takes longer than one GPU's time divided by their number, and why, in milliseconds of a repeat."""

    total: float
    """As timed; nearly the sum of the others."""
    communication: float
    waiting: float
    """For the slowest process."""
    computing: float
    """What a process computes beyond its share of what one GPU does; it may be less."""

    @property
    def largest(self) -> str:
        """The name of the largest part."""
        return max(("communication", "waiting", "computing"), key=lambda name: getattr(self, name))


def markdown(result: SeveralBench) -> str:
    """The result for people."""
    made_on = result.environment
    lines = [
        f"# EAGLE-3 training on several GPUs, {made_on.gpu or made_on.cpu}",
        "",
        f"Whole training steps on random data in the GPUs' memory: forward and backward passes, reduction in "
        f"float32, norm, clipping, fused AdamW. S = {result.num_steps}, {result.dtype}; the median of the repeats "
        f"behind {result.num_warm_ups} warm-ups, 2 where a step takes seconds, with the fastest and the slowest. "
        "Every replica has micro-batches of its own, of the same sizes; those of real lengths are dealt out among "
        "the replicas.",
        f"{made_on.packages}; commit {made_on.commit}; `{made_on.command}`.",
        "",
        markdown_table([_cells(row, result) for row in result.rows]),
        "",
        "MFU counts FLOPs as if every token went through everything at every step, without attention; useful MFU "
        "those that exact training cannot do without, attention included.",
        "",
    ]
    if any(row.path == FSDP2 for row in result.rows):
        lines += [FSDP2_EXPLANATION, ""]
    if bounded := [(row, distance) for row in result.rows if (distance := distance_to_linear(row, result.rows))]:
        lines += ["## What bounds it", "", markdown_table([_distance_cells(*one) for one in bounded])]
        lines += ["", _verdict([distance for _, distance in bounded]), "", DISTANCE_EXPLANATION, ""]
    return "\n".join(lines)


FSDP2_EXPLANATION = """\
`conventional, FSDP2`: padded rows, all of them at every step, flex attention, whole logits, autograd, under
`fully_shard`: float32 shards of weights and moments, gathered in bfloat16 before a step, gradients added up in bfloat16
and reduced in float32. On one GPU the same without `fully_shard`."""

DISTANCE_EXPLANATION = """\
Milliseconds of a repeat, medians. Over N x: beyond one GPU's time for the same work, divided by the number of GPUs. It
has three parts: communication, the shortest stay of any process in each exchange; waiting, by which the slowest process
computes longer between two exchanges than all do on average; and computing, what a process on average computes beyond
its share: what is not shared, smaller products, and hosts and GPUs that are slower together."""


def alone(row: SeveralRow, rows: Sequence[SeveralRow]) -> SeveralRow | None:
    """The row of one GPU with the same work, if there is one."""
    return next((one for one in rows if one.num_gpus == 1 and one.work == row.work), None)


def distance_to_linear(row: SeveralRow, rows: Sequence[SeveralRow]) -> Distance | None:
    """What keeps the row from N x; None for one GPU, or where that or the exchanges were not timed."""
    one = alone(row, rows)
    if one is None or row.num_gpus == 1 or not row.communication_ms:
        return None
    slowest, mean = median(row.slowest_ms), median(row.mean_ms)
    ideal = median(one.ms) * row.num_tokens / one.num_tokens / row.num_gpus
    return Distance(
        total=median(row.ms) - ideal,
        communication=median(row.communication_ms),
        waiting=slowest - mean,
        computing=mean - ideal,
    )


def _verdict(distances: Sequence[Distance]) -> str:
    """One sentence."""
    counts = Counter(distance.largest for distance in distances).most_common()
    return "The largest part of the distance: " + ", ".join(
        f"{name} in {count} of {len(distances)} rows" for name, count in counts
    ) + "."  # fmt: skip


def _work_cells(row: SeveralRow) -> dict[str, str]:
    return {
        "shape": row.shape,
        "path": row.path,
        "tokens a document": f"{row.document_tokens:,}" if row.lengths == "uniform" else "real",
        "supervised": f"{row.num_supervised / row.num_tokens:.0%}",
        "micro-batches": str(row.micro_batches) if row.steps == 1 else f"{row.steps} x {row.micro_batches}",
        "dp x cp x tp": f"{row.dp} x {row.cp} x {row.tp}",
    }


def _cells(row: SeveralRow, result: SeveralBench) -> dict[str, str]:
    seconds = median(row.ms) / MILLISECONDS
    one = alone(row, result.rows)
    by_dp = next((other for other in result.rows if other.dp == row.num_gpus and other.work == row.work), None)

    def utilisation(flops: float) -> str:
        return f"{flops / seconds / row.num_gpus / result.peak_flops:.0%}" if result.peak_flops else "-"

    def speed_over(other: SeveralRow) -> float:
        return row.tokens_per_s_per_gpu / other.tokens_per_s_per_gpu

    return _work_cells(row) | {
        "ms (fastest - slowest)": f"{median(row.ms):.1f} ({min(row.ms):.1f} - {max(row.ms):.1f})",
        "repeats": str(len(row.ms)),
        "tokens/s": f"{row.tokens_per_s_per_gpu * row.num_gpus:,.0f}",
        "against one GPU": f"{row.num_gpus * speed_over(one):.2f}" if one else "-",
        "against dp": f"{speed_over(by_dp):.0%}" if by_dp and row.num_gpus > 1 else "-",
        "MFU": utilisation(row.dense_flops),
        "useful MFU": utilisation(row.useful_flops),
        "peak GiB": f"{row.peak_bytes / GIB:.1f}" if row.peak_bytes else "-",
    }


def _distance_cells(row: SeveralRow, distance: Distance) -> dict[str, str]:
    return _work_cells(row) | {
        "ms": f"{median(row.ms):.1f}",
        "over N x": f"{distance.total:.1f}",
        "communication": f"{distance.communication:.1f}",
        "waiting": f"{distance.waiting:.1f}",
        "computing": f"{distance.computing:.1f}",
        "slowest / mean": f"{median(row.slowest_ms) / median(row.mean_ms):.3f}",
        "largest": distance.largest,
    }
