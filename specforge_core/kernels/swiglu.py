"""SwiGLU's activation of two projections that lie side by side.

    a = silu(g) u,  silu(g) = g s,  s = 1 / (1 + exp(-g))
    du = da silu(g)                                                 dg = da u s (1 + g (1 - s))

Shapes: gate_up = [g, u] [R, 2 I], a [R, I]; any I. Computed in float32; results have the dtype of gate_up.
Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.

R rows, I feed-forward width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from specforge_core.kernels.dispatch import uses_triton
from specforge_core.kernels.precision import at_least_float32

# 16 values a thread: two accesses of 16 bytes in bfloat16 to each of the tensors.
BLOCK = 2048
NUM_WARPS = 4


class SwiGLUBackward(NamedTuple):
    """What the backward pass of a feed-forward layer needs."""

    activation_RI: Tensor
    """What the forward pass returned, for the gradient of the next weight."""
    grad_gate_up_R2I: Tensor


def swiglu_reference(gate_up_R2I: Tensor) -> Tensor:
    """silu(gate) * up [R, I], in plain PyTorch."""
    gate_RI, up_RI = at_least_float32(gate_up_R2I).chunk(2, dim=1)
    return (F.silu(gate_RI) * up_RI).to(gate_up_R2I.dtype)


def swiglu_backward_reference(grad_RI: Tensor, gate_up_R2I: Tensor) -> SwiGLUBackward:
    """`swiglu_backward` in plain PyTorch, into new memory."""
    gate_RI, up_RI = at_least_float32(gate_up_R2I).chunk(2, dim=1)
    wide_grad_RI = grad_RI.to(gate_RI.dtype)
    sigmoid_RI = gate_RI.sigmoid()
    silu_RI = gate_RI * sigmoid_RI
    grad_gate_RI = wide_grad_RI * up_RI * sigmoid_RI * (1 + gate_RI * (1 - sigmoid_RI))
    grad_gate_up_R2I = torch.cat((grad_gate_RI, wide_grad_RI * silu_RI), dim=1)
    return SwiGLUBackward((silu_RI * up_RI).to(gate_up_R2I.dtype), grad_gate_up_R2I.to(gate_up_R2I.dtype))


def swiglu(gate_up_R2I: Tensor) -> Tensor:
    """silu(gate) * up [R, I] of [gate, up]. Raises: ValueError if the number of columns is odd."""
    _check(gate_up_R2I)
    if not uses_triton("swiglu", gate_up_R2I):
        return swiglu_reference(gate_up_R2I)
    return _SwiGLU.apply(gate_up_R2I)


def swiglu_backward(grad_RI: Tensor, gate_up_R2I: Tensor, *, out: Tensor) -> SwiGLUBackward:
    """The activation once more, and the gradient of gate and up, which is written to `out`.

    Args: grad_RI: gradient of the activation; out: contiguous [R, 2 I], may be `gate_up_R2I` itself.
    Raises: ValueError if shapes do not fit.
    """
    _check(gate_up_R2I)
    num_rows, width = gate_up_R2I.shape
    if grad_RI.shape != (num_rows, width // 2) or out.shape != gate_up_R2I.shape or not out.is_contiguous():
        raise ValueError(
            f"gate and up are {tuple(gate_up_R2I.shape)}, but the gradient is {tuple(grad_RI.shape)} and out is "
            f"{tuple(out.shape)} with strides {out.stride()}; they must be [R, I] and contiguous [R, 2 I]"
        )
    if not uses_triton("swiglu", gate_up_R2I):
        reference = swiglu_backward_reference(grad_RI, gate_up_R2I)
        return SwiGLUBackward(reference.activation_RI, out.copy_(reference.grad_gate_up_R2I))
    activation_RI = torch.empty(grad_RI.shape, dtype=gate_up_R2I.dtype, device=gate_up_R2I.device)
    _launch_backward(grad_RI, gate_up_R2I, activation_RI, out)
    return SwiGLUBackward(activation_RI, out)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up_R2I = _side_by_side(gate_up)
        num_rows, width = gate_up_R2I.shape[0], gate_up_R2I.shape[1] // 2
        activation_RI = torch.empty(num_rows, width, dtype=gate_up.dtype, device=gate_up.device)
        _forward[_grid(num_rows, width)](
            gate_up_R2I, activation_RI, gate_up_R2I.stride(0), WIDTH=width, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
        ctx.save_for_backward(gate_up_R2I)
        return activation_RI

    @staticmethod
    def backward(ctx: Any, grad_RI: Tensor) -> Tensor:
        (gate_up_R2I,) = ctx.saved_tensors
        grad_gate_up_R2I = torch.empty(gate_up_R2I.shape, dtype=gate_up_R2I.dtype, device=gate_up_R2I.device)
        _launch_backward(grad_RI, gate_up_R2I, None, grad_gate_up_R2I)
        return grad_gate_up_R2I


def _launch_backward(grad: Tensor, gate_up: Tensor, activation_RI: Tensor | None, out_R2I: Tensor) -> None:
    grad_RI, gate_up_R2I = _side_by_side(grad), _side_by_side(gate_up)
    num_rows, width = grad_RI.shape
    _backward[_grid(num_rows, width)](
        grad_RI, gate_up_R2I, activation_RI, out_R2I, grad_RI.stride(0), gate_up_R2I.stride(0),
        WIDTH=width, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


@triton.jit
def _forward(gate_up_ptr, activation_ptr, gate_up_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // tl.cdiv(WIDTH, BLOCK)).to(tl.int64)
    columns = tl.program_id(0) % tl.cdiv(WIDTH, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate_ptrs = gate_up_ptr + row * gate_up_stride + columns
    gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + WIDTH, mask=inside, other=0.0).to(tl.float32)
    activation = gate * tl.sigmoid(gate) * up
    tl.store(activation_ptr + row * WIDTH + columns, activation.to(activation_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_ptr, gate_up_ptr, activation_ptr, out_ptr, grad_stride, gate_up_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tl.cdiv(WIDTH, BLOCK)).to(tl.int64)
    columns = tl.program_id(0) % tl.cdiv(WIDTH, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate_ptrs = gate_up_ptr + row * gate_up_stride + columns
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + WIDTH, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dtype = out_ptr.dtype.element_ty
    # `out` may be `gate_up`: each value is read before its gradient takes its place, and by no other program.
    out_ptrs = out_ptr + row * 2 * WIDTH + columns
    tl.store(out_ptrs, (grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(dtype), mask=inside)
    tl.store(out_ptrs + WIDTH, (grad * silu).to(dtype), mask=inside)
    if activation_ptr is not None:
        tl.store(activation_ptr + row * WIDTH + columns, (silu * up).to(dtype), mask=inside)


def _grid(num_rows: int, width: int) -> tuple[int]:
    return (num_rows * triton.cdiv(width, BLOCK),)


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _check(gate_up_R2I: Tensor) -> None:
    if gate_up_R2I.dim() != 2 or gate_up_R2I.shape[1] % 2:
        raise ValueError(f"gate and up are {tuple(gate_up_R2I.shape)}; they must be side by side, [R, 2 I]")
