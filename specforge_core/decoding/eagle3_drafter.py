"""EAGLE-3 as served: chains that start from the target's hidden states, with keys and values in a cache.

Slot t consumes token x[t+1] and the target's auxiliary hidden states a[t], at RoPE position t. A chain starts in the
last slot t = L-2 of a sequence of L tokens, and its step i consumes its own token i and its own output of step i-1:

    slot             0      ..  L-2       | L-1          L              temporary, overwritten by the next extension
    reads            x1 a0  ..  x[L-1] a  | first, own   second, own    token and hidden state
    RoPE position    0      ..  L-2       | L-1          L
    proposes                    first     | second       third

A step attends to everything to its left: to the slots up to t, which saw the target, and to its own chain. This is what
the training-time test of `drafts/eagle3.py` simulates.

R rows of the buffers, B rows, T new tokens, L captured layers or keys read, D width, N query heads, M KV heads, C head
width.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from specforge_core.decoding.drafters import Extension
from specforge_core.decoding.kv_cache import RowBuffer, Window, make_window
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.drafts.layers import QKV

if TYPE_CHECKING:
    from specforge_core.targets.hf import HFTarget


class Eagle3Drafter:
    """A `Drafter` that runs an EAGLE-3 draft greedily, in the draft's own dtype and on its device."""

    def __init__(self, draft: Eagle3Draft) -> None:
        config = draft.serving_config()
        self.draft = draft
        self.aux_layers: tuple[int, ...] = tuple(config["eagle_config"]["eagle_aux_hidden_state_layer_ids"])
        self.context_limit: int = config["max_position_embeddings"]
        self.begin(num_rows=0)

    @torch.inference_mode()
    def begin(self, num_rows: int) -> None:
        weight = self.draft.fc.weight
        self.buffer = RowBuffer(num_rows)
        self.hidden_RD = weight.new_zeros(num_rows, weight.shape[0])
        self.first_ids_R = torch.zeros(num_rows, dtype=torch.int64, device=weight.device)

    @torch.inference_mode()
    def extend(self, first_row: int, extensions: Sequence[Extension], aux_hidden_BTLD: Tensor | None) -> None:
        assert aux_hidden_BTLD is not None
        num_new = aux_hidden_BTLD.shape[1]
        # What is filled up lies past the row's end: no later step reads it before it is overwritten.
        token_ids = [[*ids, *[ids[-1]] * (num_new - len(ids))] for _, ids in extensions]
        rows = slice(first_row, first_row + len(extensions))
        window = self._window(rows, [start for start, _ in extensions], num_new)
        embedding_BTD = self.draft.embed(torch.tensor(token_ids, device=self.hidden_RD.device))
        hidden_BTD = self.draft.fuse(aux_hidden_BTLD.to(self.hidden_RD.device))
        qkv = self.draft.midlayer.project_qkv(embedding_BTD, hidden_BTD, window.position_ids_BT)
        # Only the last slot starts a chain. The others just leave their keys and values.
        last_B1 = torch.tensor([[len(ids) - 1] for _, ids in extensions], device=self.hidden_RD.device)
        batch_B1 = torch.arange(len(extensions), device=self.hidden_RD.device)[:, None]
        qkv = qkv._replace(query_TNC=qkv.query_TNC[batch_B1, last_B1])
        mask_B11L = window.mask_B1TL.transpose(1, 2)[batch_B1, last_B1]
        self.hidden_RD[rows], self.first_ids_R[rows] = self._finish(
            qkv, hidden_BTD[batch_B1, last_B1], window._replace(mask_B1TL=mask_B11L)
        )

    @torch.inference_mode()
    def propose(self, sequences: Sequence[Sequence[int]], num_steps: int) -> list[list[int]]:
        rows = slice(0, len(sequences))
        hidden_BD, token_ids_B = self.hidden_RD[rows], self.first_ids_R[rows]
        chain = [token_ids_B]
        for step in range(1, num_steps):
            window = self._window(rows, [len(sequence) - 2 + step for sequence in sequences], 1)
            hidden_B1D = hidden_BD[:, None]
            qkv = self.draft.midlayer.project_qkv(
                self.draft.embed(token_ids_B)[:, None], hidden_B1D, window.position_ids_BT
            )
            hidden_BD, token_ids_B = self._finish(qkv, hidden_B1D, window)
            chain.append(token_ids_B)
        proposed: list[list[int]] = torch.stack(chain, dim=1).tolist()
        return proposed

    @torch.inference_mode()
    def copy_row(self, source: int, destination: int) -> None:
        self.buffer.copy_row(source, destination)
        self.hidden_RD[destination] = self.hidden_RD[source]
        self.first_ids_R[destination] = self.first_ids_R[source]

    def _window(self, rows: slice, starts: Sequence[int], num_new: int) -> Window:
        weight = self.draft.fc.weight
        return make_window(
            rows, starts, num_new, context_limit=self.context_limit, dtype=weight.dtype, device=weight.device
        )

    def _finish(self, qkv: QKV, hidden_B1D: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """The hidden state [B, D] that the next step takes, and the token [B] that this one proposes.

        Args: qkv: one query a row, and the keys and values that the window writes.
        """
        keys_BMLC, values_BMLC = self.buffer.update(qkv.key_TMC.transpose(1, 2), qkv.value_TMC.transpose(1, 2), window)
        attended_BN1C = F.scaled_dot_product_attention(
            qkv.query_TNC.transpose(1, 2), keys_BMLC, values_BMLC, attn_mask=window.mask_B1TL, enable_gqa=True
        )
        hidden_BD = self.draft.midlayer.finish(hidden_B1D, attended_BN1C.transpose(1, 2).flatten(2))[:, 0]
        token_ids_B = self.draft.draft_to_target(self.draft.logits(hidden_BD).argmax(dim=-1))
        return self.draft.recurrent(hidden_BD), token_ids_B


def load_eagle3_drafter(directory: Path, target: "HFTarget") -> Eagle3Drafter:
    """The drafter of an exported folder (`config.json`, `model.safetensors`), beside its target.

    It computes in the target's dtype on the target's device, as a server does, and shares the target's embedding.
    Raises: ValueError if the folder does not hold an EAGLE-3 draft of this target's shape.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    weights = load_file(directory / "model.safetensors")
    embedding_VD = target.model.get_input_embeddings().weight
    draft = Eagle3Draft.from_serving(config, weights, embedding_VD).to(target.device, target.model.dtype)
    return Eagle3Drafter(draft.eval().requires_grad_(False))
