"""Weights, bytes and FLOPs of targets: against hand counts, published numbers and the models of transformers."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from specforge_core.cost.configs import hub_facts
from specforge_core.cost.target_model import TargetModel, target_model
from specforge_core.manifest_sections import TargetConfig

# Of the model cards and technical reports; for text, where a target sees images too.
PUBLISHED = {
    "meta-llama/Llama-3.1-8B-Instruct": (8.03e9, 7.5e9),
    "meta-llama/Llama-3.3-70B-Instruct": (70.55e9, 69.5e9),
    "Qwen/Qwen3-8B": (8.19e9, 7.57e9),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": (30.53e9, 3.04e9),
    "Qwen/Qwen3-235B-A22B-Instruct-2507": (235.09e9, 21.6e9),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": (480.15e9, 34.5e9),
    "openai/gpt-oss-20b": (20.91e9, 3.61e9),
    "openai/gpt-oss-120b": (116.83e9, 5.13e9),
    "moonshotai/Kimi-K2-Instruct": (1026.4e9, 31.7e9),
}
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
}


def shipped(name: str) -> TargetModel:
    return target_model(hub_facts()["configs"][name], TargetConfig(model=name))


def test_llama_8b_has_the_weights_cache_and_flops_counted_by_hand() -> None:
    model = shipped("meta-llama/Llama-3.1-8B-Instruct")
    # 2 x 128256 x 4096 + 32 x (2 x 4096^2 + 2 x 4096 x 1024 + 3 x 4096 x 14336) + 65 norms of 4096
    assert model.num_parameters == 8_030_261_248
    assert model.weight_bytes == 2 * 8_030_261_248
    # 32 layers x (key + value) x 8 heads x 128 x 2 bytes
    assert model.kv_bytes_per_token == 131_072
    assert [model.kv_bytes_per_gpu(n) for n in (1, 4, 8, 16)] == [131_072, 32_768, 16_384, 16_384]
    # Without embedding and head: 8,030,261,248 - 2 x 525,336,576. Half of the tokens go through the head.
    assert model.prefill_flops(0, head_share=0.5) == 2 * (6_979_588_096 + 525_336_576 / 2)
    # A key costs each of 32 x 32 heads two products of 128 numbers.
    assert model.prefill_flops(1, 0.5) - model.prefill_flops(0, 0.5) == 2 * 2 * 32 * 32 * 128
    # A step reads everything but the embedding, and the cache of each request.
    assert model.decode_bytes(1, 0) == 2 * (8_030_261_248 - 525_336_576)
    assert model.decode_bytes(8, 100) - model.decode_bytes(8, 0) == 8 * 100 * 131_072


def test_a_mixture_reads_the_experts_that_its_tokens_are_sent_to() -> None:
    model = shipped("Qwen/Qwen3-30B-A3B-Instruct-2507")
    # 48 layers x 128 experts x 3 x 2048 x 768
    assert model.parts["experts"].parameters == 28_991_029_248
    assert model.parts["experts"].used == 8 / 128
    outside = model.decode_bytes(1, 0) - 2 * 28_991_029_248 / 16
    # Two tokens miss an expert with (15/16)^2.
    assert model.decode_bytes(2, 0) == pytest.approx(outside + 2 * 28_991_029_248 * (1 - (15 / 16) ** 2))
    assert model.decode_bytes(10_000, 0) == pytest.approx(outside + 2 * 28_991_029_248)


def test_latent_attention_caches_one_vector_for_all_heads() -> None:
    model = shipped("moonshotai/Kimi-K2-Instruct")
    # 61 layers x (512 + 64) x 2 bytes, which tensor parallelism cannot divide.
    assert model.kv_bytes_per_token == model.kv_bytes_per_gpu(16) == 70_272
    # Down and up to 64 queries of 192; to 576; up to 64 x (128 + 128); and back from 64 values of 128.
    by_layer = 7168 * 1536 + 1536 * 64 * 192 + 7168 * 576 + 512 * 64 * 256 + 64 * 128 * 7168
    assert model.parts["attention"].parameters == 61 * by_layer
    # One byte a weight, and a float32 scale for 128 x 128 of them; embedding, head, router and norms in bfloat16.
    assert model.parts["attention"].bytes == 61 * by_layer * (1 + 4 / 128**2)
    # What its files on the Hub take.
    assert model.weight_bytes == pytest.approx(959 * 2**30, rel=0.01)


def test_float8_and_mxfp4_weights_take_what_their_files_take() -> None:
    coder = dict(hub_facts()["configs"]["Qwen/Qwen3-Coder-480B-A35B-Instruct"])
    coder["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model = target_model(coder, TargetConfig(model="Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8"))
    assert model.weight_bytes == pytest.approx(450 * 2**30, rel=0.01)
    assert model.float8_block == 128
    # 60.8 GiB by OpenAI's report (arXiv 2508.10925, table 1).
    assert shipped("openai/gpt-oss-120b").weight_bytes == pytest.approx(60.8 * 2**30, rel=0.01)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_sizes_give_the_published_numbers_of_parameters(name: str) -> None:
    model, (total, active) = shipped(name), PUBLISHED[name]
    assert model.num_parameters == pytest.approx(total, rel=1e-3)
    assert model.num_active_parameters == pytest.approx(active, rel=5e-3)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "llama", "num_hidden_layers": 3, "intermediate_size": 80, "tie_word_embeddings": True},
        {
            "model_type": "qwen3_moe", "num_hidden_layers": 4, "intermediate_size": 80, "moe_intermediate_size": 24,
            "num_experts": 6, "num_experts_per_tok": 2, "decoder_sparse_step": 2, "mlp_only_layers": [1],
        },
        {
            "model_type": "deepseek_v3", "num_hidden_layers": 3, "intermediate_size": 80, "moe_intermediate_size": 24,
            "n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
            "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10,
            "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
        },
        {
            "model_type": "llama4_text", "num_hidden_layers": 4, "intermediate_size": 24, "intermediate_size_mlp": 80,
            "num_local_experts": 6, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
        },
        {
            "model_type": "gpt_oss", "num_hidden_layers": 3, "intermediate_size": 24, "num_local_experts": 6,
            "num_experts_per_tok": 2,
        },
        {
            "model_type": "qwen3_next", "num_hidden_layers": 8, "intermediate_size": 80, "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 2,
            "full_attention_interval": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_conv_kernel_dim": 4,
        },
    ],
    ids=lambda values: values["model_type"],
)  # fmt: skip
def test_counts_are_those_of_the_model_that_transformers_builds(values: dict[str, Any]) -> None:
    config = SMALL | values
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    # Biases, norms and a gate of one row are not worth a count.
    matrices = sum(
        parameter.numel()
        for name, parameter in built.named_parameters()
        if parameter.dim() > 1 and "bias" not in name and "shared_expert_gate" not in name
    )
    model = target_model(config, TargetConfig(model="any"))
    assert model.num_parameters - model.parts["norms"].parameters == matrices


def test_what_is_not_known_is_refused_by_name() -> None:
    config = SMALL | {"num_hidden_layers": 2}
    with pytest.raises(ValueError, match=r"config\.json of a/b has no 'intermediate_size'"):
        target_model(config, TargetConfig(model="a/b"))
    config |= {"intermediate_size": 80, "quantization_config": {"quant_method": "bitnet"}}
    with pytest.raises(ValueError, match='quant_method "bitnet" is not known'):
        target_model(config, TargetConfig(model="a/b"))
