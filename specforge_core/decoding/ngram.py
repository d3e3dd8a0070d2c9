"""An n-gram drafter: what followed the last tokens before, in this answer or in training data. No weights.

It is the yardstick of a trained draft: on text that merely repeats itself, this is nearly as good.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from specforge_core.decoding.drafters import Extension

MAX_CONTEXT = 3
"""Tokens looked back at."""
MAX_LEARNED_TOKENS = 1_000_000
"""Bounds the table's memory to about 1 GiB; more text adds little to three tokens of context."""

Context = tuple[int, ...]


class SupervisedTokens(NamedTuple):
    """A conversation's token ids, and which of them the target produced."""

    input_ids: Sequence[int]
    loss_mask: Sequence[bool]


def learn_continuations(documents: Iterable[SupervisedTokens]) -> dict[Context, int]:
    """The most frequent next token of every context of 1 to 3 tokens, over tokens that the target produced."""
    counts: dict[Context, Counter[int]] = {}
    produced = ((ids, end) for ids, mask in documents for end in range(1, len(ids)) if mask[end])
    for ids, end in islice(produced, MAX_LEARNED_TOKENS):
        for context in _contexts(ids, end):
            counts.setdefault(context, Counter())[ids[end]] += 1
    # Equal counts go to the lower id, not to what happened to come first.
    return {context: max(counter, key=lambda token: (counter[token], -token)) for context, counter in counts.items()}


class NgramDrafter:
    """A `Drafter` by longest context: at each length first the row's own text, newest first, then the table."""

    aux_layers: tuple[int, ...] = ()

    def __init__(self, continuations: dict[Context, int]) -> None:
        self.continuations = continuations
        self.seen: list[dict[Context, int]] = []
        self.history: list[list[int]] = []

    def begin(self, num_rows: int) -> None:
        self.seen = [{} for _ in range(num_rows)]
        self.history = [[] for _ in range(num_rows)]

    def extend(self, first_row: int, extensions: Sequence[Extension], aux_hidden_BTLD: Tensor | None) -> None:
        for row, extension in enumerate(extensions, first_row):
            if extension.start == 0:
                self.seen[row], self.history[row] = {}, []
            history = self.history[row]
            for token_id in extension.token_ids:
                for context in _contexts(history, len(history)):
                    self.seen[row][context] = token_id
                history.append(token_id)

    def propose(self, sequences: Sequence[Sequence[int]], num_steps: int) -> list[list[int]]:
        return [self._chain(row, sequence, num_steps) for row, sequence in enumerate(sequences)]

    def copy_row(self, source: int, destination: int) -> None:
        self.seen[destination], self.history[destination] = self.seen[source], self.history[source]

    def _chain(self, row: int, sequence: Sequence[int], num_steps: int) -> list[int]:
        tail = list(sequence[-MAX_CONTEXT:])
        for _ in range(num_steps):
            tail.append(self._next(row, tail))
        return tail[-num_steps:]

    def _next(self, row: int, tail: list[int]) -> int:
        for context in _contexts(tail, len(tail)):
            for table in (self.seen[row], self.continuations):
                if context in table:
                    return table[context]
        # Nothing is known about this token; a guess costs no more than another.
        return tail[-1]


def _contexts(token_ids: Sequence[int], end: int) -> list[Context]:
    """The 3, 2 and 1 tokens before `end`, the longest first, as far as there are so many."""
    return [tuple(token_ids[end - length : end]) for length in range(min(MAX_CONTEXT, end), 0, -1)]
