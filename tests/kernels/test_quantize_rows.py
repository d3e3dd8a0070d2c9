"""Tests of rows in float8: every code of the format, rows of any layout, and on a GPU every rounding.

Triton's interpreter does not round what it converts to float8, so numbers that are no codes are left to a GPU.
"""

import pytest
import torch
from torch import Tensor

from specforge_core.data.float8 import SMALLEST_SCALE, ScaledFloat8, dequantised
from specforge_core.kernels.cases import Numbers
from specforge_core.kernels.quantize_rows import BLOCK, _quantize, quantize_rows, quantize_rows_reference


def finite_codes(device: torch.device) -> Tensor:
    """All numbers of e4m3fn but its two that are none, in float32."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return codes[codes.isfinite()].to(device)


def assert_same_bits(actual: ScaledFloat8, expected: ScaledFloat8) -> None:
    assert torch.equal(actual.scale, expected.scale)
    assert torch.equal(actual.values.view(torch.uint8), expected.values.view(torch.uint8))


def test_numbers_of_the_format_survive_times_any_power_of_two(device: torch.device) -> None:
    codes = finite_codes(device)
    assert len(codes) == 254
    factors = [2.0**-60, 2.0**-7, 1.0, 2.0**20]
    rows = torch.stack([codes * factor for factor in factors])
    scaled = quantize_rows(rows)
    # 448, the largest number of the format, is in every row.
    assert scaled.scale.tolist() == factors
    assert torch.equal(dequantised(scaled, torch.float32), rows)


@pytest.mark.parametrize("width", [1, 3, 254, BLOCK, BLOCK + 5])
def test_rows_of_any_width_have_scales_of_their_own(width: int, device: torch.device) -> None:
    codes = finite_codes(device).repeat(width // 254 + 1)[:width]
    # The largest of a row comes last, where a block may have only just begun.
    rows = torch.stack([torch.cat((codes[:-1], codes.new_tensor([448.0]))) * factor for factor in (8.0, 0.5)])
    scaled = quantize_rows(rows)
    assert scaled.scale.tolist() == [8.0, 0.5]
    assert torch.equal(dequantised(scaled, torch.float32), rows)


def test_rows_may_be_columns_of_something_wider(device: torch.device) -> None:
    wide = torch.stack([finite_codes(device)[:252]] * 3)
    for x in (wide[:, 100:200], wide[:, ::2], wide.T):
        assert_same_bits(quantize_rows(x), quantize_rows_reference(x))


def test_a_row_of_zeros_stays_one(device: torch.device) -> None:
    scaled = quantize_rows(torch.zeros(2, 16, device=device))
    assert scaled.scale.tolist() == [SMALLEST_SCALE] * 2
    assert not scaled.values.float().any()


def test_no_rows_are_no_problem(device: torch.device) -> None:
    scaled = quantize_rows(torch.zeros(0, 16, device=device))
    assert scaled.values.shape == (0, 16)
    assert scaled.scale.shape == (0,)


def test_what_has_no_rows_and_columns_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"x is \(2, 3, 4\); it must have rows and columns"):
        quantize_rows(torch.zeros(2, 3, 4, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 4096), (4096, 4096), (37, 28672), (64, 57344), (5, 32000), (3, 7)])
def test_every_number_is_rounded_as_pytorch_rounds_it(
    num_rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    # Cubed, so that a row holds numbers far below its largest, down to those that vanish.
    x = Numbers(device, torch.float32).normal(num_rows, width).pow(3).to(dtype)
    assert_same_bits(quantize_rows(x), quantize_rows_reference(x))
    on_cpu = quantize_rows_reference(x.cpu())
    assert_same_bits(quantize_rows(x), ScaledFloat8(*(part.to(device) for part in on_cpu)))


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_does_not_get_lost(bad: float, device: torch.device) -> None:
    x = torch.ones(2, 4096, device=device)
    x[1, 77] = bad
    scaled = quantize_rows(x)
    assert dequantised(scaled, torch.float32).isfinite().all(1).tolist() == [True, False]


@pytest.mark.gpu
def test_another_number_of_rows_compiles_nothing(device: torch.device) -> None:
    quantize_rows(torch.ones(64, 1024, device=device, dtype=torch.bfloat16))
    compiled = len(_quantize.device_caches[device.index or 0][0])
    for num_rows in (1, 7, 4096):
        quantize_rows(torch.ones(num_rows, 1024, device=device, dtype=torch.bfloat16))
    assert len(_quantize.device_caches[device.index or 0][0]) == compiled
