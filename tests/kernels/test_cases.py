"""Every kernel at the size of training, in bfloat16, on a GPU; and that the check of a case can fail."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from specforge_core.kernels import dispatch
from specforge_core.kernels.cases import Case, Inputs, Numbers, Work, all_cases, assert_within_error_budget, check
from specforge_core.kernels.cases_head import head_case


@pytest.mark.gpu
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_a_kernel_is_as_close_to_float64_as_eager_pytorch(case: Case, device: torch.device) -> None:
    check(case, device, torch.bfloat16)


def test_cases_have_names_of_their_own() -> None:
    names = [case.name for case in all_cases()]
    assert len(names) == len(set(names)) > 0


def doubling(**changes: object) -> Case:
    """A case whose op is right."""

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        return {"x": Numbers(device, dtype).leaf(5)}

    case = Case("doubling", make_inputs, lambda x: 2 * x, lambda x: x + x, {"x": 5}, Work(40, 40), Work(5, 5))
    return dataclasses.replace(case, **changes)  # type: ignore[arg-type]


def test_a_right_case_passes_its_check(device: torch.device) -> None:
    check(doubling(), device, torch.float32)


def test_a_wrong_result_fails_its_check(device: torch.device) -> None:
    with pytest.raises(AssertionError, match=r"doubling: output 0: largest error .* is over its budget"):
        check(doubling(op=lambda x: 2.00001 * x), device, torch.float32)


def test_a_wrong_gradient_fails_its_check(device: torch.device) -> None:
    with pytest.raises(AssertionError, match="doubling: gradient of x: largest error"):
        check(doubling(op=lambda x: 2 * x.detach() + 2.00001 * (x - x.detach())), device, torch.float32)


def test_a_value_that_was_never_written_fails_its_check(device: torch.device) -> None:
    def forgets(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        y[:-1] = 2 * x[:-1]
        return y

    with pytest.raises(AssertionError, match="output 0: 1 values are not finite"):
        check(doubling(op=forgets), device, torch.float32)


def test_a_changed_input_fails_its_check(device: torch.device) -> None:
    def changes_its_input(x: Tensor) -> Tensor:
        y = 2 * x
        x.data += 1
        return y

    with pytest.raises(AssertionError, match="the input x was changed"):
        check(doubling(op=changes_its_input), device, torch.float32)


def test_an_accumulator_stands_for_the_gradient_of_its_input(device: torch.device) -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, y: Tensor, x: Tensor, x_grad: Tensor) -> Tensor:
            ctx.x_grad = x_grad  # type: ignore[attr-defined]
            return y + 2 * x

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
            ctx.x_grad.add_(grad, alpha=factor)  # type: ignore[attr-defined]
            return grad, None, None

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        numbers = Numbers(device, dtype)
        x = numbers.leaf(5)
        return {"y": numbers.leaf(5), "x": x, "x_grad": torch.zeros_like(x).detach()}

    case = doubling(
        make_inputs=make_inputs,
        op=lambda y, x, x_grad: Double.apply(y, x.detach(), x_grad),
        reference=lambda y, x, x_grad: y + 2 * x,
    )
    factor = 2
    check(case, device, torch.float32)
    factor = 3
    with pytest.raises(AssertionError, match="gradient of x"):
        check(case, device, torch.float32)


def test_the_budget_is_twice_eagers_error_and_two_roundings() -> None:
    # Eager is off by 0.5, so 1 and two roundings of the largest value, 2 * 2^-7 * 64 = 1, are allowed: 2 in all.
    exact = torch.full((3,), 64.0, dtype=torch.float64)
    eager, right, wrong = ((exact + error).to(torch.bfloat16) for error in (0.5, 2.0, 2.5))
    assert_within_error_budget(right, exact, eager, what="x", factor=2)
    with pytest.raises(AssertionError, match=r"x: largest error 2.500e\+00 is over its budget 2.000e\+00"):
        assert_within_error_budget(wrong, exact, eager, what="x", factor=2)


def test_a_sum_of_n_numbers_may_be_off_by_sqrt_n_of_their_roundings(device: torch.device) -> None:
    # 64 ones, summed in float32. Two roundings to bfloat16 of 2^-7 each, times sqrt(64) = 8, are 0.125.
    def summing(error: float) -> Case:
        return doubling(
            make_inputs=lambda device, dtype: {"x": torch.ones(64, device=device, dtype=dtype)},
            op=lambda x: x.sum(dtype=torch.float32) + error,
            reference=lambda x: x.sum(dtype=torch.promote_types(x.dtype, torch.float32)),
            num_summed=64,
        )

    check(summing(0.12), device, torch.bfloat16)
    with pytest.raises(AssertionError, match=r"error 1.300e-01 is over its budget 1.250e-01"):
        check(summing(0.13), device, torch.bfloat16)


def test_an_acceptance_that_forgets_the_target_fails_its_check(device: torch.device) -> None:
    case = head_case("small", num_rows=256, num_steps=2, width=256, vocab_size=512)

    def forgets(**inputs: Any) -> tuple[Tensor, ...]:
        with dispatch.references(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "minimum", lambda p, own, out: p)
            return case.op(**inputs)

    def remembers(**inputs: Any) -> tuple[Tensor, ...]:
        with dispatch.references():
            return case.op(**inputs)

    check(dataclasses.replace(case, op=remembers), device, torch.bfloat16)
    with pytest.raises(AssertionError, match="output 2: largest error"):
        check(dataclasses.replace(case, op=forgets), device, torch.bfloat16)
