"""Tests of products in float8: exact where nothing is rounded, else off by as much as two roundings are."""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from specforge_core.data.float8 import dequantised
from specforge_core.kernels import dispatch
from specforge_core.kernels.cases import Numbers
from specforge_core.kernels.float8_product import float8_product, float8_weight, multiplies_float8
from specforge_core.kernels.quantize_rows import quantize_rows

# Two factors of normally distributed numbers, each rounded to 3 bits of mantissa: 2.6 % each, root mean square.
EXPECTED_ERROR = 0.038


def compute_dtype(device: torch.device) -> torch.dtype:
    """What a trainer computes in there; a GPU writes products of float8 rows in no other."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def on_cpu_references(device: torch.device) -> AbstractContextManager[None]:
    """Triton's interpreter does not round what it converts to float8."""
    return dispatch.references() if device.type == "cpu" else nullcontext()


def test_small_whole_numbers_are_multiplied_exactly(device: torch.device) -> None:
    # With a 7 = 448 / 2^6 in each row and column, all whole numbers up to 7 are numbers of the format times a scale.
    generator, dtype = torch.Generator().manual_seed(0), compute_dtype(device)
    x, grad, weight = (torch.randint(-7, 8, size, generator=generator) for size in ((40, 32), (40, 16), (16, 32)))
    x[:, 0] = grad[:, 0] = 7
    weight += torch.eye(16, 32).long() * (7 - weight)
    weight += torch.eye(16, 32).roll(16, dims=1).long() * (7 - weight)
    with on_cpu_references(device):
        float8 = float8_weight(weight.to(device, dtype))
        assert torch.equal(float8_product(x.to(device, dtype), float8.rows).cpu(), (x @ weight.T).to(dtype))
        assert torch.equal(float8_product(grad.to(device, dtype), float8.columns).cpu(), (grad @ weight).to(dtype))


def test_random_numbers_are_off_by_their_roundings(device: torch.device) -> None:
    numbers = Numbers(device, compute_dtype(device))
    x, grad, weight = numbers.normal(64, 256), numbers.normal(64, 128), numbers.normal(128, 256)
    with on_cpu_references(device):
        float8 = float8_weight(weight)
        forward, backward = float8_product(x, float8.rows), float8_product(grad, float8.columns)
    for product, exact in ((forward, x.double() @ weight.double().T), (backward, grad.double() @ weight.double())):
        error = ((product.double() - exact).norm() / exact.norm()).item()
        assert EXPECTED_ERROR / 1.2 < error < EXPECTED_ERROR * 1.2


def test_scales_are_of_rows_so_that_a_large_one_does_not_drown_a_small_one() -> None:
    numbers = Numbers(torch.device("cpu"), torch.float64)
    x, weight = numbers.normal(16, 64), numbers.normal(32, 64)
    x[3], weight[5] = 1e6 * x[3], 1e-6 * weight[5]
    with dispatch.references():
        product = float8_product(x, float8_weight(weight).rows)
    exact = x @ weight.T
    errors = (product - exact).abs() / (x.norm(dim=1).unsqueeze(1) * weight.norm(dim=1)) * 64**0.5
    # Of one product of unit variance; the largest of 512 such errors is about 3.5 standard deviations.
    assert errors.max() < 5 * EXPECTED_ERROR


def test_the_product_can_be_written_to_its_place(device: torch.device) -> None:
    numbers = Numbers(device, compute_dtype(device))
    x, weight = numbers.normal(48, 32), numbers.normal(16, 32)
    with on_cpu_references(device):
        float8 = float8_weight(weight)
        out = torch.full((64, 16), 7.0, device=device, dtype=x.dtype)
        returned = float8_product(x, float8.rows, out=out[8:56])
        assert returned.data_ptr() == out[8:56].data_ptr()
        assert torch.equal(out[8:56], float8_product(x, float8.rows))
    assert (out[:8] == 7).all()
    assert (out[56:] == 7).all()


@pytest.mark.parametrize("shape", [(24, 32), (32, 40)])
def test_sizes_that_matrix_units_do_not_take_are_refused(shape: tuple[int, int], device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"multiples of 16; set training.float8_matmuls to false"):
        float8_weight(torch.ones(shape, device=device))


def test_a_cpu_has_no_matrix_units_for_float8() -> None:
    assert not multiplies_float8(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_rows", "height", "width"), [(4096, 28672, 4096), (4001, 4096, 14336), (8192, 32000, 4096)]
)
def test_a_gpu_multiplies_what_was_rounded_as_exactly_as_bfloat16(
    num_rows: int, height: int, width: int, device: torch.device
) -> None:
    numbers = Numbers(device, torch.bfloat16)
    x, weight = numbers.normal(num_rows, width), numbers.normal(height, width)
    float8 = float8_weight(weight)
    # Every 97th row and 101st column, so that float64 takes no minutes.
    actual = float8_product(x, float8.rows)[::97, ::101].double()
    rounded_x, rounded_weight = (dequantised(part, torch.float64) for part in (quantize_rows(x[::97]), float8.rows))
    exact = rounded_x @ rounded_weight[::101].T
    # The result is rounded to 8 bits; sums are float32 or nearly so.
    assert (actual - exact).norm() / exact.norm() < 2**-9 * 1.5
