"""EAGLE-3's training-time test on supervised rows alone, pass by pass; see `rows.py` for what a pass is.

Per token, once: the fused hidden state, the step-0 keys and values, and the embedding half of all queries, keys and
values, since q, k, v = W [rms(e); rms(h)] = W_e rms(e) + W_h rms(h) and every step reads the same W_e rms(e), shifted.
Per pass: all steps forward, head and loss with their gradient, all steps backward.

T tokens of a packed batch, U teaching tokens, R rows of a pass, D width, N query heads, M KV heads,
C head width, E columns of the query or key and value projections or, where C follows, their heads.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from specforge_core.drafts.base import DraftBatch, DraftLoss
from specforge_core.drafts.linear import FeedForward, Weight, gradient_buffer, linear, make_weight
from specforge_core.drafts.peers import Peers, from_row_parts, row_part
from specforge_core.drafts.rows import Pass, RowIndex
from specforge_core.kernels.linear_soft_cross_entropy import HeadLoss, Teacher, linear_soft_cross_entropy
from specforge_core.kernels.rms_norm import residual_rms_norm, rms_norm
from specforge_core.kernels.rope import Part, add_rope
from specforge_core.kernels.ttt_attention import ttt_attention

if TYPE_CHECKING:
    from specforge_core.drafts.eagle3 import Eagle3Draft


class Weights(NamedTuple):
    """The draft's matrices in the dtype of computing."""

    fc: Weight
    query_embedding: Weight
    key_value_embedding: Weight
    query_hidden: Weight
    key_value_hidden: Weight
    qkv_hidden: Weight
    output: Weight
    gate_up: Weight
    down: Weight
    head: Weight
    teacher_head_WD: Tensor | None
    """Frozen; None in a draft that is only decoded with."""

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return self.fc.value_OI.dtype


class Shared(NamedTuple):
    """What all passes read, computed once per token. Leaves of autograd, whose gradients the passes add up."""

    hidden_TD: Tensor
    query_embedding_UE: Tensor
    query_embedding_grad_UE: Tensor | None
    """At least float32; None without gradient, like the next."""
    key_value_embedding_TE: Tensor
    key_value_embedding_grad_TE: Tensor | None
    key_value_TEC: Tensor
    """Of step 0: the keys of all heads, then the values."""
    cos_PC: Tensor
    sin_PC: Tensor


def training_time_test(draft: "Eagle3Draft", batch: DraftBatch) -> DraftLoss:
    """The loss of one prepared batch; with gradients enabled, they are added to the parameters' `.grad`."""
    weights = make_weights(draft)
    rows = prepared_rows(batch)
    losses = DraftLoss.zero(draft.num_positions, batch.input_ids_T.device)
    if not rows.num_slots:
        return losses
    sources, shared = share(draft, weights, batch, rows)
    for one in rows.passes:
        losses = losses.plus(run_pass(draft, weights, shared, batch, one))
    if torch.is_grad_enabled():
        sources.backward(shared, draft.peers)
    return losses


def layer_outputs(draft: "Eagle3Draft", batch: DraftBatch) -> Iterator[tuple[Pass, list[Tensor]]]:
    """Each pass with the head's inputs [rows of the step, D] of its steps."""
    weights = make_weights(draft)
    rows = prepared_rows(batch)
    _, shared = share(draft, weights, batch, rows)
    for one in rows.passes:
        feed_forward = FeedForward(weights.gate_up, weights.down, sum(one.num_rows))
        yield one, run_steps(draft, weights, shared, one, feed_forward)


def prepared_rows(batch: DraftBatch) -> RowIndex:
    """The batch's row index. Raises: ValueError if it was not prepared."""
    if batch.rows is None:
        raise ValueError("the batch has no row index: call the draft's `prepare` on it first")
    return batch.rows


def make_weights(draft: "Eagle3Draft") -> Weights:
    """Copies in the draft's dtype of computing; new ones are due whenever the parameters have changed."""
    # What is evaluated is the draft that will be served, and that is not in float8.
    in_float8 = draft.float8_matmuls and torch.is_grad_enabled()
    dtype, width = draft.compute_dtype or draft.fc.weight.dtype, draft.fc.weight.shape[0]
    layer = draft.midlayer
    attention, mlp = layer.self_attn, layer.mlp
    of_embedding, of_hidden = slice(0, width), slice(width, 2 * width)
    qkv = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    qkv_hidden = make_weight(qkv, dtype, of_hidden)
    return Weights(
        fc=make_weight([draft.fc.weight], dtype),
        query_embedding=make_weight(qkv[:1], dtype, of_embedding),
        key_value_embedding=make_weight(qkv[1:], dtype, of_embedding),
        query_hidden=qkv_hidden.part(0, 1),
        key_value_hidden=qkv_hidden.part(1, 3),
        qkv_hidden=qkv_hidden,
        output=make_weight([attention.o_proj.weight], dtype),
        gate_up=make_weight([mlp.gate_proj.weight, mlp.up_proj.weight], dtype, in_float8=in_float8),
        down=make_weight([mlp.down_proj.weight], dtype, in_float8=in_float8),
        head=make_weight([draft.lm_head.weight], dtype, in_float8=in_float8),
        teacher_head_WD=None if draft.teacher_head is None else draft.teacher_head.to(dtype),
    )


class Sources(NamedTuple):
    """Where the leaves of `Shared` come from: this process's share of each, which is all of it if there is no other."""

    hidden_TD: Tensor
    hidden_leaf_TD: Tensor
    """The same, from where its gradient is carried on by hand."""
    key_value_TEC: Tensor
    query_embedding_UE: Tensor
    key_value_embedding_TE: Tensor

    def backward(self, shared: Shared, peers: Peers) -> None:
        """Carry on the gradients that the passes left in the leaves."""
        # The step-0 keys and values first: they add to the gradients of the hidden states and of the embedding half.
        torch.autograd.backward(self.key_value_TEC, peers.sum_to_share(_gradient(shared.key_value_TEC)))
        hidden_grad_TD = peers.sum_to_share(_gradient(shared.hidden_TD)) + _gradient(self.hidden_leaf_TD)
        halves = (self.query_embedding_UE, self.key_value_embedding_TE)
        assert shared.query_embedding_grad_UE is not None
        assert shared.key_value_embedding_grad_TE is not None
        half_grads = (shared.query_embedding_grad_UE, shared.key_value_embedding_grad_TE)
        torch.autograd.backward(
            [self.hidden_TD, *halves],
            [
                hidden_grad_TD,
                *(peers.sum_to_share(grad).to(half.dtype) for grad, half in zip(half_grads, halves, strict=True)),
            ],
        )


def share(draft: "Eagle3Draft", weights: Weights, batch: DraftBatch, rows: RowIndex) -> tuple[Sources, Shared]:
    """What all passes read, and where it comes from."""
    layer, shape, peers = draft.midlayer, draft.shape, draft.peers
    num_tokens, num_teaching = len(batch.input_ids_T), len(batch.teaching_U)
    own_tokens, own_teaching = peers.own(num_tokens), peers.own(num_teaching)
    with record_function("projections"):
        hidden_TD = linear(draft.fc_input(batch.aux_hidden_TLD[own_tokens].to(weights.dtype)), weights.fc)
        embedding_TD = rms_norm(
            F.embedding(batch.input_ids_T, draft.embed_tokens).to(weights.dtype),
            layer.input_layernorm.weight,
            shape.eps,
        )
        embedding_TD = peers.spread(embedding_TD)
        query_embedding_UE = linear(embedding_TD[batch.teaching_U[own_teaching]], weights.query_embedding)
        key_value_embedding_TE = linear(embedding_TD[own_tokens], weights.key_value_embedding)
    query_half, query_half_grad = _leaf(peers.gather(query_embedding_UE, num_teaching))
    key_value_half, key_value_half_grad = _leaf(peers.gather(key_value_embedding_TE, num_tokens))
    hidden_leaf_TD = hidden_TD.detach().requires_grad_(torch.is_grad_enabled())
    position_P = torch.arange(rows.num_positions, device=hidden_TD.device)
    cos_PC, sin_PC = (table[:, : shape.head_dim // 2] for table in layer.rotary(position_P))
    with record_function("projections"):
        normed_TD = rms_norm(hidden_leaf_TD, layer.hidden_norm.weight, shape.eps)
        key_value_TE = linear(peers.spread(normed_TD), weights.key_value_hidden)
        # Slot t consumes token t + 1 at step 0. The last slot of a document reads what nothing reads of it.
        token_T = torch.arange(num_tokens, device=hidden_TD.device)[own_tokens]
        part = Part(2 * shape.num_kv_heads, shape.num_kv_heads, key_value_half, key_value_half_grad, token_T, 1)
        (key_value_TEC,) = add_rope(key_value_TE, [part], batch.position_ids_T[own_tokens], 0, cos_PC, sin_PC)
    shared = Shared(
        hidden_TD=peers.gather(hidden_TD, num_tokens).requires_grad_(torch.is_grad_enabled()),
        query_embedding_UE=query_half,
        query_embedding_grad_UE=query_half_grad,
        key_value_embedding_TE=key_value_half,
        key_value_embedding_grad_TE=key_value_half_grad,
        key_value_TEC=peers.gather(key_value_TEC, num_tokens).requires_grad_(torch.is_grad_enabled()),
        cos_PC=cos_PC,
        sin_PC=sin_PC,
    )
    return Sources(hidden_TD, hidden_leaf_TD, key_value_TEC, query_embedding_UE, key_value_embedding_TE), shared


def run_steps(
    draft: "Eagle3Draft", weights: Weights, shared: Shared, rows: Pass, feed_forward: FeedForward
) -> list[Tensor]:
    """The head's input [rows of the step, D] at each step that has rows, the data's tokens going in."""
    layer, shape, peers = draft.midlayer, draft.shape, draft.peers
    hidden_RD = shared.hidden_TD.index_select(0, rows.slot_R)
    own_key_values: list[Tensor] = []
    outputs: list[Tensor] = []
    for step, num_rows in enumerate(rows.num_rows):
        if not num_rows:
            break
        with record_function("projections"):
            normed_RD, residual_RD = residual_rms_norm(hidden_RD[:num_rows], layer.hidden_norm.weight, shape.eps)
            # Token t + 1 + step, which the row consumes, is also the token that teaches it.
            query_part = Part(
                shape.num_heads, shape.num_heads,
                shared.query_embedding_UE, shared.query_embedding_grad_UE, rows.teacher_R, step,
            )  # fmt: skip
            key_value_part = Part(
                2 * shape.num_kv_heads, shape.num_kv_heads,
                shared.key_value_embedding_TE, shared.key_value_embedding_grad_TE, rows.slot_R, 1 + step,
            )  # fmt: skip
            parts, weight = [query_part, key_value_part], weights.qkv_hidden
            if step == 0:
                parts, weight = [query_part], weights.query_hidden
            query_RNC, *own = add_rope(
                linear(peers.spread(normed_RD), weight), parts, rows.position_R, step, shared.cos_PC, shared.sin_PC
            )
            own_key_values += own
        with record_function("attention"):
            attended_RNC = ttt_attention(
                query_RNC, shared.key_value_TEC, own_key_values, rows.start_R, rows.slot_R, rows.attention
            )
        with record_function("projections"):
            attended_RD = peers.collect(linear(attended_RNC.flatten(1), weights.output))
        with record_function("feed-forward"):
            normed_RD, residual_RD = residual_rms_norm(
                residual_RD, layer.post_attention_layernorm.weight, shape.eps, branch_RD=attended_RD
            )
            transformed_RD = peers.collect(feed_forward(peers.spread(normed_RD)))
        with record_function("head"):
            output_RD, hidden_RD = residual_rms_norm(
                residual_RD, draft.norm.weight, shape.eps, branch_RD=transformed_RD
            )
        outputs.append(output_RD)
        if draft.norm_output:
            hidden_RD = output_RD
    return outputs


def run_pass(draft: "Eagle3Draft", weights: Weights, shared: Shared, batch: DraftBatch, rows: Pass) -> DraftLoss:
    """The loss of a pass; with gradients enabled, they are added to the parameters and to the leaves of `shared`."""
    feed_forward = FeedForward(weights.gate_up, weights.down, sum(rows.num_rows))
    outputs = run_steps(draft, weights, shared, rows, feed_forward)
    step_weights = [draft.step_loss_decay**step for step in range(len(outputs))]
    with record_function("head"):
        head = linear_soft_cross_entropy(
            [row_part(output_RD.detach(), draft.peers) for output_RD in outputs],
            weights.head.value_OI,
            make_teacher(draft, weights, batch, rows),
            row_part(rows.teacher_R - rows.first_teacher, draft.peers),
            row_part(rows.depth_R, draft.peers),
            step_weights=step_weights,
            weight_grad_WH=gradient_buffer(draft.lm_head.weight) if torch.is_grad_enabled() else None,
            weight_float8=weights.head.float8,
        )
    if head.hidden_grads is not None:
        grads = [from_row_parts(grad, x, draft.peers) for grad, x in zip(head.hidden_grads, outputs, strict=True)]
        torch.autograd.backward(outputs, grads)
        with record_function("feed-forward"):
            feed_forward.accumulate()
    return _sums(head, step_weights, draft.num_positions)


def make_teacher(draft: "Eagle3Draft", weights: Weights, batch: DraftBatch, rows: Pass) -> Teacher:
    """What the target says at the teaching tokens of a pass."""
    assert weights.teacher_head_WD is not None
    assert draft.target_to_draft is not None
    window = slice(rows.first_teacher, rows.first_teacher + rows.num_teachers)
    return Teacher(
        hidden_UH=batch.last_hidden_UD[window].to(weights.dtype),
        head_WH=weights.teacher_head_WD,
        argmax_U=draft.target_to_draft[batch.target_argmax_U[window]],
        logsumexp_U=batch.target_logsumexp_U[window],
    )


def _sums(head: HeadLoss, step_weights: list[float], num_positions: int) -> DraftLoss:
    def by_position(sums: Tensor) -> Tensor:
        return F.pad(sums, (0, num_positions - len(sums)))

    return DraftLoss(
        loss_sum=sum(weight * loss for weight, loss in zip(step_weights, head.loss_S, strict=True)),
        num_tokens=head.valid_S[0],
        correct_K=by_position(head.correct_S),
        accepted_K=by_position(head.accepted_S),
        valid_K=by_position(head.valid_S),
    )


def _gradient(leaf: Tensor) -> Tensor:
    """Zero if no pass read the leaf."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _leaf(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """`x` without history, and room for its gradient in at least float32 if one is wanted."""
    if not torch.is_grad_enabled():
        return x, None
    return x.detach(), torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
