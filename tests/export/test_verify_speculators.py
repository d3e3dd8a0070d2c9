"""What vLLM would load silently and wrongly must be refused. The folder is written by hand."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_core.export.verify_speculators import check_speculators_folder
from tests.export.folders import good_tensors, write_folder

# Sizes as in `good_tensors`; 8 target layers.
TARGET_CONFIG = {"hidden_size": 8, "vocab_size": 20, "max_position_embeddings": 512, "num_hidden_layers": 8}
LAYER_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 20,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
CONFIG: dict[str, Any] = {
    "speculators_model_type": "eagle3",
    "speculators_config": {
        "algorithm": "eagle3",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
        "default_proposal_method": "greedy",
        "verifier": {"name_or_path": None, "architectures": ["LlamaForCausalLM"]},
    },
    "transformer_layer_config": LAYER_CONFIG,
    "draft_vocab_size": 6,
    "target_hidden_size": 8,
    "norm_before_residual": False,
    "norm_before_fc": False,
    "fc_norm": False,
    "norm_output": False,
    "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
}


def refusal(directory: Path, config: dict[str, Any]) -> str:
    write_folder(directory, config, good_tensors("layers.0"))
    with pytest.raises(ValueError, match="no EAGLE-3 draft that vLLM would serve as trained") as error:
        check_speculators_folder(directory, TARGET_CONFIG)
    return str(error.value)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in CONFIG.items() if key != name}


def test_a_right_folder_passes(tmp_path: Path) -> None:
    check_speculators_folder(write_folder(tmp_path, CONFIG, good_tensors("layers.0")), TARGET_CONFIG)


def test_a_layer_under_sglangs_name_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, CONFIG, good_tensors("midlayer"))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight is missing") as error:
        check_speculators_folder(tmp_path, TARGET_CONFIG)
    assert "midlayer.mlp.up_proj.weight is not a name" in str(error.value)


@pytest.mark.parametrize("name", ["norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"])
def test_a_flag_left_to_the_servers_default_is_refused(tmp_path: Path, name: str) -> None:
    assert f"{name} is 'absent'" in refusal(tmp_path, without(name))


def test_a_flag_where_the_server_does_not_read_it_is_refused(tmp_path: Path) -> None:
    config = copy.deepcopy(without("norm_output"))
    config["transformer_layer_config"]["norm_output"] = False
    assert "norm_output is 'absent'" in refusal(tmp_path, config)


def test_a_size_where_the_server_does_not_read_it_is_refused(tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIG)
    config["head_dim"] = config["transformer_layer_config"].pop("head_dim")
    assert "head_dim is None, must be a positive integer" in refusal(tmp_path, config)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 3, 8], "the target's layers have the inputs 1 to 7"),
        ([0, 3, 4], "the target's layers have the inputs 1 to 7"),
        ([5, 4, 2], "must be 3 ascending layers"),
        (None, "must be 3 ascending layers"),
    ],
)
def test_captured_layers_that_the_target_does_not_have_are_refused(tmp_path: Path, ids: Any, expected: str) -> None:
    assert expected in refusal(tmp_path, CONFIG | {"eagle_aux_hidden_state_layer_ids": ids})


def test_a_length_limit_other_than_the_targets_is_refused(tmp_path: Path) -> None:
    config = CONFIG | {"transformer_layer_config": LAYER_CONFIG | {"max_position_embeddings": 2048}}
    assert "max_position_embeddings is 2048, must be the target's 512" in refusal(tmp_path, config)


@pytest.mark.parametrize("num_tokens", [None, 0, "3", True])
def test_how_much_to_draft_must_be_said(tmp_path: Path, num_tokens: Any) -> None:
    config = copy.deepcopy(CONFIG)
    config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = num_tokens
    assert f"speculative_tokens is {num_tokens!r}" in refusal(tmp_path, config)


def test_a_config_without_its_method_or_target_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, CONFIG | {"speculators_model_type": "dflash", "speculators_config": {}})
    for part in ("speculators_model_type is 'dflash'", "default_proposal_method", "name_or_path"):
        assert part in message


def test_a_draft_of_the_whole_vocabulary_has_no_maps(tmp_path: Path) -> None:
    config = CONFIG | {"draft_vocab_size": 20}
    tensors = good_tensors("layers.0") | {"lm_head.weight": torch.ones(20, 8, dtype=torch.bfloat16)}
    del tensors["d2t"], tensors["t2d"]
    check_speculators_folder(write_folder(tmp_path, config, tensors), TARGET_CONFIG)
    identity = {"d2t": torch.zeros(20, dtype=torch.int64), "t2d": torch.ones(20, dtype=torch.bool)}
    write_folder(tmp_path, config, tensors | identity)
    with pytest.raises(ValueError, match="d2t is not a name that the server knows"):
        check_speculators_folder(tmp_path, TARGET_CONFIG)
