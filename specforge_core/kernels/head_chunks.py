"""Which rows of a pass go through the head together, its steps' rows taken slot after slot."""

from collections.abc import Sequence
from typing import NamedTuple


class Block(NamedTuple):
    """Neighbouring slots with equally many steps: num_slots * num_steps rows of a chunk."""

    first_slot: int
    num_slots: int
    num_steps: int

    @property
    def num_rows(self) -> int:
        return self.num_slots * self.num_steps

    @property
    def slots(self) -> slice:
        return slice(self.first_slot, self.first_slot + self.num_slots)


def plan_chunks(row_counts: Sequence[int], max_rows: int) -> list[list[Block]]:
    """All slots with all their steps, in chunks of about equally many rows, less than a slot more than `max_rows`.

    Args: row_counts: by step, never rising.
    """
    total = sum(row_counts)
    num_chunks = -(-total // max_rows)
    chunks: list[list[Block]] = []
    slot = room = 0
    for num_steps in range(len(row_counts), 0, -1):
        while slot < row_counts[num_steps - 1]:
            if room <= 0:
                chunks.append([])
                room = -(-total // num_chunks)
            # Rounded up: what no chunk had room for would otherwise make a small one more at the end.
            block = Block(slot, min(row_counts[num_steps - 1] - slot, -(-room // num_steps)), num_steps)
            chunks[-1].append(block)
            slot += block.num_slots
            room -= block.num_rows
    return chunks
