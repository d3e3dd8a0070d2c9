"""Tests of the activation: by hand, against float64, and its gradient in place."""

import math

import pytest
import torch

from specforge_core.kernels import dispatch
from specforge_core.kernels.cases import Numbers, check
from specforge_core.kernels.cases_elementwise import swiglu_backward_case, swiglu_case
from specforge_core.kernels.swiglu import swiglu, swiglu_backward, swiglu_backward_reference, swiglu_reference


@pytest.mark.parametrize(("num_rows", "width"), [(1, 2048), (5, 100), (3, 2049), (2, 14336), (4, 1)])
def test_output_and_gradients_are_as_close_to_float64_as_eager_pytorch(
    num_rows: int, width: int, device: torch.device
) -> None:
    check(swiglu_case(num_rows, width), device, torch.float32)
    check(swiglu_backward_case(num_rows, width), device, torch.float32)


def test_the_activation_is_what_the_formula_says(device: torch.device) -> None:
    gate, up = [-2.0, 0.0, 1.0], [3.0, 5.0, -7.0]
    expected = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
    assert swiglu(torch.tensor([gate + up], device=device))[0].tolist() == pytest.approx(expected)


def test_the_gradient_is_that_of_autograd() -> None:
    gate_up = Numbers(torch.device("cpu"), torch.float64).leaf(3, 10)
    grad = Numbers(torch.device("cpu"), torch.float64, seed=1).normal(3, 5)
    activation, grad_gate_up = swiglu_backward_reference(grad, gate_up.detach())
    expected = swiglu_reference(gate_up)
    torch.testing.assert_close(activation, expected)
    torch.testing.assert_close(grad_gate_up, torch.autograd.grad(expected, gate_up, grad)[0])


@pytest.mark.parametrize("plain", [False, True])
def test_the_gradient_may_take_the_place_of_gate_and_up(plain: bool, device: torch.device) -> None:
    numbers = Numbers(device, torch.float32)
    grad, gate_up = numbers.normal(3, 2100), numbers.normal(3, 4200)
    expected = swiglu_backward(grad, gate_up, out=torch.empty_like(gate_up))
    with dispatch.references() if plain else torch.no_grad():
        actual = swiglu_backward(grad, gate_up, out=gate_up)
    assert actual.grad_gate_up_R2I is gate_up
    torch.testing.assert_close(actual.activation_RI, expected.activation_RI)
    torch.testing.assert_close(actual.grad_gate_up_R2I, expected.grad_gate_up_R2I)


def test_rows_may_be_columns_of_something_wider(device: torch.device) -> None:
    wide = Numbers(device, torch.float32).normal(3, 400)
    for gate_up in (wide[:, 100:300], wide[:, ::2]):
        torch.testing.assert_close(swiglu(gate_up), swiglu_reference(gate_up))
        for grad in (wide[:, :100], wide[:, ::4]):
            actual = swiglu_backward(grad, gate_up, out=torch.empty(3, 200, device=device))
            torch.testing.assert_close(actual, swiglu_backward_reference(grad, gate_up))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_far_from_zero_nothing_overflows(device: torch.device) -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 1.0, 1.0]], device=device, requires_grad=True)
    activation = swiglu(gate_up)
    activation.sum().backward()
    assert activation[0].tolist() == [0.0, 200.0]
    assert gate_up.grad is not None
    # silu is flat on the left, and the identity on the right.
    assert gate_up.grad[0].tolist() == [0.0, 1.0, 0.0, 200.0]


def test_shapes_that_do_not_fit_are_refused(device: torch.device) -> None:
    gate_up, grad = torch.zeros(2, 6, device=device), torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match=r"\(2, 5\); they must be side by side"):
        swiglu(torch.zeros(2, 5, device=device))
    with pytest.raises(ValueError, match=r"the gradient is \(2, 6\)"):
        swiglu_backward(gate_up, gate_up, out=gate_up)
    with pytest.raises(ValueError, match=r"strides \(12, 2\)"):
        swiglu_backward(grad, gate_up, out=torch.zeros(2, 12, device=device)[:, ::2])
