"""Matrix products of low-precision factors that keep float32: as a result, or added to a sum that is float32.

Matrix units multiply bfloat16 and add in float32 anyway; rounding that sum to bfloat16 is what is saved here. On a GPU
the product is written, or added to the sum, in float32 by the matrix product itself, without a temporary.
"""

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)


@torch.no_grad()
def accumulate_product(grad: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `grad` in place, in the dtype of `grad`.

    Args: grad: [rows, columns], at least as precise as the factors; a view is fine, such as some columns of a larger
    matrix; a: [rows, n]; b: [n, columns], in the dtype of `a`.
    """
    if _writes_float32(a) and grad.dtype == torch.float32:
        torch.addmm(grad, a, b, out_dtype=torch.float32, out=grad)
    else:
        grad.addmm_(a.to(grad.dtype), b.to(grad.dtype))


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, or in float64 if the factors are that."""
    if _writes_float32(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.to(dtype) @ b.to(dtype)


def _writes_float32(factor: Tensor) -> bool:
    # Only cuBLAS mixes dtypes: on a CPU the factors themselves must be float32.
    return factor.is_cuda and factor.dtype in LOW_PRECISION
