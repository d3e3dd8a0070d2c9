"""Whole training steps on several GPUs against the same steps on one of them, in one run.

    torchrun --standalone --nproc-per-node=2 -m specforge_core.training.bench.several
    torchrun --standalone --nproc-per-node=2 -m specforge_core.training.bench.several --cases dp long wide longest

A step is `train_step` with gradient reduction, norm, clipping and fused AdamW, on batches in the GPU's memory. One GPU
is the first of them while the others wait. Every row that is done is in the report at once. `longest` doubles the
document up to 262,144 tokens, twice what the target reads, where one GPU takes half a minute a step: fewer `--steps`.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from specforge_core.artifacts import write_atomically
from specforge_core.benchmark.tables import markdown_table
from specforge_core.drafts.base import DraftBatch
from specforge_core.environment import environment, hardware_stem
from specforge_core.facts import Environment, Record
from specforge_core.manifest_sections import ParallelConfig, TrainingConfig
from specforge_core.training.bench.batch import count_rows, make_batch, make_draft
from specforge_core.training.bench.measure import release_memory, timed_ms
from specforge_core.training.bench.results import GIB, MILLISECONDS
from specforge_core.training.bench.shapes import SHAPES, dense_flops, peak_flops, useful_flops
from specforge_core.training.bench.workload import make_workload
from specforge_core.training.optim import build_optimizers
from specforge_core.training.parallel import parallelize
from specforge_core.training.step import train_step
from specforge_core.training.workers import Workers, compute_dtype, join_workers

logger = logging.getLogger(__name__)

NUM_WARM_UPS = 3
STEM_SUFFIX = "-several-gpus"


class Work(NamedTuple):
    """What every replica computes in a step."""

    shape: str
    num_tokens: int
    """Of a micro-batch."""
    document_tokens: int
    micro_batches: int
    share: float = 1.0
    """Of tokens in answers."""


class Case(NamedTuple):
    """Work, and the meshes that do it beside one GPU: `dp`, `cp` or `tp` is all GPUs in that dimension."""

    work: Work
    meshes: tuple[str, ...]


CASES = {
    "dp": (
        Case(Work("llama-3.1-8b", 8192, 4096, 1), ("dp",)),
        Case(Work("llama-3.1-8b", 8192, 4096, 8), ("dp",)),
        Case(Work("llama-3.1-8b", 8192, 4096, 8, share=0.5), ("dp",)),
    ),
    "long": (
        Case(Work("llama-3.1-8b", 32_768, 32_768, 1), ("dp", "cp")),
        Case(Work("llama-3.1-8b", 32_768, 32_768, 1, share=0.2), ("dp", "cp")),
    ),
    "wide": (
        Case(Work("llama-3.3-70b", 8192, 4096, 1), ("dp", "tp")),
        Case(Work("llama-3.3-70b", 8192, 4096, 8), ("dp",)),
    ),
    "longest": tuple(Case(Work("llama-3.1-8b", 2**k, 2**k, 1), ("cp",)) for k in range(16, 19)),
    "tiny": (Case(Work("tiny", 128, 64, 2), ("dp", "cp", "tp")),),
}


class SeveralRow(Record):
    """One mesh at work."""

    shape: str
    document_tokens: int
    share: float
    micro_batches: int
    dp: int
    cp: int
    tp: int
    num_tokens: int
    """Of a step, all replicas together, like the next three."""
    num_supervised: int
    dense_flops: float
    useful_flops: float
    ms: tuple[float, ...]
    """By step."""
    peak_bytes: int | None
    """On the GPU that needs most; None on a CPU."""

    @property
    def num_gpus(self) -> int:
        return self.dp * self.cp * self.tp

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """By the median step."""
        return self.num_tokens * MILLISECONDS / median(self.ms) / self.num_gpus

    @property
    def work(self) -> tuple[Any, ...]:
        """What rows must agree on to be compared."""
        return self.shape, self.document_tokens, self.share, self.micro_batches


class SeveralBench(Record):
    """A run."""

    environment: Environment
    num_steps: int
    """Of training-time test, S."""
    num_warm_ups: int
    dtype: str
    peak_flops: float | None
    rows: tuple[SeveralRow, ...] = ()


def measured_rows(cases: Sequence[Case], workers: Workers, *, num_steps: int, num_repeats: int) -> Iterator[SeveralRow]:
    """All rows, in all processes."""
    for case in cases:
        # What others wait for, one GPU needs not be able to do: its row is left out then.
        for mesh in ("one", *case.meshes):
            row = None
            if mesh != "one":
                sizes = {name: workers.world_size for name in ("cp", "tp") if name == mesh}
                arranged = workers.arranged(ParallelConfig(**sizes))
                row = measured(case.work, arranged, num_steps=num_steps, num_repeats=num_repeats)
            elif workers.is_first:
                try:
                    row = measured(
                        case.work, Workers(0, 1, workers.device), num_steps=num_steps, num_repeats=num_repeats
                    )
                except torch.OutOfMemoryError:
                    logger.info("one GPU has no memory for %s", case.work)
            release_memory()
            workers.wait()
            if row is not None:
                yield row


def measured(work: Work, workers: Workers, *, num_steps: int, num_repeats: int) -> SeveralRow:
    """The row of this mesh. All its processes call it."""
    shape, device = SHAPES[work.shape], workers.device
    draft = make_draft(shape, num_steps=num_steps, seed=0, device=device)
    config = TrainingConfig()
    sharding = parallelize(draft, config, workers)
    optimizers = build_optimizers(sharding, config)
    conversations = make_workload(
        "uniform", work.share, budget=work.num_tokens, document_tokens=work.document_tokens, seed=0
    ).packed
    made = [
        make_batch(conversations, shape, seed=workers.replica * work.micro_batches + number, device=device)
        for number in range(work.micro_batches)
    ]
    counts = count_rows(made[0], num_steps)
    batches: list[DraftBatch] = [
        tree_map_only(Tensor, lambda tensor: tensor.to(device), draft.prepare(batch)) for batch in made
    ]

    def step() -> None:
        train_step(draft, optimizers, batches, config.max_grad_norm, workers, sharding)

    for _ in range(NUM_WARM_UPS):
        step()
    peak = torch.zeros((), dtype=torch.int64)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ms = timed_ms(step, num_repeats, is_cuda=device.type == "cuda")
    if device.type == "cuda":
        peak = torch.tensor(torch.cuda.max_memory_allocated(), device=device)
    if workers.world_size > 1:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    num_batches = work.micro_batches * workers.num_replicas
    return SeveralRow(
        shape=work.shape,
        document_tokens=work.document_tokens,
        share=work.share,
        micro_batches=work.micro_batches,
        dp=workers.num_replicas,
        cp=workers.cp,
        tp=workers.tp,
        num_tokens=num_batches * counts.num_tokens,
        num_supervised=num_batches * counts.rows_S[0],
        dense_flops=num_batches * dense_flops(shape, counts.num_tokens, num_steps),
        useful_flops=num_batches * useful_flops(shape, counts),
        ms=ms,
        peak_bytes=int(peak) or None,
    )


def markdown(result: SeveralBench) -> str:
    """The result for people."""
    made_on = result.environment
    versions = ", ".join(f"{name} {version}" for name, version in made_on.versions.items())
    return "\n".join(
        [
            f"# EAGLE-3 training on several GPUs, {made_on.gpu or made_on.cpu}",
            "",
            f"Whole training steps on random data in the GPUs' memory: forward and backward passes, reduction in "
            f"float32, norm, clipping, fused AdamW. S = {result.num_steps}, {result.dtype}; the median of "
            f"{max((len(row.ms) for row in result.rows), default=0)} steps after {result.num_warm_ups} warm-ups, with "
            "the fastest and the slowest. Every replica has micro-batches of its own, of the same sizes.",
            f"{versions}; commit {made_on.commit}; `{made_on.command}`.",
            "",
            markdown_table([_cells(row, result) for row in result.rows]),
            "",
            "MFU counts FLOPs as if every token went through everything at every step, without attention; useful MFU "
            "those that exact training cannot do without, attention included.",
            "",
        ]
    )


def _cells(row: SeveralRow, result: SeveralBench) -> dict[str, str]:
    alone = next((one for one in result.rows if one.num_gpus == 1 and one.work == row.work), None)
    seconds = median(row.ms) / MILLISECONDS

    def utilisation(flops: float) -> str:
        return f"{flops / seconds / row.num_gpus / result.peak_flops:.0%}" if result.peak_flops else "-"

    return {
        "shape": row.shape,
        "tokens a document": f"{row.document_tokens:,}",
        "supervised": f"{row.num_supervised / row.num_tokens:.0%}",
        "micro-batches": str(row.micro_batches),
        "dp x cp x tp": f"{row.dp} x {row.cp} x {row.tp}",
        "ms (fastest - slowest)": f"{median(row.ms):.1f} ({min(row.ms):.1f} - {max(row.ms):.1f})",
        "tokens/s": f"{row.tokens_per_s_per_gpu * row.num_gpus:,.0f}",
        "against one GPU": f"{row.tokens_per_s_per_gpu * row.num_gpus / alone.tokens_per_s_per_gpu:.2f}"
        if alone
        else "-",
        "MFU": utilisation(row.dense_flops),
        "useful MFU": utilisation(row.useful_flops),
        "peak GiB": f"{row.peak_bytes / GIB:.1f}" if row.peak_bytes else "-",
    }


def main() -> int:
    """0."""
    arguments = _parser().parse_args()
    with join_workers(arguments.device) as workers:
        logging.basicConfig(
            level=logging.INFO if workers.is_first else logging.WARNING, format="%(asctime)s %(message)s"
        )
        gpu = torch.cuda.get_device_name() if arguments.device == "cuda" else None
        made_on = environment(num_threads=torch.get_num_threads(), gpu=gpu, more_versions=["triton"])
        result = SeveralBench(
            environment=made_on.model_copy(update={"commit": arguments.commit or made_on.commit}),
            num_steps=arguments.ttt_steps,
            num_warm_ups=NUM_WARM_UPS,
            dtype=str(compute_dtype(workers.device)).removeprefix("torch."),
            peak_flops=peak_flops(gpu),
        )
        stem = arguments.name or hardware_stem(made_on) + STEM_SUFFIX
        cases = [case for name in arguments.cases for case in CASES[name]]
        for row in measured_rows(cases, workers, num_steps=arguments.ttt_steps, num_repeats=arguments.steps):
            if workers.is_first:
                logger.info("%s: %.0f tokens/s per GPU", row.model_dump_json(exclude={"ms"}), row.tokens_per_s_per_gpu)
                result = result.model_copy(update={"rows": (*result.rows, row)})
                arguments.out.mkdir(parents=True, exist_ok=True)
                write_atomically(arguments.out / f"{stem}.json", result.model_dump_json(indent=1) + "\n")
                write_atomically(arguments.out / f"{stem}.md", markdown(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m specforge_core.training.bench.several",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["dp", "long", "wide"])
    parser.add_argument("--ttt-steps", type=int, default=7, help="steps of training-time test")
    parser.add_argument("--steps", type=int, default=7, help="timed repeats")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("reports/training"))
    parser.add_argument("--name", help="of the files; the hardware's when absent")
    parser.add_argument("--commit", help="of these sources, where they lie outside a checkout")
    return parser


if __name__ == "__main__":
    sys.exit(main())
