"""Batches on their way to a device: in order, whole, and few at a time."""

from itertools import islice

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from specforge_core.data.loader import StoredBatch
from specforge_core.drafts.base import DraftBatch
from specforge_core.training.prefetch import device_batches
from tests.training.factory import make_batch

DOCUMENTS = [(100, 400), (20, 280)]


def stored_batches(count: int, *, width: int) -> list[StoredBatch]:
    return [StoredBatch(make_batch(DOCUMENTS, seed=seed, width=width), None, None) for seed in range(count)]


def pinned(stored: StoredBatch) -> StoredBatch:
    return tree_map_only(Tensor, Tensor.pin_memory, stored)


def test_a_cpu_takes_the_batches_as_they_are():
    stored = stored_batches(3, width=8)
    batches = list(device_batches(iter(stored), torch.device("cpu")))
    assert all(batch is given.batch for batch, given in zip(batches, stored, strict=True))


def num_bytes(batch: DraftBatch) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))


@pytest.mark.gpu
def test_copies_meet_the_computation_in_order_and_two_at_a_time():
    stored = stored_batches(4, width=8192)
    # Through one piece of pinned memory each, four times over, with the GPU always behind the host.
    pinned_batches = [pinned(batch) for batch in stored]
    torch.cuda.synchronize()
    matrix, product = torch.randn(2, 4096, 4096, device="cuda")
    bytes_before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sums = []
    for batch in device_batches(iter(pinned_batches * 4), torch.device("cuda")):
        for _ in range(5):
            torch.mm(matrix, matrix, out=product)
        sums.append([x.sum() for x in batch if isinstance(x, Tensor)])
    bytes_at_peak = torch.cuda.max_memory_allocated() - bytes_before
    assert bytes_at_peak < 2.5 * num_bytes(stored[0].batch)

    expected = [[x.sum().item() for x in given.batch if isinstance(x, Tensor)] for given in stored]
    assert len({tuple(row) for row in expected}) == 4
    for row, expected_row in zip(sums, expected * 4, strict=True):
        # Sums of millions of numbers in float32: those of two batches are thousands apart.
        assert [x.item() for x in row] == pytest.approx(expected_row, rel=1e-4, abs=1)


@pytest.mark.gpu
def test_a_batch_is_whole_although_the_computation_is_far_behind():
    given = stored_batches(6, width=256)
    matrix, product = torch.randn(2, 4096, 4096, device="cuda")
    batches = []
    for batch in islice(device_batches(iter([pinned(batch) for batch in given]), torch.device("cuda")), 6):
        for _ in range(5):
            torch.mm(matrix, matrix, out=product)
        batches.append(DraftBatch(*(x.clone() if isinstance(x, Tensor) else x for x in batch)))
    for batch, stored in zip(batches, given, strict=True):
        for name, ours, theirs in zip(DraftBatch._fields, batch, stored.batch, strict=True):
            assert ours is theirs is None or torch.equal(ours.cpu(), theirs), name
