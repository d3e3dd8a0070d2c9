"""The `config.json` of an EAGLE-3 draft: the one description that training builds from and a server reads."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers import LlamaConfig

from specforge_core.manifest_sections import Eagle3Config

ARCHITECTURE = "LlamaForCausalLMEagle3"
ROPE_FIELDS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "default": frozenset(),
        "linear": frozenset({"factor"}),
        "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
        "yarn": frozenset({"factor", "beta_fast", "beta_slow", "original_max_position_embeddings"}),
    }
)
"""By type, what transformers and the servers read alike, beside the base. A server's YaRN scales by the factor alone,
whatever `mscale` (DeepSeek, Kimi) or `attention_factor` say. Other types change the frequencies with the length of the
sequence, so training and serving could not agree."""


def make_serving_config(
    config: Eagle3Config, target_config: dict[str, Any], capture_layers: tuple[int, ...]
) -> dict[str, Any]:
    """The draft's `config.json`, but for the two vocabulary sizes. Sizes that `config` leaves out are the target's."""
    num_heads = config.num_attention_heads or target_config["num_attention_heads"]
    num_kv_heads = config.num_key_value_heads or target_config.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise ValueError(f"num_attention_heads={num_heads} is no multiple of num_key_value_heads={num_kv_heads}")
    head_dim = config.head_dim or target_config.get("head_dim") or target_config["hidden_size"] // num_heads
    rope = rope_parameters(target_config)
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    token_ids = {name: target_config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": target_config["hidden_size"],
        "target_hidden_size": target_config["hidden_size"],
        "intermediate_size": config.intermediate_size or target_config["intermediate_size"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": target_config.get("rms_norm_eps", 1e-6),
        # Servers size their RoPE table by it, so a smaller one than the target's breaks long requests.
        "max_position_embeddings": target_config["max_position_embeddings"],
        # Both schemas: transformers 4 and the servers read the first two, transformers 5 the third.
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling if rope["rope_type"] != "default" else None,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        **token_ids,
        "eagle_config": {
            # Decoder layer OUTPUTS counted from 0, as SGLang reads them.
            "eagle_aux_hidden_state_layer_ids": list(capture_layers),
            "use_aux_hidden_state": True,
        },
        "norm_before_residual": False,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
    }


def rope_parameters(target_config: dict[str, Any]) -> dict[str, Any]:
    """RoPE for the draft of a target, in the schema of transformers 5, from its `config.json` in either schema.

    The draft rotates whole heads, all of them alike, whatever of its own the target rotates.
    """
    rope = target_config.get("rope_parameters") or target_config.get("rope_scaling") or {}
    # Targets with several kinds of layers have one entry for each; the draft's attention is full.
    rope = dict(rope.get("full_attention", rope))
    rope_type = rope.pop("type", "default")
    rope.setdefault("rope_type", rope_type)
    rope.setdefault("rope_theta", target_config.get("rope_theta", 10_000.0))
    fields = {"rope_type", "rope_theta", *ROPE_FIELDS.get(rope["rope_type"], ())}
    return {name: value for name, value in rope.items() if name in fields}


def llama_config(serving_config: dict[str, Any]) -> LlamaConfig:
    """The shape part of a draft's `config.json`."""
    names = (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "rms_norm_eps", "max_position_embeddings", "rope_parameters",
    )  # fmt: skip
    if missing := [name for name in names if name not in serving_config]:
        raise ValueError(f"the draft's config.json lacks {', '.join(missing)}")
    # transformers fills in and edits the RoPE dictionary that it is given.
    values = {name: serving_config[name] for name in names} | {
        "rope_parameters": dict(serving_config["rope_parameters"])
    }
    return LlamaConfig(num_hidden_layers=1, **values)
