"""Keys and values with a length of its own for every row: to rewind a rejected draft is to forget a length.

A forward pass writes T new tokens of B neighbouring rows, each row at its own position, and reads what lies before
them. What a row wrote past its length is garbage that the next pass overwrites; the mask keeps it from being read.

R rows in the buffer, B rows in a pass, T new tokens, L keys read, H key/value heads, D head width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

CAPACITY_STEP = 128
"""Tokens by which a full buffer grows."""


class Window(NamedTuple):
    """Where one forward pass writes, and what each of its tokens may read."""

    rows: slice
    row_ids_B1: Tensor
    slots_BT: Tensor
    """int64, where in its row each token's key and value go."""
    position_ids_BT: Tensor
    """The same, held below the context limit: tokens past it are computed and thrown away."""
    mask_B1TL: Tensor
    """Additive: 0 where a token reads, -inf where it does not."""


def make_window(
    rows: slice, starts: Sequence[int], num_new: int, *, context_limit: int, dtype: torch.dtype, device: torch.device
) -> Window:
    """The window of a pass over `rows`, whose row b writes `num_new` tokens from `starts[b]` on, causally."""
    slots_BT = torch.tensor(starts, device=device)[:, None] + torch.arange(num_new, device=device)
    keys_L = torch.arange(max(starts) + num_new, device=device)
    mask_BTL = torch.zeros(len(starts), num_new, len(keys_L), dtype=dtype, device=device)
    mask_BTL.masked_fill_(keys_L > slots_BT[..., None], -torch.inf)
    return Window(
        rows=rows,
        row_ids_B1=torch.arange(rows.start, rows.stop, device=device)[:, None],
        slots_BT=slots_BT,
        position_ids_BT=slots_BT.clamp(max=context_limit - 1),
        mask_B1TL=mask_BTL[:, None],
    )


class RowBuffer:
    """Keys and values of one attention layer. Allocated by the first write, grown when a row gets longer."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        # Heads before tokens: attention goes through one head's tokens in the order in which they lie in memory.
        self.keys_RHLD: Tensor | None = None
        self.values_RHLD: Tensor | None = None

    def update(self, keys_BHTD: Tensor, values_BHTD: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, L, D] of the window's rows, the new ones written. They are views."""
        num_keys = window.mask_B1TL.shape[-1]
        self.keys_RHLD = self._with_room(self.keys_RHLD, keys_BHTD, num_keys)
        self.values_RHLD = self._with_room(self.values_RHLD, values_BHTD, num_keys)
        self.keys_RHLD[window.row_ids_B1, :, window.slots_BT] = keys_BHTD.transpose(1, 2)
        self.values_RHLD[window.row_ids_B1, :, window.slots_BT] = values_BHTD.transpose(1, 2)
        return self.keys_RHLD[window.rows, :, :num_keys], self.values_RHLD[window.rows, :, :num_keys]

    def copy_row(self, source: int, destination: int) -> None:
        """Overwrite one row by another."""
        for buffer_RHLD in (self.keys_RHLD, self.values_RHLD):
            assert buffer_RHLD is not None
            buffer_RHLD[destination] = buffer_RHLD[source]

    def _with_room(self, buffer_RHLD: Tensor | None, new_BHTD: Tensor, num_keys: int) -> Tensor:
        if buffer_RHLD is not None and buffer_RHLD.shape[2] >= num_keys:
            return buffer_RHLD
        _, num_heads, _, head_dim = new_BHTD.shape
        capacity = -(-num_keys // CAPACITY_STEP) * CAPACITY_STEP
        # Zeros, not empty memory: a NaN there would pass through the mask.
        grown_RHLD = new_BHTD.new_zeros(self.num_rows, num_heads, capacity, head_dim)
        if buffer_RHLD is not None:
            grown_RHLD[:, :, : buffer_RHLD.shape[2]] = buffer_RHLD
        return grown_RHLD


class RowCache(Cache):
    """A `transformers` cache over one `RowBuffer` a layer. Set `window` before each forward pass."""

    def __init__(self, num_rows: int, num_layers: int) -> None:
        super().__init__(layers=[RowBuffer(num_rows) for _ in range(num_layers)])
        self.window: Window | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What `RowBuffer.update` returns for this layer and the current window."""
        assert self.window is not None
        keys_and_values: tuple[Tensor, Tensor] = self.layers[layer_idx].update(key_states, value_states, self.window)
        return keys_and_values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the current window, in its longest row."""
        if self.window is None:
            return 0
        return self.window.mask_B1TL.shape[-1] - self.window.slots_BT.shape[-1]

    def copy_row(self, source: int, destination: int) -> None:
        """Overwrite one row by another, in every layer."""
        for layer in self.layers:
            layer.copy_row(source, destination)
