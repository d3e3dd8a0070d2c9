"""Which blocks of keys a tile of query rows meets, and which tiles a block of keys, found on the CPU ahead of time.

Rows that a pass sorts by depth come in a few runs of ascending tokens, so what a tile meets are a few contiguous ranges
of blocks: kernels loop over ranges, and skip everything else.

R rows of a pass, T tokens of the packed batch.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TILE = 128
"""Query rows that the plan treats as one; kernels use tiles that divide it."""
BLOCK = 128
"""Keys that the plan treats as one; kernels use blocks that divide it."""


class AttentionPlan(NamedTuple):
    """What meets, seen from both sides, int32. A range is its first tile or block and the one behind its last."""

    tile_order: Tensor
    """[R / TILE], tiles of query rows, those that meet most blocks first: the device ends without stragglers."""
    tile_offsets: Tensor
    """[R / TILE + 1]: tile i meets ranges offsets[i] to offsets[i + 1] - 1."""
    tile_ranges: Tensor
    """[ranges and some unused, 2], ranges of blocks."""
    block_order: Tensor
    """[T / BLOCK], blocks of keys, those that meet most tiles first."""
    block_offsets: Tensor
    """[2 T / BLOCK + 1]: all rows of the tiles in ranges offsets[2i] to offsets[2i + 1] - 1 see all of block i, and
    some rows of those in ranges offsets[2i + 1] to offsets[2i + 2] - 1 see some of it."""
    block_ranges: Tensor
    """[ranges and some unused, 2], ranges of tiles."""
    start: Tensor
    """[R rounded up to tiles], first token whose step-0 key a row reads; the last row fills its tile up."""
    slot: Tensor
    """[R rounded up to tiles], last such token."""


def plan_attention(start_R: Tensor, slot_R: Tensor, num_tokens: int) -> AttentionPlan:
    """The plan of a pass whose row r reads the step-0 keys of tokens start_r to slot_r, from tensors on the CPU.

    It serves every prefix of the rows too. Shapes depend on R and T alone, unless the ranges are unusually many.
    """
    start, slot = start_R.numpy().astype(np.int64), slot_R.numpy().astype(np.int64)
    assert start.shape == slot.shape
    assert np.all((start >= 0) & (start <= slot) & (slot < num_tokens))
    num_tiles, num_blocks = -(-len(start) // TILE), -(-num_tokens // BLOCK)
    # The last tile is filled up with its last row, which changes nothing about what it meets.
    filling = (0, num_tiles * TILE - len(start))
    start, slot = np.pad(start, filling, mode="edge"), np.pad(slot, filling, mode="edge")
    num_meeting = _count_rows(start // BLOCK, slot // BLOCK + 1, num_blocks)
    num_in_full = _count_rows(-(-start // BLOCK), (slot + 1) // BLOCK, num_blocks)
    is_full = num_in_full == TILE
    meets = num_meeting > 0
    tile_offsets, tile_ranges = _ranges(meets)
    block_offsets, block_ranges = _ranges(
        np.stack((is_full.T, (meets & ~is_full).T), axis=1).reshape(2 * num_blocks, num_tiles)
    )
    parts = (
        *(_most_first(meets), tile_offsets, tile_ranges),
        *(_most_first(meets.T), block_offsets, block_ranges),
        *(start, slot),
    )
    return AttentionPlan(*(torch.from_numpy(part.astype(np.int32)) for part in parts))


def _count_rows(first: npt.NDArray[np.int64], end: npt.NDArray[np.int64], num_blocks: int) -> npt.NDArray[np.int64]:
    """[tiles, blocks]: how many rows of a tile have the block between their `first` and their `end` - 1."""
    width = num_blocks + 1
    row_begins = np.arange(len(first)) // TILE * width
    size = len(first) // TILE * width
    begins = np.bincount(row_begins + first, minlength=size)
    # A row that sees no block in full has its end before its first.
    ends = np.bincount(row_begins + np.maximum(first, end), minlength=size)
    return (begins - ends).reshape(-1, width).cumsum(axis=1)[:, :-1]


def _most_first(meets: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The lines of the table, those that meet most first."""
    return np.argsort(-meets.sum(axis=1), kind="stable")


def _ranges(lines: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Offsets and ranges of the columns that are set in each line."""
    edges = np.diff(lines.astype(np.int8), axis=1, prepend=0, append=0)
    line, first = np.nonzero(edges == 1)
    _, end = np.nonzero(edges == -1)
    offsets = np.concatenate(([0], np.bincount(line, minlength=len(lines)).cumsum()))
    # One range or two are the rule; room for more keeps the shape from batch to batch.
    capacity = 4 * max(1, len(lines))
    while capacity < len(first):
        capacity *= 2
    ranges = np.zeros((capacity, 2), dtype=np.int64)
    ranges[: len(first)] = np.stack((first, end), axis=1)
    return offsets, ranges
