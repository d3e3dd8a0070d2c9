"""Cases of the kernels that are bound by memory: norm, activation, rotation, float8.

R rows, D width, I feed-forward width, K columns, C head width, X rows of an embedding half, E its columns, P positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specforge_core.kernels.cases import Case, Inputs, Numbers, Work
from specforge_core.kernels.quantize_rows import quantize_rows, quantize_rows_reference
from specforge_core.kernels.rms_norm import residual_rms_norm, rms_norm, rms_norm_reference
from specforge_core.kernels.rope import Angles, Part, add_rope, add_rope_reference
from specforge_core.kernels.swiglu import swiglu, swiglu_backward, swiglu_backward_reference, swiglu_reference

FLOAT8, BFLOAT16, FLOAT32 = 1, 2, 4
"""Bytes of a number."""
# A pass of training, and the widths of a Llama 3.1 8B; 7168 is no power of two.
NUM_ROWS = 4096
EPS = 1e-5


def cases() -> tuple[Case, ...]:
    """What a training step runs, at its size."""
    return (
        residual_rms_norm_case(NUM_ROWS, 4096),
        branch_rms_norm_case(NUM_ROWS, 4096),
        rms_norm_case(NUM_ROWS, 7168),
        swiglu_case(NUM_ROWS, 14336),
        swiglu_backward_case(NUM_ROWS, 14336),
        add_rope_case(NUM_ROWS, {"query": (32, 32)}, head_width=128),
        add_rope_case(NUM_ROWS, {"query": (32, 32), "key_value": (16, 8)}, head_width=128),
        quantize_rows_case(NUM_ROWS, 4096),
        quantize_rows_case(NUM_ROWS, 28672),
    )


def rms_norm_case(num_rows: int, width: int) -> Case:
    """The norm alone."""

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        numbers = Numbers(device, dtype)
        # Norm weights stay in float32 when activations do not.
        return {"x_RD": numbers.leaf(num_rows, width), "weight_D": _norm_weight(numbers, width)}

    size = num_rows * width
    return Case(
        f"rms_norm {num_rows} x {width}",
        make_inputs,
        lambda x_RD, weight_D: rms_norm(x_RD, weight_D, EPS),
        lambda x_RD, weight_D: rms_norm_reference(x_RD, weight_D, EPS),
        shapes={"R": num_rows, "D": width},
        bytes=Work(2 * size * BFLOAT16, 3 * size * BFLOAT16),
        flops=Work(4 * size, 9 * size),
    )


def residual_rms_norm_case(num_rows: int, width: int) -> Case:
    """The norm, and its input as the start of a residual branch."""
    norm = rms_norm_case(num_rows, width)
    size = num_rows * width
    return Case(
        f"residual_rms_norm {num_rows} x {width}",
        norm.make_inputs,
        lambda x_RD, weight_D: residual_rms_norm(x_RD, weight_D, EPS),
        lambda x_RD, weight_D: (rms_norm_reference(x_RD, weight_D, EPS), x_RD.view_as(x_RD)),
        shapes=norm.shapes,
        bytes=Work(2 * size * BFLOAT16, 4 * size * BFLOAT16),
        flops=Work(4 * size, 10 * size),
    )


def branch_rms_norm_case(num_rows: int, width: int) -> Case:
    """The norm between two residual branches: of the sum of one's end and what went into it."""

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        numbers = Numbers(device, dtype)
        x_RD, branch_RD = numbers.leaf(num_rows, width), numbers.leaf(num_rows, width)
        return {"x_RD": x_RD, "branch_RD": branch_RD, "weight_D": _norm_weight(numbers, width)}

    def reference(x_RD: Tensor, branch_RD: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        sum_RD = x_RD + branch_RD
        return rms_norm_reference(sum_RD, weight_D, EPS), sum_RD

    size = num_rows * width
    return Case(
        f"branch_rms_norm {num_rows} x {width}",
        make_inputs,
        lambda x_RD, branch_RD, weight_D: residual_rms_norm(x_RD, weight_D, EPS, branch_RD=branch_RD),
        reference,
        shapes={"R": num_rows, "D": width},
        bytes=Work(4 * size * BFLOAT16, 4 * size * BFLOAT16),
        flops=Work(5 * size, 10 * size),
    )


def swiglu_case(num_rows: int, width: int) -> Case:
    """The activation, and the gradient of gate and up alone."""
    size = num_rows * width
    return Case(
        f"swiglu {num_rows} x {width}",
        lambda device, dtype: {"gate_up_R2I": Numbers(device, dtype).leaf(num_rows, 2 * width)},
        lambda gate_up_R2I: swiglu(gate_up_R2I),
        lambda gate_up_R2I: swiglu_reference(gate_up_R2I),
        shapes={"R": num_rows, "I": width},
        bytes=Work(3 * size * BFLOAT16, 5 * size * BFLOAT16),
        flops=Work(5 * size, 10 * size),
    )


def swiglu_backward_case(num_rows: int, width: int) -> Case:
    """The gradient of gate and up together with the activation, as the backward pass of a feed-forward layer wants."""

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        numbers = Numbers(device, dtype)
        return {"grad_RI": numbers.normal(num_rows, width), "gate_up_R2I": numbers.normal(num_rows, 2 * width)}

    size = num_rows * width
    return Case(
        f"swiglu_backward {num_rows} x {width}",
        make_inputs,
        lambda grad_RI, gate_up_R2I: swiglu_backward(grad_RI, gate_up_R2I, out=torch.empty_like(gate_up_R2I)),
        lambda grad_RI, gate_up_R2I: swiglu_backward_reference(grad_RI, gate_up_R2I),
        shapes={"R": num_rows, "I": width},
        bytes=Work(6 * size * BFLOAT16, 0),
        flops=Work(11 * size, 0),
    )


def add_rope_case(num_rows: int, heads: dict[str, tuple[int, int]], head_width: int, *, num_shared: int = 0) -> Case:
    """The end of a projection.

    Args: heads: by name of the part, how many heads it has and how many of them are rotated; num_shared: rows of the
        embedding halves, twice those of the projection if 0.
    """
    num_shared = num_shared or 2 * num_rows
    width = head_width * sum(num_heads for num_heads, _ in heads.values())

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        numbers = Numbers(device, dtype)
        inputs: Inputs = {"x_RE": numbers.leaf(num_rows, width)}
        for name, (num_heads, _) in heads.items():
            shared_XE = numbers.leaf(num_shared, num_heads * head_width)
            grad_dtype = torch.promote_types(dtype, torch.float32)
            inputs |= {name: shared_XE, f"{name}_grad": torch.zeros_like(shared_XE, dtype=grad_dtype).detach()}
        # Another order than that of the tokens; shifted by one, the last row reads past the end.
        index_R = torch.randperm(num_shared - 1, generator=torch.Generator().manual_seed(0))[: num_rows - 1]
        index_R = torch.cat((index_R, torch.tensor([num_shared - 1])))
        angle_PC2 = torch.arange(num_rows + 4)[:, None] * 0.5 ** torch.arange(head_width // 2)
        tables = {"cos_PC2": angle_PC2.cos(), "sin_PC2": angle_PC2.sin()}
        inputs |= {name: table.to(device).to(grad_dtype) for name, table in tables.items()}
        return inputs | {"index_R": index_R.to(device), "position_R": torch.arange(num_rows, device=device)}

    def parts(inputs: Inputs, *, accumulates: bool) -> Sequence[Part]:
        return [
            Part(
                num_heads,
                num_rotated,
                inputs[name].detach() if accumulates else inputs[name],
                inputs[f"{name}_grad"] if accumulates else None,
                inputs["index_R"],
                shift=1,
            )
            for name, (num_heads, num_rotated) in heads.items()
        ]

    def op(x_RE: Tensor, position_R: Tensor, cos_PC2: Tensor, sin_PC2: Tensor, **rest: Any) -> tuple[Tensor, ...]:
        return add_rope(x_RE, parts(rest, accumulates=True), position_R, 3, cos_PC2, sin_PC2)

    def reference(
        x_RE: Tensor, position_R: Tensor, cos_PC2: Tensor, sin_PC2: Tensor, **rest: Any
    ) -> tuple[Tensor, ...]:
        return add_rope_reference(x_RE, parts(rest, accumulates=False), Angles(position_R, 3, cos_PC2, sin_PC2))

    size, tables = num_rows * width, num_rows * head_width * FLOAT32
    return Case(
        f"add_rope {num_rows} x {' + '.join(heads)}",
        make_inputs,
        op,
        reference,
        shapes={"R": num_rows, "C": head_width} | {name: num_heads for name, (num_heads, _) in heads.items()},
        bytes=Work(3 * size * BFLOAT16 + tables, 2 * size * BFLOAT16 + 2 * size * FLOAT32 + tables),
        flops=Work(4 * size, 4 * size),
    )


def quantize_rows_case(num_rows: int, width: int) -> Case:
    """Rows in float8, of which every bit must be right."""

    def bits(values_RK: Tensor, scale_R: Tensor) -> tuple[Tensor, Tensor]:
        return values_RK.view(torch.uint8), scale_R

    size = num_rows * width
    return Case(
        f"quantize_rows {num_rows} x {width}",
        lambda device, dtype: {"x_RK": Numbers(device, dtype).normal(num_rows, width)},
        lambda x_RK: bits(*quantize_rows(x_RK)),
        lambda x_RK: bits(*quantize_rows_reference(x_RK)),
        shapes={"R": num_rows, "K": width},
        bytes=Work(size * (BFLOAT16 + FLOAT8) + num_rows * FLOAT32, 0),
        flops=Work(3 * size, 0),
    )


def _norm_weight(numbers: Numbers, width: int) -> Tensor:
    return (1 + numbers.normal(width, scale=0.1).to(torch.promote_types(numbers.dtype, torch.float32))).requires_grad_()
