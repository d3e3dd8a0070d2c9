"""Matrix products of training: weights in the dtype of computing, gradients added up in that of the parameters.

A step of training-time test uses each weight once per draft position and pass. Adding its gradient to the parameter's
`.grad` in the matrix product itself keeps the sum in float32 and takes no memory for the summands.

R rows, O output width, I input width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from specforge_core.kernels.accumulate import accumulate_product
from specforge_core.kernels.float8_product import Float8Weight, float8_product, float8_weight
from specforge_core.kernels.swiglu import swiglu, swiglu_backward


class Source(NamedTuple):
    """Columns of a parameter."""

    parameter: Tensor
    columns: slice


class Weight(NamedTuple):
    """Parameters below each other, as one matrix to multiply by."""

    value_OI: Tensor
    """A copy in the dtype of computing, or the parameter itself if that is its own; without gradient."""
    sources: tuple[Source, ...]
    float8: Float8Weight | None = None
    """What is multiplied by instead, if anything; gradients of the parameters are not rounded to it."""

    def product(self, input_RI: Tensor, *, out: Tensor | None = None) -> Tensor:
        """input W^T, without gradient."""
        if self.float8 is not None:
            return float8_product(input_RI, self.float8.rows, out=out)
        return torch.mm(input_RI, self.value_OI.T, out=out)

    def input_gradient(self, grad_RO: Tensor) -> Tensor:
        """grad W."""
        return grad_RO @ self.value_OI if self.float8 is None else float8_product(grad_RO, self.float8.columns)

    def part(self, first: int, last: int) -> "Weight":
        """The weight of the sources first to last - 1 alone."""
        assert self.float8 is None
        heights = [len(source.parameter) for source in self.sources]
        return Weight(self.value_OI[sum(heights[:first]) : sum(heights[:last])], self.sources[first:last])

    def accumulate(self, grad_RO: Tensor, input_RI: Tensor) -> None:
        """Add grad^T input to the parameters' `.grad`."""
        first = 0
        for parameter, columns in self.sources:
            grad_part_RO = grad_RO[:, first : first + len(parameter)]
            accumulate_product(gradient_buffer(parameter)[:, columns], grad_part_RO.T, input_RI)
            first += len(parameter)


@torch.no_grad()
def make_weight(
    parameters: Sequence[Tensor], dtype: torch.dtype, columns: slice = slice(None), *, in_float8: bool = False
) -> Weight:
    """The parameters' columns below each other. Raises: ValueError for sizes that float8 does not take, if it is to."""
    sources = tuple(Source(parameter, columns) for parameter in parameters)
    if len(parameters) == 1:
        value_OI = parameters[0].detach()[:, columns].to(dtype)
    else:
        height = sum(len(parameter) for parameter in parameters)
        value_OI = parameters[0].new_empty(height, parameters[0][:, columns].shape[1], dtype=dtype)
        torch.cat([parameter[:, columns] for parameter in parameters], out=value_OI)
    return Weight(value_OI, sources, float8_weight(value_OI) if in_float8 else None)


def gradient_buffer(parameter: Tensor) -> Tensor:
    """The parameter's `.grad`, zero if there was none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def linear(input_RI: Tensor, weight: Weight) -> Tensor:
    """input weight^T. In backward the weight's gradient goes straight to its parameters' `.grad`."""
    return _Linear.apply(input_RI, weight, weight.sources[0].parameter)


class FeedForward:
    """The feed-forward of the steps of one pass: down(silu(gate x) * up x).

    Only x, gate and up are saved; their product is computed again. Gate and up of all steps lie below each other and so
    do their gradients, which take their place: their weight, the largest of the layer, gets its gradient from one
    product at the end of the pass.
    """

    def __init__(self, gate_up: Weight, down: Weight, num_rows: int) -> None:
        """Args: num_rows: of all steps together."""
        self.gate_up, self.down = gate_up, down
        self._inputs: list[Tensor] = []
        self._rows = gate_up.value_OI.new_empty(num_rows if torch.is_grad_enabled() else 0, len(gate_up.value_OI))

    def __call__(self, input_RI: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.down.product(swiglu(self.gate_up.product(input_RI)))
        first = sum(len(x) for x in self._inputs)
        self._inputs.append(input_RI.detach())
        return _FeedForward.apply(input_RI, self, self._rows[first : first + len(input_RI)])

    def accumulate(self) -> None:
        """Add the gradient of the gate and up weights to their parameters, after the backward pass of all steps."""
        if self._inputs:
            self.gate_up.accumulate(self._rows, torch.cat(self._inputs))


class _Linear(Function):
    # The parameter is an input so that autograd calls `backward` when it is all that wants a gradient.
    @staticmethod
    def forward(ctx: FunctionCtx, input_RI: Tensor, weight: Weight, parameter: Tensor) -> Tensor:
        ctx.save_for_backward(input_RI)
        ctx.weight = weight  # type: ignore[attr-defined]
        return weight.product(input_RI)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
        (input_RI,) = ctx.saved_tensors  # type: ignore[attr-defined]
        weight: Weight = ctx.weight  # type: ignore[attr-defined]
        weight.accumulate(grad_RO, input_RI)
        wants_input = ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        return weight.input_gradient(grad_RO) if wants_input else None, None, None


class _FeedForward(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, input_RI: Tensor, feed_forward: FeedForward, gate_up_RO: Tensor) -> Tensor:
        feed_forward.gate_up.product(input_RI, out=gate_up_RO)
        ctx.feed_forward, ctx.gate_up_RO = feed_forward, gate_up_RO  # type: ignore[attr-defined]
        return feed_forward.down.product(swiglu(gate_up_RO))

    @staticmethod
    def backward(ctx: FunctionCtx, grad_RI: Tensor) -> tuple[Tensor | None, ...]:
        feed_forward: FeedForward = ctx.feed_forward  # type: ignore[attr-defined]
        gate_up_RO: Tensor = ctx.gate_up_RO  # type: ignore[attr-defined]
        down = feed_forward.down
        activation_RO, grad_gate_up_RO = swiglu_backward(down.input_gradient(grad_RI), gate_up_RO, out=gate_up_RO)
        down.accumulate(grad_RI, activation_RO)
        return feed_forward.gate_up.input_gradient(grad_gate_up_RO), None, None
