"""Tests of the norm: by hand, against float64, and as the start of a residual branch."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from specforge_core.kernels import dispatch
from specforge_core.kernels.cases import Numbers, check
from specforge_core.kernels.cases_elementwise import branch_rms_norm_case, residual_rms_norm_case, rms_norm_case
from specforge_core.kernels.rms_norm import MAX_WIDTH, _backward, residual_rms_norm, rms_norm, rms_norm_reference

EPS = 1e-5


@pytest.mark.parametrize(("num_rows", "width"), [(1, 4096), (5, 192), (3, 7168), (2, 8192), (7, 1)])
def test_output_and_gradients_are_as_close_to_float64_as_eager_pytorch(
    num_rows: int, width: int, device: torch.device
) -> None:
    check(rms_norm_case(num_rows, width), device, torch.float32)
    check(residual_rms_norm_case(num_rows, width), device, torch.float32)
    # The gradient of a norm over one column is all cancellation, and that of a sum has a rounding more.
    if width > 1:
        check(branch_rms_norm_case(num_rows, width), device, torch.float32)


def test_a_branch_that_ends_is_added_before_the_norm(device: torch.device) -> None:
    x, branch = torch.tensor([[1.0, 6.0]], device=device), torch.tensor([[2.0, -2.0]], device=device)
    normed, residual = residual_rms_norm(x, torch.ones(2, device=device), 0.0, branch_RD=branch)
    # 1 + 2 and 6 - 2: the mean of 3^2 and 4^2 is 12.5.
    assert residual.tolist() == [[3.0, 4.0]]
    assert normed[0].tolist() == pytest.approx([3 / math.sqrt(12.5), 4 / math.sqrt(12.5)])
    assert x.tolist() == [[1.0, 6.0]]


def test_a_branch_of_another_kind_is_refused(device: torch.device) -> None:
    x, weight = torch.zeros(2, 8, device=device), torch.ones(8, device=device)
    for branch in (torch.zeros(1, 8, device=device), torch.zeros(2, 8, dtype=torch.bfloat16, device=device)):
        with pytest.raises(ValueError, match="they must be alike"):
            residual_rms_norm(x, weight, EPS, branch_RD=branch)


def test_a_row_is_divided_by_its_root_mean_square(device: torch.device) -> None:
    # The mean of 3^2 and 4^2 is 12.5.
    y = rms_norm(torch.tensor([[3.0, 4.0]], device=device), torch.tensor([1.0, 2.0], device=device), 0.0)
    assert y[0].tolist() == pytest.approx([3 / math.sqrt(12.5), 8 / math.sqrt(12.5)])


def test_a_row_of_zeros_stays_zero_and_has_a_finite_gradient(device: torch.device) -> None:
    x = torch.zeros(2, 8, device=device, requires_grad=True)
    weight = torch.full((8,), 3.0, device=device)
    y = rms_norm(x, weight, 0.25)
    y.sum().backward()
    assert not y.any()
    # At zero only 1 / sqrt(eps) = 2 and the weight are left.
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [6.0] * 16


def test_rows_may_be_columns_of_something_wider_and_have_more_dimensions(device: torch.device) -> None:
    numbers = Numbers(device, torch.float32)
    wide = numbers.normal(2, 3, 3 * 192)
    weight = numbers.normal(192)
    for x in (wide[..., 192:384], wide[..., :192].transpose(0, 1), wide[..., ::3]):
        y = rms_norm(x, weight, EPS)
        assert y.shape == x.shape
        torch.testing.assert_close(y, rms_norm_reference(x, weight, EPS))


@pytest.mark.parametrize(
    "loss",
    [
        lambda normed, residual: normed.T.contiguous().sin().sum() + residual.sum(),
        lambda normed, residual: torch.cat((normed, residual), dim=1).sin().sum(),
    ],
    ids=["columns apart", "part of wider rows"],
)
def test_a_gradient_may_lie_in_memory_in_any_way(loss: Callable[..., Tensor], device: torch.device) -> None:
    numbers = Numbers(device, torch.float32)
    x, weight = numbers.leaf(4, 192), numbers.leaf(192)
    actual = torch.autograd.grad(loss(*residual_rms_norm(x, weight, EPS)), (x, weight))
    expected = torch.autograd.grad(loss(rms_norm_reference(x, weight, EPS), x), (x, weight))
    torch.testing.assert_close(actual, expected)


def test_a_frozen_input_or_weight_gets_no_gradient(device: torch.device) -> None:
    numbers = Numbers(device, torch.float32)
    x, weight = numbers.leaf(3, 192), numbers.leaf(192)
    rms_norm(x.detach(), weight, EPS).sum().backward()
    assert x.grad is None
    expected = (x.detach() * (x.detach().square().mean(1, keepdim=True) + EPS).rsqrt()).sum(0)
    torch.testing.assert_close(weight.grad, expected)
    weight.grad = None
    rms_norm(x, weight.detach(), EPS).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_what_nothing_used_of_a_residual_branch_has_no_gradient(device: torch.device) -> None:
    numbers = Numbers(device, torch.float32)
    x, weight, grad = numbers.leaf(3, 192), numbers.leaf(192), numbers.normal(3, 192)
    residual = residual_rms_norm(x, weight, EPS).residual
    assert torch.equal(residual, x)
    residual.backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, grad)
    assert weight.grad is None
    (only_normed,) = torch.autograd.grad(residual_rms_norm(x, weight, EPS).normed, x, grad)
    torch.testing.assert_close(only_normed, torch.autograd.grad(rms_norm_reference(x, weight, EPS), x, grad)[0])


def test_no_rows_are_no_problem(device: torch.device) -> None:
    x, weight = (
        torch.zeros(0, 192, device=device, requires_grad=True),
        torch.ones(192, device=device, requires_grad=True),
    )
    y = rms_norm(x, weight, EPS)
    y.sum().backward()
    assert y.shape == (0, 192)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_float64_is_computed_in_float64(device: torch.device) -> None:
    x = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64, device=device)
    y = rms_norm(x, torch.ones(2, dtype=torch.float64, device=device), 0.0)
    assert y[0, 1] > y[0, 0]


def test_a_weight_of_another_width_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"weight is \(3,\) but rows have 4 columns"):
        rms_norm(torch.zeros(2, 4, device=device), torch.zeros(3, device=device), EPS)


def test_a_row_that_no_program_can_hold_is_refused(device: torch.device) -> None:
    x, weight = torch.ones(1, MAX_WIDTH + 1, device=device), torch.ones(MAX_WIDTH + 1, device=device)
    with pytest.raises(ValueError, match=rf"{MAX_WIDTH + 1} columns.*dispatch.references"):
        rms_norm(x, weight, EPS)
    with dispatch.references():
        assert rms_norm(x, weight, 0.0)[0, 0] == 1


@pytest.mark.gpu
def test_another_number_of_rows_compiles_nothing(device: torch.device) -> None:
    def run(num_rows: int) -> Tensor:
        x = torch.randn(num_rows, 1024, device=device, dtype=torch.bfloat16, requires_grad=True)
        normed, residual = residual_rms_norm(x, torch.ones(1024, device=device), EPS)
        (normed + residual).sum().backward()
        return normed

    run(64)
    compiled = len(_backward.device_caches[device.index or 0][0])
    for num_rows in (1, 7, 4096):
        run(num_rows)
    assert len(_backward.device_caches[device.index or 0][0]) == compiled
