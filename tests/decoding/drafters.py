"""Drafters whose acceptance is known by hand."""

from collections.abc import Callable, Sequence

from torch import Tensor

from specforge_core.decoding.drafters import Extension

VOCAB_SIZE = 259


class FunctionDrafter:
    """Proposes what a function of the sequence and the number of steps says.

    It keeps the text of every row by what it is told, and fails if that is not the sequence that it is asked about.
    """

    def __init__(self, chain: Callable[[Sequence[int], int], list[int]], *, aux_layers: tuple[int, ...] = ()) -> None:
        self.chain = chain
        self.aux_layers = aux_layers
        self.extensions: list[tuple[Extension, Tensor | None]] = []
        self.rows: list[list[int]] = []

    def begin(self, num_rows: int) -> None:
        self.extensions = []
        self.rows = [[] for _ in range(num_rows)]

    def extend(self, first_row: int, extensions: Sequence[Extension], aux_hidden_BTLD: Tensor | None) -> None:
        for i, extension in enumerate(extensions):
            self.rows[first_row + i][extension.start :] = extension.token_ids
            self.extensions.append((extension, None if aux_hidden_BTLD is None else aux_hidden_BTLD[i]))

    def propose(self, sequences: Sequence[Sequence[int]], num_steps: int) -> list[list[int]]:
        assert [list(sequence[1:]) for sequence in sequences] == self.rows[: len(sequences)]
        return [self.chain(sequence, num_steps) for sequence in sequences]

    def copy_row(self, source: int, destination: int) -> None:
        self.rows[destination] = list(self.rows[source])


def knowing(full_sequences: Sequence[Sequence[int]], *, num_right: int) -> FunctionDrafter:
    """A drafter whose first `num_right` tokens are always those of the sequence, and whose others never are."""

    def chain(sequence: Sequence[int], num_steps: int) -> list[int]:
        full = next(full for full in full_sequences if list(full[: len(sequence)]) == list(sequence))
        coming = [*full[len(sequence) : len(sequence) + num_steps], *[0] * num_steps][:num_steps]
        return [token if i < num_right else (token + 1) % VOCAB_SIZE for i, token in enumerate(coming)]

    return FunctionDrafter(chain)
