"""Root mean square norm, alone, as the start of a residual branch, or between two of them.

    y = x r w,  r = 1 / sqrt(mean(x^2) + eps)                       mean over the D columns of a row
    dx = r (g - x r mean(g x r)) + dresidual,  g = dy w             dw = sum over rows of dy x r

Between two branches x is the sum of what came out of the last one and of what went in, rounded to their dtype.

Shapes: x, y [..., D], w [D]; any D up to MAX_WIDTH. Everything is computed in float32; y and dx have the dtype of x, dw
that of w. Backward reads x and r [R] again, nothing else is saved. dw is added up in float32 by each program over its
rows, then over the programs, always in the same order.
Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.

R rows, D width, G programs.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from specforge_core.kernels.dispatch import num_programs, uses_triton
from specforge_core.kernels.precision import at_least_float32

# One program holds a row in registers: wider ones would spill.
MAX_WIDTH = 32768
# A program of 256 threads takes about 80 registers a thread, so this many share one multiprocessor.
BACKWARD_PROGRAMS_PER_PROCESSOR = 3
# What the forward pass takes for 16 values a thread. Where columns are masked the compiler would take 48, and of 512
# threads a multiprocessor would have room for two programs instead of three.
FORWARD_REGISTERS = 40


class Normed(NamedTuple):
    """The start of a residual branch."""

    normed: Tensor
    residual: Tensor
    """What was normed: the gradient of what is added to it later joins that of the norm in one kernel."""


def rms_norm_reference(x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in plain PyTorch."""
    wide_RD = at_least_float32(x_RD)
    return F.rms_norm(wide_RD, weight_D.shape, weight_D.to(wide_RD.dtype), eps).to(x_RD.dtype)


def rms_norm(x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32, in the dtype of `x`."""
    return residual_rms_norm(x_RD, weight_D, eps).normed


def residual_rms_norm(x_RD: Tensor, weight_D: Tensor, eps: float, *, branch_RD: Tensor | None = None) -> Normed:
    """`rms_norm` of `x`, and `x` to add to; or of x + branch, where a branch has just ended.

    Raises: ValueError if shapes do not fit.
    """
    width = x_RD.shape[-1]
    if weight_D.shape != (width,):
        raise ValueError(f"weight is {tuple(weight_D.shape)} but rows have {width} columns; it must be [{width}]")
    if branch_RD is not None and (branch_RD.shape, branch_RD.dtype) != (x_RD.shape, x_RD.dtype):
        raise ValueError(
            f"the branch is {tuple(branch_RD.shape)} in {branch_RD.dtype}, what it is added to {tuple(x_RD.shape)} in "
            f"{x_RD.dtype}; they must be alike"
        )
    if not uses_triton("rms_norm", x_RD):
        sum_RD = x_RD if branch_RD is None else x_RD + branch_RD
        return Normed(rms_norm_reference(sum_RD, weight_D, eps), sum_RD)
    if width > MAX_WIDTH:
        raise ValueError(f"rows have {width} columns, this kernel takes {MAX_WIDTH}; use dispatch.references()")
    return Normed(*_RMSNorm.apply(x_RD, branch_RD, weight_D, eps))


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x_RD = _rows(x)
        branch_RD = None if branch is None else _rows(branch)
        width = x_RD.shape[1]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        total = x if branch_RD is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        reciprocal_R = torch.empty(len(x_RD), dtype=torch.float32, device=x.device)
        _forward[(len(x_RD),)](
            x_RD, branch_RD, weight_D, y, None if branch_RD is None else total, reciprocal_R,
            x_RD.stride(0), 0 if branch_RD is None else branch_RD.stride(0), eps,
            WIDTH=width, maxnreg=FORWARD_REGISTERS if width <= 8192 else None, **_block(width),
        )  # fmt: skip
        ctx.save_for_backward(_rows(total), weight_D, reciprocal_R)
        # An output that nothing used has no gradient, rather than one of zeros to read.
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dresidual = grads
        if dy is None:
            return dresidual, dresidual if ctx.needs_input_grad[1] else None, None, None
        x_RD, weight_D, reciprocal_R = ctx.saved_tensors
        num_rows, width = x_RD.shape
        dy_RD = _rows(dy)
        dresidual_RD = None if dresidual is None else _rows(dresidual)
        dx = torch.empty(dy.shape, dtype=x_RD.dtype, device=x_RD.device) if ctx.needs_input_grad[0] else None
        programs = min(num_programs(x_RD.device, BACKWARD_PROGRAMS_PER_PROCESSOR), max(num_rows, 1))
        partial_GD = torch.empty(programs, width, dtype=torch.float32, device=x_RD.device)
        _backward[(programs,)](
            dy_RD, x_RD, weight_D, reciprocal_R, dresidual_RD, dx, partial_GD,
            dy_RD.stride(0), x_RD.stride(0), 0 if dresidual_RD is None else dresidual_RD.stride(0), num_rows,
            WIDTH=width, **_block(width),
        )  # fmt: skip
        return dx, dx if ctx.needs_input_grad[1] else None, partial_GD.sum(dim=0).to(weight_D.dtype), None


@triton.jit
def _forward(
    x_ptr, branch_ptr, weight_ptr, y_ptr, sum_ptr, reciprocal_ptr, x_stride, branch_stride, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + row * branch_stride + columns, mask=inside, other=0.0)
        # Rounded before it is normed, because that is what the backward pass will read.
        total = (x + branch.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * WIDTH + columns, total, mask=inside)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    reciprocal = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    tl.store(reciprocal_ptr + row, reciprocal)
    tl.store(y_ptr + row * WIDTH + columns, (x * reciprocal * weight).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _backward(
    dy_ptr, x_ptr, weight_ptr, reciprocal_ptr, dresidual_ptr, dx_ptr, partial_ptr,
    dy_stride, x_stride, dresidual_stride, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        reciprocal = tl.load(reciprocal_ptr + row)
        normed = x * reciprocal
        dweight += dy * normed
        if dx_ptr is not None:
            g = dy * weight
            dx = reciprocal * (g - normed * (tl.sum(g * normed, axis=0) / WIDTH))
            if dresidual_ptr is not None:
                dresidual = tl.load(dresidual_ptr + row * dresidual_stride + columns, mask=inside, other=0.0)
                dx += dresidual.to(tl.float32)
            tl.store(dx_ptr + row * WIDTH + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * WIDTH + columns, dweight, mask=inside)


def _rows(x: Tensor) -> Tensor:
    """`x` as rows whose columns lie side by side; a copy only if they do not."""
    x_RD = x.reshape(-1, x.shape[-1])
    return x_RD if x_RD.stride(1) == 1 else x_RD.contiguous()


def _block(width: int) -> dict[str, int]:
    # 16 values a thread: two accesses of 16 bytes in bfloat16.
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}
