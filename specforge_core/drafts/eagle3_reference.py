"""The EAGLE-3 loss as its definition reads: every slot of every document through plain differentiable PyTorch.

What `training_time_test.py` computes on fewer rows and with fused kernels. Benchmarks and tests compare with it.

T tokens of a packed batch, L captured layers, D width, N query heads, M KV heads, C head width, W draft vocabulary,
S steps, R supervised slots.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge_core.drafts.base import DraftBatch, DraftLoss
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.kernels.precision import at_least_float32


class Teacher(NamedTuple):
    """What supervised slot r is taught at step 0; at step i it is taught what slot r + i is taught at step 0."""

    probability_RW: Tensor
    """The target's distribution, renormalised over the draft vocabulary."""
    kept_mass_R: Tensor
    """The target's probability of the draft vocabulary: probability * kept_mass is the target's own."""
    argmax_R: Tensor
    """int64, target vocabulary."""
    is_kept_R: Tensor
    """bool, whether `argmax` is in the draft vocabulary."""


class StepLoss(NamedTuple):
    """Sums over the active rows of one step."""

    loss_sum: Tensor
    correct: Tensor
    accepted: Tensor
    valid: Tensor


def reference_loss(draft: Eagle3Draft, batch: DraftBatch) -> DraftLoss:
    """The loss of one packed batch, differentiable; the batch needs no row index."""
    active_ST = active_slots(batch, draft.num_positions)
    slots_R = active_ST[0].nonzero().squeeze(1)
    teacher = make_teacher(draft, batch, slots_R + 1)
    steps = []
    for step, hidden_TD in enumerate(layer_outputs(draft, batch, draft.num_positions)):
        rows = active_ST[step][slots_R].nonzero().squeeze(1)
        taught = Teacher(*(part[rows + step] for part in teacher))
        steps.append(_step_loss(draft, hidden_TD[slots_R[rows]], taught))
    total = StepLoss(*(torch.stack(sums) for sums in zip(*steps, strict=True)))
    weight_S = draft.step_loss_decay ** torch.arange(draft.num_positions).to(total.loss_sum)
    return DraftLoss(
        loss_sum=(weight_S * total.loss_sum).sum(),
        num_tokens=total.valid[0],
        correct_K=total.correct,
        accepted_K=total.accepted,
        valid_K=total.valid,
    )


def layer_outputs(draft: Eagle3Draft, batch: DraftBatch, num_steps: int) -> Iterator[Tensor]:
    """The layer's output [T, D] at each step, the data's tokens going in."""
    lengths = document_lengths(batch.document_ids_T)
    embedding_TD = draft.embed(batch.input_ids_T)
    hidden_TD = draft.fuse(batch.aux_hidden_TLD)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for step in range(num_steps):
        # The rows that wrap around are slots at a document's end, which nothing active reads.
        next_embedding_TD = embedding_TD.roll(-1 - step, dims=0)
        qkv = draft.midlayer.project_qkv(next_embedding_TD, hidden_TD, batch.position_ids_T + step)
        keys.append(qkv.key_TMC)
        values.append(qkv.value_TMC)
        output_TD = draft.midlayer.finish(hidden_TD, attend(qkv.query_TNC, keys, values, lengths))
        yield output_TD
        hidden_TD = draft.recurrent(output_TD)


@torch.no_grad()
def make_teacher(draft: Eagle3Draft, batch: DraftBatch, token_index_R: Tensor) -> Teacher:
    """What the target says at these tokens, which all teach."""
    if draft.teacher_head is None:
        raise ValueError("this draft was loaded to decode: only one made by `create` has a teacher")
    teacher_R = torch.searchsorted(batch.teaching_U, token_index_R)
    # As capture computed argmax and log-sum-exp: rounded logits would give the kept tokens more than all of them.
    with torch.autocast(draft.teacher_head.device.type, enabled=False):
        last_hidden_RD = at_least_float32(batch.last_hidden_UD[teacher_R])
        logits_RW = F.linear(last_hidden_RD, at_least_float32(draft.teacher_head))
    argmax_R = batch.target_argmax_U[teacher_R].long()
    return Teacher(
        probability_RW=logits_RW.softmax(-1),
        kept_mass_R=(logits_RW.logsumexp(-1) - batch.target_logsumexp_U[teacher_R]).exp(),
        argmax_R=argmax_R,
        is_kept_R=draft.t2d[argmax_R],
    )


def _step_loss(draft: Eagle3Draft, hidden_RD: Tensor, teacher: Teacher) -> StepLoss:
    logits_RW = at_least_float32(draft.logits(hidden_RD))
    loss_R = F.cross_entropy(logits_RW, teacher.probability_RW, reduction="none") * teacher.is_kept_R
    with torch.no_grad():
        target_RW = teacher.probability_RW * teacher.kept_mass_R.unsqueeze(1)
        accepted_R = torch.minimum(logits_RW.softmax(-1), target_RW).sum(-1) * teacher.is_kept_R
        is_correct_R = draft.draft_to_target(logits_RW.argmax(-1)) == teacher.argmax_R
    return StepLoss(
        loss_sum=loss_R.sum(),
        correct=is_correct_R.sum().to(loss_R.dtype),
        accepted=accepted_R.sum(),
        valid=torch.ones_like(loss_R).sum(),
    )


def active_slots(batch: DraftBatch, num_steps: int) -> Tensor:
    """bool [S, T]: whether slot t at step i is supervised. Step i + 1 is within step i."""

    def later(x_T: Tensor, shift: int, fill: int) -> Tensor:
        return F.pad(x_T, (0, shift), value=fill)[shift:]

    def is_answer(shift: int) -> Tensor:
        in_document_T = later(batch.document_ids_T, shift, -1) == batch.document_ids_T
        return later(batch.loss_mask_T, shift, 0) & in_document_T & (batch.document_ids_T >= 0)

    steps = [is_answer(1) & is_answer(2)]
    for step in range(1, num_steps):
        steps.append(steps[-1] & is_answer(2 + step))
    return torch.stack(steps)


def document_lengths(document_ids_T: Tensor) -> list[int]:
    """Lengths of the documents in their order; padding at the end counts as one more."""
    _, counts = document_ids_T.unique_consecutive(return_counts=True)
    return counts.tolist()


def attend(query_TNC: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """The attention's output of the latest step, [T, N C].

    Slot t reads the step-0 keys of slots up to t in its document, and of the later steps its own keys alone.

    Args: keys, values: [T, M, C] of every step so far, the first one first; lengths: of the documents, adding up to T.
    """
    num_kv_heads = keys[0].shape[1]
    # M KV heads x G query heads for each; queries are scaled once, before they meet either kind of key.
    query_TMGC = query_TNC.unflatten(1, (num_kv_heads, -1)) * query_TNC.shape[-1] ** -0.5
    own_logits = [(query_TMGC * key_TMC.unsqueeze(2)).sum(-1) for key_TMC in keys[1:]]
    own_logits_TMGJ = torch.stack(own_logits, dim=-1) if own_logits else query_TMGC[..., :0]
    is_future = torch.ones(max(lengths), max(lengths), dtype=torch.bool, device=query_TNC.device).triu(1)
    attended = []
    own_weights = []
    parts = (x.split(lengths) for x in (query_TMGC, keys[0], values[0], own_logits_TMGJ))
    for query, key, value, own in zip(*parts, strict=True):
        n = len(query)
        logits_MGTU = torch.einsum("tmgc,umc->mgtu", query, key).masked_fill(is_future[:n, :n], -torch.inf)
        weight = at_least_float32(torch.cat((logits_MGTU, own.permute(1, 2, 0, 3)), dim=-1)).softmax(-1).to(value.dtype)
        attended.append(torch.einsum("mgtu,umc->tmgc", weight[..., :n], value))
        own_weights.append(weight[..., n:].permute(2, 0, 1, 3))
    attended_TMGC = torch.cat(attended)
    own_weight_TMGJ = torch.cat(own_weights)
    for j, value_TMC in enumerate(values[1:]):
        attended_TMGC = attended_TMGC + own_weight_TMGJ[..., j, None] * value_TMC.unsqueeze(2)
    return attended_TMGC.flatten(1)
