"""A target's weights, bytes and FLOPs, counted from its `config.json` alone. Torch-free.

Dense decoders, mixtures of experts, multi-head latent attention (arXiv 2405.04434) and linear attention (Qwen3-Next).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from specforge_core.draft_limits import text_config
from specforge_core.manifest_sections import TargetConfig

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
CACHE_BYTES = 2
"""Of one number in the KV cache, which servers keep in bfloat16."""
MULTIPLY_AND_ADD = 2
NEVER_QUANTISED = frozenset({"embedding", "head", "router", "norms"})
IGNORED_AS = {"attention": "self_attn", "shared experts": "shared_expert", "feed-forward": "feed_forward"}
"""What lists of modules that stay in the target's dtype call a part."""
LLAMA4, QWEN3_NEXT = "llama4_text", "qwen3_next"


class Part(NamedTuple):
    """Weights of one kind, of all layers."""

    parameters: int
    bytes: float
    used: float = 1.0
    """The share of them that one token is multiplied with; 0 for a table that it reads a row of."""


class TargetModel(NamedTuple):
    """What a cost depends on."""

    num_layers: int
    width: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    """1 where all heads share one latent vector, which tensor parallelism cannot divide."""
    expert_width: int | None
    float8_block: int | None
    """Rows and columns that share a scale."""
    parts: Mapping[str, Part]
    kv_bytes_per_token: int
    attention_flops_per_key: int
    """Of one token, all layers and heads."""

    @property
    def num_parameters(self) -> int:
        """All of them."""
        return sum(part.parameters for part in self.parts.values())

    @property
    def num_active_parameters(self) -> float:
        """Those that a token goes through, the row of the embedding not counted."""
        return sum(part.parameters * part.used for part in self.parts.values())

    @property
    def weight_bytes(self) -> float:
        """On disk, and in the memory of the GPUs of one server together."""
        return sum(part.bytes for part in self.parts.values())

    def prefill_flops(self, num_keys: float, head_share: float) -> float:
        """FLOPs of one token that is read.

        Args: num_keys: that it attends to; head_share: of the tokens that go through the head.
        """
        through_layers = self.num_active_parameters - self.parts["head"].parameters
        weights = through_layers + head_share * self.parts["head"].parameters
        return MULTIPLY_AND_ADD * weights + self.attention_flops_per_key * num_keys

    def decode_bytes(self, num_requests: float, num_keys: float) -> float:
        """Bytes read in a step that adds a token to each of so many requests, which have `num_keys` tokens each.

        Of the experts, those that some token is sent to, if the router deals evenly.
        """
        read = sum(part.bytes * (1 - (1 - part.used) ** num_requests) for part in self.parts.values())
        return read + num_requests * num_keys * self.kv_bytes_per_token

    def kv_bytes_per_gpu(self, tensor_parallel: int) -> float:
        """Of one token on each GPU of a server: more GPUs than KV heads hold copies."""
        return self.kv_bytes_per_token / min(tensor_parallel, self.num_kv_heads)


def target_model(config: Mapping[str, Any], target: TargetConfig) -> TargetModel:
    """The target of a `config.json`. Raises: ValueError that names a size which the config does not have."""
    text = text_config(config)
    try:
        return _target_model(text, target)
    except KeyError as error:
        raise ValueError(f"the config.json of {target.model} has no {error}, so its cost cannot be counted") from None


def _target_model(config: Mapping[str, Any], target: TargetConfig) -> TargetModel:
    width, layers, vocab = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    tied = config.get("tie_word_embeddings", False)
    attention = _latent_attention(config) if config.get("kv_lora_rank") else _grouped_attention(config)
    num_linear = _num_linear_layers(config)
    num_full = layers - num_linear
    attention_parameters = num_full * attention.parameters + num_linear * _linear_attention_parameters(config)
    counts = {
        "embedding": (vocab * width, 0.0),
        "head": (0 if tied else vocab * width, 1.0),
        "attention": (attention_parameters, 1.0),
        "norms": ((2 * layers + 1) * width, 1.0),
        **_feed_forward(config),
    }
    if tied:
        # One table, read by rows at the input and as a whole at the output.
        counts["head"], counts["embedding"] = (vocab * width, 1.0), (0, 0.0)
    quantisation = config.get("quantization_config") or {}
    return TargetModel(
        num_layers=layers,
        width=width,
        vocab_size=vocab,
        num_heads=config["num_attention_heads"],
        num_kv_heads=attention.num_kv_heads,
        expert_width=_expert_width(config) if _num_experts(config) else None,
        float8_block=(quantisation.get("weight_block_size") or [None])[0],
        parts={
            name: Part(parameters, parameters * _bytes_per_weight(name, quantisation, BYTES[target.dtype]), used)
            for name, (parameters, used) in counts.items()
        },
        kv_bytes_per_token=num_full * attention.cached_per_token * CACHE_BYTES,
        attention_flops_per_key=num_full * attention.flops_per_key,
    )


class Attention(NamedTuple):
    """One layer of attention over all keys."""

    parameters: int
    num_kv_heads: int
    cached_per_token: int
    """Numbers in the KV cache."""
    flops_per_key: int
    """Of one token, all heads: the product with the key, and that of the weight with the value."""


def _grouped_attention(config: Mapping[str, Any]) -> Attention:
    width, num_heads = config["hidden_size"], config["num_attention_heads"]
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    head_dim = config.get("head_dim") or width // num_heads
    # Qwen3-Next projects a gate of the output beside the query.
    num_queries = 2 if config.get("model_type") == QWEN3_NEXT else 1
    by_head = (num_queries + 1) * num_heads + 2 * num_kv_heads
    return Attention(
        parameters=width * head_dim * by_head,
        num_kv_heads=num_kv_heads,
        cached_per_token=2 * num_kv_heads * head_dim,
        flops_per_key=MULTIPLY_AND_ADD * num_heads * 2 * head_dim,
    )


def _latent_attention(config: Mapping[str, Any]) -> Attention:
    width, num_heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    rope, value = config["qk_rope_head_dim"], config["v_head_dim"]
    query = num_heads * (config["qk_nope_head_dim"] + rope)
    query_rank = config.get("q_lora_rank")
    query_parameters = width * query_rank + query_rank * query if query_rank else width * query
    from_latent = latent * num_heads * (config["qk_nope_head_dim"] + value)
    return Attention(
        parameters=query_parameters + width * (latent + rope) + from_latent + num_heads * value * width,
        num_kv_heads=1,
        cached_per_token=latent + rope,
        flops_per_key=MULTIPLY_AND_ADD * (query + num_heads * value),
    )


def _num_linear_layers(config: Mapping[str, Any]) -> int:
    if "linear_num_key_heads" not in config:
        return 0
    if kinds := config.get("layer_types"):
        return sum(kind == "linear_attention" for kind in kinds)
    layers: int = config["num_hidden_layers"]
    return layers - layers // int(config["full_attention_interval"])


def _linear_attention_parameters(config: Mapping[str, Any]) -> int:
    """Of a layer of Gated DeltaNet (arXiv 2412.06464): query, key, value, gate, two scalars a head, output, filter."""
    if "linear_num_key_heads" not in config:
        return 0
    width, num_values = config["hidden_size"], config["linear_num_value_heads"]
    key = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    value = num_values * config["linear_value_head_dim"]
    projections: int = width * (2 * key + 2 * value + 2 * num_values) + value * width
    return projections + (2 * key + value) * int(config["linear_conv_kernel_dim"])


def _num_experts(config: Mapping[str, Any]) -> int:
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    return next((config[name] for name in names if config.get(name)), 0)


def _expert_width(config: Mapping[str, Any]) -> int:
    width: int = config.get("moe_intermediate_size") or config["intermediate_size"]
    return width


def _shared_width(config: Mapping[str, Any]) -> int:
    """Of the experts that every token goes through, together."""
    if config.get("model_type") == LLAMA4:
        return _expert_width(config)
    if width := config.get("shared_expert_intermediate_size"):
        return int(width)
    count = config.get("n_shared_experts") or config.get("num_shared_experts") or 0
    return count * int(config.get("moe_shared_expert_intermediate_size") or _expert_width(config))


def _num_dense_layers(config: Mapping[str, Any]) -> int:
    """Layers with a feed-forward network instead of experts."""
    layers: int = config["num_hidden_layers"]
    if not _num_experts(config):
        return layers
    if config.get("model_type") == LLAMA4:
        return layers - layers // int(config.get("interleave_moe_layer_step", 1))
    dense, step = set(config.get("mlp_only_layers") or ()), config.get("decoder_sparse_step") or 1
    first = config.get("first_k_dense_replace") or 0
    return sum(layer in dense or layer < first or (layer + 1) % step > 0 for layer in range(layers))


def _feed_forward(config: Mapping[str, Any]) -> dict[str, tuple[int, float]]:
    """(parameters, share used) of the parts behind attention."""
    width, num_experts = config["hidden_size"], _num_experts(config)
    num_dense = _num_dense_layers(config)
    num_sparse = config["num_hidden_layers"] - num_dense
    dense_width = config.get("intermediate_size_mlp") or config["intermediate_size"]
    parts = {"feed-forward": (num_dense * 3 * width * dense_width, 1.0)}
    if num_experts:
        expert = 3 * width * _expert_width(config)
        parts["experts"] = (num_sparse * num_experts * expert, config["num_experts_per_tok"] / num_experts)
        parts["shared experts"] = (num_sparse * 3 * width * _shared_width(config), 1.0)
        parts["router"] = (num_sparse * num_experts * width, 1.0)
    return parts


def _bytes_per_weight(part: str, quantisation: Mapping[str, Any], plain: float) -> float:
    """Of a part, scales included. Raises: ValueError for a quantisation that is not known here."""
    method = quantisation.get("quant_method")
    ignored = (*(quantisation.get("modules_to_not_convert") or ()), *(quantisation.get("ignore") or ()))
    stays = part in IGNORED_AS and any(IGNORED_AS[part] in name for name in ignored)
    if method is None or part in NEVER_QUANTISED or stays:
        return plain
    if method == "mxfp4":
        # gpt-oss quantises its experts alone: 4 bits, and a scale of 8 bits for 32 of them.
        return 4 / 8 + 1 / 32 if part == "experts" else plain
    if method in ("fp8", "fbgemm_fp8"):
        rows, columns = quantisation.get("weight_block_size") or (0, 0)
        return 1 + (4 / (rows * columns) if rows else 0)
    if method == "compressed-tensors":
        (group, *_) = quantisation["config_groups"].values()
        size = group["weights"].get("group_size")
        return group["weights"]["num_bits"] / 8 + (2 / size if size and size > 0 else 0)
    if bits := quantisation.get("bits"):
        return bits / 8 + 2 / quantisation.get("group_size", 128)
    raise ValueError(f'quantization_config.quant_method "{method}" is not known to specforge_core/cost/target_model.py')
