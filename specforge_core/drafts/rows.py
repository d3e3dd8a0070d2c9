"""Which rows of a packed batch a draft with training-time test computes: those that are taught, and no others.

A slot that is not supervised gives its step-0 key and value to later slots, and nothing else; so queries, feed-forward,
head and loss run on supervised slots alone. They are dealt out in passes, which share nothing but the step-0 keys and
values: a trainer runs one pass forward and backward and forgets it before the next, so that the memory for activations
depends on the size of a pass and not on that of the batch.

T tokens of a packed batch, U teaching tokens of it, R rows of a pass, S steps.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge_core.kernels.ttt_attention import AttentionPlan, plan_attention


class Pass(NamedTuple):
    """Rows that go through all steps together, the deepest first, then in the order of their tokens.

    So the rows of each step are the first ones: step i computes `num_rows[i]` of them. That is a few more than are
    active, to make shapes repeat; a row behind its depth is a valid row without a loss.
    """

    slot_R: Tensor
    """int64, the row's token t: at step i the row consumes token t + 1 + i."""
    start_R: Tensor
    """int64, the first token of the row's document."""
    position_R: Tensor
    """int64, of t in its document."""
    depth_R: Tensor
    """int64, steps at which the row is supervised; 0 in a row that only fills up."""
    teacher_R: Tensor
    """int64, index among the batch's teaching tokens of token t + 1; that of token t + 1 + i is i more."""
    attention: AttentionPlan
    num_rows: tuple[int, ...]
    """By step, never rising."""
    first_teacher: int
    num_teachers: int
    """The rows are taught by teaching tokens first_teacher to first_teacher + num_teachers - 1."""


class RowIndex(NamedTuple):
    """All supervised slots of a packed batch, or a process's share of them."""

    passes: tuple[Pass, ...]
    num_positions: int
    """More than any RoPE position that occurs."""
    num_slots: int
    """Of all shares together."""


def is_teaching(loss_mask_T: Tensor, document_ids_T: Tensor) -> Tensor:
    """bool [T]: whether the next token of the same document was produced by the target."""
    next_is_answer_T = torch.zeros_like(loss_mask_T)
    next_is_answer_T[:-1] = loss_mask_T[1:] & (document_ids_T[1:] == document_ids_T[:-1]) & (document_ids_T[1:] >= 0)
    return next_is_answer_T


def slot_depths(loss_mask_T: Tensor, document_ids_T: Tensor, num_steps: int) -> Tensor:
    """int64 [T]: the number of steps at which slot t is supervised, at most `num_steps`.

    Slot t is supervised at step i if tokens t+1 to t+2+i all were produced by the target, in the document of t.
    """
    teaches_T = is_teaching(loss_mask_T, document_ids_T)
    # Tokens of the target that follow slot t without a gap, up to the S + 1 that the last step asks for.
    num_following_T = torch.zeros_like(loss_mask_T, dtype=torch.int64)
    is_unbroken_T = torch.ones_like(loss_mask_T)
    for ahead in range(min(num_steps + 1, len(loss_mask_T))):
        is_unbroken_T = is_unbroken_T & F.pad(teaches_T, (0, ahead))[ahead:]
        num_following_T += is_unbroken_T
    return (num_following_T - 1).clamp(min=0)


def index_rows(
    loss_mask_T: Tensor,
    document_ids_T: Tensor,
    teaching_U: Tensor,
    *,
    num_steps: int,
    rows_per_pass: int,
    bucket: int = 1,
    share: int = 0,
    num_shares: int = 1,
) -> RowIndex:
    """The row index of a packed batch on the CPU.

    Args: rows_per_pass: at most so many rows, a multiple of `bucket`, to which numbers of rows are rounded up;
    share, num_shares: which passes to return, of the shares that processes take.
    """
    num_tokens = len(loss_mask_T)
    token_T = torch.arange(num_tokens)
    is_first_T = torch.ones_like(loss_mask_T)
    is_first_T[1:] = document_ids_T[1:] != document_ids_T[:-1]
    start_T = torch.where(is_first_T, token_T, 0).cummax(0).values
    depth_T = slot_depths(loss_mask_T, document_ids_T, num_steps)
    teacher_of_T = torch.zeros(num_tokens, dtype=torch.int64)
    teacher_of_T[teaching_U] = torch.arange(len(teaching_U))
    slots = depth_T.nonzero().squeeze(1)
    # As many rows in each pass, so that none is too small for matrix products at full speed.
    num_passes = max(1, -(-len(slots) // rows_per_pass))
    if num_shares > 1:
        # Rounds in pairs, see `_is_dealt_to`.
        num_passes = _round_up(num_passes, 2 * num_shares)
    rows_per_pass = _round_up(-(-len(slots) // num_passes), bucket)
    passes = tuple(
        _make_pass(
            slots[first : first + rows_per_pass], start_T, depth_T, teacher_of_T, num_steps, bucket, len(teaching_U)
        )
        for number, first in enumerate(range(0, len(slots), max(1, rows_per_pass)))
        if _is_dealt_to(share, num_shares, number)
    )
    return RowIndex(
        passes=passes,
        num_slots=len(slots),
        num_positions=_round_up(int((token_T - start_T).max()) + 1 + num_steps, bucket),
    )


def _is_dealt_to(share: int, num_shares: int, number: int) -> bool:
    """Whether the pass is this share's: to and fro, because in a long document later rows read more keys."""
    turn, place = divmod(number, num_shares)
    return share == (num_shares - 1 - place if turn % 2 else place)


def _make_pass(
    slots: Tensor,
    start_T: Tensor,
    depth_T: Tensor,
    teacher_of_T: Tensor,
    num_steps: int,
    bucket: int,
    num_teaching: int,
) -> Pass:
    slots = slots[depth_T[slots].argsort(descending=True, stable=True)]
    depth = depth_T[slots]
    num_rows = tuple(_round_up(int((depth > step).sum()), bucket) for step in range(num_steps))
    num_filling = num_rows[0] - len(slots)
    slots = torch.cat((slots, slots[-1:].expand(num_filling)))
    depth = F.pad(depth, (0, num_filling))
    teacher = teacher_of_T[slots + 1]
    last_teacher = int((teacher + (depth - 1).clamp(min=0)).max())
    # The window of teaching tokens slides back where its rounded size would pass their end.
    num_teachers = min(_round_up(last_teacher + 1 - int(teacher.min()), bucket), num_teaching)
    return Pass(
        slot_R=slots,
        start_R=start_T[slots],
        position_R=slots - start_T[slots],
        depth_R=depth,
        teacher_R=teacher,
        attention=plan_attention(start_T[slots], slots, len(start_T)),
        num_rows=num_rows,
        first_teacher=min(int(teacher.min()), num_teaching - num_teachers),
        num_teachers=num_teachers,
    )


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
