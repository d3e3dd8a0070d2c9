"""Attention of a few new tokens to many cached ones, without a copy of the keys for every query head.

Where several query heads share a key/value head, `transformers` repeats keys and values once for each of them whenever
more than one token comes with a mask, which is every verification. Here those queries become rows of one product.

B rows, T new tokens, L keys read, N query heads, M key/value heads, G = N / M, C head width.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "specbundle_grouped"
MAX_GROUPED_TOKENS = 32
"""For a whole prompt the copy is little beside the work, and the mask, repeated for the group, is not."""


def grouped_attention(
    module: nn.Module,
    query_BNTC: Tensor,
    key_BMLC: Tensor,
    value_BMLC: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What `sdpa` gives: attended values [B, T, N, C], and no weights.

    Args: attention_mask: additive [B, 1, T, L]; kwargs: whatever else the model hands to its attention.
    """
    num_new = query_BNTC.shape[2]
    if num_new > MAX_GROUPED_TOKENS or attention_mask is None or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query_BNTC, key_BMLC, value_BMLC, attention_mask, **kwargs)
    group = query_BNTC.shape[1] // key_BMLC.shape[1]
    query_BMSC = query_BNTC.unflatten(1, (-1, group)).flatten(2, 3)
    mask_B1SL = attention_mask.repeat(1, 1, group, 1)
    attended_BMSC = F.scaled_dot_product_attention(
        query_BMSC, key_BMLC, value_BMLC, attn_mask=mask_B1SL, scale=kwargs.get("scaling")
    )
    return attended_BMSC.unflatten(2, (group, num_new)).flatten(1, 2).transpose(1, 2), None


@contextlib.contextmanager
def grouped(model: PreTrainedModel) -> Iterator[None]:
    """Have a model that uses `sdpa` attend by groups; another implementation stays what it is."""
    before = model.config._attn_implementation
    if before == "sdpa":
        AttentionInterface.register(NAME, grouped_attention)
        model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
