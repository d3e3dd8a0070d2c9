"""Whole training steps on several GPUs against the same steps on one of them, in one run, and what bounds them.

    torchrun --standalone --nproc-per-node=gpu -m specforge_core.training.bench.several     six minutes on two H200
    torchrun --standalone --nproc-per-node=gpu -m specforge_core.training.bench.several --cases dp long

A step is `train_step` with gradient reduction, norm, clipping and fused AdamW, on batches in the GPU's memory. One GPU
is the first of them while the others wait. Every row that is done is in the report at once.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from specforge_core.arguments import add_report_options
from specforge_core.artifacts import write_result
from specforge_core.data.loader import deal, plan_epoch, plan_steps
from specforge_core.drafts.base import DraftBatch
from specforge_core.environment import hardware_stem
from specforge_core.manifest_sections import ParallelConfig, TrainingConfig
from specforge_core.training.bench.batch import count_rows, make_batch, make_draft, to_device
from specforge_core.training.bench.exchanges import timed
from specforge_core.training.bench.fsdp2 import conventional_step
from specforge_core.training.bench.lengths import (
    Conversation,
    Lengths,
    count_answer_tokens,
    count_tokens,
    draw_conversations,
)
from specforge_core.training.bench.measure import measured_environment, release_memory
from specforge_core.training.bench.several_results import FSDP2, OURS, SeveralBench, SeveralRow, markdown
from specforge_core.training.bench.shapes import SHAPES, Shape, dense_flops, peak_flops, useful_flops
from specforge_core.training.optim import build_optimizers
from specforge_core.training.parallel import parallelize
from specforge_core.training.step import train_step
from specforge_core.training.workers import Workers, join_workers

logger = logging.getLogger(__name__)

NUM_WARM_UPS = 3
LONG_REPEAT_S = 1.0
"""Compilers and allocators have done their work after two repeats; a third makes sure of short ones."""
TIMED_S = 5.0
"""Repeats of a row end there, but for the least number."""
MIN_REPEATS = 2
STEM_SUFFIX = "-several-gpus"

Numbered = tuple[int, Sequence[Conversation]]
"""A micro-batch and the seed of its random numbers."""
Steps = Sequence[Sequence[DraftBatch]]
"""The micro-batches of each step, on the CPU."""


class Work(NamedTuple):
    """What is computed in a repeat."""

    shape: str
    num_tokens: int
    """Of a micro-batch, at most."""
    document_tokens: int
    """Of each document, if lengths are uniform."""
    micro_batches: int
    """Of a step: of each replica, or of all together if lengths are real, as a trainer would deal them out."""
    share: float = 1.0
    """Of tokens in answers."""
    lengths: Lengths = "uniform"
    steps: int = 1
    """Each with documents of its own."""
    path: str = OURS


class Case(NamedTuple):
    """Work, and the meshes that do it beside one GPU; see `arrangement`."""

    work: Work
    meshes: tuple[str, ...]


CASES = {
    "dp": (
        Case(Work("llama-3.1-8b", 8192, 4096, 1), ("dp",)),
        Case(Work("llama-3.1-8b", 8192, 4096, 8), ("dp",)),
    ),
    "half": (Case(Work("llama-3.1-8b", 8192, 4096, 8, share=0.5), ("dp",)),),
    # A step of the 65,536 tokens that the manifest's entries take.
    "real": (Case(Work("llama-3.1-8b", 8192, 4096, 8, share=0.5, lengths="real", steps=3), ("dp",)),),
    "long": (
        Case(Work("llama-3.1-8b", 65_536, 65_536, 1), ("dp", "cp", "dp x cp")),
        Case(Work("llama-3.1-8b", 32_768, 32_768, 1), ("dp", "cp", "dp x cp")),
        Case(Work("llama-3.1-8b", 32_768, 32_768, 1, share=0.2), ("dp", "cp", "dp x cp")),
    ),
    "wide": (
        Case(Work("llama-3.3-70b", 8192, 4096, 1), ("dp", "tp")),
        Case(Work("llama-3.3-70b", 8192, 4096, 4), ("dp",)),
    ),
    "longest": (Case(Work("llama-3.1-8b", 131_072, 131_072, 1), ("cp",)),),
    "fsdp2": (
        Case(Work("llama-3.3-70b", 8192, 4096, 1, path=FSDP2), ("dp",)),
        Case(Work("llama-3.1-8b", 8192, 4096, 1, path=FSDP2), ("dp",)),
    ),
    "tiny": (
        Case(Work("tiny", 128, 64, 2), ("dp", "cp", "dp x cp", "dp x tp")),
        Case(Work("tiny", 128, 64, 8, share=0.5, lengths="real", steps=2), ("dp",)),
        Case(Work("tiny", 128, 64, 2, path=FSDP2), ("dp",)),
    ),
}

DEFAULT_CASES = ("dp", "real", "long", "wide", "longest", "fsdp2")


def arrangement(mesh: str, num_processes: int) -> ParallelConfig:
    """All processes in one dimension: `dp`, `cp`, `tp`; or `dp x cp`, `dp x tp`: pairs of replicas."""
    return {
        "dp": ParallelConfig(),
        "cp": ParallelConfig(cp=num_processes),
        "tp": ParallelConfig(tp=num_processes),
        "dp x cp": ParallelConfig(cp=max(1, num_processes // 2)),
        "dp x tp": ParallelConfig(tp=max(1, num_processes // 2)),
    }[mesh]


def measured_rows(cases: Sequence[Case], workers: Workers, *, num_steps: int, num_repeats: int) -> Iterator[SeveralRow]:
    """All rows, in all processes."""
    for case in cases:
        # What others wait for, one GPU needs not be able to do: its row is left out then.
        if workers.is_first:
            try:
                yield measured(case.work, Workers(0, 1, workers.device), num_steps=num_steps, num_repeats=num_repeats)
            except torch.OutOfMemoryError:
                logger.info("one GPU has no memory for %s", case.work)
        release_memory()
        workers.wait()
        # With two processes, some are the same.
        for parallel in dict.fromkeys(arrangement(mesh, workers.world_size) for mesh in case.meshes):
            yield measured(case.work, workers.arranged(parallel), num_steps=num_steps, num_repeats=num_repeats)
            release_memory()
            workers.wait()


def measured(work: Work, workers: Workers, *, num_steps: int, num_repeats: int) -> SeveralRow:
    """The row of this mesh. All its processes call it."""
    shape, device = SHAPES[work.shape], workers.device
    steps = drawn_steps(work, workers)
    step = PATHS[work.path](shape, num_steps, steps, workers)
    # What all processes of a replica have is counted once.
    batches = [batch for batches in steps for batch in batches] if workers.leads_replica else []
    counts = [count_rows(batch, num_steps) for batch in batches]
    sums = torch.tensor(
        [
            sum(one.num_tokens for one in counts),
            sum(one.rows_S[0] for one in counts),
            sum(dense_flops(shape, one.num_tokens, num_steps) for one in counts),
            sum(useful_flops(shape, one) for one in counts),
        ],
        dtype=torch.float64,
        device=device,
    )
    workers.add_up([sums])
    num_tokens, num_supervised, dense, useful = sums.tolist()
    repeats = warmed_up(step, workers, num_repeats)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = timed(step, repeats, workers)
    peak_bytes = _largest(torch.cuda.max_memory_allocated() if device.type == "cuda" else 0, workers)
    return SeveralRow(
        **work._asdict() | {"num_tokens": int(num_tokens)},
        dp=workers.num_replicas,
        cp=workers.cp,
        tp=workers.tp,
        num_supervised=int(num_supervised),
        dense_flops=dense,
        useful_flops=useful,
        # What FSDP2 exchanges is in hooks of its own.
        **times._asdict() if work.path == OURS else {"ms": times.ms},
        peak_bytes=int(peak_bytes) or None,
    )


def drawn_steps(work: Work, workers: Workers) -> Steps:
    """This replica's micro-batches of random numbers, the same for all its processes."""
    shape, num_batches = SHAPES[work.shape], work.steps * work.micro_batches
    if work.lengths == "uniform":
        conversations = _drawn(work, work.num_tokens)
        first = workers.replica * num_batches
        numbered: list[Numbered] = [(first + number, conversations) for number in range(num_batches)]
        steps = plan_steps(numbered, work.micro_batches)
    else:
        # The plan of an epoch leaves its last batches half empty.
        drawn = _drawn(work, 2 * num_batches * work.num_tokens)
        plan = plan_epoch([count_tokens(conversation) for conversation in drawn], work.num_tokens, seed=0, epoch=0)
        of_all = [(number, [drawn[i] for i in batch]) for number, batch in enumerate(plan[:num_batches])]
        steps = [_share(step, workers) for step in plan_steps(of_all, work.micro_batches)]
    return [
        [make_batch(conversations, shape, seed=number, device=workers.device) for number, conversations in step]
        for step in steps
    ]


def _share(step: Sequence[Numbered], workers: Workers) -> Sequence[Numbered]:
    """What a training has this replica take."""
    loads = [sum(map(count_answer_tokens, conversations)) for _, conversations in step]
    takers = deal(loads, workers.num_replicas)
    return list(compress(step, (taker == workers.replica for taker in takers)))


def _drawn(work: Work, num_tokens: int) -> list[Conversation]:
    return draw_conversations(
        work.lengths,
        work.share,
        num_tokens=num_tokens,
        max_tokens=work.num_tokens,
        document_tokens=work.document_tokens,
        seed=0,
    )


def our_step(shape: Shape, num_steps: int, steps: Steps, workers: Workers) -> Callable[[], None]:
    """The training steps of a repeat, one after the other."""
    draft = make_draft(shape, num_steps=num_steps, seed=0, device=workers.device)
    config = TrainingConfig()
    sharding = parallelize(draft, config, workers)
    optimizers = build_optimizers(sharding, config)
    loaded = [[to_device(draft.prepare(batch), workers.device) for batch in batches] for batches in steps]

    def step() -> None:
        for batches in loaded:
            train_step(draft, optimizers, batches, config.max_grad_norm, workers, sharding)

    return step


PATHS: dict[str, Callable[[Shape, int, Steps, Workers], Callable[[], Any]]] = {
    OURS: our_step,
    FSDP2: conventional_step,
}


def warmed_up(step: Callable[[], Any], workers: Workers, num_repeats: int) -> int:
    """How often to time the step, after its warm-ups: as often as asked for, or as there is time for."""
    repeat_s = 0.0
    for number in range(NUM_WARM_UPS):
        if number == NUM_WARM_UPS - 1 and repeat_s > LONG_REPEAT_S:
            break
        started_at = time.perf_counter()
        step()
        if workers.device.type == "cuda":
            torch.cuda.synchronize()
        repeat_s = _largest(time.perf_counter() - started_at, workers)
    return max(MIN_REPEATS, min(num_repeats, int(TIMED_S / repeat_s)))


def _largest(value: float, workers: Workers) -> float:
    """Of all processes."""
    largest = torch.tensor(value, dtype=torch.float64, device=workers.device)
    if workers.world_size > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def main() -> int:
    """0."""
    arguments = _parser().parse_args()
    with join_workers(arguments.device) as workers:
        logging.basicConfig(
            level=logging.INFO if workers.is_first else logging.WARNING, format="%(asctime)s %(message)s"
        )
        made_on = measured_environment(workers.device, arguments.commit)
        result = SeveralBench(
            environment=made_on,
            num_steps=arguments.ttt_steps,
            num_warm_ups=NUM_WARM_UPS,
            dtype=str(workers.compute_dtype).removeprefix("torch."),
            peak_flops=peak_flops(made_on.gpu),
        )
        stem = arguments.name or hardware_stem(made_on) + STEM_SUFFIX
        cases = [case for name in arguments.cases for case in CASES[name]]
        for row in measured_rows(cases, workers, num_steps=arguments.ttt_steps, num_repeats=arguments.steps):
            if workers.is_first:
                logger.info("%s: %.0f tokens/s per GPU", row.model_dump_json(), row.tokens_per_s_per_gpu)
                result = result.model_copy(update={"rows": (*result.rows, row)})
                write_result(arguments.out, stem, result, markdown(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m specforge_core.training.bench.several",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(DEFAULT_CASES), help="in this order")
    parser.add_argument("--ttt-steps", type=int, default=7, help="steps of training-time test")
    parser.add_argument("--steps", type=int, default=5, help="timed repeats at most; of long steps fewer, at least 2")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    add_report_options(parser, Path("reports/training"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
