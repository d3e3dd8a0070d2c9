"""The EAGLE-3 draft (arXiv 2503.01840) and its training-time test; EAGLE-3.1 with `fc_norm` and `norm_output`.

T tokens of a packed batch, L = 3 captured layers, D width of draft and target, V target vocabulary, W draft vocabulary,
S steps of training-time test, R rows that are computed.
"""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from specforge_core.draft_limits import NUM_AUX_LAYERS, eagle3_layers
from specforge_core.drafts.base import DraftBatch, DraftLoss, DraftModel, TargetHead
from specforge_core.drafts.eagle3_config import ARCHITECTURE, llama_config, make_serving_config
from specforge_core.drafts.layers import Eagle3Layer, RMSNorm
from specforge_core.drafts.rows import RowIndex, index_rows
from specforge_core.drafts.training_time_test import layer_outputs, training_time_test
from specforge_core.manifest_sections import Eagle3Config

# Measured on the demo target: fc as an average of its layers, the middle layer as a copy of the target's last one, or
# noise scaled by the fan-in all reach a lower acceptance length than small noise does; so does a random head.
INIT_STD = 0.02
MAX_ROWS_PER_PASS = 4096
"""Large enough for matrix products at full speed."""
MAX_TEACHER_BYTES = 2**30
"""For the teacher's logits of a pass, in float32."""
ROW_BUCKET = 128
"""Numbers of rows on a GPU are multiples of it, the height of a matrix product's tile."""
GREEDY_ROWS = 4096
"""Rows whose logits exist at a time where nothing but their favourites is wanted."""


class LayerShape(NamedTuple):
    """What a draft's layer is computed with, besides its weights."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float


class Eagle3Draft(DraftModel):
    """One decoder layer over fused hidden states of the target and the embedding of the next token.

    Parameters carry their serving names. The target's embedding is a frozen buffer that is not exported, because
    the server shares the target's.
    """

    teacher_head: Tensor | None
    """[W, D], the target head's rows of the draft vocabulary; None in a draft that is only decoded with."""
    target_to_draft: Tensor | None
    """int64 [V], the draft's id of a target token, or -1; None like `teacher_head`."""

    def __init__(self, serving_config: dict[str, Any], embedding_VD: Tensor) -> None:
        """An untrained draft without vocabulary or teacher: use `create` or `from_serving`."""
        super().__init__()
        config = llama_config(serving_config)
        width = config.hidden_size
        if embedding_VD.shape != (serving_config["vocab_size"], width):
            raise ValueError(
                f"the target's embedding is {tuple(embedding_VD.shape)}, the draft's config says "
                f"vocab_size={serving_config['vocab_size']} and hidden_size={width}; they must be of one target"
            )
        target_width = serving_config.get("target_hidden_size", width)
        if target_width != width:
            raise ValueError(
                f"target_hidden_size={target_width} with hidden_size={width}: other widths are unsupported"
            )
        self._serving_config = copy.deepcopy(serving_config)
        self.shape = LayerShape(
            config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rms_norm_eps
        )
        self.norm_output: bool = serving_config["norm_output"]
        self.fc = nn.Linear(NUM_AUX_LAYERS * width, width, bias=False)
        self.fc_norm: nn.ModuleList | None = None
        if serving_config["fc_norm"]:
            self.fc_norm = nn.ModuleList(RMSNorm(width, config.rms_norm_eps) for _ in range(NUM_AUX_LAYERS))
        self.midlayer = Eagle3Layer(config)
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.lm_head = nn.Linear(width, serving_config["draft_vocab_size"], bias=False)
        self.d2t = nn.Buffer(torch.zeros(serving_config["draft_vocab_size"], dtype=torch.int64))
        self.t2d = nn.Buffer(torch.zeros(serving_config["vocab_size"], dtype=torch.bool))
        self.embed_tokens = nn.Buffer(embedding_VD.detach(), persistent=False)
        self.register_buffer("teacher_head", None, persistent=False)
        self.register_buffer("target_to_draft", None, persistent=False)
        self.num_positions = 0
        self.step_loss_decay = 1.0

    @classmethod
    def capture_layers(cls, aux_layers: tuple[int, ...] | None, num_target_layers: int) -> tuple[int, ...]:
        """The layers given, or [1, N//2 - 1, N - 4] of N. Raises: ValueError if these are not three ascending ones."""
        return eagle3_layers(aux_layers, num_target_layers)

    @classmethod
    def create(
        cls,
        config: Eagle3Config,
        target_config: dict[str, Any],
        head: TargetHead,
        draft_token_ids: Tensor,
        capture_layers: tuple[int, ...],
    ) -> "Eagle3Draft":
        """A fresh draft that starts from the target's head and final norm; other weights from torch's generator."""
        vocab_size = head.embedding_VD.shape[0]
        serving_config = make_serving_config(config, target_config, capture_layers) | {
            "vocab_size": vocab_size,
            "draft_vocab_size": len(draft_token_ids),
        }
        draft = cls(serving_config, head.embedding_VD)
        for parameter in draft.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=INIT_STD)
        kept_head_WD = head.lm_head_VD.detach()[draft_token_ids]
        with torch.no_grad():
            draft.lm_head.weight.copy_(kept_head_WD)
            if head.final_norm_D is not None:
                draft.norm.weight.copy_(head.final_norm_D)
            draft.d2t.copy_(draft_token_ids - torch.arange(len(draft_token_ids)))
            draft.t2d[draft_token_ids] = True
        draft.teacher_head = kept_head_WD
        draft.target_to_draft = torch.where(draft.t2d, draft.t2d.cumsum(0) - 1, -1)
        draft.num_positions, draft.step_loss_decay = config.num_steps, config.step_loss_decay
        return draft

    @classmethod
    def from_serving(cls, config: dict[str, Any], state_dict: dict[str, Tensor], embedding_VD: Tensor) -> "Eagle3Draft":
        """The draft of an exported checkpoint, in float32, to decode with; it has no teacher and cannot be trained.

        Raises: ValueError if a tensor is missing or unknown, or the two vocabulary maps disagree.
        """
        draft = cls(config, embedding_VD)
        expected = draft.state_dict().keys()
        missing, unknown = sorted(expected - state_dict.keys()), sorted(state_dict.keys() - expected)
        if missing or unknown:
            raise ValueError(f"not the tensors of {ARCHITECTURE}: missing {missing}, unknown {unknown}")
        draft.load_state_dict(state_dict)
        kept_ids = draft.draft_to_target(torch.arange(len(draft.d2t)))
        if not torch.equal(kept_ids, draft.t2d.nonzero().squeeze(1)):
            raise ValueError(
                "d2t and t2d name different tokens: nonzero(t2d) must equal d2t + arange(draft vocabulary)"
            )
        return draft

    def serving_config(self) -> dict[str, Any]:
        return copy.deepcopy(self._serving_config)

    def serving_state_dict(self) -> dict[str, Tensor]:
        """The tensors under SGLang's names, on the CPU, in the dtype that they are trained in."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}

    def embed(self, input_ids_T: Tensor) -> Tensor:
        """The target's embedding of target token ids, in the draft's dtype."""
        return F.embedding(input_ids_T, self.embed_tokens).to(self.fc.weight.dtype)

    def fuse(self, aux_hidden_TLD: Tensor) -> Tensor:
        """The first hidden state [..., D], from the target's captured layers [..., L, D]."""
        return self.fc(self.fc_input(aux_hidden_TLD.to(self.fc.weight.dtype)))

    def fc_input(self, aux_hidden_TLD: Tensor) -> Tensor:
        """The captured layers side by side [..., L D], each normed if there are norms for them."""
        if self.fc_norm is None:
            return aux_hidden_TLD.flatten(-2)
        layers = zip(self.fc_norm, aux_hidden_TLD.unbind(-2), strict=True)
        return torch.cat([norm(hidden_TD) for norm, hidden_TD in layers], dim=-1)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits over the draft vocabulary [..., W] of a layer output."""
        return self.lm_head(self.norm(hidden_TD))

    def recurrent(self, hidden_TD: Tensor) -> Tensor:
        """What the next step takes for its hidden state: the layer output, normed if `norm_output` says so."""
        return self.norm(hidden_TD) if self.norm_output else hidden_TD

    def draft_to_target(self, draft_ids: Tensor) -> Tensor:
        """Target token ids of draft vocabulary ids."""
        return draft_ids + self.d2t[draft_ids]

    def prepare(self, batch: DraftBatch) -> DraftBatch:
        if self.teacher_head is None:
            raise ValueError("this draft was loaded to decode: only one made by `create` has a teacher")
        return batch._replace(rows=self._index_rows(batch, self.num_positions))

    def forward(self, batch: DraftBatch) -> DraftLoss:
        """The loss of S steps of training-time test, as sums over supervised slots.

        Slot t at step i consumes token x[t+1+i] and a hidden state: at step 0 that of the target at t (a[t], fused),
        afterwards its own output of step i-1. It predicts x[t+2+i] and is taught p[t+1+i], the target's distribution
        of that token. The hidden state stays in its slot; tokens and teacher shift. With a prompt x0..x3 and an
        answer x4..x7:

                            slot 2        slot 3        slot 4        slot 5        slot 6
            step 0  reads   x3 a2         x4 a3         x5 a4         x6 a5         x7 a6
                    teacher p3 (for x4)   p4 (for x5)   p5 (for x6)   p6 (for x7)   p7 (for -)
                    active  0             1             1             1             0
            step 1  reads   x4            x5            x6            x7            -
                    teacher p4 (for x5)   p5 (for x6)   p6 (for x7)   p7 (for -)    -
                    active  0             1             1             0             0

        Serving starts a chain in slot t only when x[t+1] came from the target, and a chain must stay in its answer:
        active_i[t] = m[t+1] and ... and m[t+2+i] in the document of t. The public trainers gate with m[t], which
        never trains slot 3, the first of each answer.

        Returns: `loss_sum` = sum_i decay^i * sum over active_i of the cross entropy to the teacher renormalised over
        the draft vocabulary; `num_tokens` = slots active at step 0. A row whose teacher's favourite is outside the
        draft vocabulary has no loss and counts as a miss.
        """
        with torch.no_grad():
            return training_time_test(self, batch)

    def accumulate_gradients(self, batch: DraftBatch) -> DraftLoss:
        with torch.enable_grad():
            return training_time_test(self, batch)

    @torch.no_grad()
    def greedy_chains(self, batch: DraftBatch, num_tokens: int) -> Tensor:
        batch = batch._replace(rows=self._index_rows(batch, num_tokens))
        chain_KT = batch.input_ids_T.new_full((num_tokens, len(batch.input_ids_T)), -1)
        for rows, outputs in layer_outputs(self, batch):
            for drafted_T, output_RD in zip(chain_KT, outputs, strict=False):
                drafted_T[rows.slot_R[: len(output_RD)]] = self.draft_to_target(self._greedy(output_RD))
        return self.peers.latest(chain_KT)

    def _greedy(self, head_input_RD: Tensor) -> Tensor:
        """The favourite draft token of each row; the logits of all rows never exist at once."""
        head_WD = self.lm_head.weight.to(head_input_RD.dtype)
        return torch.cat([(chunk @ head_WD.T).argmax(-1) for chunk in head_input_RD.split(GREEDY_ROWS)])

    def _index_rows(self, batch: DraftBatch, num_steps: int) -> RowIndex:
        device = batch.input_ids_T.device
        index = index_rows(
            batch.loss_mask_T.cpu(),
            batch.document_ids_T.cpu(),
            batch.teaching_U.cpu(),
            num_steps=num_steps,
            rows_per_pass=rows_per_pass(len(self.d2t)),
            bucket=ROW_BUCKET if self.fc.weight.is_cuda else 1,
            share=self.peers.share,
            num_shares=self.peers.num_shares,
        )
        return tree_map_only(Tensor, lambda x: x.to(device), index)


def rows_per_pass(draft_vocab_size: int) -> int:
    """How many rows go through all steps together: as many as are fast, fewer if their logits would be too large."""
    return min(
        MAX_ROWS_PER_PASS, max(ROW_BUCKET, MAX_TEACHER_BYTES // (4 * draft_vocab_size) // ROW_BUCKET * ROW_BUCKET)
    )
