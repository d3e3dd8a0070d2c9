"""Hidden states in float8: half of the bytes of bfloat16, with a scale for each vector.

The format is e4m3fn: 3 bits of mantissa, at most 448, no infinity. A vector is divided by its scale, so that its
largest element becomes 448: each element is off by at most 1/16 of itself, or by 2^-10 of the scale where it is tiny.
"""

from typing import NamedTuple

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class ScaledFloat8(NamedTuple):
    """Vectors along the last dimension, and the factor that each is to be multiplied with."""

    values: Tensor
    """float8_e4m3fn"""
    scale: Tensor
    """float32, without the last dimension."""


def quantised(vectors: Tensor) -> ScaledFloat8:
    """The vectors of the last dimension in float8. A vector of zeros stays one."""
    vectors = vectors.float()
    # A product, because GPUs divide by a constant in another way than CPUs do. Not zero, by which a vector of zeros
    # would be divided.
    scale = (vectors.abs().amax(-1) * (1 / LARGEST)).clamp(min=SMALLEST_SCALE)
    return ScaledFloat8((vectors / scale.unsqueeze(-1)).to(FLOAT8), scale)


def dequantised(scaled: ScaledFloat8, dtype: torch.dtype) -> Tensor:
    """The vectors again, multiplied in float32 and rounded once to `dtype`."""
    # In place, the product is rounded as it is written: nothing of this size ever exists in float32 beside it.
    return scaled.values.to(dtype).mul_(scaled.scale.unsqueeze(-1))
