"""Stored batches on their way to the device: each is copied while the one before it computes."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from specforge_core.data.loader import StoredBatch, dequantised
from specforge_core.drafts.base import DraftBatch


def device_batches(stored: Iterator[StoredBatch], device: torch.device) -> Iterator[DraftBatch]:
    """The batches in their order, on the device.

    On a GPU at most two lie there at once, the one that computes and the next. Tensors in pinned memory are copied
    beside the computation; others make it wait.
    """
    if device.type == "cuda":
        stored = _copied(stored, device)
    return map(dequantised, stored)


def _copied(stored: Iterator[StoredBatch], device: torch.device) -> Iterator[StoredBatch]:
    copying = torch.cuda.Stream(device)
    end_of_last: torch.cuda.Event | None = None
    for batch in stored:
        copied = _copy(batch, device, copying)
        yield copied
        # Whatever the consumer does with the batch is queued by now.
        del copied
        end_of_this = torch.cuda.current_stream(device).record_event()
        if end_of_last is not None:
            # The next copy takes the place of the batch before this one. The GPU has this one to work on meanwhile; a
            # host that did not wait would fill the memory with batches far ahead of the computation.
            end_of_last.synchronize()
        end_of_last = end_of_this


def _copy(batch: StoredBatch, device: torch.device, copying: torch.cuda.Stream) -> StoredBatch:
    """The batch on the device, for use in the current stream, which goes on when stream `copying` has brought it."""
    computing = torch.cuda.current_stream(device)
    with torch.cuda.stream(copying):
        copied: StoredBatch = tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)
    computing.wait_stream(copying)
    # The allocator knows only of the stream that it gave the memory to.
    tree_map_only(Tensor, lambda tensor: tensor.record_stream(computing), copied)
    return copied
