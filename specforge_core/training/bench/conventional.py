"""EAGLE-3 training as the public trainers do it: padded rows, all of them at every step, whole logits.

A batch is padded to its longest document. Every slot goes through every step, supervised or not; keys and values of
all steps are concatenated and read by flex attention under a block mask; logits [rows, W] exist in bfloat16 for every
step until the backward pass, the teacher's distribution [rows, W] in float32 for all. What could be unfair to it is
settled in its favour: the teacher's head has only the draft vocabulary's rows, block masks are made beforehand, norms,
rotation, attention and loss are compiled, and weights and gradients are bfloat16, without float32 masters.

B documents of a batch, T slots of each, L captured layers, D width, N query heads, M KV heads, C head width, W draft
vocabulary, S steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import record_function

from specforge_core.drafts.base import DraftBatch
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.drafts.layers import RMSNorm, apply_rope
from specforge_core.drafts.rows import slot_depths
from specforge_core.kernels.precision import at_least_float32

MAX_COMPILATIONS = 64


class PaddedBatch(NamedTuple):
    """Documents side by side, each padded at its end."""

    input_ids_BT: Tensor
    aux_hidden_BTE: Tensor
    """The captured layers of a slot behind each other."""
    last_hidden_BTD: Tensor
    target_argmax_BT: Tensor
    depth_BT: Tensor
    """int64, steps at which the slot is supervised."""
    block_masks: tuple[BlockMask | Tensor, ...]
    """By step; on a CPU plain masks, bool [B, 1, T, keys]."""


def pad_batch(batch: DraftBatch, num_steps: int, device: torch.device) -> PaddedBatch:
    """A packed batch of the CPU as a padded one on the device."""
    lengths = batch.document_ids_T.unique_consecutive(return_counts=True)[1].tolist()
    depth_T = slot_depths(batch.loss_mask_T, batch.document_ids_T, num_steps)
    # Only teaching tokens carry what the target said; the others are never read.
    last_hidden_TD = batch.last_hidden_UD.new_zeros(len(depth_T), batch.last_hidden_UD.shape[1])
    last_hidden_TD[batch.teaching_U] = batch.last_hidden_UD
    argmax_T = torch.zeros_like(batch.input_ids_T)
    argmax_T[batch.teaching_U] = batch.target_argmax_U

    def padded(x_T: Tensor) -> Tensor:
        return pad_sequence(list(x_T.split(lengths)), batch_first=True).to(device)

    num_slots = max(lengths)
    return PaddedBatch(
        padded(batch.input_ids_T),
        padded(batch.aux_hidden_TLD.flatten(1)),
        padded(last_hidden_TD),
        padded(argmax_T),
        padded(depth_T),
        tuple(_mask(torch.tensor(lengths, device=device), num_slots, step) for step in range(num_steps)),
    )


def _mask(lengths_B: Tensor, num_slots: int, step: int) -> BlockMask | Tensor:
    """Step-0 keys up to the slot, then the slot's own key of each later step."""
    # A tensor like the other, because a number would be compiled in.
    num_slots_B = torch.full_like(lengths_B, num_slots)

    def is_visible(document: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # A query has a place below the number of slots, and so have the keys up to it.
        is_earlier = (key <= query) & (key < lengths_B[document])
        is_own = (key >= num_slots_B[document]) & (key % num_slots_B[document] == query)
        return is_earlier | is_own

    num_keys = (step + 1) * num_slots
    if lengths_B.is_cuda:
        return create_block_mask(is_visible, len(lengths_B), None, num_slots, num_keys, device=lengths_B.device)
    document = torch.arange(len(lengths_B)).view(-1, 1, 1, 1)
    query, key = torch.arange(num_slots).view(-1, 1), torch.arange(num_keys)
    return is_visible(document, query, query, key)


class ConventionalDraft(nn.Module):
    """The weights of a draft in another dtype, and its training step."""

    def __init__(self, draft: Eagle3Draft, dtype: torch.dtype) -> None:
        """Args: draft: whose weights are copied; it may be deleted afterwards."""
        super().__init__()
        layer = draft.midlayer
        weights: dict[str, nn.Linear | RMSNorm] = {
            "fc": draft.fc, "q": layer.self_attn.q_proj, "k": layer.self_attn.k_proj, "v": layer.self_attn.v_proj,
            "o": layer.self_attn.o_proj, "gate": layer.mlp.gate_proj, "up": layer.mlp.up_proj,
            "down": layer.mlp.down_proj, "head": draft.lm_head, "input_norm": layer.input_layernorm,
            "hidden_norm": layer.hidden_norm, "mlp_norm": layer.post_attention_layernorm, "norm": draft.norm,
        }  # fmt: skip
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(module.weight.detach().to(dtype, copy=True)) for name, module in weights.items()}
        )
        assert draft.teacher_head is not None
        self.embedding_VD = draft.embed_tokens.to(dtype)
        self.teacher_head_WD = draft.teacher_head.to(dtype)
        self.is_kept_V = draft.t2d
        self.rotary = layer.rotary
        self.eps, self.head_dim = layer.input_layernorm.eps, layer.head_dim
        self.num_steps: int = draft.num_positions
        self.step_loss_decay: float = draft.step_loss_decay
        on_gpu = draft.fc.weight.is_cuda
        self.attend: Callable[..., Tensor] = _compiled(flex_attention) if on_gpu else _masked_attention
        self.norm = _compiled(rms_norm, dynamic=True) if on_gpu else rms_norm
        self.rotate = _compiled(apply_rope, dynamic=True) if on_gpu else apply_rope
        self.soft_cross_entropy = _compiled(soft_cross_entropy) if on_gpu else soft_cross_entropy

    def forward(self, batch: PaddedBatch) -> Tensor:
        """The weighted loss over supervised slots, as a sum: at least float32, []."""
        w = self.weights
        embedding_BTD = F.embedding(batch.input_ids_BT, self.embedding_VD)
        with record_function("projections"):
            hidden_BTD = F.linear(batch.aux_hidden_BTE, w["fc"])
        probability_BTW = self._teach(batch)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        losses = []
        for step in range(self.num_steps):
            # Token and teacher of the slot at this step; what wraps around is not supervised.
            next_BTD = embedding_BTD.roll(-1 - step, dims=1)
            hidden_BTD = self._layer(next_BTD, hidden_BTD, keys, values, batch)
            with record_function("head"):
                logits_BTW = F.linear(self.norm(hidden_BTD, w["norm"], self.eps), w["head"])
                is_taught_BT = (batch.depth_BT > step) & self.is_kept_V[batch.target_argmax_BT.roll(-1 - step, dims=1)]
                taught_BTW = probability_BTW[:, 1 + step : 1 + step + logits_BTW.shape[1]]
                loss = self.soft_cross_entropy(logits_BTW, taught_BTW, is_taught_BT)
                with torch.no_grad():
                    # Public trainers report the accuracy of every step.
                    (logits_BTW.argmax(-1) == taught_BTW.argmax(-1)).mul(is_taught_BT).sum()
            losses.append(self.step_loss_decay**step * loss)
        return torch.stack(losses).sum()

    def _teach(self, batch: PaddedBatch) -> Tensor:
        with torch.no_grad(), record_function("teacher"):
            logits_BTW = F.linear(batch.last_hidden_BTD, self.teacher_head_WD)
            return F.pad(at_least_float32(logits_BTW).softmax(-1), (0, 0, 0, self.num_steps))

    def _layer(
        self, embedding_BTD: Tensor, hidden_BTD: Tensor, keys: list[Tensor], values: list[Tensor], batch: PaddedBatch
    ) -> Tensor:
        """The layer's output; keys and values of this step are appended to the lists."""
        w, step = self.weights, len(keys)
        with record_function("projections"):
            x = torch.cat(
                (
                    self.norm(embedding_BTD, w["input_norm"], self.eps),
                    self.norm(hidden_BTD, w["hidden_norm"], self.eps),
                ),
                dim=-1,
            )
            query, key, value = (F.linear(x, w[name]).unflatten(-1, (-1, self.head_dim)) for name in "qkv")
            cos_TC, sin_TC = self.rotary(torch.arange(x.shape[1], device=x.device) + step)
            keys.append(self.rotate(key, cos_TC, sin_TC))
            values.append(value)
            query = self.rotate(query, cos_TC, sin_TC)
        with record_function("attention"):
            attended = self.attend(
                query.transpose(1, 2),
                torch.cat(keys, dim=1).transpose(1, 2),
                torch.cat(values, dim=1).transpose(1, 2),
                block_mask=batch.block_masks[step],
                enable_gqa=True,
            )
        with record_function("projections"):
            hidden_BTD = hidden_BTD + F.linear(attended.transpose(1, 2).flatten(2), w["o"])
        with record_function("feed-forward"):
            normed_BTD = self.norm(hidden_BTD, w["mlp_norm"], self.eps)
            gated = F.silu(F.linear(normed_BTD, w["gate"])) * F.linear(normed_BTD, w["up"])
            return hidden_BTD + F.linear(gated, w["down"])


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in at least float32."""
    wide_BTD = at_least_float32(x_BTD)
    normed_BTD = wide_BTD * torch.rsqrt(wide_BTD.square().mean(-1, keepdim=True) + eps)
    return (normed_BTD * weight_D).to(x_BTD.dtype)


def soft_cross_entropy(logits_BTW: Tensor, probability_BTW: Tensor, is_taught_BT: Tensor) -> Tensor:
    """The cross entropy to the teacher, summed over the slots that are taught: at least float32, []."""
    loss_BT = -(probability_BTW * at_least_float32(logits_BTW).log_softmax(-1)).sum(-1)
    return (loss_BT * is_taught_BT).sum()


def _compiled(function: Callable[..., Tensor], *, dynamic: bool | None = None) -> Callable[..., Tensor]:
    # Attention is compiled for each length of its keys until that counts as dynamic.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILATIONS)
    return torch.compile(function, dynamic=dynamic)


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, *, block_mask: Tensor, enable_gqa: bool) -> Tensor:
    """What flex attention computes; on a CPU it has no backward pass."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=block_mask, enable_gqa=enable_gqa)
