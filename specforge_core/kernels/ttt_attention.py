"""Attention of training-time test: the rows of a pass read step 0's keys of their document and their own later keys.

Row r at token t = slot_r, its document starting at start_r, after J later steps:

    logits   l_s = q.K_0[s] / sqrt(C)  for start_r <= s <= slot_r,   l_j = q.K_j[r] / sqrt(C)  for j = 1..J
    output   o = (sum_s e^l_s V_0[s] + sum_j e^l_j V_j[r]) / e^L,    L the log-sum-exp of all these logits

Step 0 is a flash attention (arXiv 2205.14135, 2307.08691), the own keys, which only row r reads, start off its running
maximum and sum. Backward, with p = e^(l - L), D = do.o and ds = p (do.v - D) for each key k and its value v:

    dv += p do,    dk += ds q / sqrt(C),    dq += ds k / sqrt(C)      with dk and dv summed over the heads of a group

R rows of a pass, T tokens of the packed batch, N query heads in M groups with one KV head each, E = 2M heads of keys,
then of values, C head width, J own keys. Products take the inputs' dtype and accumulate in float32, as do maximum, sum
and output; base-2 logarithms of the sums are kept in float32.
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
    key_value_TEC: Tensor,
    own_key_values: Sequence[Tensor],
    start_R: Tensor,
    slot_R: Tensor,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """What `ttt_attention` returns, document by document in plain PyTorch; `plan` is not needed."""
    key_TMC, value_TMC = key_value_TEC.chunk(2, dim=1)
    num_rows, num_kv_heads = len(query_RNC), key_TMC.shape[1]
    own = [key_value_REC[:num_rows].chunk(2, dim=1) for key_value_REC in own_key_values]
    if num_rows == 0:
        return query_RNC.clone()
    # M KV heads x G query heads for each; queries are scaled once, before they meet either kind of key.
    query_RMGC = query_RNC.unflatten(1, (num_kv_heads, -1)) * query_RNC.shape[-1] ** -0.5
    own_logits = [(query_RMGC * key_RMC.unsqueeze(2)).sum(-1) for key_RMC, _ in own]
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
    for j, (_, value_RMC) in enumerate(own):
        attended_RMGC = attended_RMGC + own_weight_RMGJ[..., j, None] * value_RMC.unsqueeze(2)
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


def _configs(head_width: int, dtype: torch.dtype, num_own: int) -> Configs:
    """For Hopper: a tile's two warpgroups leave room for accumulators in registers, without spilling in a loop."""
    if dtype == torch.float32:
        return Configs(Config(64, 32, 4, 2), Config(64, 32, 4, 2), Config(32, 64, 4, 2))
    if head_width > 128:
        return Configs(Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(64, 64, 8, 2))
    # An H100 takes, for 8,192 rows over two documents, 0.70 ms with 3 own keys, and 0.75 ms with the larger tile.
    forward = Config(64, 64, 4, 3) if num_own else Config(128, 128, 8, 3)
    return Configs(forward, Config(128, 64, 8, 3), Config(64, 128, 8, 3))


class _Operands(NamedTuple):
    """What all kernels of one call read, `_readable` all of it."""

    query: Tensor
    key_value: Tensor
    own_key_values: tuple[Tensor, ...]
    plan: AttentionPlan
    constants: dict[str, Any]
    configs: Configs


def _operands(
    query_RNC: Tensor, key_value_TEC: Tensor, own_key_values: tuple[Tensor, ...], plan: AttentionPlan
) -> _Operands:
    _, num_heads, head_width = query_RNC.shape
    num_kv_heads = key_value_TEC.shape[1] // 2
    constants = {
        "GROUP": num_heads // num_kv_heads,
        "SCALE": LOG2_E / math.sqrt(head_width),
        "C": head_width,
        "TO_VALUE": num_kv_heads * head_width,
    }
    configs = _configs(head_width, query_RNC.dtype, len(own_key_values))
    return _Operands(query_RNC, key_value_TEC, own_key_values, plan, constants, configs)


def _launch_forward(operands: _Operands) -> tuple[Tensor, Tensor]:
    """The output [R, N, C] and log-sum-exps to base 2, [N, R rounded up to tiles] in float32."""
    query, key_value, own_key_values, plan, constants, configs = operands
    num_rows, num_heads, _ = query.shape
    config = configs.forward
    output = torch.empty_like(query)
    logsumexp = torch.empty(num_heads, _cdiv(num_rows, TILE) * TILE, dtype=torch.float32, device=query.device)
    kernels.forward_kernel[(num_heads, plan.tile_order.shape[0] * (TILE // config.rows))](
        _described(query, config.rows),
        _described(key_value, config.keys),
        _described(output, config.rows),
        own_key_values,
        logsumexp,
        plan.start,
        plan.slot,
        plan.tile_order,
        plan.tile_offsets,
        plan.tile_ranges,
        num_rows,
        **constants,
        **config.options,
    )
    return output, logsumexp


class _StartedGradients(NamedTuple):
    """What the own keys need and give, before step 0's keys are met."""

    delta: Tensor
    """D, laid out like the log-sum-exps."""
    grad_query: Tensor
    """As far as own keys give it; uninitialized if there are none."""
    grad_own_key_values: tuple[Tensor, ...]


def _launch_grad_own(operands: _Operands, output: Tensor, grad_output: Tensor, logsumexp: Tensor) -> _StartedGradients:
    """The part of the backward pass that looks at every row once."""
    num_rows, num_heads, head_width = output.shape
    group = operands.constants["GROUP"]
    delta = torch.empty_like(logsumexp)
    grad_query = torch.empty_like(output)
    grad_own_key_values = tuple(torch.empty_like(x) for x in operands.own_key_values)
    for grad in grad_own_key_values:
        if grad.shape[0] > num_rows:
            grad[num_rows:].zero_()
    padded_group = triton.next_power_of_2(group)
    # 4,096 numbers of each tensor, 32 for each thread of four warps.
    rows = max(1, 4096 // (padded_group * head_width))
    kernels.grad_own_kernel[(_cdiv(logsumexp.shape[1], rows), num_heads // group)](
        operands.query,
        output,
        grad_output,
        operands.own_key_values,
        grad_own_key_values,
        grad_query,
        logsumexp,
        delta,
        num_rows,
        ROWS=rows,
        PADDED_GROUP=padded_group,
        num_warps=4,
        **operands.constants,
    )
    return _StartedGradients(delta, grad_query, grad_own_key_values)


def _launch_grad_query(operands: _Operands, grad_output: Tensor, logsumexp: Tensor, started: _StartedGradients) -> None:
    """Completes `started.grad_query`."""
    query, key_value, own_key_values, plan, constants, configs = operands
    config = configs.grad_query
    kernels.grad_query_kernel[(query.shape[1], plan.tile_order.shape[0] * (TILE // config.rows))](
        _described(query, config.rows),
        _described(key_value, config.keys),
        _described(grad_output, config.rows),
        _described(started.grad_query, config.rows),
        logsumexp,
        started.delta,
        plan.start,
        plan.slot,
        plan.tile_order,
        plan.tile_offsets,
        plan.tile_ranges,
        query.shape[0],
        HAS_OWN=bool(own_key_values),
        **constants,
        **config.options,
    )


def _launch_grad_key(operands: _Operands, grad_output: Tensor, logsumexp: Tensor, delta: Tensor) -> Tensor:
    """dK_0 and dV_0, [T, E, C]."""
    query, key_value, _, plan, constants, configs = operands
    config = configs.grad_key
    grad_key_value = torch.empty_like(key_value)
    kernels.grad_key_kernel[(key_value.shape[1] // 2, plan.block_order.shape[0] * (BLOCK // config.keys))](
        _described(query, config.rows),
        _described(key_value, config.keys),
        _described(grad_output, config.rows),
        _described(grad_key_value, config.keys),
        *(TensorDescriptor(x, [x.numel()], [1], [config.rows]) for x in (logsumexp, delta, plan.start, plan.slot)),
        plan.block_order,
        plan.block_offsets,
        plan.block_ranges,
        query.shape[0],
        **constants,
        **config.options,
    )
    return grad_key_value


def _cdiv(x: int, y: int) -> int:
    # `triton.cdiv` takes 2 us on the host, for which the device would wait in short passes.
    return -(-x // y)


def _described(x_RNC: Tensor, rows: int) -> TensorDescriptor:
    """What Hopper's copy engine needs to load and store blocks of some rows of one head."""
    num_rows, num_heads, width = x_RNC.shape
    return TensorDescriptor(x_RNC, [num_rows, num_heads * width], [num_heads * width, 1], [rows, width])


def _readable(x: Tensor) -> Tensor:
    """The tensor itself if its numbers are adjacent and begin where the copy engine can, else a copy."""
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


class _TTTAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key_value: Tensor, plan: AttentionPlan, *own_key_values: Tensor) -> Tensor:
        query, key_value, *own = (_readable(x) for x in (query, key_value, *own_key_values))
        output, logsumexp = _launch_forward(_operands(query, key_value, tuple(own), plan))
        ctx.save_for_backward(query, key_value, output, logsumexp, *own)
        ctx.plan = plan
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key_value, output, logsumexp, *own = ctx.saved_tensors
        operands = _operands(query, key_value, tuple(own), ctx.plan)
        grad_output = _readable(grad_outputs[0])
        started = _launch_grad_own(operands, output, grad_output, logsumexp)
        _launch_grad_query(operands, grad_output, logsumexp, started)
        grad_key_value = _launch_grad_key(operands, grad_output, logsumexp, started.delta)
        return started.grad_query, grad_key_value, None, *started.grad_own_key_values


def ttt_attention(
    query_RNC: Tensor,
    key_value_TEC: Tensor,
    own_key_values: Sequence[Tensor],
    start_R: Tensor,
    slot_R: Tensor,
    plan: AttentionPlan,
) -> Tensor:
    """The attention's output [R, N, C] of the rows of one step.

    Args: query_RNC: the first R rows of the pass that `start_R`, `slot_R` and `plan` are about; key_value_TEC: step 0's
    keys, then values, for all tokens; own_key_values: [R or more, E, C] of each later step so far, row r's in row r;
    start_R, slot_R: integers, the first and the last token whose step-0 key the row reads; plan: of
    `plan_attention` for them, on the queries' device.
    Raises: ValueError if shapes do not belong together, or Triton has no tile for the head width.
    """
    _check_shapes(query_RNC, key_value_TEC, own_key_values, slot_R.shape[0], plan)
    if query_RNC.shape[0] == 0 or not uses_triton("ttt_attention", query_RNC):
        return ttt_attention_reference(query_RNC, key_value_TEC, own_key_values, start_R, slot_R)
    head_width = query_RNC.shape[2]
    if head_width < 16 or head_width & (head_width - 1):
        wider = max(16, triton.next_power_of_2(head_width))
        raise ValueError(
            f"head width {head_width}: the kernels need a power of two from 16 on; set draft.head_dim to {wider}"
        )
    return _TTTAttention.apply(query_RNC, key_value_TEC, plan, *own_key_values)


def _check_shapes(
    query: Tensor, key_value: Tensor, own_key_values: Sequence[Tensor], num_rows: int, plan: AttentionPlan
) -> None:
    """Raises ValueError if the parts of a call do not belong together; `num_rows`: of the pass."""
    num_asked, num_heads, head_width = query.shape
    num_tokens, num_kv_heads = key_value.shape[0], key_value.shape[1] // 2
    if key_value.shape[1:] != (2 * num_kv_heads, head_width) or num_heads % num_kv_heads:
        raise ValueError(
            f"query {tuple(query.shape)} and keys with values {tuple(key_value.shape)} must be [R, N, C] and "
            "[T, 2 M, C], with N a multiple of M"
        )
    if any(x.shape[0] < num_asked or x.shape[1:] != key_value.shape[1:] for x in own_key_values):
        raise ValueError(
            f"own keys with values {[tuple(x.shape) for x in own_key_values]} must be [{num_asked} or more, "
            f"{2 * num_kv_heads}, {head_width}]"
        )
    num_tiles, num_blocks = plan.tile_order.shape[0], plan.block_order.shape[0]
    is_plan_of_pass = (num_tiles, num_blocks) == (_cdiv(num_rows, TILE), _cdiv(num_tokens, BLOCK))
    if num_asked > num_rows or not is_plan_of_pass:
        raise ValueError(
            f"the plan, {num_tiles} tiles of {TILE} rows and {num_blocks} blocks of {BLOCK} tokens, is not that of a "
            f"pass of {num_rows} rows over {num_tokens} tokens, of which {num_asked} rows are asked for"
        )
