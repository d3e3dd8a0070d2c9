"""What proposes tokens to the decoding loop. B rows of the batch, T new tokens, L captured layers, D target width."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Extension(NamedTuple):
    """What the last forward pass of the target added to a row: its prompt, or what a verification kept.

    Token `token_ids[j]` lies at position `start + 1 + j`; the auxiliary hidden state j is of the position before it.
    """

    start: int
    token_ids: Sequence[int]


class Drafter(Protocol):
    """Proposes chains. It holds its state by row; rows are the decoding loop's to assign."""

    aux_layers: tuple[int, ...]
    """Target layers whose outputs it reads, counted from 0; empty if it reads tokens only."""

    def begin(self, num_rows: int) -> None:
        """Forget everything; rows 0 to `num_rows` - 1 are about to be used."""
        ...

    def extend(self, first_row: int, extensions: Sequence[Extension], aux_hidden_BTLD: Tensor | None) -> None:
        """Take in what the neighbouring rows from `first_row` on have gained.

        Args: aux_hidden_BTLD: T is at least the longest extension; what lies past a row's own extension was rejected.
        """
        ...

    def propose(self, sequences: Sequence[Sequence[int]], num_steps: int) -> list[list[int]]:
        """`num_steps` tokens for each of the first rows, after its sequence (prompt and answer so far)."""
        ...

    def copy_row(self, source: int, destination: int) -> None:
        """Overwrite the state of one row by another's."""
        ...
