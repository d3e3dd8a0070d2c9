"""The whole training step as a training run takes it: features from disk, forward and backward pass, AdamW."""

import os
import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from specforge_core.data.loader import FeatureSet
from specforge_core.data.shards import Document, FeatureIndex, FeatureWriter, load_index
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.manifest import TrainingConfig
from specforge_core.targets import TargetFeatures
from specforge_core.training.bench.batch import CAPTURE_LAYERS, make_batch
from specforge_core.training.bench.lengths import Conversation
from specforge_core.training.bench.measure import timed_ms
from specforge_core.training.bench.shapes import Shape
from specforge_core.training.optim import build_optimizers
from specforge_core.training.step import train_step
from specforge_core.training.train import prepared_batches
from specforge_core.training.workers import Workers

SEED = 0


class StepTimes(NamedTuple):
    """Milliseconds by step; see `results.StepRow`."""

    num_tokens: int
    stored_bytes: int
    forward_backward_ms: tuple[float, ...]
    step_ms: tuple[float, ...]
    cold_step_ms: tuple[float, ...]


def measure_from_disk(
    draft: Eagle3Draft, shape: Shape, conversations: Sequence[Conversation], *, budget: int, num_warm_ups: int
) -> StepTimes:
    """The times of one pass over random features of these conversations, one micro-batch a step.

    Weights change. Args: num_warm_ups: steps at the start of the pass that are not timed.
    """
    device = draft.fc.weight.device
    workers = Workers(0, 1, device)
    optimizers = build_optimizers(draft, config := TrainingConfig())
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_features(directory, shape, conversations, device)
        drop_cached_pages(directory)
        features = FeatureSet(directory)
        plan = features.plan(range(len(conversations)), budget, seed=SEED, epoch=0)

        def timed_pass() -> tuple[float, ...]:
            batches = prepared_batches(draft, features, plan, workers)

            def step() -> None:
                train_step(draft, optimizers, islice(batches, 1), config.max_grad_norm, workers)

            return _behind_warm_ups(step, num_warm_ups, len(plan), device)

        cold_step_ms = timed_pass()
        step_ms = timed_pass()
        loaded = iter(list(prepared_batches(draft, features, plan, workers)))
        forward_backward_ms = _behind_warm_ups(
            lambda: draft.accumulate_gradients(next(loaded)), num_warm_ups, len(plan), device
        )
        num_stored_tokens = sum(features.lengths)
        num_tokens = sum(features.lengths[document] for batch in plan[num_warm_ups:] for document in batch)
        stored_bytes = sum(shard.size_bytes for shard in load_index(directory).shards)
    draft.zero_grad()
    return StepTimes(
        num_tokens, stored_bytes * num_tokens // num_stored_tokens, forward_backward_ms, step_ms, cold_step_ms
    )


def write_features(directory: Path, shape: Shape, conversations: Sequence[Conversation], device: torch.device) -> None:
    """Random features of these conversations, as `capture` would store them."""
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    writer = FeatureWriter(directory, FeatureIndex(layers=CAPTURE_LAYERS, hidden_size=shape.width, dtype=dtype))
    batches = (make_batch([c], shape, seed=number, device=device) for number, c in enumerate(conversations))
    documents, features = [], []
    for number, batch in enumerate(batches):
        documents.append(Document(f"document-{number}", batch.input_ids_T, batch.loss_mask_T))
        features.append(
            TargetFeatures(
                batch.aux_hidden_TLD, batch.last_hidden_UD, batch.target_argmax_U.int(), batch.target_logsumexp_U
            )
        )
    writer.write(documents, features)


def drop_cached_pages(directory: Path) -> None:
    """Have the next reads of the folder's files come from the disk; they must have been written out."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _behind_warm_ups(
    step: Callable[[], object], num_warm_ups: int, num_steps: int, device: torch.device
) -> tuple[float, ...]:
    """Milliseconds of the steps after the first ones, with nothing between these and those."""
    return timed_ms(step, num_steps, is_cuda=device.type == "cuda")[num_warm_ups:]
