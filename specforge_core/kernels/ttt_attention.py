"""Attention of training-time test: the rows of a pass read step 0's keys of their document and their own later keys.

Row r at token t = slot_r, its document starting at start_r, after J later steps:

    logits   l_s = q.K_0[s] / sqrt(C)  for start_r <= s <= slot_r,   l_j = q.K_j[r] / sqrt(C)  for j = 1..J
    output   o = (sum_s e^l_s V_0[s] + sum_j e^l_j V_j[r]) / e^L,    L the log-sum-exp of all these logits

Step 0 is a flash attention (arXiv 2205.14135, 2307.08691), the own keys, which only row r reads, start off its running
maximum and sum. Backward, with p = e^(l - L), D = do.o and ds = p (do.v - D) for each key k and its value v:

    dv += p do,    dk += ds q / sqrt(C),    dq += ds k / sqrt(C)      with dk and dv summed over the heads of a group

R rows of a pass, T tokens of the packed batch, N query heads in M groups with one KV head each, C head width, J own
keys. Products take the inputs' dtype and accumulate in float32, as do maximum, sum and output; base-2 logarithms of
the sums are kept in float32.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from specforge_core.kernels import ttt_attention_kernels as kernels
from specforge_core.kernels.attention_plan import BLOCK, TILE, AttentionPlan, plan_attention
from specforge_core.kernels.dispatch import uses_triton

__all__ = ["AttentionPlan", "plan_attention", "ttt_attention", "ttt_attention_reference"]

LOG2_E = math.log2(math.e)


def ttt_attention_reference(
    query_RNC: Tensor,
    key_TMC: Tensor,
    value_TMC: Tensor,
    own_keys: Sequence[Tensor],
    own_values: Sequence[Tensor],
    start_R: Tensor,
    slot_R: Tensor,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """What `ttt_attention` returns, document by document in plain PyTorch; `plan` is not needed."""
    num_rows, num_kv_heads = len(query_RNC), key_TMC.shape[1]
    if num_rows == 0:
        return query_RNC.clone()
    # M KV heads x G query heads for each; queries are scaled once, before they meet either kind of key.
    query_RMGC = query_RNC.unflatten(1, (num_kv_heads, -1)) * query_RNC.shape[-1] ** -0.5
    own_logits = [(query_RMGC * key[:num_rows].unsqueeze(2)).sum(-1) for key in own_keys]
    own_logits_RMGJ = torch.stack(own_logits, dim=-1) if own_logits else query_RMGC[..., :0]
    start_R, slot_R = start_R[:num_rows].long(), slot_R[:num_rows].long()
    by_document_R = start_R.argsort(stable=True)
    starts, counts = start_R[by_document_R].unique_consecutive(return_counts=True)
    attended, own_weights = [], []
    for start, rows in zip(starts.tolist(), by_document_R.split(counts.tolist()), strict=True):
        slot = slot_R[rows] - start
        document = slice(start, start + int(slot.max()) + 1)
        key, value = key_TMC[document], value_TMC[document]
        is_future = torch.arange(len(key), device=slot.device) > slot.unsqueeze(1)
        logits_MGRT = torch.einsum("rmgc,tmc->mgrt", query_RMGC[rows], key).masked_fill(is_future, -torch.inf)
        own_MGRJ = own_logits_RMGJ[rows].permute(1, 2, 0, 3)
        logits = torch.cat((logits_MGRT, own_MGRJ), dim=-1)
        weight = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).to(value.dtype)
        attended.append(torch.einsum("mgrt,tmc->rmgc", weight[..., : len(key)], value))
        own_weights.append(weight[..., len(key) :].permute(2, 0, 1, 3))
    in_order_R = by_document_R.argsort()
    attended_RMGC = torch.cat(attended)[in_order_R]
    own_weight_RMGJ = torch.cat(own_weights)[in_order_R]
    for j, value in enumerate(own_values):
        attended_RMGC = attended_RMGC + own_weight_RMGJ[..., j, None] * value[:num_rows].unsqueeze(2)
    return attended_RMGC.flatten(1, 2)


class Config(NamedTuple):
    """How one of the kernels is tiled: query rows and keys at a time, warps, and loads in flight."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"ROWS": self.rows, "KEYS": self.keys, "num_warps": self.num_warps, "num_stages": self.num_stages}


class Configs(NamedTuple):
    """Tiles of the three kernels that multiply matrices; they divide the plan's."""

    forward: Config
    grad_query: Config
    grad_key: Config


def _configs(head_width: int, dtype: torch.dtype) -> Configs:
    """For Hopper: a tile's two warpgroups leave room for accumulators in registers, without spilling in a loop."""
    if dtype == torch.float32:
        return Configs(Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(32, 64, 4, 2))
    if head_width > 128:
        return Configs(Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(64, 64, 8, 2))
    return Configs(Config(128, 128, 8, 3), Config(128, 64, 8, 3), Config(64, 128, 8, 3))


class _Operands(NamedTuple):
    """What all kernels of one call read, `_readable` all of it."""

    query: Tensor
    key: Tensor
    value: Tensor
    own_keys: tuple[Tensor, ...]
    own_values: tuple[Tensor, ...]
    plan: AttentionPlan

    @property
    def own_strides(self) -> tuple[int, ...]:
        pairs = zip(self.own_keys, self.own_values, strict=True)
        return tuple(x.stride(0) for pair in pairs for x in pair)

    @property
    def constants(self) -> dict[str, Any]:
        head_width = self.query.shape[2]
        return {
            "GROUP": self.query.shape[1] // self.key.shape[1],
            "SCALE": LOG2_E / math.sqrt(head_width),
            "C": head_width,
        }

    @property
    def padded_rows(self) -> int:
        return triton.cdiv(len(self.query), TILE) * TILE


def _launch_forward(operands: _Operands, config: Config) -> tuple[Tensor, Tensor]:
    """The output [R, N, C] and log-sum-exps to base 2, [N, R rounded up to tiles] in float32."""
    query, key, value, own_keys, own_values, plan = operands
    output = _empty_like(query)
    logsumexp = torch.empty(query.shape[1], operands.padded_rows, dtype=torch.float32, device=query.device)
    kernels.forward_kernel[(query.shape[1], len(plan.tile_order) * (TILE // config.rows))](
        _described(query, config.rows),
        _described(key, config.keys),
        _described(value, config.keys),
        _described(output, config.rows),
        own_keys,
        own_values,
        operands.own_strides,
        logsumexp,
        plan.start,
        plan.slot,
        *plan[:3],
        len(query),
        **operands.constants,
        **config.options,
    )
    return output, logsumexp


class _StartedGradients(NamedTuple):
    """What the own keys need and give, before step 0's keys are met."""

    delta: Tensor
    """D, laid out like the log-sum-exps."""
    grad_query: Tensor
    """As far as own keys give it; uninitialized if there are none."""
    grad_own_keys: tuple[Tensor, ...]
    grad_own_values: tuple[Tensor, ...]


def _launch_grad_own(operands: _Operands, output: Tensor, grad_output: Tensor, logsumexp: Tensor) -> _StartedGradients:
    """The part of the backward pass that looks at every row once."""
    query, num_rows = operands.query, len(operands.query)
    num_heads, head_width = query.shape[1:]
    group = operands.constants["GROUP"]
    delta = torch.empty_like(logsumexp)
    grad_query = torch.empty_like(output)
    grad_keys = tuple(_empty_like(x) for x in operands.own_keys)
    grad_values = tuple(_empty_like(x) for x in operands.own_values)
    for grad in grad_keys + grad_values:
        grad[num_rows:].zero_()
    padded_group = triton.next_power_of_2(group)
    # 4,096 numbers of each tensor, 32 for each thread of four warps.
    rows = max(1, 4096 // (padded_group * head_width))
    kernels.grad_own_kernel[(triton.cdiv(operands.padded_rows, rows), num_heads // group)](
        query,
        output,
        grad_output,
        operands.own_keys,
        operands.own_values,
        operands.own_strides,
        grad_keys,
        grad_values,
        grad_query,
        logsumexp,
        delta,
        query.stride(0),
        grad_output.stride(0),
        num_rows,
        NUM_HEADS=num_heads,
        ROWS=rows,
        PADDED_GROUP=padded_group,
        num_warps=4,
        **operands.constants,
    )
    return _StartedGradients(delta, grad_query, grad_keys, grad_values)


def _launch_grad_query(
    operands: _Operands, grad_output: Tensor, logsumexp: Tensor, started: _StartedGradients, config: Config
) -> None:
    """Completes `started.grad_query`."""
    query, key, value, own_keys, _, plan = operands
    kernels.grad_query_kernel[(query.shape[1], len(plan.tile_order) * (TILE // config.rows))](
        _described(query, config.rows),
        _described(key, config.keys),
        _described(value, config.keys),
        _described(grad_output, config.rows),
        _described(started.grad_query, config.rows),
        logsumexp,
        started.delta,
        plan.start,
        plan.slot,
        *plan[:3],
        len(query),
        HAS_OWN=len(own_keys) > 0,
        **operands.constants,
        **config.options,
    )


def _launch_grad_key(
    operands: _Operands, grad_output: Tensor, logsumexp: Tensor, delta: Tensor, config: Config
) -> tuple[Tensor, Tensor]:
    """dK_0 and dV_0."""
    query, key, value, _, _, plan = operands
    grad_key, grad_value = _empty_like(key), _empty_like(value)
    kernels.grad_key_kernel[(key.shape[1], len(plan.block_order) * (BLOCK // config.keys))](
        _described(query, config.rows),
        _described(key, config.keys),
        _described(value, config.keys),
        _described(grad_output, config.rows),
        _described(grad_key, config.keys),
        _described(grad_value, config.keys),
        *(TensorDescriptor(x, [x.numel()], [1], [config.rows]) for x in (logsumexp, delta, plan.start, plan.slot)),
        *plan[3:6],
        len(query),
        **operands.constants,
        **config.options,
    )
    return grad_key, grad_value


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _described(x_RNC: Tensor, rows: int) -> TensorDescriptor:
    """What Hopper's copy engine needs to load and store blocks of some rows of one head."""
    num_rows, num_heads, width = x_RNC.shape
    return TensorDescriptor(x_RNC, [num_rows, num_heads * width], [x_RNC.stride(0), 1], [rows, width])


def _readable(x_RNC: Tensor) -> Tensor:
    """The tensor itself if the heads of a row are adjacent and rows begin where the copy engine can, else a copy."""
    alignment = 16 // x_RNC.element_size()
    is_readable = (
        x_RNC.stride(2) == 1
        and x_RNC.stride(1) == x_RNC.shape[2]
        and x_RNC.stride(0) % alignment == 0
        and x_RNC.data_ptr() % 16 == 0
    )
    return x_RNC if is_readable else x_RNC.clone(memory_format=torch.contiguous_format)


class _TTTAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, num_own: int, *own: Tensor
    ) -> Tensor:
        query, key, value, *own_read = (_readable(x) for x in (query, key, value, *own))
        operands = _Operands(query, key, value, tuple(own_read[:num_own]), tuple(own_read[num_own:]), plan)
        output, logsumexp = _launch_forward(operands, _configs(query.shape[2], query.dtype).forward)
        ctx.save_for_backward(query, key, value, output, logsumexp, *own_read)
        ctx.plan, ctx.num_own = plan, num_own
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logsumexp, *own = ctx.saved_tensors
        operands = _Operands(query, key, value, tuple(own[: ctx.num_own]), tuple(own[ctx.num_own :]), ctx.plan)
        configs = _configs(query.shape[2], query.dtype)
        grad_output = _readable(grad_outputs[0])
        started = _launch_grad_own(operands, output, grad_output, logsumexp)
        _launch_grad_query(operands, grad_output, logsumexp, started, configs.grad_query)
        grad_key, grad_value = _launch_grad_key(operands, grad_output, logsumexp, started.delta, configs.grad_key)
        return started.grad_query, grad_key, grad_value, None, None, *started.grad_own_keys, *started.grad_own_values


def ttt_attention(
    query_RNC: Tensor,
    key_TMC: Tensor,
    value_TMC: Tensor,
    own_keys: Sequence[Tensor],
    own_values: Sequence[Tensor],
    start_R: Tensor,
    slot_R: Tensor,
    plan: AttentionPlan,
) -> Tensor:
    """The attention's output [R, N, C] of the rows of one step.

    Args: query_RNC: the first R rows of the pass that `start_R`, `slot_R` and `plan` are about; key_TMC, value_TMC:
    of step 0, for all tokens; own_keys, own_values: [R or more, M, C] of each later step so far, row r's in row r;
    start_R, slot_R: integers, the first and the last token whose step-0 key the row reads; plan: of
    `plan_attention` for them, on the queries' device.
    Raises: ValueError if shapes do not belong together, or Triton has no tile for the head width.
    """
    own = [*own_keys, *own_values]
    _check_shapes(query_RNC, key_TMC, value_TMC, own, len(own_keys), len(slot_R), plan)
    if len(query_RNC) == 0 or not uses_triton("ttt_attention", query_RNC):
        return ttt_attention_reference(query_RNC, key_TMC, value_TMC, own_keys, own_values, start_R, slot_R)
    head_width = query_RNC.shape[2]
    if head_width < 16 or head_width & (head_width - 1):
        raise ValueError(f"head width {head_width}: the kernels need a power of two from 16 on")
    return _TTTAttention.apply(query_RNC, key_TMC, value_TMC, plan, len(own_keys), *own)


def _check_shapes(
    query: Tensor, key: Tensor, value: Tensor, own: Sequence[Tensor], num_own: int, num_rows: int, plan: AttentionPlan
) -> None:
    """Raises ValueError if the parts of a call do not belong together; `num_rows`: of the pass."""
    kv_shape = key.shape[1:]
    if value.shape != key.shape or kv_shape[1] != query.shape[2] or query.shape[1] % kv_shape[0]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} must be [R, N, C] "
            "and twice [T, M, C], with N a multiple of M"
        )
    if len(own) != 2 * num_own or any(len(x) < len(query) or x.shape[1:] != kv_shape for x in own):
        raise ValueError(
            f"own keys and values {[tuple(x.shape) for x in own]} must be as many of each, [{len(query)} or more, "
            f"{kv_shape[0]}, {kv_shape[1]}]"
        )
    num_tiles, num_blocks = len(plan.tile_order), len(plan.block_order)
    if len(query) > num_rows or num_tiles != triton.cdiv(num_rows, TILE) or num_blocks != triton.cdiv(len(key), BLOCK):
        raise ValueError(
            f"the plan, {num_tiles} tiles of {TILE} rows and {num_blocks} blocks of {BLOCK} tokens, is not that of a "
            f"pass of {num_rows} rows over {len(key)} tokens, of which {len(query)} rows are asked for"
        )
