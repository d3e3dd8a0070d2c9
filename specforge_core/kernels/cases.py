"""The cases on which a kernel is tested and timed, and what "correct" means for both."""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from specforge_core.kernels import dispatch

Inputs = dict[str, Any]
"""Arguments by name; trees of tensors are allowed. A tensor that requires a gradient is an argument of its own, and if
its gradient is accumulated in place, the accumulator is the argument named `<name>_grad`, zero at first."""

CASE_FILES = ("elementwise", "attention", "head")
"""What follows `cases_` in the names of the modules that define cases."""

FORWARD_FACTOR = 2.0
"""Times the error of eager PyTorch that a forward pass may be off."""
BACKWARD_FACTOR = 3.0
FLOOR_ROUNDINGS = 2.0
"""That are allowed on top, for where eager PyTorch happens to be exact."""


class Work(NamedTuple):
    """What the forward and the backward pass must at least do: bytes moved to and from memory, or FLOPs.

    `backward` is 0 where gradients come with the call, or where there are none.
    """

    forward: int
    backward: int


@dataclass(frozen=True)
class Case:
    """One kernel on inputs of one shape."""

    name: str
    """Kernel and shape, unique among all cases."""
    make_inputs: Callable[[torch.device, torch.dtype], Inputs]
    """The same numbers at every call; `dtype` is that of activations."""
    op: Callable[..., Any]
    reference: Callable[..., Any]
    """Plain PyTorch, differentiable; takes the same arguments as `op`, and ignores accumulators."""
    shapes: dict[str, int]
    """Sizes by name, for the report."""
    bytes: Work
    """In bfloat16."""
    flops: Work
    has_compiled_rival: bool = True
    """Whether `torch.compile` of the reference is worth its compile time in a benchmark."""
    reference_waits: bool = False
    """Whether the reference waits for the device, which a CUDA graph cannot record. PyTorch frees no memory any more
    after a capture that failed, so none may be tried."""
    num_summed: int = 1
    """How many numbers, computed in the dtype of the case, each output in floating point is the sum of."""


def all_cases() -> tuple[Case, ...]:
    """The cases that are timed on a GPU, of every kernel."""
    modules = (importlib.import_module(f"specforge_core.kernels.cases_{name}") for name in CASE_FILES)
    return tuple(case for module in modules for case in module.cases())


class Numbers:
    """Random inputs: the same ones for the same device, dtype and seed."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """N(0, scale^2), in this dtype."""
        return (scale * torch.randn(*shape, generator=self._generator, device=self.device)).to(self.dtype)

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        """`normal`, and a gradient is wanted."""
        return self.normal(*shape, scale=scale).requires_grad_()


class Result(NamedTuple):
    """What one run of a case gave, in one dtype."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]
    """By the name of the input."""


def run(function: Callable[..., Any], inputs: Inputs) -> Result:
    """Outputs and gradients of one run: the gradients of the outputs are the same random numbers at every call."""
    leaves = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad}
    outputs = as_tuple(function(**inputs))
    differentiable = [output for output in outputs if output.requires_grad]
    if differentiable:
        torch.autograd.backward(differentiable, gradients_of(differentiable))
    gradients = {}
    for name, leaf in leaves.items():
        gradient = leaf.grad if leaf.grad is not None else inputs.get(f"{name}_grad")
        assert gradient is not None, f"no gradient arrived at {name}"
        gradients[name] = gradient
    return Result(tuple(output.detach() for output in outputs), gradients)


def gradients_of(outputs: list[Tensor]) -> list[Tensor]:
    """Gradients to start a backward pass with: one random number per element, rounded to bfloat16."""
    # From bfloat16 and after a fixed seed, so that runs in other dtypes start with the same numbers.
    numbers = Numbers(outputs[0].device, torch.bfloat16, seed=1)
    return [numbers.normal(*output.shape).to(output.dtype) for output in outputs]


def check(case: Case, device: torch.device, dtype: torch.dtype) -> None:
    """Nothing, if `case.op` is right in this dtype: outputs and gradients within the error budget, inputs unchanged.

    Raises: AssertionError that names the output or gradient, its error and the budget.
    """
    exact = run(case.reference, in_float64(case.make_inputs(device, dtype)))
    with dispatch.references():
        eager = run(case.reference, case.make_inputs(device, dtype))
    inputs, fresh = case.make_inputs(device, dtype), case.make_inputs(device, dtype)
    actual = run(case.op, inputs)
    assert len(actual.outputs) == len(exact.outputs), f"{case.name}: {len(actual.outputs)} outputs"
    # Errors of n numbers partly cancel in their sum, eager's too, and by luck almost all of them: n independent ones
    # of a rounding each are sqrt(n) roundings of one number, or a rounding of the sum divided by sqrt(n).
    rounding = torch.finfo(dtype).eps / math.sqrt(case.num_summed) if case.num_summed > 1 else 0.0
    for i, outputs in enumerate(zip(actual.outputs, exact.outputs, eager.outputs, strict=True)):
        what = f"{case.name}: output {i}"
        assert_within_error_budget(*outputs, what=what, factor=FORWARD_FACTOR, rounding=rounding)
    for name, gradient in actual.gradients.items():
        triple = gradient, exact.gradients[name], eager.gradients[name]
        assert_within_error_budget(*triple, what=f"{case.name}: gradient of {name}", factor=BACKWARD_FACTOR)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and not name.endswith("_grad"):
            assert torch.equal(value, fresh[name]), f"{case.name}: the input {name} was changed"


def assert_within_error_budget(
    actual: Tensor, exact: Tensor, eager: Tensor, *, what: str, factor: float, rounding: float = 0.0
) -> None:
    """Nothing, if `actual` is about as close to the float64 result as eager PyTorch in the same dtype is.

    Both the largest and the root mean square error may be at most `factor` times eager's, plus FLOOR_ROUNDINGS
    roundings of the largest and the root mean square value; a rounding is the eps of `actual`'s dtype, or `rounding`
    if that is more. Integers must be equal. Raises: AssertionError with error and budget.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    if not exact.is_floating_point():
        assert torch.equal(actual, exact), f"{what}: {int((actual != exact).sum())} values differ"
        return
    assert torch.isfinite(actual).all(), f"{what}: {int((~torch.isfinite(actual)).sum())} values are not finite"
    rounding = max(rounding, torch.finfo(actual.dtype).eps)
    for name, norm in (("largest", _largest), ("root mean square", _root_mean_square)):
        error = norm(actual.double() - exact)
        budget = factor * norm(eager.double() - exact) + FLOOR_ROUNDINGS * rounding * norm(exact)
        assert error <= budget, f"{what}: {name} error {error:.3e} is over its budget {budget:.3e}"


def in_float64(inputs: Inputs) -> Inputs:
    """The same numbers in float64, as new leaves."""

    def widen(x: Tensor) -> Tensor:
        return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x

    return tree_map_only(Tensor, widen, inputs)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """The tensors that a kernel returned, one or many."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0
