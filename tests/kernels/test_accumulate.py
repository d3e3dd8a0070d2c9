"""Tests of matrix products that keep float32."""

import pytest
import torch

from specforge_core.kernels.accumulate import accumulate_product, wide_product

LOW_AND_EQUAL = [torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", LOW_AND_EQUAL)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_product_is_added_in_the_precision_of_the_sum(
    dtype: torch.dtype, transposed: bool, device: torch.device
) -> None:
    a = torch.randn(24, 40, device=device).to(dtype)
    a = a.T.contiguous().T if transposed else a
    b = torch.randn(40, 16, device=device).to(dtype)
    # Far from 0, so that a sum in bfloat16 would be off by up to 2.
    grad = 500.0 + torch.randn(24, 16, device=device, dtype=torch.promote_types(dtype, torch.float32))
    exact = grad.double() + a.double() @ b.double()
    accumulate_product(grad, a, b)
    torch.testing.assert_close(grad.double(), exact, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", LOW_AND_EQUAL)
def test_some_columns_of_a_larger_sum_can_be_added_to(dtype: torch.dtype, device: torch.device) -> None:
    a, b = torch.randn(24, 40, device=device).to(dtype), torch.randn(40, 16, device=device).to(dtype)
    whole = torch.ones(24, 48, device=device, dtype=torch.promote_types(dtype, torch.float32))
    columns = whole[:, 16:32]
    accumulate_product(columns, a, b)
    torch.testing.assert_close(columns.double(), 1.0 + a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    assert (whole[:, :16] == 1.0).all()
    assert (whole[:, 32:] == 1.0).all()


def test_factors_may_require_gradients(device: torch.device) -> None:
    grad = torch.zeros(2, 2, device=device)
    accumulate_product(grad, torch.eye(2, device=device).requires_grad_(), torch.ones(2, 2, device=device))
    assert not grad.requires_grad
    assert grad.tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("dtype", LOW_AND_EQUAL)
def test_a_wide_product_is_not_rounded_to_the_dtype_of_its_factors(dtype: torch.dtype, device: torch.device) -> None:
    a, b = torch.randn(24, 40, device=device).to(dtype), torch.randn(40, 16, device=device).to(dtype)
    product = wide_product(a, b)
    assert product.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(product.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
