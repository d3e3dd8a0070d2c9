"""The Triton kernels of `ttt_attention`: what they compute stands there, and what plan they follow in `attention_plan`.

Tensors named in the plural are described for Hopper's copy engine as [rows, heads * C] or are pointers; those behind
`logsumexp` and `delta` are [heads, rows rounded up to tiles]. Rows behind the last one read as zeros with an infinite
log-sum-exp, and so weigh nothing without a mask. A row of keys and values, 2M heads, has a head's value TO_VALUE
numbers behind its key.
"""

import math

import triton
import triton.language as tl

from specforge_core.kernels.attention_plan import BLOCK, TILE

_LOG2_E = tl.constexpr(math.log2(math.e))
_TILE = tl.constexpr(TILE)
_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def _attend(
    output, maximum, total, query, key_values, column, start, slot, ranges, first, last,
    SCALE: tl.constexpr, TO_VALUE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The running output, maximum and sum after the key blocks of ranges first to last - 1."""
    last_start, first_slot = tl.max(start, 0), tl.min(slot, 0)
    for i in range(first, last):
        begin = tl.load(ranges + 2 * i) * (_BLOCK // KEYS)
        end = tl.load(ranges + 2 * i + 1) * (_BLOCK // KEYS)
        for block in tl.range(begin, end):
            first_token = block * KEYS
            logits = tl.dot(query, key_values.load([first_token, column]).T, input_precision="ieee")
            if (first_token < last_start) | (first_token + KEYS - 1 > first_slot):
                token = first_token + tl.arange(0, KEYS)[None, :]
                logits = tl.where((token >= start[:, None]) & (token <= slot[:, None]), logits, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(logits, 1) * SCALE)
            weight = tl.exp2(logits * SCALE - new_maximum[:, None])
            shrink = tl.exp2(maximum - new_maximum)
            total = total * shrink + tl.sum(weight, 1)
            value = key_values.load([first_token, column + TO_VALUE])
            output = tl.dot(weight.to(value.dtype), value, output * shrink[:, None], input_precision="ieee")
            maximum = new_maximum
    return output, maximum, total


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    queries, key_values, outputs, own_key_values, logsumexp, starts, slots, tile_order, tile_offsets, tile_ranges,
    num_rows, GROUP: tl.constexpr, SCALE: tl.constexpr, C: tl.constexpr, TO_VALUE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one query head."""
    head = tl.program_id(0)
    tile = tl.load(tile_order + tl.program_id(1) // (_TILE // ROWS))
    if tile * _TILE >= num_rows:
        return
    first_row = tile * _TILE + tl.program_id(1) % (_TILE // ROWS) * ROWS
    row = first_row + tl.arange(0, ROWS)
    in_range = row < num_rows
    column = head // GROUP * C
    query = queries.load([first_row, head * C])
    # Finite, so that a row which no key was shown to yet does not turn into NaN.
    maximum = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, C], tl.float32)
    own_offset = row.to(tl.int64)[:, None] * (2 * TO_VALUE) + column + tl.arange(0, C)[None, :]
    for j in tl.static_range(len(own_key_values)):
        key = tl.load(own_key_values[j] + own_offset, in_range[:, None], 0.0)
        value = tl.load(own_key_values[j] + own_offset + TO_VALUE, in_range[:, None], 0.0)
        logit = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * SCALE
        new_maximum = tl.maximum(maximum, logit)
        weight = tl.exp2(logit - new_maximum)
        shrink = tl.exp2(maximum - new_maximum)
        total = total * shrink + weight
        output = output * shrink[:, None] + weight[:, None] * value.to(tl.float32)
        maximum = new_maximum
    start, slot = tl.load(starts + row), tl.load(slots + row)
    output, maximum, total = _attend(
        output, maximum, total, query, key_values, column, start, slot, tile_ranges,
        tl.load(tile_offsets + tile), tl.load(tile_offsets + tile + 1), SCALE, TO_VALUE, KEYS,
    )  # fmt: skip
    outputs.store([first_row, head * C], (output / total[:, None]).to(query.dtype))
    # Infinite behind the last row: the backward kernels then give such rows no weight without looking at their number.
    padded_rows = tl.cdiv(num_rows, _TILE) * _TILE
    tl.store(
        logsumexp + head.to(tl.int64) * padded_rows + row, tl.where(in_range, maximum + tl.log2(total), float("inf"))
    )


@triton.jit(do_not_specialize=["num_rows"])
def grad_own_kernel(
    queries, outputs, grad_outputs, own_key_values, grad_own_key_values, grad_queries, logsumexp, deltas, num_rows,
    GROUP: tl.constexpr, SCALE: tl.constexpr, C: tl.constexpr, TO_VALUE: tl.constexpr, ROWS: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
):  # fmt: skip
    """The gradients of and through own keys and values, and D, for a few rows of one group of heads."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    in_group = tl.arange(0, PADDED_GROUP)
    head = tl.program_id(1) * GROUP + in_group
    in_range = row < num_rows
    mask = (in_range[:, None] & (in_group < GROUP)[None, :])[:, :, None]
    offset = (row * (TO_VALUE * GROUP))[:, None, None] + head[None, :, None] * C + tl.arange(0, C)[None, None, :]
    do = tl.load(grad_outputs + offset, mask, 0.0).to(tl.float32)
    output = tl.load(outputs + offset, mask, 0.0).to(tl.float32)
    delta = tl.sum(do * output, 2)
    padded_rows = tl.cdiv(num_rows, _TILE).to(tl.int64) * _TILE
    statistic = head[None, :] * padded_rows + row[:, None]
    has_statistic = (row < padded_rows)[:, None] & (in_group < GROUP)[None, :]
    tl.store(deltas + statistic, delta, has_statistic)
    if len(own_key_values) > 0:
        lse = tl.load(logsumexp + statistic, has_statistic, float("inf"))
        query = tl.load(queries + offset, mask, 0.0).to(tl.float32)
        dq = tl.zeros([ROWS, PADDED_GROUP, C], tl.float32)
        own_offset = row[:, None] * (2 * TO_VALUE) + tl.program_id(1) * C + tl.arange(0, C)[None, :]
        for j in tl.static_range(len(own_key_values)):
            own = own_key_values[j] + own_offset
            key = tl.load(own, in_range[:, None], 0.0).to(tl.float32)[:, None, :]
            value = tl.load(own + TO_VALUE, in_range[:, None], 0.0).to(tl.float32)[:, None, :]
            weight = tl.exp2(tl.sum(query * key, 2) * SCALE - lse)
            dlogit = weight * (tl.sum(do * value, 2) - delta) * (SCALE / _LOG2_E)
            dq += dlogit[:, :, None] * key
            dk = tl.sum(dlogit[:, :, None] * query, 1)
            dv = tl.sum(weight[:, :, None] * do, 1)
            grad_own = grad_own_key_values[j] + own_offset
            tl.store(grad_own, dk.to(grad_own.dtype.element_ty), in_range[:, None])
            tl.store(grad_own + TO_VALUE, dv.to(grad_own.dtype.element_ty), in_range[:, None])
        tl.store(grad_queries + offset, dq.to(grad_queries.dtype.element_ty), mask)


@triton.jit
def _add_grad_query(
    dq, query, do, key_values, column, lse, delta, start, slot, ranges, first, last,
    SCALE: tl.constexpr, TO_VALUE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq, not yet scaled, after the key blocks of ranges first to last - 1."""
    last_start, first_slot = tl.max(start, 0), tl.min(slot, 0)
    for i in range(first, last):
        begin = tl.load(ranges + 2 * i) * (_BLOCK // KEYS)
        end = tl.load(ranges + 2 * i + 1) * (_BLOCK // KEYS)
        for block in tl.range(begin, end):
            first_token = block * KEYS
            key = key_values.load([first_token, column])
            value = key_values.load([first_token, column + TO_VALUE])
            weight = tl.exp2(tl.dot(query, key.T, input_precision="ieee") * SCALE - lse[:, None])
            if (first_token < last_start) | (first_token + KEYS - 1 > first_slot):
                token = first_token + tl.arange(0, KEYS)[None, :]
                weight = tl.where((token >= start[:, None]) & (token <= slot[:, None]), weight, 0.0)
            dweight = tl.dot(do, value.T, input_precision="ieee")
            dlogit = (weight * (dweight - delta[:, None])).to(key.dtype)
            dq = tl.dot(dlogit, key, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["num_rows"])
def grad_query_kernel(
    queries, key_values, grad_outputs, grad_queries, logsumexp, deltas, starts, slots,
    tile_order, tile_offsets, tile_ranges, num_rows, HAS_OWN: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr,
    C: tl.constexpr, TO_VALUE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq of one tile of rows of one query head; what the own keys give is there already, in the inputs' dtype."""
    head = tl.program_id(0)
    tile = tl.load(tile_order + tl.program_id(1) // (_TILE // ROWS))
    first_row = tile * _TILE + tl.program_id(1) % (_TILE // ROWS) * ROWS
    if first_row >= num_rows:
        return
    row = first_row + tl.arange(0, ROWS)
    column = head // GROUP * C
    statistic = head.to(tl.int64) * tl.cdiv(num_rows, _TILE) * _TILE + row
    lse = tl.load(logsumexp + statistic)
    delta = tl.load(deltas + statistic)
    start, slot = tl.load(starts + row), tl.load(slots + row)
    query = queries.load([first_row, head * C])
    do = grad_outputs.load([first_row, head * C])
    dq = _add_grad_query(
        tl.zeros([ROWS, C], tl.float32), query, do, key_values, column, lse, delta, start, slot, tile_ranges,
        tl.load(tile_offsets + tile), tl.load(tile_offsets + tile + 1), SCALE, TO_VALUE, KEYS,
    )  # fmt: skip
    dq *= SCALE / _LOG2_E
    if HAS_OWN:
        dq += grad_queries.load([first_row, head * C]).to(tl.float32)
    grad_queries.store([first_row, head * C], dq.to(query.dtype))


@triton.jit
def _add_grad_key(
    dk, dv, key, value, queries, grad_outputs, logsumexp, deltas, starts, slots, first_token, first_head, num_rows,
    ranges, first, last, GROUP: tl.constexpr, SCALE: tl.constexpr, MASKED: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dk, not yet scaled, and dv after the tiles of ranges first to last - 1, each for all heads of the group."""
    padded_rows = tl.cdiv(num_rows, _TILE) * _TILE
    for i in range(first, last):
        begin = tl.load(ranges + 2 * i) * (_TILE // ROWS)
        end = tl.minimum(tl.load(ranges + 2 * i + 1) * (_TILE // ROWS), tl.cdiv(num_rows, ROWS))
        for step in tl.range(begin * GROUP, end * GROUP):
            first_row = step // GROUP * ROWS
            head = first_head + step % GROUP
            # Transposed, keys by rows, so that both products into dk and dv take their left factor from registers.
            query = queries.load([first_row, head * C])
            lse = logsumexp.load([head * padded_rows + first_row])
            do = grad_outputs.load([first_row, head * C])
            logits = tl.dot(key, query.T, input_precision="ieee")
            dweight = tl.dot(value, do.T, input_precision="ieee")
            weight = tl.exp2(logits * SCALE - lse[None, :])
            if MASKED:
                start, slot = starts.load([first_row]), slots.load([first_row])
                token = first_token + tl.arange(0, KEYS)[:, None]
                weight = tl.where((token >= start[None, :]) & (token <= slot[None, :]), weight, 0.0)
            delta = deltas.load([head * padded_rows + first_row])
            dv = tl.dot(weight.to(do.dtype), do, dv, input_precision="ieee")
            dlogit = (weight * (dweight - delta[None, :])).to(query.dtype)
            dk = tl.dot(dlogit, query, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["num_rows"])
def grad_key_kernel(
    queries, key_values, grad_outputs, grad_key_values, logsumexp, deltas, starts, slots,
    block_order, block_offsets, block_ranges, num_rows, GROUP: tl.constexpr, SCALE: tl.constexpr,
    C: tl.constexpr, TO_VALUE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dK_0 and dV_0 of one block of tokens of one KV head: zeros, where no row reads them."""
    kv_head = tl.program_id(0)
    block = tl.load(block_order + tl.program_id(1) // (_BLOCK // KEYS))
    first_token = block * _BLOCK + tl.program_id(1) % (_BLOCK // KEYS) * KEYS
    key = key_values.load([first_token, kv_head * C])
    value = key_values.load([first_token, kv_head * C + TO_VALUE])
    dk = tl.zeros([KEYS, C], tl.float32)
    dv = tl.zeros([KEYS, C], tl.float32)
    first_full = tl.load(block_offsets + 2 * block)
    first_masked = tl.load(block_offsets + 2 * block + 1)
    end = tl.load(block_offsets + 2 * block + 2)
    dk, dv = _add_grad_key(
        dk, dv, key, value, queries, grad_outputs, logsumexp, deltas, starts, slots, first_token, kv_head * GROUP,
        num_rows, block_ranges, first_full, first_masked, GROUP, SCALE, False, C, ROWS, KEYS,
    )  # fmt: skip
    dk, dv = _add_grad_key(
        dk, dv, key, value, queries, grad_outputs, logsumexp, deltas, starts, slots, first_token, kv_head * GROUP,
        num_rows, block_ranges, first_masked, end, GROUP, SCALE, True, C, ROWS, KEYS,
    )  # fmt: skip
    grad_key_values.store([first_token, kv_head * C], (dk * (SCALE / _LOG2_E)).to(key.dtype))
    grad_key_values.store([first_token, kv_head * C + TO_VALUE], dv.to(value.dtype))
