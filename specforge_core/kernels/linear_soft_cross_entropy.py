"""Linear head, soft cross entropy and acceptance of all steps of a pass, and their gradients at the same time.

    logits    x = h W^T                                     of row r at step i; teacher row u = teacher_r + i teaches it
    teacher   z = y W'^T,  P = softmax(z),  Q = P e^(logsumexp(z) - L)     L over the target's full vocabulary
    loss      -sum_v P log p,  p = softmax(x)               accepted  sum_v min(p, Q)
    gradient  dx = w_i (p - P),  dh = dx W,  dW += dx^T h   w_i the weight of step i

Row r is active at step i while depth_r > i. It has loss, acceptance and gradient if the target's favourite is in the
draft vocabulary; otherwise it only counts as a miss.

No logits of the draft outlive their chunk of rows: x is rounded to the dtype of h, and dx takes its place. The
teacher's P is computed once for all steps, and in float32: a logit of 20 in bfloat16 is off by up to 0.06, and P by
6 %. Sums over the vocabulary are float32, and so is the sum that dW is added to.
Source: the chunked head of Liger Kernel, arXiv 2410.10989, and the online softmax, arXiv 1805.02867.

R rows of a step (R_0 >= R_1 >= ...), U teacher rows, S steps, H width, W draft vocabulary. B rows of a chunk: slot
after slot with all its steps, so that those that read the same teacher row run together and find it in the cache.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.profiler import record_function

from specforge_core.kernels.accumulate import accumulate_product, wide_product
from specforge_core.kernels.dispatch import uses_triton
from specforge_core.kernels.float8_product import Float8Weight, float8_product
from specforge_core.kernels.head_chunks import Block, plan_chunks
from specforge_core.kernels.precision import at_least_float32

CHUNK_ROWS = 6144
"""Rows whose logits exist at a time: enough that adding to dW, a float32 matrix, is cheap next to the product."""
CPU_CHUNK_ELEMENTS = 1 << 20
"""Logits that exist at a time on a CPU: few enough to stay in its cache."""
BLOCK, NUM_WARPS = 4096, 16
"""Columns at a time: one access of 16 bytes to bfloat16 per thread. Two programs share a multiprocessor of Hopper, and
of 32,000 columns the rows of them all stay in its level-2 cache between the two times that they are read."""
_LOWEST = tl.constexpr(-3.0e38)


class Teacher(NamedTuple):
    """What the target says of the U teacher rows of a pass."""

    hidden_UH: Tensor
    """After the target's final norm."""
    head_WH: Tensor
    """The target head's rows of the draft vocabulary."""
    argmax_U: Tensor
    """int32 or int64, draft vocabulary id of the target's favourite; -1 if it is outside the draft vocabulary."""
    logsumexp_U: Tensor
    """float32, of the target's logits over its full vocabulary."""


class HeadLoss(NamedTuple):
    """Sums over the active rows of each step, [S], float32 (float64 if `hidden` is)."""

    loss_S: Tensor
    """Not weighted."""
    correct_S: Tensor
    """Rows whose first largest logit is the target's favourite."""
    accepted_S: Tensor
    valid_S: Tensor
    """The active rows."""
    hidden_grads: tuple[Tensor, ...] | None
    """Of sum_i step_weights[i] * loss_S[i], like `hidden`; None in evaluation."""


class Target(NamedTuple):
    """The teacher as the loss reads it."""

    probability_UW: Tensor
    """P, float32 or float64."""
    kept_mass_U: Tensor
    """Q / P: the target's probability of the draft vocabulary."""
    argmax_U: Tensor


def linear_soft_cross_entropy_reference(
    hidden: Sequence[Tensor], weight_WH: Tensor, teacher: Teacher, teacher_R: Tensor, depth_R: Tensor
) -> HeadLoss:
    """What `linear_soft_cross_entropy` returns, step by step in plain PyTorch; `loss_S` is differentiable."""
    teacher_logits_UW = F.linear(at_least_float32(teacher.hidden_UH), at_least_float32(teacher.head_WH))
    probability_UW = teacher_logits_UW.softmax(-1)
    kept_mass_U = (teacher_logits_UW.logsumexp(-1) - teacher.logsumexp_U).exp()
    steps = []
    for step, hidden_RH in enumerate(hidden):
        is_active_R = depth_R[: len(hidden_RH)] > step
        # Rows behind their depth may point past the last teacher row.
        taught_by_R = (teacher_R[: len(hidden_RH)] + step).clamp(max=len(probability_UW) - 1)
        argmax_R = teacher.argmax_U[taught_by_R]
        is_taught_R = is_active_R & (argmax_R >= 0)
        logits_RW = at_least_float32(F.linear(hidden_RH, weight_WH))
        target_RW = probability_UW[taught_by_R]
        loss_R = F.cross_entropy(logits_RW, target_RW, reduction="none")
        with torch.no_grad():
            own_RW = target_RW * kept_mass_U[taught_by_R].unsqueeze(1)
            accepted_R = torch.minimum(logits_RW.softmax(-1), own_RW).sum(-1)
            is_correct_R = is_taught_R & (logits_RW.argmax(-1) == argmax_R)
        sums = [torch.where(is_taught_R, loss_R, 0.0).sum(), is_correct_R.sum()]
        sums += [torch.where(is_taught_R, accepted_R, 0.0).sum(), is_active_R.sum()]
        steps.append(torch.stack([x.to(logits_RW.dtype) for x in sums]))
    loss_S, correct_S, accepted_S, valid_S = torch.stack(steps, dim=1)
    return HeadLoss(loss_S, correct_S, accepted_S, valid_S, hidden_grads=None)


@triton.jit
def _maximum_and_log_sum(row_ptr, W: tl.constexpr, BLOCK: tl.constexpr):
    """The row's maximum and log(sum_v e^(x_v - maximum)); their sum would be rounded to the maximum's precision."""
    # Every lane keeps a maximum and a sum of its own, so that the loop needs no reduction across threads.
    lanes = tl.arange(0, BLOCK)
    maximum = tl.full((BLOCK,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, W, BLOCK):
        column = start + lanes
        x = tl.load(row_ptr + column, mask=column < W, other=float("-inf")).to(tl.float32)
        smaller = tl.exp(-tl.abs(x - maximum))
        total = tl.where(x > maximum, total * smaller + 1.0, total + smaller)
        maximum = tl.maximum(maximum, x)
    top = tl.max(maximum, axis=0)
    return top, tl.log(tl.sum(total * tl.exp(maximum - top), axis=0))


# What is read one number at a time needs no alignment, which may differ from pass to pass.
@triton.jit(do_not_specialize_on_alignment=["logsumexp_ptr"])
def _target_kernel(
    logits_ptr, logsumexp_ptr, kept_mass_ptr, W: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Q / P of one teacher row; P takes the place of its logits."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * W
    top, log_sum = _maximum_and_log_sum(row_ptr, W, BLOCK)
    tl.store(kept_mass_ptr + row, tl.exp(top - tl.load(logsumexp_ptr + row) + log_sum))
    for start in range(0, W, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(row_ptr + column, mask=column < W, other=0.0)
        tl.store(row_ptr + column, tl.exp(z - top - log_sum), mask=column < W)


@triton.jit(
    do_not_specialize=["first_slot", "num_steps", "num_slots"],
    do_not_specialize_on_alignment=["argmax_ptr", "teacher_ptr", "depth_ptr"],
)
def _loss_kernel(
    logits_ptr, probability_ptr, kept_mass_ptr, argmax_ptr, teacher_ptr, depth_ptr, sums_ptr, step_weights,
    first_slot, num_steps, num_slots, W: tl.constexpr, BLOCK: tl.constexpr, WITH_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Loss, hit and acceptance of one row, to sums [3, S, num_slots]; the gradient takes the place of its logits."""
    row = tl.program_id(0)
    slot = first_slot + row // num_steps
    step = row % num_steps
    row_ptr = logits_ptr + row.to(tl.int64) * W
    lanes = tl.arange(0, BLOCK)
    is_active = tl.load(depth_ptr + slot) > step
    teacher = tl.load(teacher_ptr + slot).to(tl.int64) + step
    favourite = tl.load(argmax_ptr + teacher, mask=is_active, other=-1)
    if favourite < 0:
        if WITH_GRADIENT:
            for start in range(0, W, BLOCK):
                nothing = tl.zeros((BLOCK,), logits_ptr.dtype.element_ty)
                tl.store(row_ptr + start + lanes, nothing, mask=start + lanes < W)
    else:
        step_weight = 0.0
        for i in tl.static_range(len(step_weights)):
            step_weight = tl.where(step == i, step_weights[i], step_weight)
        kept_mass = tl.load(kept_mass_ptr + teacher)
        top, log_sum = _maximum_and_log_sum(row_ptr, W, BLOCK)
        loss = tl.zeros((BLOCK,), tl.float32)
        accepted = tl.zeros((BLOCK,), tl.float32)
        first_top = tl.full((BLOCK,), W, tl.int32)
        for start in range(0, W, BLOCK):
            column = start + lanes
            inside = column < W
            x = tl.load(row_ptr + column, mask=inside, other=0.0).to(tl.float32)
            target = tl.load(probability_ptr + teacher * W + column, mask=inside, other=0.0)
            log_p = x - top - log_sum
            p = tl.exp(log_p)
            loss -= target * log_p
            accepted += tl.minimum(p, target * kept_mass)
            first_top = tl.minimum(first_top, tl.where(x == top, column, W))
            if WITH_GRADIENT:
                gradient = (step_weight * (p - target)).to(logits_ptr.dtype.element_ty)
                tl.store(row_ptr + column, gradient, mask=inside)
        size = len(step_weights) * num_slots
        place = sums_ptr + step * num_slots + slot
        tl.store(place, tl.sum(loss, axis=0))
        tl.store(place + size, (tl.min(first_top, axis=0) == favourite).to(tl.float32))
        tl.store(place + 2 * size, tl.sum(accepted, axis=0))


class _Job(NamedTuple):
    """What all chunks share. `weight_grad_WH` and `hidden_grads` are None in evaluation."""

    hidden: Sequence[Tensor]
    weight_WH: Tensor
    weight_float8: Float8Weight | None
    target: Target
    teacher_R: Tensor
    depth_R: Tensor
    step_weights: tuple[float, ...]
    sums_3SR: Tensor
    """Loss, hit and acceptance by row; 0 where a row has none."""
    weight_grad_WH: Tensor | None
    hidden_grads: tuple[Tensor, ...] | None


@torch.no_grad()
def linear_soft_cross_entropy(
    hidden: Sequence[Tensor],
    weight_WH: Tensor,
    teacher: Teacher,
    teacher_R: Tensor,
    depth_R: Tensor,
    *,
    step_weights: Sequence[float],
    weight_grad_WH: Tensor | None,
    weight_float8: Float8Weight | None = None,
) -> HeadLoss:
    """Loss and metrics of all steps of a pass, and with `weight_grad_WH` the gradients of sum_i step_weights[i] loss_i.

    Autograd is not involved: hand `hidden_grads` to `torch.autograd.backward(hidden, hidden_grads)`.

    Args: hidden: [R_i, H] of each step i, row r always the same slot; weight_WH: the draft's head, in the dtype of
    `hidden`; teacher_R: the teacher row that row r reads at step 0, that of step i is i more; depth_R: the number of
    steps at which row r is active, at most the number of `hidden` that reach it; step_weights: of the steps' losses;
    weight_grad_WH: at least float32, where the gradient of `weight_WH` is added; None evaluates without gradients;
    weight_float8: `weight_WH`, to multiply by in its place; its own gradient and the teacher stay as they are.
    Raises: ValueError if shapes do not fit.
    """
    row_counts = [len(hidden_RH) for hidden_RH in hidden]
    _check_shapes(hidden, weight_WH, teacher, (teacher_R, depth_R), step_weights)
    fused = uses_triton("linear_soft_cross_entropy", weight_WH)
    sums_dtype = torch.promote_types(weight_WH.dtype, torch.float32)
    with record_function("teacher"):
        target = _make_target(teacher, fused=fused)
    job = _Job(
        hidden=hidden,
        weight_WH=weight_WH,
        weight_float8=weight_float8,
        target=target,
        teacher_R=teacher_R,
        depth_R=depth_R,
        step_weights=tuple(float(weight) for weight in step_weights),
        sums_3SR=torch.zeros(3, len(hidden), row_counts[0], dtype=sums_dtype, device=weight_WH.device),
        weight_grad_WH=weight_grad_WH,
        hidden_grads=None if weight_grad_WH is None else tuple(torch.empty_like(x) for x in hidden),
    )
    chunk_rows = CHUNK_ROWS if weight_WH.is_cuda else max(CPU_CHUNK_ELEMENTS // len(weight_WH), 1)
    for blocks in plan_chunks(row_counts, chunk_rows):
        _run_chunk(job, blocks, fused=fused)
    loss_S, correct_S, accepted_S = job.sums_3SR.sum(dim=2)
    is_active_SR = depth_R > torch.arange(len(hidden), device=depth_R.device).unsqueeze(1)
    return HeadLoss(loss_S, correct_S, accepted_S, is_active_SR.sum(dim=1).to(sums_dtype), job.hidden_grads)


def _make_target(teacher: Teacher, *, fused: bool) -> Target:
    logits_UW = wide_product(teacher.hidden_UH, teacher.head_WH.T)
    if not fused:
        kept_mass_U = (logits_UW.logsumexp(-1) - teacher.logsumexp_U).exp()
        return Target(logits_UW.softmax(-1), kept_mass_U, teacher.argmax_U)
    num_rows, vocab_size = logits_UW.shape
    kept_mass_U = torch.empty_like(teacher.logsumexp_U)
    _target_kernel[(num_rows,)](logits_UW, teacher.logsumexp_U, kept_mass_U, **_columns(vocab_size))
    return Target(logits_UW, kept_mass_U, teacher.argmax_U)


def _run_chunk(job: _Job, blocks: list[Block], *, fused: bool) -> None:
    """Add the chunk's sums and gradients to those of the job."""
    sizes = [block.num_rows for block in blocks]
    chunk_BH = job.weight_WH.new_empty(sum(sizes), job.weight_WH.shape[1])
    for block, part_BH in zip(blocks, chunk_BH.split(sizes), strict=True):
        steps = [hidden_RH[block.slots] for hidden_RH in job.hidden[: block.num_steps]]
        torch.stack(steps, dim=1, out=part_BH.unflatten(0, (block.num_slots, block.num_steps)))
    float8 = job.weight_float8
    logits_BW = chunk_BH @ job.weight_WH.T if float8 is None else float8_product(chunk_BH, float8.rows)
    for block, part_BW in zip(blocks, logits_BW.split(sizes), strict=True):
        if fused:
            _loss_in_triton(job, block, part_BW)
        else:
            _loss_in_torch(job, block, part_BW)
    if job.weight_grad_WH is None or job.hidden_grads is None:
        return
    accumulate_product(job.weight_grad_WH, logits_BW.T, chunk_BH)
    # The hidden states were read for the last time, so their gradient takes their place.
    if float8 is None:
        torch.mm(logits_BW, job.weight_WH, out=chunk_BH)
    else:
        float8_product(logits_BW, float8.columns, out=chunk_BH)
    for block, part_BH in zip(blocks, chunk_BH.split(sizes), strict=True):
        by_step = part_BH.unflatten(0, (block.num_slots, block.num_steps)).unbind(1)
        for hidden_grad_RH, grad_RH in zip(job.hidden_grads, by_step, strict=False):
            hidden_grad_RH[block.slots] = grad_RH


def _loss_in_triton(job: _Job, block: Block, logits_BW: Tensor) -> None:
    """Write the block's sums; with gradients, that of the logits takes their place."""
    _loss_kernel[(block.num_rows,)](
        logits_BW, *job.target, job.teacher_R, job.depth_R, job.sums_3SR, job.step_weights,
        block.first_slot, block.num_steps, len(job.depth_R),
        WITH_GRADIENT=job.hidden_grads is not None, **_columns(logits_BW.shape[1]),
    )  # fmt: skip


def _loss_in_torch(job: _Job, block: Block, logits_BW: Tensor) -> None:
    """What `_loss_in_triton` does, in plain PyTorch."""
    step = torch.arange(block.num_steps, device=logits_BW.device)
    # Rows behind their depth may point past the last teacher row.
    last_teacher = len(job.target.probability_UW) - 1
    taught_by_B = (job.teacher_R[block.slots].unsqueeze(1) + step).flatten().clamp(max=last_teacher)
    argmax_B = job.target.argmax_U[taught_by_B]
    is_taught_B = (job.depth_R[block.slots].unsqueeze(1) > step).flatten() & (argmax_B >= 0)
    # Unlike indexing, index_select copies rows as fast as memory allows.
    target_BW = job.target.probability_UW.index_select(0, taught_by_B)
    is_correct_B = logits_BW.argmax(-1) == argmax_B
    # New memory and logarithms cost a CPU most. log p = x - max(x) + log max(p), P sums to 1, and `wide_BW` is used
    # again as soon as it was read.
    wide_BW = at_least_float32(logits_BW)
    p_BW = wide_BW.softmax(-1)
    wide_BW.sub_(wide_BW.amax(-1, keepdim=True)).mul_(target_BW)
    loss_B = -wide_BW.sum(-1) - p_BW.amax(-1).log()
    if job.hidden_grads is not None:
        weight_N = torch.tensor(job.step_weights[: block.num_steps], dtype=p_BW.dtype, device=p_BW.device)
        weight_B = weight_N.repeat(block.num_slots) * is_taught_B
        logits_BW.copy_(torch.sub(p_BW, target_BW, out=wide_BW).mul_(weight_B.unsqueeze(1)))
    own_BW = target_BW.mul_(job.target.kept_mass_U[taught_by_B].unsqueeze(1))
    accepted_B = torch.minimum(p_BW, own_BW, out=own_BW).sum(-1)
    sums_3B = torch.stack((loss_B, is_correct_B.to(loss_B.dtype), accepted_B)).masked_fill_(~is_taught_B, 0.0)
    job.sums_3SR[:, : block.num_steps, block.slots] = sums_3B.unflatten(1, (block.num_slots, -1)).transpose(1, 2)


def _columns(vocab_size: int) -> dict[str, int]:
    return {"W": vocab_size, "BLOCK": min(BLOCK, triton.next_power_of_2(vocab_size)), "num_warps": NUM_WARPS}


def _check_shapes(
    hidden: Sequence[Tensor],
    weight_WH: Tensor,
    teacher: Teacher,
    by_row: tuple[Tensor, Tensor],
    step_weights: Sequence[float],
) -> None:
    row_counts = [len(hidden_RH) for hidden_RH in hidden]
    lengths = [len(x_R) for x_R in by_row]
    if not row_counts or row_counts != sorted(row_counts, reverse=True) or lengths != [row_counts[0]] * 2:
        raise ValueError(
            f"the steps have {row_counts} rows, teacher_R and depth_R {lengths}; "
            "both must have those of the first step, and no step more than the one before"
        )
    if len(step_weights) != len(row_counts):
        raise ValueError(f"{len(step_weights)} step_weights for {len(row_counts)} steps; give one for each")
    for hidden_RH in hidden:
        if hidden_RH.shape[1:] != weight_WH.shape[1:] or hidden_RH.dtype != weight_WH.dtype:
            raise ValueError(
                f"a step's hidden is {tuple(hidden_RH.shape)} in {hidden_RH.dtype}, the head {tuple(weight_WH.shape)} "
                f"in {weight_WH.dtype}; width and dtype must agree"
            )
    if len(teacher.head_WH) != len(weight_WH):
        raise ValueError(
            f"the teacher's head has {len(teacher.head_WH)} rows, the draft's {len(weight_WH)}; "
            "both must be of the draft vocabulary"
        )
    assert all(x.is_contiguous() for x in (*by_row, teacher.argmax_U, teacher.logsumexp_U)), "kernels read these flat"
