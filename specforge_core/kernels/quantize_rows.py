"""Rows in float8, each with a scale of its own.

    s = max(|x|) / 448                  over the K columns of a row, and at least the smallest normal float32
    q = float8(x / s)                   e4m3fn, to the nearest, ties to even

Shapes: x, q [R, K], s [R]; any K. Computed in float32; s is float32. No gradient: what is computed with q and s takes
that of x. The reference gives the same bits. A row with a number that is not finite has some in q, too.
Source: Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433.

R rows, K columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from specforge_core.data.float8 import FLOAT8, LARGEST, SMALLEST_SCALE, ScaledFloat8, quantised
from specforge_core.kernels.dispatch import uses_triton

BLOCK = 8192
"""Columns at a time: two accesses of 16 bytes to bfloat16 per thread. Of 32,000 columns, the rows of the programs that
run at once stay in the level-2 cache of Hopper between the two times that they are read."""
VALUES_PER_WARP = 512
_RECIPROCAL = tl.constexpr(1 / LARGEST)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)


def quantize_rows_reference(x_RK: Tensor) -> ScaledFloat8:
    """The rows in float8, in plain PyTorch."""
    return quantised(x_RK)


@torch.no_grad()
def quantize_rows(x_RK: Tensor) -> ScaledFloat8:
    """The rows in float8. Raises: ValueError unless `x` has two dimensions."""
    if x_RK.dim() != 2:
        raise ValueError(f"x is {tuple(x_RK.shape)}; it must have rows and columns")
    if not uses_triton("quantize_rows", x_RK):
        return quantize_rows_reference(x_RK)
    x_RK = x_RK if x_RK.stride(1) == 1 else x_RK.contiguous()
    num_rows, width = x_RK.shape
    values_RK = torch.empty(num_rows, width, dtype=FLOAT8, device=x_RK.device)
    scale_R = torch.empty(num_rows, dtype=torch.float32, device=x_RK.device)
    block = min(BLOCK, triton.next_power_of_2(width))
    _quantize[(num_rows,)](
        x_RK, values_RK, scale_R, x_RK.stride(0),
        WIDTH=width, BLOCK=block, num_warps=max(block // VALUES_PER_WARP, 1),
    )  # fmt: skip
    return ScaledFloat8(values_RK, scale_R)


@triton.jit
def _quantize(x_ptr, values_ptr, scale_ptr, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + lanes
        x = tl.load(x_ptr + row * x_stride + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    scale = tl.maximum(tl.max(largest, axis=0) * _RECIPROCAL, _SMALLEST_SCALE)
    tl.store(scale_ptr + row, scale)
    for start in range(0, WIDTH, BLOCK):
        column = start + lanes
        x = tl.load(x_ptr + row * x_stride + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        values = tl.div_rn(x, scale).to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + row * WIDTH + column, values, mask=column < WIDTH)
