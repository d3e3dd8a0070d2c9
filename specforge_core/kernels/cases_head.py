"""Cases of the head: linear layer, soft cross entropy, acceptance and gradients of all steps of a pass.

R rows of a pass, U teacher rows, S steps, H width, W draft vocabulary.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge_core.kernels.accumulate import wide_product
from specforge_core.kernels.cases import Case, Inputs, Numbers, Work
from specforge_core.kernels.linear_soft_cross_entropy import (
    HeadLoss,
    Teacher,
    linear_soft_cross_entropy,
    linear_soft_cross_entropy_reference,
)

STEP_LOSS_DECAY = 0.8
ROWS_PER_ANSWER = 64
"""Each answer ends in one row of every depth below S."""
BUCKET = 256
"""What numbers of rows are rounded up to."""
SPREAD = 7919
"""Ids of neighbouring rows' favourites are so far apart."""
LOGIT_OF_FAVOURITE, LOGIT_STD = 16.0, 1.6
"""Of other logits, none reaches the favourite's: then rounding changes no argmax, and hits can be compared exactly."""


def cases() -> tuple[Case, ...]:
    """Passes of a training step; `full-vocabulary` has a draft vocabulary of all of Qwen3's ids."""
    return (
        head_case("llama-3.1-8b", num_rows=4096, num_steps=7, width=4096, vocab_size=32000),
        head_case("llama-3.3-70b", num_rows=4096, num_steps=7, width=8192, vocab_size=32000),
        head_case("qwen3-30b-a3b", num_rows=4096, num_steps=7, width=2048, vocab_size=32000),
        head_case("full-vocabulary", num_rows=1024, num_steps=7, width=4096, vocab_size=151_936),
    )


def head_case(shape: str, *, num_rows: int, num_steps: int, width: int, vocab_size: int) -> Case:
    """A pass with gradients: all its work is in the forward pass."""
    total = sum(row_counts(num_rows, num_steps))
    num_teachers = num_rows + num_steps
    product = 2 * width * vocab_size
    weight_size = width * vocab_size
    return Case(
        name=f"linear_soft_cross_entropy/{shape}",
        make_inputs=partial(_make_inputs, num_rows=num_rows, num_steps=num_steps, width=width, vocab_size=vocab_size),
        op=_op,
        reference=_reference,
        shapes={"R": num_rows, "S": num_steps, "H": width, "W": vocab_size},
        # Both heads and all hidden states in bfloat16 once, the gradient of the hidden states, and a float32 sum.
        bytes=Work(forward=2 * (2 * weight_size + (2 * total + num_teachers) * width) + 8 * weight_size, backward=0),
        flops=Work(forward=(3 * total + num_teachers) * product, backward=0),
        # The reference runs its own backward pass, which torch.compile does not take.
        has_compiled_rival=False,
        # Matrix units truncate what they add up: a teacher's logit of 16 comes out 1e-4 too low, which adds up over the
        # acceptances of 4,096 rows, to 0.2 or 0.3 on an H100. Their roundings may add up to 0.6.
        num_summed=num_rows,
    )


def row_counts(num_rows: int, num_steps: int) -> list[int]:
    """By step, rounded up to a bucket."""
    num_answers = max(num_rows // ROWS_PER_ANSWER, 1)
    return [min(num_rows, -(-(num_rows - step * num_answers) // BUCKET) * BUCKET) for step in range(num_steps)]


def _make_inputs(
    device: torch.device, dtype: torch.dtype, *, num_rows: int, num_steps: int, width: int, vocab_size: int
) -> Inputs:
    numbers = Numbers(device, torch.float32)

    def hidden_states(head_WH: Tensor, favourite_R: Tensor) -> Tensor:
        """Hidden states whose logit of the favourite is LOGIT_OF_FAVOURITE, those of others LOGIT_STD * N(0, 1)."""
        direction_RH = F.normalize(head_WH[favourite_R].float(), dim=1)
        noise_RH = numbers.normal(len(favourite_R), width, scale=LOGIT_STD)
        return (LOGIT_OF_FAVOURITE * direction_RH + noise_RH).to(dtype)

    # Rows of length about 1, and the draft's near the target's.
    weight_WH = numbers.normal(vocab_size, width, scale=width**-0.5).to(dtype)
    head_WH = (weight_WH + numbers.normal(vocab_size, width, scale=0.1 * width**-0.5)).to(dtype)
    teacher_U = torch.arange(num_rows + num_steps, device=device)
    favourite_U = teacher_U * SPREAD % vocab_size
    teacher_hidden_UH = hidden_states(head_WH, favourite_U)
    logsumexp_U = torch.cat([wide_product(part, head_WH.T).logsumexp(-1) for part in teacher_hidden_UH.split(1024)])
    argmax_U = favourite_U.masked_fill(teacher_U % 10 == 9, -1)
    teacher = Teacher(teacher_hidden_UH, head_WH, argmax_U, logsumexp_U + 0.1)
    num_answers = max(num_rows // ROWS_PER_ANSWER, 1)
    row_R = torch.arange(num_rows, device=device)
    inputs: Inputs = {}
    for step, count in enumerate(row_counts(num_rows, num_steps)):
        # Every third row of the draft has another favourite than the target has.
        offset_R = (row_R[:count] % 3 == 0).long()
        guess_R = (favourite_U[step : step + count] + offset_R) % vocab_size
        inputs[f"hidden_{step}"] = hidden_states(weight_WH, guess_R).requires_grad_()
    return inputs | {
        "weight": weight_WH.requires_grad_(),
        "weight_grad": torch.zeros(vocab_size, width, device=device, dtype=torch.promote_types(dtype, torch.float32)),
        "teacher": teacher,
        "teacher_R": row_R,
        "depth_R": ((num_rows - 1 - row_R) // num_answers + 1).clamp(max=num_steps),
    }


def _op(
    *, weight: Tensor, weight_grad: Tensor, teacher: Teacher, teacher_R: Tensor, depth_R: Tensor, **hidden: Tensor
) -> tuple[Tensor, ...]:
    step_weights = [STEP_LOSS_DECAY**step for step in range(len(hidden))]
    head = linear_soft_cross_entropy(
        list(hidden.values()), weight, teacher, teacher_R, depth_R,
        step_weights=step_weights, weight_grad_WH=weight_grad,
    )  # fmt: skip
    assert head.hidden_grads is not None
    for hidden_RH, grad_RH in zip(hidden.values(), head.hidden_grads, strict=True):
        hidden_RH.grad = grad_RH
    return _sums(head)


def _reference(
    *, weight: Tensor, weight_grad: Tensor, teacher: Teacher, teacher_R: Tensor, depth_R: Tensor, **hidden: Tensor
) -> tuple[Tensor, ...]:
    head = linear_soft_cross_entropy_reference(list(hidden.values()), weight, teacher, teacher_R, depth_R)
    total = sum(STEP_LOSS_DECAY**step * loss for step, loss in enumerate(head.loss_S))
    assert isinstance(total, Tensor)
    total.backward()
    return _sums(head)


def _sums(head: HeadLoss) -> tuple[Tensor, ...]:
    """Loss and acceptance, hits and rows; what is counted as integers, which must be right."""
    return head.loss_S.detach(), head.correct_S.long(), head.accepted_S.detach(), head.valid_S.long()
