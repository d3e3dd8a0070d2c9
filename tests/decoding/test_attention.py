from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from specforge_core.decoding.attention import MAX_GROUPED_TOKENS, grouped, grouped_attention
from specforge_core.decoding.kv_cache import make_window


@pytest.mark.parametrize("num_new", [1, 4, MAX_GROUPED_TOKENS, MAX_GROUPED_TOKENS + 1])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_grouped_attention_is_sdpa_with_repeated_keys(num_new, num_kv_heads):
    torch.manual_seed(0)
    mask = make_window(
        slice(0, 2), [5, 9], num_new, context_limit=99, dtype=torch.float64, device=torch.device("cpu")
    ).mask_B1TL
    query = torch.randn(2, 6, num_new, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, num_kv_heads, mask.shape[-1], 8, dtype=torch.float64)
    module = SimpleNamespace(num_key_value_groups=6 // num_kv_heads, is_causal=True)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    attended, weights = grouped_attention(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(attended, expected)
    assert weights is None


def test_a_model_has_its_own_attention_back_afterwards(target):
    assert target.model.config._attn_implementation == "sdpa"
    with grouped(target.model):
        assert target.model.config._attn_implementation != "sdpa"
    assert target.model.config._attn_implementation == "sdpa"


def test_a_model_with_another_attention_keeps_it():
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="eager"))
    with grouped(model):
        assert model.config._attn_implementation == "eager"
