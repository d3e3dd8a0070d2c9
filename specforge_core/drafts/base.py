"""What a draft algorithm is to the trainer: a batch in, additive sums out.

T tokens of a packed batch, U teaching tokens of it, L captured layers, D target width, V target vocabulary, K draft
positions.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from specforge_core.drafts.peers import Peers
from specforge_core.drafts.rows import RowIndex
from specforge_core.manifest_sections import DraftConfig


class DraftBatch(NamedTuple):
    """One packed batch; documents lie one after the other, without padding between them."""

    input_ids_T: Tensor
    """int64, target vocabulary."""
    loss_mask_T: Tensor
    """bool, True where THIS token was produced by the target."""
    position_ids_T: Tensor
    """int64, restart at 0 in each document."""
    document_ids_T: Tensor
    """int32, ascending; -1 in padding at the end, if there is any."""
    aux_hidden_TLD: Tensor
    """Outputs of the captured target layers, in capture order."""
    teaching_U: Tensor
    """int64, ascending: the tokens that teach, which are those before a token that the target produced."""
    last_hidden_UD: Tensor
    """After the target's final norm: the target head times this is the target's logits."""
    target_argmax_U: Tensor
    """int64, the target's own greedy next token."""
    target_logsumexp_U: Tensor
    """float32, of the target's logits over its full vocabulary."""
    rows: RowIndex | None = None
    """What `DraftModel.prepare` adds."""


class DraftLoss(NamedTuple):
    """Sums over tokens, to be added over micro-batches and ranks and divided once, where they are shown."""

    loss_sum: Tensor
    """float32 [], weighted over draft positions."""
    num_tokens: Tensor
    """float32 [], the count behind `loss_sum`."""
    correct_K: Tensor
    """float32 [K], greedy matches."""
    accepted_K: Tensor
    """float32 [K], sum of min(p_target, p_draft)."""
    valid_K: Tensor
    """float32 [K], the count behind the two above."""

    @staticmethod
    def zero(num_positions: int, device: torch.device) -> "DraftLoss":
        """Nothing yet, in float64, which counts exactly beyond 2^24."""
        shapes = ((), (), (num_positions,), (num_positions,), (num_positions,))
        return DraftLoss(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def plus(self, other: "DraftLoss") -> "DraftLoss":
        """The sums of both, without gradient."""
        return DraftLoss(*(mine + theirs.detach() for mine, theirs in zip(self, other, strict=True)))


class TargetHead(NamedTuple):
    """The frozen parts of the target that a draft shares or starts from."""

    embedding_VD: Tensor
    lm_head_VD: Tensor
    final_norm_D: Tensor | None
    """Weight of the norm before the head; None if the target has none of RMSNorm form."""


class DraftModel(nn.Module, ABC):
    """A trainable draft. `forward` computes the loss itself, so that sharding hooks on the root module run."""

    num_positions: int
    """Draft positions that the loss is about, K."""
    compute_dtype: torch.dtype | None = None
    """What losses and gradients are computed in, their sums aside; None for the dtype of the parameters."""
    float8_matmuls: bool = False
    """Whether head and feed-forward multiply in float8 when gradients are wanted; see `TrainingConfig`."""
    peers: Peers = Peers()
    """The processes that work on each batch together. All of them are given the same batches; each returns and
    accumulates its part of the sums."""

    @classmethod
    @abstractmethod
    def capture_layers(cls, aux_layers: tuple[int, ...] | None, num_target_layers: int) -> tuple[int, ...]:
        """Decoder layers whose output is to be captured, counted from 0. Raises: ValueError if one does not exist."""

    @classmethod
    @abstractmethod
    def create(
        cls,
        config: DraftConfig,
        target_config: dict[str, Any],
        head: TargetHead,
        draft_token_ids: Tensor,
        capture_layers: tuple[int, ...],
    ) -> "DraftModel":
        """A fresh draft.

        Args: target_config: the target's `config.json` (its text part); draft_token_ids: int64 [draft vocabulary],
        ascending target ids.
        """

    @abstractmethod
    def prepare(self, batch: DraftBatch) -> DraftBatch:
        """The same batch with the row index that the methods below want; a loader's thread runs it, on the CPU."""

    @abstractmethod
    def forward(self, batch: DraftBatch) -> DraftLoss:
        """The loss of one prepared batch, as sums, without gradient."""

    @abstractmethod
    def accumulate_gradients(self, batch: DraftBatch) -> DraftLoss:
        """The same, after adding the gradient of `loss_sum` to the parameters' `.grad`, in place where there is one."""

    @abstractmethod
    def greedy_chains(self, batch: DraftBatch, num_tokens: int) -> Tensor:
        """What slot t drafts for x[t+2+k], k < num_tokens, x[t+1] being the last known token: int64 [num_tokens, T].

        Target ids. The tokens drafted before, x[t+2] to x[t+1+k], are taken from the batch: an entry is what a served
        chain would draft if all of it was right so far, and behind a wrong token nothing of a chain counts.
        """

    @abstractmethod
    def serving_config(self) -> dict[str, Any]:
        """The `config.json` that SGLang reads."""

    @abstractmethod
    def serving_state_dict(self) -> dict[str, Tensor]:
        """The tensors that SGLang loads, under its names."""
