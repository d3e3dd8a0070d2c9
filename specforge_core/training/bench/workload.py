"""Documents dealt to one batch, packed or padded."""

from collections.abc import Sequence
from typing import NamedTuple

from specforge_core.data.loader import plan_epoch
from specforge_core.training.bench.lengths import (
    Conversation,
    Lengths,
    count_answer_tokens,
    count_tokens,
    draw_conversations,
)

POOL_BATCHES = 16
"""Batches drawn to choose one from."""


class Workload(NamedTuple):
    """One kind of document, dealt to one batch in each of the two ways to batch."""

    packed: tuple[Conversation, ...]
    """At most the token budget together."""
    padded: tuple[Conversation, ...]
    """At most the token budget after each is padded to the longest."""


def make_workload(lengths: Lengths, share: float, *, budget: int, document_tokens: int, seed: int) -> Workload:
    """A batch of about `budget` tokens, of which about `share` are in answers.

    Raises: ValueError if no weights of the real conversations reach `share`.
    """
    num_pool_tokens = (1 if lengths == "uniform" else POOL_BATCHES) * budget
    drawn = draw_conversations(
        lengths, share, num_tokens=num_pool_tokens, max_tokens=budget, document_tokens=document_tokens, seed=seed
    )
    if lengths == "uniform":
        return Workload(tuple(drawn), tuple(drawn))
    return Workload(_packed(drawn, share, budget, seed), _padded(drawn, share, budget))


def _packed(drawn: Sequence[Conversation], share: float, budget: int, seed: int) -> tuple[Conversation, ...]:
    """The micro-batch, of those that a loader plans, that comes nearest to being full and having `share`."""

    def tokens_off(batch: Sequence[int]) -> float:
        total = sum(count_tokens(drawn[i]) for i in batch)
        answers = sum(count_answer_tokens(drawn[i]) for i in batch)
        return abs(answers - share * total) + (budget - total)

    plan = plan_epoch([count_tokens(conversation) for conversation in drawn], budget, seed, epoch=0)
    return tuple(drawn[i] for i in min(plan, key=tokens_off))


def _padded(drawn: Sequence[Conversation], share: float, budget: int) -> tuple[Conversation, ...]:
    """Of batches filled in the order of the draw, the one nearest to `share`, usual padding and being full."""
    batches: list[list[Conversation]] = [[]]
    for conversation in drawn:
        grown = [*batches[-1], conversation]
        if len(grown) * max(map(count_tokens, grown)) <= budget:
            batches[-1] = grown
        else:
            batches.append([conversation])
    num_padded_tokens = sum(len(batch) * max(map(count_tokens, batch)) for batch in batches)
    usual_fill = sum(map(count_tokens, drawn)) / num_padded_tokens

    def distance(batch: list[Conversation]) -> float:
        lengths = [count_tokens(conversation) for conversation in batch]
        padded_tokens = len(lengths) * max(lengths)
        share_off = abs(sum(map(count_answer_tokens, batch)) / sum(lengths) - share)
        return share_off + abs(sum(lengths) / padded_tokens - usual_fill) + abs(1 - padded_tokens / budget)

    # The last one is cut short by the end of the draw.
    nearest = min(batches[:-1] or batches, key=distance)
    return tuple(nearest)
