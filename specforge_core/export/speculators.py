"""The format of `speculators`, which vLLM reads: the same draft in other words.

A draft's own config and tensors are in SGLang's words. What this format says otherwise:
* what a Llama layer is made of is nested, as `transformer_layer_config`;
* layers are counted by their INPUT, so the same hidden state has an id that is one higher;
* the layer is called `layers.0`;
* a draft vocabulary that is the target's whole one has no maps;
* the target is named, as `verifier`, and so is how much to draft at once.

Neither format needs the embedding, which may be larger than all the rest: both servers share the target's where a
draft has none. The package would fill it in from the verifier, but its `from_pretrained` may keep uninitialised memory
instead; who trains on with the package copies the embedding into the folder first, and names a verifier that has no
name here.

Source: speculators 0.9.0, models/eagle3/config.py, core.py and train/vocab_mapping.py; vLLM 0.33.0,
transformers_utils/configs/speculators/algos.py and model_executor/models/llama_eagle3.py.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from specforge_core.drafts.eagle3_config import ARCHITECTURE

FORMAT_VERSION = "0.9.0"
"""Of the package whose config this is."""
SHARED_FIELDS = ("draft_vocab_size", "target_hidden_size", "norm_before_residual", "fc_norm", "norm_output")
"""Of the draft as a whole, under the same names at the top of either config."""
SGLANG_FIELDS = ("architectures", "eagle_config")
OWN_LAYER, LAYER = "midlayer.", "layers.0."
VOCABULARY_MAPS = ("d2t", "t2d")


class DraftFiles(NamedTuple):
    """A draft as files: what is in `config.json` and in `model.safetensors`."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


class Verifier(NamedTuple):
    """The target, as a draft's config names it."""

    name_or_path: str | None
    """Hub id; None for a target that others could not load by a name."""
    architectures: tuple[str, ...]


def to_speculators(draft: DraftFiles, verifier: Verifier, *, num_speculative_tokens: int) -> DraftFiles:
    """The draft in this format.

    Args: num_speculative_tokens: drafted at once by a server that is not told otherwise.
    """
    config = draft.config
    elsewhere = {*SHARED_FIELDS, *SGLANG_FIELDS}
    layer_inputs = [layer + 1 for layer in config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]]
    proposal = {"proposal_type": "greedy", "speculative_tokens": num_speculative_tokens}
    spoken = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": FORMAT_VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": verifier.name_or_path, "architectures": list(verifier.architectures)},
        },
        "transformer_layer_config": {name: value for name, value in config.items() if name not in elsewhere},
        **{name: config[name] for name in SHARED_FIELDS},
        "norm_before_fc": False,
        "eagle_aux_hidden_state_layer_ids": layer_inputs,
        "tie_word_embeddings": False,
        "torch_dtype": config["torch_dtype"],
        "dtype": config["dtype"],
    }
    left_out = VOCABULARY_MAPS if config["draft_vocab_size"] == config["vocab_size"] else ()
    tensors = {_renamed(name, OWN_LAYER, LAYER): x for name, x in draft.tensors.items() if name not in left_out}
    return DraftFiles(spoken, tensors)


def from_speculators(draft: DraftFiles) -> DraftFiles:
    """The draft in its own words again: what `to_speculators` was given."""
    config = draft.config
    layer_outputs = [layer - 1 for layer in config["eagle_aux_hidden_state_layer_ids"]]
    own = {
        "architectures": [ARCHITECTURE],
        **config["transformer_layer_config"],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": layer_outputs, "use_aux_hidden_state": True},
        **{name: config[name] for name in SHARED_FIELDS},
    }
    tensors = {_renamed(name, LAYER, OWN_LAYER): tensor for name, tensor in draft.tensors.items()}
    if own["draft_vocab_size"] == own["vocab_size"]:
        tensors["d2t"] = torch.zeros(own["vocab_size"], dtype=torch.int64)
        tensors["t2d"] = torch.ones(own["vocab_size"], dtype=torch.bool)
    return DraftFiles(own, tensors)


def _renamed(name: str, old_prefix: str, new_prefix: str) -> str:
    return new_prefix + name.removeprefix(old_prefix) if name.startswith(old_prefix) else name
