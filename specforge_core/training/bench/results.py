"""What the training benchmark records, as JSON, as markdown and as a plot. Torch-free."""

from collections.abc import Sequence
from statistics import median

from pydantic import Field

from specforge_core.benchmark.tables import markdown_table
from specforge_core.facts import Environment, Record
from specforge_core.training.bench.lengths import Lengths

GIB = 2**30
TERA = 1e12
GIGA = 1e9
MILLISECONDS = 1e3


class Mix(Record):
    """What batches are of."""

    shape: str
    lengths: Lengths
    share: float
    """Of the tokens that are to be in answers."""


class Row(Mix):
    """One path on one batch."""

    path: str
    status: str
    """`measured`, `out of memory`, or `failed: ` and why; then there are no times."""
    num_documents: int
    num_tokens: int
    """Real ones: padding does not count."""
    num_supervised: int
    """Slots that are supervised at step 0."""
    dense_flops: float
    useful_flops: float
    roofline_ms: float
    """What the useful FLOPs take at the rate of a large matrix product, or the bytes at that of a copy if longer."""
    ms: tuple[float, ...] = ()
    """Forward and backward pass, by repeat."""
    prepare_ms: float | None = None
    peak_bytes: int | None = None
    weight_bytes: int | None = None
    gradient_bytes: int | None = None
    input_bytes: int | None = None
    master_bytes: int | None = None
    """float32 weights, inside `weight_bytes`, of which the matrix products see a copy in bfloat16."""
    parts_ms: dict[str, float] = Field(default_factory=dict)
    """GPU time by part, of one step more, under a profiler; empty on a CPU."""

    @property
    def is_measured(self) -> bool:
        """Whether there are times."""
        return bool(self.ms)

    @property
    def tokens_per_s(self) -> float:
        """By the median step."""
        return self.num_tokens * MILLISECONDS / median(self.ms)

    @property
    def supervised_share(self) -> float:
        """Of the tokens, those whose slot is supervised."""
        return self.num_supervised / self.num_tokens


class StepRow(Mix):
    """The whole training step of our path, batches from the disk, against its forward and backward pass alone."""

    micro_batches: int
    """Of each step."""
    num_tokens: int
    """Of all timed steps together."""
    stored_bytes: int
    """Of the same tokens."""
    forward_backward_ms: tuple[float, ...]
    """The same batches, on the device already."""
    step_ms: tuple[float, ...]
    """From disk, when the system's page cache holds the files."""
    cold_step_ms: tuple[float, ...]
    """From disk, after the files were dropped from the page cache."""

    @property
    def efficiency(self) -> float:
        """Forward and backward pass alone against the whole step, of all steps together."""
        return sum(self.forward_backward_ms) / sum(self.step_ms)

    @property
    def cold_efficiency(self) -> float:
        """The same, against the step with an empty page cache."""
        return sum(self.forward_backward_ms) / sum(self.cold_step_ms)


class TrainingBench(Record):
    """A run of the benchmark."""

    environment: Environment
    num_steps: int
    """Of training-time test, S."""
    num_warm_ups: int
    dtype: str
    peak_flops: float | None
    """Of the GPU's data sheet, dense, in bfloat16."""
    matmul_flops: float
    """FLOP/s measured in a large matrix product."""
    copy_bytes_per_s: float
    """Read and written, measured in a copy."""
    rows: tuple[Row, ...] = ()
    step_rows: tuple[StepRow, ...] = ()


def markdown(result: TrainingBench, stem: str) -> str:
    """The result for people."""
    made_on = result.environment
    peak = f"{result.peak_flops / TERA:.0f} TFLOP/s by its data sheet, " if result.peak_flops else ""
    # Measured path by path, read batch by batch.
    mixes = list(dict.fromkeys((row.shape, row.lengths, row.share) for row in result.rows))
    rows = sorted(result.rows, key=lambda row: mixes.index((row.shape, row.lengths, row.share)))
    lines = [
        f"# EAGLE-3 training on {made_on.gpu or made_on.cpu}",
        "",
        f"S = {result.num_steps} steps of training-time test, {result.dtype}, random data; the median of "
        f"{max((len(row.ms) for row in result.rows), default=0)} steps after {result.num_warm_ups} warm-ups, with the "
        f"fastest and the slowest. {peak}{result.matmul_flops / TERA:.0f} TFLOP/s in a large matrix product, "
        f"{result.copy_bytes_per_s / GIGA:,.0f} GB/s in a copy.",
        f"{made_on.packages}; commit {made_on.commit}; `{made_on.command}`.",
        "",
        "## Forward and backward pass",
        "",
        markdown_table([_row_cells(row, result) for row in rows]),
        "",
        f"![tokens per second over the supervised share]({stem}.svg)",
        "",
        EXPLANATION,
    ]
    if parts := [row for row in rows if row.parts_ms]:
        lines += ["", "## GPU milliseconds by part", "", markdown_table(_parts_cells(parts)), "", PARTS_EXPLANATION]
    if result.step_rows:
        lines += ["", "## Whole step from disk", "", markdown_table([_step_cells(row) for row in result.step_rows])]
        lines += ["", STEP_EXPLANATION]
    return "\n".join(lines) + "\n"


EXPLANATION = """\
Tokens are real ones, padding does not count; supervised are those whose slot carries a loss at step 0. Memory is
everything allocated at the worst moment of a step: weights, frozen embedding, gradients, activations, inputs, but no
optimizer state; the second number is without the float32 masters, which a trainer may count as such. MFU counts FLOPs
as if every token went through everything at every step, without attention (6 S (qkv + o + feed-forward + head) + 6 fc
+ 2 teacher head), so skipping work that is not needed can lift it over 100 %; useful MFU counts what exact training
cannot do without, attention included, the same for all paths. Roofline: the time of the useful FLOPs at the measured
rate of a large matrix product, as a share of the time taken."""

PARTS_EXPLANATION = """\
One step under the profiler: kernels of the backward pass count for the part whose forward pass they belong to. The
head includes loss, acceptance and, where they are fused, the teacher; `other` is embedding, copies and sums of
gradients. The optimizer is not part of the times above."""

STEP_EXPLANATION = """\
Loading, copying, forward and backward pass, gradient norm, clipping and fused AdamW on float32 masters, against the
forward and backward pass of the same batches in the GPU's memory. Sums over all steps."""


def _row_cells(row: Row, result: TrainingBench) -> dict[str, str]:
    cells = {
        "shape": row.shape,
        "lengths": row.lengths,
        "supervised": f"{row.supervised_share:.1%}",
        "path": row.path,
        "tokens": f"{row.num_tokens:,}",
        "documents": str(row.num_documents),
    }
    empty = dict.fromkeys(
        "tokens/s|supervised tokens/s|peak GiB|without masters|MFU|useful MFU|of roofline".split("|"), "-"
    )
    if not row.is_measured:
        return cells | {"ms (fastest - slowest)": row.status} | empty
    seconds = median(row.ms) / MILLISECONDS

    def utilisation(flops: float) -> str:
        return f"{flops / seconds / result.peak_flops:.0%}" if result.peak_flops else "-"

    # A CPU does not say how much memory a step takes.
    peak_gib = f"{row.peak_bytes / GIB:.2f}" if row.peak_bytes else "-"
    without_gib = f"{(row.peak_bytes - (row.master_bytes or 0)) / GIB:.2f}" if row.peak_bytes else "-"
    return cells | {
        "ms (fastest - slowest)": f"{median(row.ms):.1f} ({min(row.ms):.1f} - {max(row.ms):.1f})",
        "tokens/s": f"{row.tokens_per_s:,.0f}",
        "supervised tokens/s": f"{row.tokens_per_s * row.supervised_share:,.0f}",
        "peak GiB": peak_gib,
        "without masters": without_gib,
        "MFU": utilisation(row.dense_flops),
        "useful MFU": utilisation(row.useful_flops),
        "of roofline": f"{row.roofline_ms / median(row.ms):.0%}",
    }


def _parts_cells(rows: Sequence[Row]) -> list[dict[str, str]]:
    names = list(dict.fromkeys(name for row in rows for name in row.parts_ms))
    return [
        {"shape": row.shape, "lengths": row.lengths, "supervised": f"{row.supervised_share:.1%}", "path": row.path}
        | {name: f"{row.parts_ms[name]:.1f}" if name in row.parts_ms else "-" for name in names}
        for row in rows
    ]


def _step_cells(row: StepRow) -> dict[str, str]:
    def rate(times_ms: Sequence[float]) -> str:
        return f"{row.num_tokens * MILLISECONDS / sum(times_ms):,.0f}"

    stored_gb_per_s = row.stored_bytes / GIGA * MILLISECONDS / sum(row.cold_step_ms)
    return {
        "shape": row.shape,
        "lengths": row.lengths,
        "share": f"{row.share:.0%}",
        "micro-batches a step": str(row.micro_batches),
        "forward + backward, tokens/s": rate(row.forward_backward_ms),
        "whole step, files cached": rate(row.step_ms),
        "of forward + backward": f"{row.efficiency:.1%}",
        "whole step, files not cached": rate(row.cold_step_ms),
        "of forward + backward, not cached": f"{row.cold_efficiency:.1%}",
        "read, GB/s": f"{stored_gb_per_s:.2f}",
    }
