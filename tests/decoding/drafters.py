"""Drafters whose acceptance is known by hand."""

from collections.abc import Callable, Sequence

from torch import Tensor

from specforge_core.decoding.drafters import Extension

VOCAB_SIZE = 259


class FunctionDrafter:
    """Proposes what a function of the sequence and the number of steps says; remembers what it was told."""

    def __init__(self, chain: Callable[[Sequence[int], int], list[int]], *, aux_layers: tuple[int, ...] = ()) -> None:
        self.chain = chain
        self.aux_layers = aux_layers
        self.extensions: list[tuple[int, Extension, Tensor | None]] = []

    def begin(self, num_rows: int) -> None:
        self.extensions = []

    def extend(self, first_row: int, extensions: Sequence[Extension], aux_hidden_BTLD: Tensor | None) -> None:
        for i, extension in enumerate(extensions):
            aux_hidden_TLD = None if aux_hidden_BTLD is None else aux_hidden_BTLD[i]
            self.extensions.append((first_row + i, extension, aux_hidden_TLD))

    def propose(self, sequences: Sequence[Sequence[int]], num_steps: int) -> list[list[int]]:
        return [self.chain(sequence, num_steps) for sequence in sequences]

    def copy_row(self, source: int, destination: int) -> None:
        pass


def knowing(full_sequences: Sequence[Sequence[int]], *, num_right: int) -> FunctionDrafter:
    """A drafter whose first `num_right` tokens are always those of the sequence, and whose others never are."""

    def chain(sequence: Sequence[int], num_steps: int) -> list[int]:
        full = next(full for full in full_sequences if list(full[: len(sequence)]) == list(sequence))
        coming = [*full[len(sequence) : len(sequence) + num_steps], *[0] * num_steps][:num_steps]
        return [token if i < num_right else (token + 1) % VOCAB_SIZE for i, token in enumerate(coming)]

    return FunctionDrafter(chain)
