"""Matrix products in float8: each factor has a scale for every row, sums are float32.

    y = x W^T  ~  s_r t_o sum_k q_rk w_ok             x ~ s q by rows of x, W ~ t w by rows of W

Both factors are rounded to 3 bits of mantissa, 2.6 % of random numbers, root mean square; so their product is off by
3.8 % of its size. Hopper's matrix units multiply float8 twice as fast as bfloat16. They take the second factor with its
columns side by side, so a weight is kept in two copies, for the forward pass and for the gradient of the input. Without
a GPU the factors are rounded in the same way and multiplied in their own dtype.

R rows, K columns, O rows and I columns of a weight.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from specforge_core.data.float8 import ScaledFloat8, dequantised
from specforge_core.kernels.quantize_rows import quantize_rows

MULTIPLE = 16
"""Of which a factor's rows must be as many bytes, by cuBLAS."""
FAST_ACCUMULATION = False
"""Whether sums stay in Hopper's matrix units, which keep 14 bits of them; else they move to float32 on the way."""
FIRST_CAPABILITY = (8, 9)
"""The compute capability from which on GPUs multiply float8: Ada, then Hopper."""


class Float8Weight(NamedTuple):
    """A matrix [O, I] to multiply by from both sides."""

    rows: ScaledFloat8
    """[O, I], a scale for each row: for x W^T."""
    columns: ScaledFloat8
    """[I, O], the transpose, a scale for each of its rows: for g W."""


def float8_weight(value_OI: Tensor) -> Float8Weight:
    """The matrix in float8. Raises: ValueError for sizes that float8 products do not take."""
    if any(size % MULTIPLE for size in value_OI.shape):
        raise ValueError(
            f"a weight of {tuple(value_OI.shape)} cannot be multiplied in float8, which takes multiples of {MULTIPLE}; "
            "set training.float8_matmuls to false, or choose such sizes for the draft"
        )
    return Float8Weight(quantize_rows(value_OI), quantize_rows(value_OI.T.contiguous()))


@torch.no_grad()
def float8_product(x_RK: Tensor, weight: ScaledFloat8, *, out: Tensor | None = None) -> Tensor:
    """x weight^T [R, O] in the dtype of `x`.

    Args: x_RK: rounded here, row by row; weight: values [O, K], such as one side of a `Float8Weight`; out: where to
    write the product.
    """
    x = quantize_rows(x_RK)
    if not x_RK.is_cuda:
        return torch.mm(dequantised(x, x_RK.dtype), dequantised(weight, x_RK.dtype).T, out=out)
    return torch._scaled_mm(
        x.values,
        weight.values.T,
        scale_a=x.scale.unsqueeze(1),
        scale_b=weight.scale.unsqueeze(0),
        out_dtype=x_RK.dtype,
        use_fast_accum=FAST_ACCUMULATION,
        out=out,
    )


def multiplies_float8(device: torch.device) -> bool:
    """Whether the device has matrix units for float8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY
