"""The end of the query, key and value projections: the embedding half is added, heads are rotated.

    z = x + shared[index + shift];  heads (y_c, y_(c + C/2)) = (z_c cos - z_(c + C/2) sin, z_c sin + z_(c + C/2) cos)
    dx = the rotation back of dy;  dshared[index + shift] += dx

A projection of [rms(e), rms(h)] is W_e rms(e) + W_h rms(h). `shared` is the first term, computed once per token
although every step of training-time test reads it, shifted by one more token each; x is the second.
Shapes: x [R, E], its columns the heads of all parts one after the other; each part's output a tensor of its own,
[R, heads, C]. The angle of position p and pair c is given by cos[p, c] and sin[p, c]. Computed in float32; outputs and
dx have the dtype of x, and the gradient of `shared` is added up in float32 without being rounded before.
Source: Su et al., RoFormer, arXiv 2104.09864, with the pairs of `transformers`.

R rows, X rows of a part's embedding half, E columns, C head width, P positions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from specforge_core.kernels.dispatch import uses_triton
from specforge_core.kernels.precision import at_least_float32

# 8 pairs a thread: one access of 16 bytes in bfloat16 to each half of a head.
PAIRS_PER_PROGRAM = 1024
NUM_WARPS = 4


class Part(NamedTuple):
    """A run of heads of a projection, and the embedding half that is added to it."""

    num_heads: int
    num_rotated: int
    """So many of the first heads are rotated; the others, which are values, are only added."""
    shared_XE: Tensor
    """[X, num_heads * C]: the embedding half, computed once per token."""
    shared_grad_XE: Tensor | None
    """float32 (float64 for float64): the gradient is added to it in place; None without gradient."""
    index_R: Tensor
    """Row of `shared_XE` that row r reads, less `shift`; may be longer than R. At most one of the rows that read the
    same one may have a gradient other than zero if sums must not depend on the order of the programs."""
    shift: int


class Angles(NamedTuple):
    """How far each row is rotated: cos and sin [P, C/2] at position_R + shift."""

    position_R: Tensor
    """May be longer than R."""
    shift: int
    cos_PC2: Tensor
    sin_PC2: Tensor


def add_rope_reference(x_RE: Tensor, parts: Sequence[Part], angles: Angles) -> tuple[Tensor, ...]:
    """`add_rope` in plain PyTorch; gradients arrive at `x_RE` and at `shared_XE` in autograd's way."""
    cos_R1C2, sin_R1C2 = _angles_of_rows(angles, x_RE)
    outputs = []
    for part, part_RE in zip(parts, x_RE.split(_widths(parts, angles), dim=1), strict=True):
        z_RE = at_least_float32(part_RE) + part.shared_XE[_rows_read(part, len(x_RE))]
        z_RNC = z_RE.unflatten(1, (part.num_heads, -1))
        outputs.append(_rotate(z_RNC, cos_R1C2, sin_R1C2, part.num_rotated).to(x_RE.dtype))
    return tuple(outputs)


def add_rope(
    x_RE: Tensor, parts: Sequence[Part], position_R: Tensor, position_shift: int, cos_PC2: Tensor, sin_PC2: Tensor
) -> tuple[Tensor, ...]:
    """Per part the heads [R, num_heads, C] of x + shared[index + shift], rotated to position_R + position_shift.

    Where index + shift or the position passes the end of its table, the last row is read: nothing may read such a row's
    result, and its gradient must be zero.
    Args: cos_PC2, sin_PC2: float32, scaled as RoPE's type demands.
    Raises: ValueError if shapes do not fit, or if the gradient of an embedding half could not arrive.
    """
    angles = Angles(position_R, position_shift, cos_PC2, sin_PC2)
    _check(x_RE, parts, angles)
    return _AddRope.apply(x_RE, tuple(parts), angles)


class _AddRope(Function):
    """One function for the kernel and the plain body, because both add to `shared_grad_XE` in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: tuple[Part, ...], angles: Angles) -> tuple[Tensor, ...]:
        ctx.parts, ctx.angles, ctx.uses_triton = parts, angles, uses_triton("add_rope", x)
        if not ctx.uses_triton:
            return add_rope_reference(x, parts, angles)
        x_RE = x if x.stride(1) == 1 else x.contiguous()
        head_width = 2 * angles.cos_PC2.shape[1]
        outputs = tuple(
            torch.empty(len(x), part.num_heads, head_width, dtype=x.dtype, device=x.device) for part in parts
        )
        for part, part_RE, y_RNC in zip(parts, x_RE.split(_widths(parts, angles), dim=1), outputs, strict=True):
            _launch(part, angles, part_RE, y_RNC.flatten(1), backward=False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        widths = _widths(ctx.parts, ctx.angles)
        dx_RE = torch.empty(len(grads[0]), sum(widths), dtype=grads[0].dtype, device=grads[0].device)
        for part, part_RE, dy_RNC in zip(ctx.parts, dx_RE.split(widths, dim=1), grads, strict=True):
            if ctx.uses_triton:
                _launch(part, ctx.angles, dy_RNC.contiguous().flatten(1), part_RE, backward=True)
            else:
                _backward_reference(part, ctx.angles, dy_RNC, part_RE)
        return dx_RE, None, None


def _backward_reference(part: Part, angles: Angles, dy_RNC: Tensor, dx_RE: Tensor) -> None:
    cos_R1C2, sin_R1C2 = _angles_of_rows(angles, dy_RNC)
    wide_RNC = _rotate(at_least_float32(dy_RNC), cos_R1C2, -sin_R1C2, part.num_rotated)
    dx_RE.copy_(wide_RNC.flatten(1))
    if part.shared_grad_XE is not None:
        part.shared_grad_XE.index_add_(0, _rows_read(part, len(dy_RNC)), wide_RNC.flatten(1))


def _launch(part: Part, angles: Angles, source_RE: Tensor, target_RE: Tensor, *, backward: bool) -> None:
    """Run the kernel on one part, from x to y or from dy to dx."""
    half_width = angles.cos_PC2.shape[1]
    half_block = triton.next_power_of_2(half_width)
    heads_block = min(triton.next_power_of_2(part.num_heads), max(PAIRS_PER_PROGRAM // half_block, 1))
    shared = part.shared_grad_XE if backward else part.shared_XE
    _add_rope[(len(source_RE) * triton.cdiv(part.num_heads, heads_block),)](
        source_RE, target_RE, shared, part.index_R, angles.position_R, angles.cos_PC2, angles.sin_PC2,
        source_RE.stride(0), target_RE.stride(0), 0 if shared is None else shared.stride(0), angles.cos_PC2.stride(0),
        part.shift, len(part.shared_XE) - 1, angles.shift, len(angles.cos_PC2) - 1,
        NUM_HEADS=part.num_heads, NUM_ROTATED=part.num_rotated, HALF_WIDTH=half_width,
        BLOCK_HEADS=heads_block, BLOCK_HALF=half_block, BACKWARD=backward, num_warps=NUM_WARPS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["shift", "last_shared", "position_shift", "last_position"])
def _add_rope(
    source_ptr, target_ptr, shared_ptr, index_ptr, position_ptr, cos_ptr, sin_ptr,
    source_stride, target_stride, shared_stride, angle_stride,
    shift, last_shared, position_shift, last_position,
    NUM_HEADS: tl.constexpr, NUM_ROTATED: tl.constexpr, HALF_WIDTH: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tl.cdiv(NUM_HEADS, BLOCK_HEADS)).to(tl.int64)
    first_head = tl.program_id(0) % tl.cdiv(NUM_HEADS, BLOCK_HEADS) * BLOCK_HEADS
    head = first_head + tl.arange(0, BLOCK_HEADS)[:, None]
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < NUM_HEADS) & (pair < HALF_WIDTH)
    column = head * 2 * HALF_WIDTH + pair
    source_ptrs = source_ptr + row * source_stride + column
    first = tl.load(source_ptrs, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source_ptrs + HALF_WIDTH, mask=inside, other=0.0).to(tl.float32)
    if shared_ptr is not None:
        shared_row = tl.minimum(tl.load(index_ptr + row) + shift, last_shared).to(tl.int64)
        shared_ptrs = shared_ptr + shared_row * shared_stride + column
        if not BACKWARD:
            first += tl.load(shared_ptrs, mask=inside, other=0.0).to(tl.float32)
            second += tl.load(shared_ptrs + HALF_WIDTH, mask=inside, other=0.0).to(tl.float32)
    position = tl.minimum(tl.load(position_ptr + row) + position_shift, last_position).to(tl.int64)
    angle = position * angle_stride + pair
    cos = tl.load(cos_ptr + angle, mask=pair < HALF_WIDTH, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=pair < HALF_WIDTH, other=0.0)
    if BACKWARD:
        sin = -sin
    rotated = head < NUM_ROTATED
    target_first = tl.where(rotated, first * cos - second * sin, first)
    target_second = tl.where(rotated, first * sin + second * cos, second)
    dtype = target_ptr.dtype.element_ty
    target_ptrs = target_ptr + row * target_stride + column
    tl.store(target_ptrs, target_first.to(dtype), mask=inside)
    tl.store(target_ptrs + HALF_WIDTH, target_second.to(dtype), mask=inside)
    if BACKWARD and shared_ptr is not None:
        # A padding row adds zero to a row that another program adds to at the same time, so the sum is atomic.
        tl.atomic_add(shared_ptrs, target_first, mask=inside, sem="relaxed")
        tl.atomic_add(shared_ptrs + HALF_WIDTH, target_second, mask=inside, sem="relaxed")


def _rotate(x_RNC: Tensor, cos_R1C2: Tensor, sin_R1C2: Tensor, num_rotated: int) -> Tensor:
    first, second = x_RNC[:, :num_rotated].chunk(2, dim=-1)
    rotated = (first * cos_R1C2 - second * sin_R1C2, first * sin_R1C2 + second * cos_R1C2)
    return torch.cat((torch.cat(rotated, dim=-1), x_RNC[:, num_rotated:]), dim=1)


def _angles_of_rows(angles: Angles, x: Tensor) -> tuple[Tensor, Tensor]:
    position_R = (angles.position_R[: len(x)] + angles.shift).clamp(max=len(angles.cos_PC2) - 1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return angles.cos_PC2[position_R].unsqueeze(1).to(dtype), angles.sin_PC2[position_R].unsqueeze(1).to(dtype)


def _rows_read(part: Part, num_rows: int) -> Tensor:
    return (part.index_R[:num_rows] + part.shift).clamp(max=len(part.shared_XE) - 1)


def _widths(parts: Sequence[Part], angles: Angles) -> list[int]:
    return [part.num_heads * 2 * angles.cos_PC2.shape[1] for part in parts]


def _check(x_RE: Tensor, parts: Sequence[Part], angles: Angles) -> None:
    widths = _widths(parts, angles)
    if x_RE.dim() != 2 or x_RE.shape[1] != sum(widths):
        raise ValueError(f"x is {tuple(x_RE.shape)} but the parts have {sum(widths)} columns; they must agree")
    if len(angles.position_R) < len(x_RE) or angles.cos_PC2.stride() != angles.sin_PC2.stride():
        raise ValueError(
            f"{len(x_RE)} rows with {len(angles.position_R)} positions, cos {angles.cos_PC2.stride()} and sin "
            f"{angles.sin_PC2.stride()} apart: each row needs a position, and the tables the same strides"
        )
    for part, width in zip(parts, widths, strict=True):
        if part.shared_XE.shape[1] != width or len(part.index_R) < len(x_RE) or part.num_rotated > part.num_heads:
            raise ValueError(
                f"a part of {part.num_heads} heads ({part.num_rotated} rotated, {width} columns) has an embedding half "
                f"{tuple(part.shared_XE.shape)} and {len(part.index_R)} indices for {len(x_RE)} rows"
            )
        if part.shared_grad_XE is not None and torch.is_grad_enabled() and not x_RE.requires_grad:
            raise ValueError("x requires no gradient, so the embedding half's would be lost; pass shared_grad_XE=None")
