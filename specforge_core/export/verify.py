"""Is this folder an EAGLE-3 draft that SGLang loads as it was trained? Torch-free, and independent of the trainer.

SGLang skips tensors whose names it does not know, and leaves those that it misses uninitialised, so a wrong name shows
only as bad acceptance. Expected names and shapes follow from config.json alone.

H draft width, Ht target width, I feed-forward width, V target vocabulary, Vd draft vocabulary, N target layers.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
NUM_AUX_LAYERS = 3

# The values that say "this is the model that was trained". A server's default for an absent one varies by version.
FIXED_FIELDS: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "norm_before_residual": False,
    "tie_word_embeddings": False,
}
ARCHITECTURES = ["LlamaForCausalLMEagle3"]
SIZE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "draft_vocab_size",
    "max_position_embeddings",
)
FLAG_FIELDS = ("fc_norm", "norm_output")
ROPE_FIELDS_OF_TRAINING = ("attention_factor", "mscale", "mscale_all_dim", "partial_rotary_factor", "truncate")
"""That transformers reads, and servers do not, or not all of them."""


class TensorForm(NamedTuple):
    """Element type, in safetensors' words, and shape."""

    dtype: str
    shape: tuple[int, ...]


def check_serving_folder(directory: Path, target_config: dict[str, Any]) -> None:
    """Nothing, if a server may load this folder.

    Args: target_config: the target's `config.json` (its text part).
    Raises: ValueError that lists everything wrong with the folder.
    """
    config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    # Without sizes nothing can be said about tensors.
    errors = size_errors(config) or [
        *config_errors(config, target_config),
        *tensor_errors(directory / WEIGHTS_NAME, expected_tensors(config, layer="midlayer")),
    ]
    if errors:
        raise ValueError(
            f"{directory} is no EAGLE-3 draft that SGLang would serve as trained:\n  " + "\n  ".join(errors)
        )


def expected_tensors(config: dict[str, Any], *, layer: str) -> dict[str, TensorForm]:
    """Every tensor that the config calls for, by name; no other may be there. Args: layer: what the layer is called."""
    width, target_width = config["hidden_size"], config.get("target_hidden_size", config["hidden_size"])
    query_width = config["num_attention_heads"] * config["head_dim"]
    kv_width = config["num_key_value_heads"] * config["head_dim"]
    feed_forward = config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (width, NUM_AUX_LAYERS * target_width),
        f"{layer}.input_layernorm.weight": (width,),
        f"{layer}.hidden_norm.weight": (width,),
        f"{layer}.self_attn.q_proj.weight": (query_width, 2 * width),
        f"{layer}.self_attn.k_proj.weight": (kv_width, 2 * width),
        f"{layer}.self_attn.v_proj.weight": (kv_width, 2 * width),
        f"{layer}.self_attn.o_proj.weight": (width, query_width),
        f"{layer}.post_attention_layernorm.weight": (width,),
        f"{layer}.mlp.gate_proj.weight": (feed_forward, width),
        f"{layer}.mlp.up_proj.weight": (feed_forward, width),
        f"{layer}.mlp.down_proj.weight": (width, feed_forward),
        "norm.weight": (width,),
        "lm_head.weight": (config["draft_vocab_size"], width),
    }
    if config.get("fc_norm"):
        shapes |= {f"fc_norm.{i}.weight": (target_width,) for i in range(NUM_AUX_LAYERS)}
    tensors = {name: TensorForm("BF16", shape) for name, shape in shapes.items()}
    tensors["d2t"] = TensorForm("I64", (config["draft_vocab_size"],))
    tensors["t2d"] = TensorForm("BOOL", (config["vocab_size"],))
    return tensors


def size_errors(config: dict[str, Any]) -> list[str]:
    """What is wrong with the sizes that every shape follows from."""
    return [
        f"{CONFIG_NAME}: {name} is {config.get(name)!r}, must be a positive integer"
        for name in SIZE_FIELDS
        if type(config.get(name)) is not int or config[name] < 1
    ]


def config_errors(config: dict[str, Any], target_config: dict[str, Any]) -> list[str]:
    """What is wrong with the config.json that SGLang reads, beside the target's."""
    return [
        *fixed_errors(config, {"architectures": ARCHITECTURES}),
        *model_errors(config, target_config),
        *_aux_layer_errors(config, target_config["num_hidden_layers"]),
    ]


def fixed_errors(config: dict[str, Any], required: dict[str, Any]) -> list[str]:
    """Which fields are not what they must be."""
    return [
        f"{CONFIG_NAME}: {name} is {config.get(name, 'absent')!r}, must be {value!r}"
        for name, value in required.items()
        if config.get(name) != value
    ]


def model_errors(config: dict[str, Any], target_config: dict[str, Any]) -> list[str]:
    """What is wrong with the fields that every server reads under the same names, beside the target's."""
    errors = fixed_errors(config, FIXED_FIELDS)
    errors += [
        f"{CONFIG_NAME}: {name} is {config.get(name, 'absent')!r}; write true or false, as trained"
        for name in FLAG_FIELDS
        if not isinstance(config.get(name), bool)
    ]
    if "rms_norm_eps" not in config:
        errors.append(f"{CONFIG_NAME}: rms_norm_eps is absent; a server would take its own")
    # A server would make room for biases, and nothing would fill it.
    errors += [
        f"{CONFIG_NAME}: {name} is true, the draft has none"
        for name in ("attention_bias", "mlp_bias", "bias")
        if config.get(name)
    ]
    # The server sizes its table of rotations by the draft's limit, and reads beyond its end.
    errors += [
        f"{CONFIG_NAME}: {name} is {config[name]}, must be the target's {target_config.get(name)}"
        for name in ("vocab_size", "max_position_embeddings")
        if config[name] != target_config.get(name)
    ]
    if config["draft_vocab_size"] > config["vocab_size"]:
        errors.append(
            f"{CONFIG_NAME}: draft_vocab_size {config['draft_vocab_size']} exceeds vocab_size {config['vocab_size']}"
        )
    target_width = config.get("target_hidden_size", config["hidden_size"])
    if not target_width == config["hidden_size"] == target_config["hidden_size"]:
        errors.append(
            f"{CONFIG_NAME}: hidden_size {config['hidden_size']} differs from the target's "
            f"{target_config['hidden_size']}; such a draft needs its own embedding, which is not exported"
        )
    return errors + _rope_errors(config)


def _rope_errors(config: dict[str, Any]) -> list[str]:
    """transformers 4 reads `rope_theta` and `rope_scaling`, 5 reads `rope_parameters`; a server has either."""
    errors = [
        f"{CONFIG_NAME}: {name} is absent; servers with transformers {version} read it"
        for name, version in (("rope_theta", 4), ("rope_scaling", 4), ("rope_parameters", 5))
        if name not in config
    ]
    if errors:
        return errors
    new = dict(config["rope_parameters"])
    new_theta = new.pop("rope_theta", None)
    if new_theta != config["rope_theta"]:
        errors.append(f"{CONFIG_NAME}: rope_theta is {config['rope_theta']}, but {new_theta} in rope_parameters")
    errors += [
        f"{CONFIG_NAME}: rope_parameters has {name}, which training reads and servers do not"
        for name in ROPE_FIELDS_OF_TRAINING
        if name in new
    ]
    old = config["rope_scaling"] or {"rope_type": "default"}
    old = {name: value for name, value in old.items() if name != "rope_theta"}
    if new != old:
        errors.append(f"{CONFIG_NAME}: rope_scaling is {old}, but rope_parameters says {new}")
    return errors


def _aux_layer_errors(config: dict[str, Any], num_target_layers: int) -> list[str]:
    """The ids are layer OUTPUTS counted from 0, nested; the server adds 1 to reach the input of the next layer."""
    nested = config.get("eagle_config", {})
    ids = nested.get("eagle_aux_hidden_state_layer_ids")
    name = f"{CONFIG_NAME}: eagle_config.eagle_aux_hidden_state_layer_ids"
    errors = []
    if nested.get("use_aux_hidden_state") is not True:
        errors.append(f"{CONFIG_NAME}: eagle_config.use_aux_hidden_state must be true")
    if not isinstance(ids, list) or len(ids) != NUM_AUX_LAYERS or ids != sorted(set(ids)):
        errors.append(f"{name} is {ids!r}, must be {NUM_AUX_LAYERS} ascending layers")
    # The output of the last layer is the input of none.
    elif not 0 <= ids[0] <= ids[-1] <= num_target_layers - 2:
        errors.append(f"{name} is {ids}, but the server reaches the outputs of layers 0 to {num_target_layers - 2}")
    return errors


def tensor_errors(path: Path, expected: dict[str, TensorForm]) -> list[str]:
    """What is wrong with the names, types, shapes and vocabulary maps of a draft's tensors."""
    with safe_open(path, framework="numpy") as file:
        found = {
            name: TensorForm(part.get_dtype(), tuple(part.get_shape()))
            for name in file.keys()  # noqa: SIM118
            for part in [file.get_slice(name)]
        }
        errors = [f"{path.name}: {name} is missing" for name in sorted(expected.keys() - found.keys())]
        errors += [
            f"{path.name}: {name} is not a name that the server knows for this config.json"
            for name in sorted(found.keys() - expected.keys())
        ]
        errors += [
            f"{path.name}: {name} is {found[name].dtype} {list(found[name].shape)}, "
            f"must be {expected[name].dtype} {list(expected[name].shape)}"
            for name in sorted(expected.keys() & found.keys())
            if found[name] != expected[name]
        ]
        if errors or "d2t" not in expected:
            return errors
        return _vocabulary_errors(path, file.get_tensor("d2t"), file.get_tensor("t2d"))


def _vocabulary_errors(path: Path, d2t: np.ndarray, t2d: np.ndarray) -> list[str]:
    """`d2t` is an offset: target id = draft id + d2t[draft id]. `t2d` marks exactly those target ids."""
    target_ids = np.arange(len(d2t)) + d2t
    if not np.array_equal(np.flatnonzero(t2d), target_ids):
        return [
            f"{path.name}: i + d2t[i] gives the {len(target_ids)} ids {target_ids[:4].tolist()}..., "
            f"but t2d marks the {int(t2d.sum())} ids {np.flatnonzero(t2d)[:4].tolist()}..."
        ]
    return []
