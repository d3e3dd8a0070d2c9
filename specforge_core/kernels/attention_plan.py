"""Which blocks of keys a tile of query rows meets, and which tiles a block of keys, found on the CPU ahead of time.

Rows that a pass sorts by depth come in a few runs of ascending tokens, so what a tile meets are a few contiguous ranges
of blocks: kernels loop over ranges, and skip everything else. Ranges that all rows of a tile see in full need no mask.

R rows of a pass, T tokens of the packed batch.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TILE = 128
"""Query rows that the plan treats as one; kernels use tiles that divide it."""
BLOCK = 128
"""Keys that the plan treats as one; kernels use blocks that divide it."""


class AttentionPlan(NamedTuple):
    """The same facts from both sides, int32. Ranges of tile i that need no mask are offsets[2i] to offsets[2i+1] - 1,
    those that need one offsets[2i+1] to offsets[2i+2] - 1; a range is its first block and the one behind its last."""

    tile_order: Tensor
    """[R / TILE], tiles of query rows, those that meet most blocks first: the device ends without stragglers."""
    tile_offsets: Tensor
    """[2 R / TILE + 1]."""
    tile_ranges: Tensor
    """[ranges and some unused, 2], ranges of blocks."""
    block_order: Tensor
    """[T / BLOCK], blocks of keys, those that meet most tiles first."""
    block_offsets: Tensor
    """[2 T / BLOCK + 1]."""
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
    kinds = np.stack((is_full, (num_meeting > 0) & ~is_full), axis=1)
    return AttentionPlan(
        *_half_plan(kinds), *_half_plan(kinds.transpose(2, 1, 0)), start=_as_int32(start), slot=_as_int32(slot)
    )


def _count_rows(first: npt.NDArray[np.int64], end: npt.NDArray[np.int64], num_blocks: int) -> npt.NDArray[np.int64]:
    """[tiles, blocks]: how many rows of a tile have the block between their `first` and their `end` - 1."""
    width = num_blocks + 1
    row_begins = np.arange(len(first)) // TILE * width
    size = len(first) // TILE * width
    begins = np.bincount(row_begins + first, minlength=size)
    # A row that sees no block in full has its end before its first.
    ends = np.bincount(row_begins + np.maximum(first, end), minlength=size)
    return (begins - ends).reshape(-1, width).cumsum(axis=1)[:, :-1]


def _half_plan(kinds: npt.NDArray[np.bool_]) -> tuple[Tensor, Tensor, Tensor]:
    """Order, offsets and ranges from a table [rows, full or masked, columns] of what meets."""
    order = np.argsort(-kinds.sum(axis=(1, 2)), kind="stable")
    lines = kinds.reshape(2 * len(kinds), kinds.shape[2])
    edges = np.diff(lines.astype(np.int8), axis=1, prepend=0, append=0)
    line, first = np.nonzero(edges == 1)
    _, end = np.nonzero(edges == -1)
    offsets = np.concatenate(([0], np.bincount(line, minlength=len(lines)).cumsum()))
    # A full and two masked ranges are the rule; room for more keeps the shape from batch to batch.
    capacity = 4 * max(1, len(kinds))
    while capacity < len(first):
        capacity *= 2
    ranges = np.zeros((capacity, 2))
    ranges[: len(first)] = np.stack((first, end), axis=1)
    return _as_int32(order), _as_int32(offsets), _as_int32(ranges)


def _as_int32(x: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(x.astype(np.int32))
