"""The ways to train that are compared. All compute one loss, from the same weights; float8 rounds on the way."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from specforge_core.drafts.base import DraftBatch
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.drafts.eagle3_reference import reference_loss
from specforge_core.kernels import dispatch
from specforge_core.training.bench.batch import to_device
from specforge_core.training.bench.conventional import ConventionalDraft, pad_batch
from specforge_core.training.workers import compute_dtype


class TrainingPath(NamedTuple):
    """Forward and backward pass of one batch."""

    module: nn.Module
    """Weights and gradients."""
    load: Callable[[DraftBatch], Any]
    """The inputs on the device, from a batch on the CPU; a trainer's loader does that ahead of time."""
    step: Callable[[Any], Tensor]
    """Adds to the gradients. Returns: the loss, as a sum."""
    pads: bool = False
    """Whether batches are padded and not packed."""


def ours(draft: Eagle3Draft, device: torch.device) -> TrainingPath:
    """Supervised rows alone, fused kernels."""

    def load(batch: DraftBatch) -> DraftBatch:
        return to_device(draft.prepare(batch), device)

    def step(batch: DraftBatch) -> Tensor:
        return draft.accumulate_gradients(batch).loss_sum

    return TrainingPath(draft, load, step)


def ours_float8(draft: Eagle3Draft, device: torch.device) -> TrainingPath:
    """The same with `training.float8_matmuls`, so that its loss is a little off."""
    draft.float8_matmuls = True
    return ours(draft, device)


def reference(draft: Eagle3Draft, device: torch.device) -> TrainingPath:
    """Supervised rows alone, each kernel replaced by its plain PyTorch reference."""
    fused = ours(draft, device)

    def step(batch: DraftBatch) -> Tensor:
        with dispatch.references():
            return fused.step(batch)

    return fused._replace(step=step)


def all_rows(draft: Eagle3Draft, device: torch.device) -> TrainingPath:
    """The definition: every row of a packed batch through plain PyTorch and autograd."""

    def load(batch: DraftBatch) -> DraftBatch:
        return to_device(batch, device)

    def step(batch: DraftBatch) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss_sum = reference_loss(draft, batch).loss_sum
        loss_sum.backward()
        return loss_sum.detach()

    return TrainingPath(draft, load, step)


def conventional(draft: Eagle3Draft, device: torch.device) -> TrainingPath:
    """All rows, padded, flex attention, whole logits; see `conventional.py`."""
    module = ConventionalDraft(draft, compute_dtype(device))

    def step(batch: Any) -> Tensor:
        loss_sum: Tensor = module(batch)
        loss_sum.backward()
        return loss_sum.detach()

    return TrainingPath(module, lambda batch: pad_batch(batch, module.num_steps, device), step, pads=True)


PATHS: dict[str, Callable[[Eagle3Draft, torch.device], TrainingPath]] = {
    "ours": ours,
    "ours-float8": ours_float8,
    "reference": reference,
    "all-rows": all_rows,
    "conventional": conventional,
}
"""In the order in which they are measured."""
