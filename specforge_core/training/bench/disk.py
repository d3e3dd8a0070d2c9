"""The whole training step as a training run takes it: features from disk, forward and backward pass, AdamW."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch

from specforge_core.data.loader import FeatureSet, plan_steps
from specforge_core.data.shards import Document, FeatureIndex, FeatureWriter, load_index
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.manifest_sections import FeatureDtype, TrainingConfig
from specforge_core.targets import TargetFeatures
from specforge_core.training.bench.batch import CAPTURE_LAYERS, make_batch
from specforge_core.training.bench.lengths import Conversation
from specforge_core.training.bench.measure import timed_ms
from specforge_core.training.bench.results import Mix, StepRow
from specforge_core.training.bench.shapes import SHAPES, Shape
from specforge_core.training.optim import build_optimizers
from specforge_core.training.step import train_step
from specforge_core.training.train import prepared_batches
from specforge_core.training.workers import Workers

SEED = 0


def measure_from_disk(
    draft: Eagle3Draft,
    mix: Mix,
    conversations: Sequence[Conversation],
    *,
    budget: int,
    micro_batches: Sequence[int],
    num_warm_ups: int,
) -> Iterator[StepRow]:
    """The times of passes over random features of these conversations, for each number of micro-batches a step.

    Weights change. Args: mix: what the conversations are; num_warm_ups: micro-batches at the start of a pass that are
    not timed, rounded up to steps.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        device = draft.fc.weight.device
        dtype: FeatureDtype = "bfloat16" if device.type == "cuda" else "float32"
        write_features(directory, SHAPES[mix.shape], conversations, device=device, dtype=dtype)
        plan = FeatureSet(directory).plan(range(len(conversations)), budget, seed=SEED, epoch=0)
        for per_step in micro_batches:
            whole_steps = plan_steps(plan, per_step)[: len(plan) // per_step]
            yield measure_steps(draft, mix, directory, whole_steps, first_timed=-(-num_warm_ups // per_step))
    draft.zero_grad()


def measure_steps(
    draft: Eagle3Draft, mix: Mix, directory: Path, steps: Sequence[Sequence[list[int]]], *, first_timed: int
) -> StepRow:
    """The times of these steps, each a list of equally many micro-batches of documents."""
    workers = Workers(0, 1, draft.fc.weight.device)
    optimizers = build_optimizers(draft, config := TrainingConfig())
    features = FeatureSet(directory)
    per_step, all_batches = len(steps[0]), [batch for step in steps for batch in step]

    def timed(step: Callable[[], object]) -> tuple[float, ...]:
        return timed_ms(step, len(steps), is_cuda=workers.device.type == "cuda")[first_timed:]

    def timed_pass() -> tuple[float, ...]:
        batches = prepared_batches(draft, features, all_batches, workers)
        return timed(lambda: train_step(draft, optimizers, islice(batches, per_step), config.max_grad_norm, workers))

    drop_cached_pages(directory)
    cold_step_ms = timed_pass()
    step_ms = timed_pass()
    loaded = iter(list(prepared_batches(draft, features, all_batches, workers)))
    forward_backward_ms = timed(lambda: [draft.accumulate_gradients(batch) for batch in islice(loaded, per_step)])
    num_tokens = sum(features.lengths[document] for step in steps[first_timed:] for batch in step for document in batch)
    stored_bytes = sum(shard.size_bytes for shard in load_index(directory).shards)
    return StepRow(
        **dict(mix),
        micro_batches=per_step,
        num_tokens=num_tokens,
        stored_bytes=stored_bytes * num_tokens // sum(features.lengths),
        forward_backward_ms=forward_backward_ms,
        step_ms=step_ms,
        cold_step_ms=cold_step_ms,
    )


def write_features(
    directory: Path, shape: Shape, conversations: Sequence[Conversation], *, device: torch.device, dtype: FeatureDtype
) -> None:
    """Random features of these conversations, as `capture` would store them."""
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
