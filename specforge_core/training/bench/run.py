"""One row after the other, each on fresh memory, and none that ends the run: what fails is recorded as such."""

import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.profiler import record_function

from specforge_core.drafts.base import DraftBatch
from specforge_core.manifest_sections import TrainingConfig
from specforge_core.training.bench.batch import count_rows, make_batch, make_draft
from specforge_core.training.bench.disk import measure_from_disk
from specforge_core.training.bench.lengths import Lengths, draw_conversations
from specforge_core.training.bench.measure import Card, measure, release_memory, size_bytes
from specforge_core.training.bench.parts import profiled_parts
from specforge_core.training.bench.paths import PATHS, TrainingPath
from specforge_core.training.bench.results import MILLISECONDS, Mix, Row, StepRow
from specforge_core.training.bench.shapes import SHAPES, dense_flops, useful_flops
from specforge_core.training.bench.workload import make_workload
from specforge_core.training.optim import build_optimizers, take_step
from specforge_core.training.workers import compute_dtype

logger = logging.getLogger(__name__)

MEASURED, OUT_OF_MEMORY = "measured", "out of memory"
SMALLEST_PART = 8
"""A path that runs out of memory is tried again on half of the tokens, down to one of so many parts."""
BATCHES_FROM_DISK = 24
MICRO_BATCHES = (1, 8)
"""Of a step from disk: the least, and the 65,536 tokens that the manifest's entries take by default."""


class Settings(NamedTuple):
    """What to measure."""

    shapes: tuple[str, ...]
    shares: tuple[float, ...]
    lengths: tuple[Lengths, ...]
    paths: tuple[str, ...]
    num_tokens: int
    """Of a batch, at most."""
    num_steps: int
    """Of training-time test, S."""
    num_warm_ups: int
    num_repeats: int
    seed: int
    device: torch.device


def measured_rows(settings: Settings, card: Card) -> Iterator[Row]:
    """All rows, as they are measured: shape by shape, path by path."""
    for shape in settings.shapes:
        mixes = list(_mixes(shape, settings))
        for name in settings.paths:
            draft = make_draft(SHAPES[shape], num_steps=settings.num_steps, seed=settings.seed, device=settings.device)
            path = PATHS[name](draft, settings.device)
            # A path with weights of its own must not be charged for the draft's.
            del draft
            release_memory()
            for mix in mixes:
                for row in _rows_until_one_fits(path, name, mix, settings, card):
                    logger.info("%s %s %.0f %%, %s: %s", row.shape, row.lengths, 100 * row.share, name, _in_short(row))
                    yield row
            del path
            release_memory()


def measured_step_rows(settings: Settings) -> Iterator[StepRow]:
    """The whole training step from disk, of each mix."""
    for name in settings.shapes:
        draft = make_draft(SHAPES[name], num_steps=settings.num_steps, seed=settings.seed, device=settings.device)
        for mix in _mixes(name, settings):
            conversations = draw_conversations(
                mix.lengths,
                mix.share,
                num_tokens=(settings.num_warm_ups + BATCHES_FROM_DISK) * settings.num_tokens,
                max_tokens=settings.num_tokens,
                document_tokens=SHAPES[name].document_tokens,
                seed=settings.seed,
            )
            for row in measure_from_disk(
                draft,
                mix,
                conversations,
                budget=settings.num_tokens,
                micro_batches=MICRO_BATCHES,
                num_warm_ups=settings.num_warm_ups,
            ):
                logger.info(
                    "%s %s %.0f %%, from disk, %d micro-batches a step: %.1f %%",
                    row.shape, row.lengths, 100 * row.share, row.micro_batches, 100 * row.efficiency,
                )  # fmt: skip
                yield row
        del draft
        release_memory()


def _mixes(shape: str, settings: Settings) -> Iterator[Mix]:
    """Those that can be drawn."""
    for lengths in settings.lengths:
        for share in settings.shares:
            try:
                make_workload(lengths, share, budget=settings.num_tokens, document_tokens=1, seed=settings.seed)
            except ValueError as error:
                logger.warning("left out: %s", error)
            else:
                yield Mix(shape=shape, lengths=lengths, share=share)


def _rows_until_one_fits(path: TrainingPath, path_name: str, mix: Mix, settings: Settings, card: Card) -> Iterator[Row]:
    shape, budget = SHAPES[mix.shape], settings.num_tokens
    while True:
        workload = make_workload(
            mix.lengths, mix.share, budget=budget, document_tokens=shape.document_tokens, seed=settings.seed
        )
        conversations = workload.padded if path.pads else workload.packed
        batch = make_batch(conversations, shape, seed=settings.seed, device=settings.device)
        row = _measured(_unmeasured(batch, path, path_name, mix, settings, card), path, batch, settings)
        yield row
        budget //= 2
        if row.status != OUT_OF_MEMORY or budget < settings.num_tokens // SMALLEST_PART:
            return


def _unmeasured(batch: DraftBatch, path: TrainingPath, path_name: str, mix: Mix, settings: Settings, card: Card) -> Row:
    """What is known of a row before it runs."""
    shape = SHAPES[mix.shape]
    counts = count_rows(batch, settings.num_steps)
    num_parameters = sum(parameter.numel() for parameter in path.module.parameters())
    # Read in both passes, and a float32 gradient read and written once; activations could stay on the chip.
    moved_bytes = size_bytes(batch) + num_parameters * (2 * compute_dtype(settings.device).itemsize + 2 * 4)
    useful = useful_flops(shape, counts)
    return Row(
        **dict(mix),
        path=path_name,
        status=MEASURED,
        num_documents=int(batch.document_ids_T[-1]) + 1,
        num_tokens=counts.num_tokens,
        num_supervised=counts.rows_S[0],
        dense_flops=dense_flops(shape, counts.num_tokens, settings.num_steps),
        useful_flops=useful,
        roofline_ms=MILLISECONDS * max(useful / card.matmul_flops, moved_bytes / card.copy_bytes_per_s),
    )


def _measured(row: Row, path: TrainingPath, batch: DraftBatch, settings: Settings) -> Row:
    """The row with its times, or with why there are none."""
    parts_ms: dict[str, float] = {}
    try:
        timing = measure(path, batch, num_warm_ups=settings.num_warm_ups, num_repeats=settings.num_repeats)
        row = row.model_copy(update=timing._asdict() | {"master_bytes": _master_bytes(path, settings.device)})
        if settings.device.type == "cuda":
            parts_ms = _parts(path, batch, has_optimizer=row.path == "ours")
    except torch.OutOfMemoryError:
        # The parts take the memory of an optimizer on top; times that are there stay.
        row = row if row.is_measured else row.model_copy(update={"status": OUT_OF_MEMORY})
    except Exception as error:
        # A compiler that fails on one path says nothing about the others.
        logger.exception("%s failed", row.path)
        row = row.model_copy(update={"status": f"failed: {type(error).__name__}"})
    path.module.zero_grad()
    release_memory()
    return row.model_copy(update={"parts_ms": parts_ms})


def _parts(path: TrainingPath, batch: DraftBatch, *, has_optimizer: bool) -> dict[str, float]:
    """GPU milliseconds by part; with the optimizer, the weights change."""
    inputs = path.load(batch)
    optimizers = build_optimizers(path.module, TrainingConfig()) if has_optimizer else []
    divisor = torch.ones((), device=next(path.module.parameters()).device)

    def step() -> None:
        path.step(inputs)
        if optimizers:
            with record_function("optimizer"):
                take_step(optimizers, divisor)

    # The first step of an optimizer makes its state.
    step()
    return profiled_parts(step)


def _master_bytes(path: TrainingPath, device: torch.device) -> int:
    """float32 weights of a path that computes in less."""
    is_wider = next(path.module.parameters()).dtype.itemsize > compute_dtype(device).itemsize
    return size_bytes(list(path.module.parameters())) if is_wider else 0


def _in_short(row: Row) -> str:
    return f"{row.tokens_per_s:,.0f} tokens/s" if row.is_measured else row.status
