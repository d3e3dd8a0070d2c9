"""Tests of the attention of training-time test: the plan, the reference and the kernels."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from specforge_core.kernels import dispatch
from specforge_core.kernels.attention_plan import BLOCK, TILE, AttentionPlan, plan_attention
from specforge_core.kernels.cases import Case, Inputs, Numbers, check, in_float64, run
from specforge_core.kernels.cases_attention import (
    Document,
    Heads,
    attention_case,
    conversations,
    supervised_rows,
)
from specforge_core.kernels.ttt_attention import ttt_attention, ttt_attention_reference

DOCUMENTS = [Document(100, 60), Document(40, 0), Document(150, 150), Document(9, 3)]
# Their tails are longer than the rest, and each of them runs over all documents again.
SHORT_ANSWERS = [Document(30, 4)] * 9
LONG = [Document(300, 290)]
SMALL = Heads(4, 2, 16)

LAYOUTS = {
    "one row": ([Document(2, 2)], 1, SMALL),
    "documents": (DOCUMENTS, 2, SMALL),
    "no own keys": (DOCUMENTS, 0, SMALL),
    "one head per group": ([Document(140, 100)], 1, Heads(2, 2, 32)),
    "a group of three": ([Document(140, 100)], 1, Heads(3, 1, 32)),
    "blocks that need no mask": (LONG, 1, Heads(2, 1, 16)),
    "tails in odd order": (SHORT_ANSWERS, 3, SMALL),
}


def small_case(layout: str) -> Case:
    documents, num_own, heads = LAYOUTS[layout]
    return attention_case(layout, documents, num_own, heads=heads)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_are_as_close_to_float64_as_eager_pytorch(layout: str, device: torch.device) -> None:
    check(small_case(layout), device, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("layout", "width"),
    # Every pair is compiled anew, for seconds.
    [
        ("one row", 128),
        ("documents", 64),
        ("no own keys", 128),
        ("no own keys", 256),
        ("one head per group", 32),
        ("a group of three", 256),
        ("blocks that need no mask", 128),
        ("tails in odd order", 16),
    ],
)
def test_kernels_are_as_close_to_float64_as_eager_pytorch_in_bfloat16(
    layout: str, width: int, device: torch.device
) -> None:
    documents, num_own, heads = LAYOUTS[layout]
    check(attention_case(layout, documents, num_own, heads=heads._replace(width=width)), device, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("num_own", [0, 6])
def test_kernels_are_right_on_a_whole_batch_of_conversations(num_own: int, device: torch.device) -> None:
    check(attention_case("conversations", conversations(2048), num_own, bucket=256), device, torch.bfloat16)


def brute_force(query: Tensor, key_value: Tensor, own_key_values: list[Tensor], start: Any, slot: Any) -> Tensor:
    """Row by row and head by head, straight from the definition."""
    num_rows, num_heads, width = query.shape
    num_kv_heads = key_value.shape[1] // 2
    group = num_heads // num_kv_heads
    rows = []
    for r in range(num_rows):
        for n in range(num_heads):
            m = n // group
            readable = [*key_value[start[r] : slot[r] + 1], *(own[r] for own in own_key_values)]
            keys = [heads[m] for heads in readable]
            values = [heads[num_kv_heads + m] for heads in readable]
            logits = torch.stack([query[r, n] @ k / math.sqrt(width) for k in keys])
            weights = logits.exp() / logits.exp().sum()
            rows.append(sum(weight * v for weight, v in zip(weights, values, strict=True)))
    return torch.stack(rows).view(num_rows, num_heads, width)


def test_the_reference_is_the_definition() -> None:
    """Output and all gradients, in float64; rows in odd order, one twice, and own keys of more rows than are asked."""
    numbers = Numbers(torch.device("cpu"), torch.float64)
    start, slot = torch.tensor([4, 0, 4, 0, 4, 9, 0]), torch.tensor([6, 3, 8, 0, 6, 9, 2])
    inputs = {
        "query": numbers.leaf(6, 4, 3),
        "key_value": numbers.leaf(10, 4, 3),
        "own_1": numbers.leaf(7, 4, 3),
        "own_2": numbers.leaf(7, 4, 3),
    }

    def with_list(function: Any) -> Any:
        return lambda query, key_value, own_1, own_2: function(query, key_value, [own_1, own_2], start, slot)

    actual = run(with_list(ttt_attention_reference), inputs)
    expected = run(with_list(brute_force), in_float64(inputs))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_rows_may_come_twice_and_own_keys_may_have_more_rows_than_are_asked_for(device: torch.device) -> None:
    start, slot = torch.zeros(150, dtype=torch.int64), torch.arange(20, 170).clamp(max=160)

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        numbers = Numbers(device, dtype)
        plan = AttentionPlan(*(part.to(device) for part in plan_attention(start, slot, 170)))
        own = {"own_1": numbers.leaf(150, 2, 16), "own_2": numbers.leaf(145, 2, 16)}
        return {"query": numbers.leaf(145, 2, 16), "key_value": numbers.leaf(170, 2, 16), **own, "plan": plan}

    def op(function: Any) -> Any:
        return lambda query, key_value, own_1, own_2, plan: function(
            query, key_value, [own_1, own_2], start.to(query.device), slot.to(query.device), plan
        )

    case = small_case("documents")
    check(
        Case("repeated", make_inputs, op(ttt_attention), op(ttt_attention_reference), {}, case.bytes, case.flops),
        device,
        torch.float32,
    )


@pytest.mark.parametrize("gap", [0, 16, 1])
def test_queries_keys_and_values_may_be_slices_of_one_tensor(gap: int, device: torch.device) -> None:
    """Also where their rows begin at addresses that the copy engine cannot take."""
    rows = supervised_rows([Document(140, 140)], 1)
    plan = AttentionPlan(*(part.to(device) for part in plan_attention(rows.start_R, rows.slot_R, 140)))
    start, slot = rows.start_R.to(device), rows.slot_R.to(device)

    def op(function: Any) -> Any:
        def attend(fused: Tensor) -> Tensor:
            query_RNC, key_value_TEC = fused[:, gap:].unflatten(1, (8, 16)).split(4, dim=1)
            return function(query_RNC, key_value_TEC, [key_value_TEC], start, slot, plan)

        return attend

    case = small_case("documents")
    check(
        Case(
            "fused",
            lambda device, dtype: {"fused": Numbers(device, dtype).leaf(140, 128 + gap)},
            op(ttt_attention),
            op(ttt_attention_reference),
            {},
            case.bytes,
            case.flops,
        ),
        device,
        torch.float32,
    )


def test_one_token_and_its_own_key_share_the_weight(device: torch.device) -> None:
    """Equal logits: half of each value, and half of the gradient to each."""
    key = torch.ones(1, 1, 16, device=device)
    key_value, own = (torch.cat((key, torch.full_like(key, x)), dim=1).requires_grad_() for x in (1.0, 4.0))
    zero = torch.tensor([0])
    plan = AttentionPlan(*(part.to(device) for part in plan_attention(zero, zero, 1)))
    output = ttt_attention(key, key_value, [own], zero.to(device), zero.to(device), plan)
    torch.testing.assert_close(output, torch.full_like(key, 2.5))
    output.backward(torch.full_like(key, 3.0))
    assert key_value.grad is not None
    assert own.grad is not None
    torch.testing.assert_close(key_value.grad[:, 1:], torch.full_like(key, 1.5))
    torch.testing.assert_close(own.grad[:, 1:], torch.full_like(key, 1.5))
    # A key's logit gains what its value is above the output's 2.5, times the weight 1/2, the gradient 3 and 16 numbers.
    torch.testing.assert_close(key_value.grad[:, :1], torch.full_like(key, -1.5 * 0.5 * 3 * 16 / 4))
    torch.testing.assert_close(own.grad[:, :1], torch.full_like(key, 1.5 * 0.5 * 3 * 16 / 4))


def test_step_0_keys_that_no_row_reads_have_a_gradient_of_zero(device: torch.device) -> None:
    gradients = run(small_case("documents").op, small_case("documents").make_inputs(device, torch.float32)).gradients
    # The second document, tokens 100 to 139, has no supervised slot; the last two of the first are done before step 2.
    assert (gradients["key_value_TEC"][98:140] == 0).all()
    assert (gradients["key_value_TEC"][:98, 2:] != 0).any(dim=2).all()


def test_no_rows_have_no_output_and_no_gradient(device: torch.device) -> None:
    inputs = small_case("documents").make_inputs(device, torch.float32)
    rows = inputs["start_R"], inputs["slot_R"], inputs["plan"]
    output = ttt_attention(inputs["query_RNC"][:0], inputs["key_value_TEC"], [inputs["own_key_value_1"]], *rows)
    assert output.shape == (0, 4, 16)
    output.sum().backward()
    assert (inputs["query_RNC"].grad == 0).all()


@pytest.mark.gpu
def test_a_cuda_graph_replays_it_on_other_numbers_and_another_batch() -> None:
    device = torch.device("cuda")
    case = attention_case("graph", [Document(700, 512), Document(324, 256)], 2, bucket=256, heads=Heads(4, 2, 64))
    other = attention_case("other", [Document(424, 300), Document(600, 468)], 2, bucket=256, heads=Heads(4, 2, 64))
    static, fresh = (x.make_inputs(device, torch.bfloat16) for x in (case, other))
    leaves = [name for name, value in static.items() if isinstance(value, Tensor) and value.requires_grad]

    def step(inputs: Inputs) -> list[Tensor]:
        output = case.op(**inputs)
        return [output, *torch.autograd.grad(output, [inputs[name] for name in leaves], torch.ones_like(output))]

    # Compiling is not for capture.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    expected = step(fresh)
    with torch.no_grad():
        for name in (*leaves, "start_R", "slot_R"):
            static[name].copy_(fresh[name])
        for old, new in zip(static["plan"], fresh["plan"], strict=True):
            old.copy_(new)
    graph.replay()
    for actual, wanted in zip(captured, expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize(
    "documents", [DOCUMENTS, SHORT_ANSWERS, LONG, [Document(128, 128)] * 3, [Document(1, 1)], conversations(3000)]
)
def test_the_plan_names_every_block_that_a_tile_meets_and_no_other(documents: list[Document]) -> None:
    num_tokens = sum(document.num_tokens for document in documents)
    rows = supervised_rows(documents, 4)
    plan = plan_attention(rows.start_R, rows.slot_R, num_tokens)
    token = torch.arange(num_tokens)
    sees_RT = (token >= rows.start_R.unsqueeze(1)) & (token <= rows.slot_R.unsqueeze(1))
    tiles = [list(tile.split(BLOCK, dim=1)) for tile in sees_RT.split(TILE)]
    meeting = torch.tensor([[bool(part.any()) for part in tile] for tile in tiles])
    # Behind the last token a block has nothing to be seen, so it is not seen in full.
    full = torch.tensor([[bool(part.all()) and part.shape[1] == BLOCK for part in tile] for tile in tiles])

    def in_ranges(line: int, offsets: Tensor, ranges: Tensor) -> list[int]:
        return [x for first, end in ranges[offsets[line] : offsets[line + 1]].tolist() for x in range(first, end)]

    for i, line in enumerate(meeting):
        assert in_ranges(i, plan.tile_offsets, plan.tile_ranges) == line.nonzero().squeeze(1).tolist()
    for i in range(meeting.shape[1]):
        seen_in_full = full[:, i].nonzero().squeeze(1).tolist()
        seen_in_part = (meeting & ~full)[:, i].nonzero().squeeze(1).tolist()
        assert in_ranges(2 * i, plan.block_offsets, plan.block_ranges) == seen_in_full
        assert in_ranges(2 * i + 1, plan.block_offsets, plan.block_ranges) == seen_in_part
    for order, meets in ((plan.tile_order, meeting), (plan.block_order, meeting.T)):
        assert sorted(order.tolist()) == list(range(len(meets)))
        work = meets.sum(1)[order.long()]
        assert (work[:-1] >= work[1:]).all()


def test_the_plan_of_a_long_document_is_one_range_per_tile_and_a_mask_for_the_diagonal() -> None:
    rows = supervised_rows([Document(4 * BLOCK, 4 * BLOCK)], 1)
    plan = plan_attention(rows.start_R, rows.slot_R, 4 * BLOCK)
    assert plan.tile_offsets.tolist() == [0, 1, 2, 3, 4]
    assert plan.tile_ranges[:4].tolist() == [[0, 1], [0, 2], [0, 3], [0, 4]]
    assert plan.tile_order.tolist() == [3, 2, 1, 0]
    # Block i is seen in full by the tiles behind tile i, which no tile is behind the last, and in part by tile i.
    assert plan.block_offsets.tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 7]
    assert plan.block_ranges[:7].tolist() == [[1, 4], [0, 1], [2, 4], [1, 2], [3, 4], [2, 3], [3, 4]]
    assert plan.block_order.tolist() == [0, 1, 2, 3]


def test_plans_of_batches_of_one_size_have_the_same_shapes() -> None:
    plans = []
    for documents in ([Document(2048, 1024)], [Document(16, 8)] * 128):
        rows = supervised_rows(documents, 7)
        plans.append(plan_attention(rows.start_R, rows.slot_R, 2048))
    first, second = ([part.shape for part in plan] for plan in plans)
    assert first == second


def test_what_does_not_belong_together_is_refused(device: torch.device) -> None:
    inputs = small_case("documents").make_inputs(device, torch.float32)
    query, key_value, own = inputs["query_RNC"], inputs["key_value_TEC"], inputs["own_key_value_1"]
    start, slot, plan = inputs["start_R"], inputs["slot_R"], inputs["plan"]
    with pytest.raises(ValueError, match="N a multiple of M"):
        ttt_attention(query[:, :3], key_value, [], start, slot, plan)
    with pytest.raises(ValueError, match=r"must be \[R, N, C\] and \[T, 2 M, C\]"):
        ttt_attention(query, key_value[:, :3], [], start, slot, plan)
    with pytest.raises(ValueError, match=f"must be .{len(query)} or more, 4, 16"):
        ttt_attention(query, key_value, [own, key_value[:5]], start, slot, plan)
    with pytest.raises(ValueError, match=f"must be .{len(query)} or more, 4, 16"):
        ttt_attention(query, key_value, [own[:, :2]], start, slot, plan)
    with pytest.raises(ValueError, match="is not that of a pass of 100 rows over 299 tokens"):
        ttt_attention(query[:100], key_value, [], start[:100], slot[:100], plan)
    with pytest.raises(ValueError, match="is not that of a pass of 213 rows over 120 tokens"):
        ttt_attention(query, key_value[:120], [], start, slot, plan)
    with pytest.raises(ValueError, match=r"head width 12: .* power of two from 16 on; set draft\.head_dim to 16"):
        ttt_attention(query[..., :12], key_value[..., :12], [], start, slot, plan)


def test_float64_and_references_need_no_triton(device: torch.device) -> None:
    case = small_case("documents")
    inputs = in_float64(case.make_inputs(device, torch.float32))
    assert torch.equal(case.op(**inputs), case.reference(**inputs))
    with dispatch.references():
        inputs = case.make_inputs(device, torch.float32)
        assert torch.equal(case.op(**inputs), case.reference(**inputs))
