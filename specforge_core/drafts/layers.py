"""The one decoder layer of an EAGLE-3 draft, split where attention stands.

Training and decoding attend to different keys, so attention itself is theirs; everything around it is here.
T tokens (any number of leading dimensions), D draft width, N query heads, M KV heads, C head width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from specforge_core.drafts.eagle3_config import ROPE_FIELDS
from specforge_core.kernels.precision import at_least_float32
from specforge_core.kernels.rms_norm import rms_norm


class QKV(NamedTuple):
    """What one token asks, and what it offers to others; RoPE is applied to query and key."""

    query_TNC: Tensor
    key_TMC: Tensor
    value_TMC: Tensor


def apply_rope(x_TNC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """`x` rotated by its position, computed in float32: pairs are (c, c + C/2), as in `transformers`."""
    wide_TNC = at_least_float32(x_TNC)
    first, second = wide_TNC.chunk(2, dim=-1)
    rotated_TNC = torch.cat((-second, first), dim=-1)
    return (wide_TNC * cos_TC.unsqueeze(-2) + rotated_TNC * sin_TC.unsqueeze(-2)).to(x_TNC.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with its weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return rms_norm(x_TD, self.weight, self.eps)


class Rotary(nn.Module):
    """Cosines and sines of positions, with the frequencies that `transformers` derives from a config."""

    def __init__(self, config: LlamaConfig) -> None:
        """Raises: ValueError for a RoPE type that is none of `ROPE_FIELDS`."""
        super().__init__()
        rope_type = config.rope_parameters["rope_type"]
        if rope_type not in ROPE_FIELDS:
            raise ValueError(f"rope_type={rope_type!r} is not supported by the draft layer: {sorted(ROPE_FIELDS)}")
        reference = LlamaRotaryEmbedding(config)
        self.scaling = float(reference.attention_scaling)
        self._frequencies = reference.inv_freq.clone()
        self.inv_freq = nn.Buffer(self._frequencies, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        # `.to(bfloat16)` of a whole model must not round the frequencies: device follows, precision does not fall.
        super()._apply(fn, recurse)
        dtype = torch.promote_types(self.inv_freq.dtype, torch.float32)
        self.inv_freq = self._frequencies.to(self.inv_freq.device, dtype)
        return self

    def forward(self, position_ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos [..., C] and sin [..., C] of positions [...]."""
        angle = position_ids_T.unsqueeze(-1).to(self.inv_freq.dtype) * self.inv_freq
        angle_TC = torch.cat((angle, angle), dim=-1)
        return angle_TC.cos() * self.scaling, angle_TC.sin() * self.scaling


class Eagle3Attention(nn.Module):
    """The four projections; queries, keys and values read [embedding, hidden state], hence twice the width."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, intermediate, bias=False)
        self.up_proj = nn.Linear(width, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, width, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Eagle3Layer(nn.Module):
    """`project_qkv`, then the caller's attention, then `finish`. Attention is scaled by 1 / sqrt(C)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Eagle3Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.rotary = Rotary(config)

    def project_qkv(self, embedding_TD: Tensor, hidden_TD: Tensor, position_ids_T: Tensor) -> QKV:
        """Queries [..., N, C], keys and values [..., M, C] of tokens that carry this embedding and hidden state."""
        x = torch.cat((self.input_layernorm(embedding_TD), self.hidden_norm(hidden_TD)), dim=-1)
        attention = self.self_attn
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        cos, sin = self.rotary(position_ids_T)
        return QKV(apply_rope(query, cos, sin), apply_rope(key, cos, sin), value)

    def finish(self, hidden_TD: Tensor, attended_TD: Tensor) -> Tensor:
        """The layer's output [..., D] from its incoming hidden state and the attention's output [..., N C]."""
        # The residual is the hidden state as it came in, before hidden_norm: `norm_before_residual` is false.
        residual_TD = hidden_TD + self.self_attn.o_proj(attended_TD)
        return residual_TD + self.mlp(self.post_attention_layernorm(residual_TD))
