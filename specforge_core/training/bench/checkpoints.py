"""What checkpoints cost a training: how long one holds it up, and how much slower steps are while it is written.

    python -m specforge_core.training.bench.checkpoints
    torchrun --standalone --nproc-per-node=gpu -m specforge_core.training.bench.checkpoints --shapes llama-3.3-70b

Whole training steps on a batch in the GPU's memory, and `Checkpointer` as a training uses it.
"""

import argparse
import contextlib
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from specforge_core.arguments import add_report_options
from specforge_core.artifacts import write_result
from specforge_core.benchmark.tables import markdown_table
from specforge_core.environment import hardware_stem
from specforge_core.facts import Environment, Record
from specforge_core.manifest_sections import TrainingConfig
from specforge_core.training.bench.batch import make_batch, make_draft, to_device
from specforge_core.training.bench.lengths import Turn
from specforge_core.training.bench.measure import measured_environment, release_memory
from specforge_core.training.bench.results import GIB, MILLISECONDS
from specforge_core.training.bench.shapes import SHAPES
from specforge_core.training.checkpoint import Checkpointer, TrainingState
from specforge_core.training.optim import build_optimizers
from specforge_core.training.parallel import parallelize
from specforge_core.training.step import train_step
from specforge_core.training.workers import Workers, join_workers

logger = logging.getLogger(__name__)

KEY = "random weights"
NUM_WARM_UPS = 3
"""Compilers and allocators have done their work then."""
NUM_SAVES = 4
STEM_SUFFIX = "-checkpoints"


class Save(Record):
    """One checkpoint."""

    alone_ms: tuple[float, ...]
    """Of each training step before it, when nothing is written."""
    held_up_ms: float
    """Until the training goes on: its tensors are copied then."""
    beside_ms: tuple[float, ...]
    """Of each training step until it is whole."""
    whole_s: float
    """From its beginning until it is safe on disk."""

    @property
    def cost_ms(self) -> float:
        """By which the training ends later."""
        return self.held_up_ms + sum(ms - median(self.alone_ms) for ms in self.beside_ms)


class CheckpointRow(Record):
    """The checkpoints of one draft."""

    shape: str
    num_gpus: int
    size_bytes: int
    """Of a checkpoint: float32 weights and the moments of AdamW."""
    saves: tuple[Save, ...]
    """The first one gets the pinned memory that all of them use."""
    load_s: float
    """Of the last one, its files cached."""


class CheckpointBench(Record):
    """A run."""

    environment: Environment
    num_steps: int
    """Of training-time test, S."""
    dtype: str
    rows: tuple[CheckpointRow, ...] = ()


def measured(
    name: str, directory: Path, workers: Workers, *, num_steps: int, num_saves: int, num_alone: int = 10
) -> CheckpointRow:
    """The row of this shape. All its processes call it. Args: num_alone: training steps before each checkpoint."""
    shape = SHAPES[name]
    draft = make_draft(shape, num_steps=num_steps, seed=0, device=workers.device)
    config = TrainingConfig()
    sharding = parallelize(draft, config, workers)
    optimizers = build_optimizers(sharding, config)
    half = shape.document_tokens // 2
    documents = [(Turn(half, shape.document_tokens - half),)] * 2
    batch = make_batch(documents, shape, seed=workers.rank, device=workers.device)
    loaded = to_device(draft.prepare(batch), workers.device)

    def step() -> None:
        train_step(draft, optimizers, [loaded], config.max_grad_norm, workers, sharding)

    for _ in range(NUM_WARM_UPS):
        step()
    with Checkpointer(directory, sharding, optimizers, workers) as checkpointer:
        saves = tuple(measured_save(checkpointer, number, step, workers, num_alone) for number in range(num_saves))
        newest = checkpointer.newest()
        assert newest is not None
        size_bytes = sum(path.stat().st_size for path in newest.iterdir())
        load_ms = wall_ms(lambda: checkpointer.load(newest, key=KEY), workers)
    return CheckpointRow(
        shape=name, num_gpus=workers.world_size, size_bytes=size_bytes, saves=saves, load_s=load_ms / MILLISECONDS
    )


def measured_save(
    checkpointer: Checkpointer, number: int, step: Callable[[], object], workers: Workers, num_alone: int
) -> Save:
    """A checkpoint in the middle of training steps."""
    alone_ms = tuple(wall_ms(step, workers) for _ in range(num_alone))
    started_at = time.perf_counter()
    state = TrainingState(key=KEY, step=number, tokens_seen=0)
    held_up_ms = wall_ms(lambda: checkpointer.save(state), workers)
    beside_ms = []
    while _is_writing(checkpointer, workers):
        beside_ms.append(wall_ms(step, workers))
    checkpointer.finish()
    whole_s = time.perf_counter() - started_at
    return Save(alone_ms=alone_ms, held_up_ms=held_up_ms, beside_ms=tuple(beside_ms), whole_s=whole_s)


def wall_ms(call: Callable[[], object], workers: Workers) -> float:
    """Until all processes are done with it."""
    started_at = time.perf_counter()
    call()
    if workers.device.type == "cuda":
        torch.cuda.synchronize()
    workers.wait()
    return MILLISECONDS * (time.perf_counter() - started_at)


def _is_writing(checkpointer: Checkpointer, workers: Workers) -> bool:
    """Whether any process still writes: each takes as many steps."""
    num_writing = torch.tensor(int(checkpointer.is_writing), device=workers.device)
    workers.add_up([num_writing])
    return bool(num_writing)


def markdown(result: CheckpointBench) -> str:
    """The result for people."""
    made_on = result.environment
    lines = [
        f"# What a checkpoint costs, {made_on.gpu or made_on.cpu}",
        "",
        f"Whole training steps on random data, S = {result.num_steps}, {result.dtype}, and checkpoints of float32 "
        "weights and moments beside them. Held up: until the training goes on. Cost: that, and by what steps are "
        "slower until the checkpoint is safe on disk. Medians of the later checkpoints (fastest - slowest); the first "
        "one gets the pinned memory that all of them use.",
        f"{made_on.packages}; commit {made_on.commit}; `{made_on.command}`.",
        "",
        markdown_table([_cells(row) for row in result.rows]),
        "",
    ]
    return "\n".join(lines)


def _cells(row: CheckpointRow) -> dict[str, str]:
    first, *later = row.saves

    def spread(values: list[float]) -> str:
        return f"{median(values):.0f} ({min(values):.0f} - {max(values):.0f})"

    return {
        "shape": row.shape,
        "GPUs": str(row.num_gpus),
        "GiB": f"{row.size_bytes / GIB:.2f}",
        "step, ms": spread([ms for save in later for ms in save.alone_ms]),
        "held up, ms": spread([save.held_up_ms for save in later]),
        "cost, ms": spread([save.cost_ms for save in later]),
        "safe after, s": f"{median(save.whole_s for save in later):.1f}",
        "first: held up, ms": f"{first.held_up_ms:.0f}",
        "load, s": f"{row.load_s:.1f}",
    }


@contextlib.contextmanager
def _common_directory(parent: Path | None, workers: Workers) -> Iterator[Path]:
    """An empty folder that all processes know, until they are done with it."""
    with tempfile.TemporaryDirectory(dir=parent) as own:
        names = [own]
        if workers.world_size > 1:
            dist.broadcast_object_list(names)
        yield Path(names[0])
        workers.wait()


def main() -> int:
    """0."""
    arguments = _parser().parse_args()
    with join_workers(arguments.device) as workers, _common_directory(arguments.directory, workers) as directory:
        logging.basicConfig(
            level=logging.INFO if workers.is_first else logging.WARNING, format="%(asctime)s %(message)s"
        )
        made_on = measured_environment(workers.device, arguments.commit)
        result = CheckpointBench(
            environment=made_on,
            num_steps=arguments.ttt_steps,
            dtype=str(workers.compute_dtype).removeprefix("torch."),
        )
        stem = arguments.name or hardware_stem(made_on) + STEM_SUFFIX
        for shape in arguments.shapes:
            row = measured(shape, directory / shape, workers, num_steps=arguments.ttt_steps, num_saves=arguments.saves)
            if workers.is_first:
                result = result.model_copy(update={"rows": (*result.rows, row)})
                write_result(arguments.out, stem, result, markdown(result))
                logger.info("%s", _cells(row))
            release_memory()
            workers.wait()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m specforge_core.training.bench.checkpoints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-3.1-8b"])
    parser.add_argument(
        "--saves", type=int, choices=range(2, 100), metavar="N", default=NUM_SAVES, help="of each shape"
    )
    parser.add_argument("--directory", type=Path, help="for the checkpoints, on the disk to measure; /tmp when absent")
    parser.add_argument("--ttt-steps", type=int, default=7, help="steps of training-time test")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    add_report_options(parser, Path("reports/training"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
