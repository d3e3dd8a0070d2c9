"""Is this folder an EAGLE-3 draft that vLLM loads as it was trained? Torch-free, and independent of what writes it.

vLLM takes what a config leaves out from its own defaults, of which `norm_before_residual` is true.
"""

import json
from pathlib import Path
from typing import Any

from specforge_core.export.verify import (
    CONFIG_NAME,
    NUM_AUX_LAYERS,
    WEIGHTS_NAME,
    expected_tensors,
    fixed_errors,
    model_errors,
    size_errors,
    tensor_errors,
)

SPECULATORS_FOLDER = "speculators"
"""Within a draft's folder, which is SGLang's."""
LAYER_CONFIG = "transformer_layer_config"
# All that is read beside the layer's config, and read nowhere else.
TOP_FIELDS = (
    "speculators_model_type",
    "draft_vocab_size",
    "target_hidden_size",
    "norm_before_residual",
    "norm_before_fc",
    "fc_norm",
    "norm_output",
    "eagle_aux_hidden_state_layer_ids",
)
REQUIRED_FIELDS: dict[str, Any] = {"speculators_model_type": "eagle3", "norm_before_fc": False}


def check_speculators_folder(directory: Path, target_config: dict[str, Any]) -> None:
    """Nothing, if vLLM may load this folder.

    Args: target_config: the target's `config.json` (its text part).
    Raises: ValueError that lists everything wrong with the folder.
    """
    config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    # What the server makes of it.
    merged = {name: value for name, value in config.get(LAYER_CONFIG, {}).items() if name not in TOP_FIELDS}
    merged |= {name: config[name] for name in TOP_FIELDS if name in config}
    errors = size_errors(merged) or [
        *fixed_errors(merged, REQUIRED_FIELDS),
        *model_errors(merged, target_config),
        *_aux_layer_errors(merged, target_config["num_hidden_layers"]),
        *_proposal_errors(config.get("speculators_config", {})),
        *tensor_errors(directory / WEIGHTS_NAME, _expected_tensors(merged)),
    ]
    if errors:
        raise ValueError(f"{directory} is no EAGLE-3 draft that vLLM would serve as trained:\n  " + "\n  ".join(errors))


def _expected_tensors(config: dict[str, Any]) -> dict[str, Any]:
    tensors = expected_tensors(config, layer="layers.0")
    if config["draft_vocab_size"] == config["vocab_size"]:
        # The server has no place for maps that change nothing, and refuses them.
        del tensors["d2t"], tensors["t2d"]
    return tensors


def _aux_layer_errors(config: dict[str, Any], num_target_layers: int) -> list[str]:
    """The ids are layer INPUTS counted from 0, at the top level; 0 would be the embedding."""
    ids = config.get("eagle_aux_hidden_state_layer_ids")
    name = f"{CONFIG_NAME}: eagle_aux_hidden_state_layer_ids"
    if not isinstance(ids, list) or len(ids) != NUM_AUX_LAYERS or ids != sorted(set(ids)):
        return [f"{name} is {ids!r}, must be {NUM_AUX_LAYERS} ascending layers"]
    if not 1 <= ids[0] <= ids[-1] <= num_target_layers - 1:
        return [f"{name} is {ids}, but the target's layers have the inputs 1 to {num_target_layers - 1}"]
    return []


def _proposal_errors(config: dict[str, Any]) -> list[str]:
    """vLLM reads how much to draft, and insists on the name of a target."""
    methods = config.get("proposal_methods") or [{}]
    num_tokens = methods[0].get("speculative_tokens")
    errors = []
    if type(num_tokens) is not int or num_tokens < 1:
        errors.append(f"{CONFIG_NAME}: speculative_tokens is {num_tokens!r}, must be a positive integer")
    if config.get("default_proposal_method") != methods[0].get("proposal_type") or not methods[0]:
        errors.append(f"{CONFIG_NAME}: default_proposal_method must be the type of the first of proposal_methods")
    if not {"name_or_path", "architectures"} <= config.get("verifier", {}).keys():
        errors.append(f"{CONFIG_NAME}: speculators_config.verifier must have name_or_path and architectures")
    return errors
