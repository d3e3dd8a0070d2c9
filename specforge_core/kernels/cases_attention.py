"""Cases of the attention of training-time test.

R rows of a pass, T tokens of the packed batch, N query heads, M KV heads, E = 2M heads of keys, then of
values, C head width, J own keys.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specforge_core.kernels.attention_plan import AttentionPlan, plan_attention
from specforge_core.kernels.cases import Case, Inputs, Numbers, Work
from specforge_core.kernels.ttt_attention import ttt_attention, ttt_attention_reference

BFLOAT16, FLOAT32 = 2, 4
"""Bytes of a number."""


class Document(NamedTuple):
    """A prompt and an answer: the last `num_supervised` tokens are the slots whose rows are computed."""

    num_tokens: int
    num_supervised: int


class Heads(NamedTuple):
    """Those of Llama 3.1 8B, if nothing else is said."""

    num_query: int = 32
    num_kv: int = 8
    width: int = 128


def cases() -> tuple[Case, ...]:
    """Steps 0, 3 and 6 of two dense documents; conversations; a long prompt with a short answer."""
    dense = [Document(4096, 4096)] * 2
    return (
        *(attention_case(f"2 x 4096, {num_own} own keys", dense, num_own, bucket=256) for num_own in (0, 3, 6)),
        attention_case("8192 of conversations, 3 own keys", conversations(8192), 3, bucket=256),
        attention_case("1024 of 32768, 3 own keys", [Document(32768, 1024)], 3, bucket=256),
    )


def conversations(num_tokens: int) -> list[Document]:
    """Documents of 100 to 800 tokens, about half of them supervised, that fill a batch."""
    draw = random.Random(0)
    documents: list[Document] = []
    left = num_tokens
    while left > 0:
        length = min(draw.randint(100, 800), left)
        documents.append(Document(length, round(length * draw.uniform(0.2, 0.8))))
        left -= length
    return documents


def attention_case(
    name: str, documents: Sequence[Document], num_own: int, *, bucket: int = 1, heads: Heads | None = None
) -> Case:
    """The last of `num_own` + 1 steps; each step has a multiple of `bucket` rows, unless the pass has fewer."""
    heads = heads or Heads()
    rows = supervised_rows(documents, num_own + 1)
    num_tokens = sum(document.num_tokens for document in documents)
    num_rows = [min(len(rows.slot_R), -(-n // bucket) * bucket) for n in rows.num_active]

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Inputs:
        numbers = Numbers(device, dtype)
        own = {
            f"own_key_value_{j}": numbers.leaf(num_rows[j], 2 * heads.num_kv, heads.width)
            for j in range(1, num_own + 1)
        }
        plan = plan_attention(rows.start_R, rows.slot_R, num_tokens)
        return {
            "query_RNC": numbers.leaf(num_rows[-1], heads.num_query, heads.width),
            "key_value_TEC": numbers.leaf(num_tokens, 2 * heads.num_kv, heads.width),
            "start_R": rows.start_R.to(device),
            "slot_R": rows.slot_R.to(device),
            "plan": AttentionPlan(*(part.to(device) for part in plan)),
            **own,
        }

    length_R = rows.slot_R - rows.start_R + 1
    num_logits = heads.num_query * (int(length_R[: num_rows[-1]].sum()) + num_own * num_rows[-1])
    query_size = num_rows[-1] * heads.num_query * heads.width
    kv_size = (num_tokens + num_own * num_rows[-1]) * heads.num_kv * heads.width
    statistics = num_rows[-1] * heads.num_query * FLOAT32
    return Case(
        f"ttt_attention {name}",
        make_inputs,
        lambda **inputs: ttt_attention(**_with_list_of_own(inputs, num_own)),
        lambda **inputs: ttt_attention_reference(**_with_list_of_own(inputs, num_own)),
        shapes=dict(zip("RTJNMC", (num_rows[-1], num_tokens, num_own, *heads), strict=True)),
        bytes=Work(
            2 * BFLOAT16 * (query_size + kv_size) + statistics, 4 * BFLOAT16 * (query_size + kv_size) + statistics
        ),
        # Two products forward, five backward.
        flops=Work(4 * heads.width * num_logits, 10 * heads.width * num_logits),
        has_compiled_rival=False,
        # It asks the device where documents begin.
        reference_waits=True,
    )


class SupervisedRows(NamedTuple):
    """Rows as a pass has them: those of most steps first, then in the order of their tokens."""

    start_R: Tensor
    slot_R: Tensor
    num_active: list[int]
    """By step."""


def supervised_rows(documents: Sequence[Document], num_steps: int) -> SupervisedRows:
    """A row for every supervised slot; the last one of a document is active at one step, the one before at two, ..."""
    start, slot, depth = [], [], []
    end = 0
    for document in documents:
        begin, end = end, end + document.num_tokens
        for token in range(end - document.num_supervised, end):
            start.append(begin)
            slot.append(token)
            depth.append(min(num_steps, end - token))
    depth_R = torch.tensor(depth)
    order_R = depth_R.argsort(descending=True, stable=True)
    num_active = [int((depth_R > step).sum()) for step in range(num_steps)]
    return SupervisedRows(torch.tensor(start)[order_R], torch.tensor(slot)[order_R], num_active)


def _with_list_of_own(inputs: Inputs, num_own: int) -> Inputs:
    others = {name: value for name, value in inputs.items() if not name.startswith("own_")}
    return {**others, "own_key_values": [inputs[f"own_key_value_{j}"] for j in range(1, num_own + 1)]}
