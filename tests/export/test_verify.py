"""What a server would load silently and wrongly must be refused. The folder is written by hand, without the trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specforge_core.export.verify import check_serving_folder
from tests.export.folders import KEPT_IDS, good_tensors, write_folder

# Sizes as in `good_tensors`; 8 target layers.
TARGET_CONFIG = {"hidden_size": 8, "vocab_size": 20, "max_position_embeddings": 512, "num_hidden_layers": 8}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-6,
    "norm_before_residual": False,
    "tie_word_embeddings": False,
    "fc_norm": False,
    "norm_output": False,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 20,
    "draft_vocab_size": 6,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True},
}


def refusal(directory: Path, *, target_config: dict[str, Any] | None = None) -> str:
    with pytest.raises(ValueError, match="no EAGLE-3 draft that SGLang would serve as trained") as error:
        check_serving_folder(directory, target_config or TARGET_CONFIG)
    return str(error.value)


def test_a_right_folder_passes(tmp_path: Path) -> None:
    check_serving_folder(write_folder(tmp_path, CONFIG, good_tensors("midlayer")), TARGET_CONFIG)


def test_a_layer_under_the_name_of_another_engine_is_refused(tmp_path: Path) -> None:
    tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in good_tensors("midlayer").items()}
    message = refusal(write_folder(tmp_path, CONFIG, tensors))
    assert "midlayer.mlp.up_proj.weight is missing" in message
    assert "layers.0.mlp.up_proj.weight is not a name that the server knows" in message


def test_an_embedding_is_refused_because_the_server_shares_the_targets(tmp_path: Path) -> None:
    tensors = good_tensors("midlayer") | {"embed_tokens.weight": torch.randn(20, 8).bfloat16()}
    assert "embed_tokens.weight is not a name" in refusal(write_folder(tmp_path, CONFIG, tensors))


def test_a_draft_that_would_need_its_own_embedding_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, CONFIG, good_tensors("midlayer"))
    message = refusal(folder, target_config=TARGET_CONFIG | {"hidden_size": 16})
    assert "hidden_size 8 differs from the target's 16" in message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lm_head.weight", torch.ones(7, 8, dtype=torch.bfloat16), "is BF16 [7, 8], must be BF16 [6, 8]"),
        ("norm.weight", torch.ones(8), "is F32 [8], must be BF16 [8]"),
        ("d2t", torch.zeros(6, dtype=torch.int32), "is I32 [6], must be I64 [6]"),
        ("t2d", torch.zeros(20, dtype=torch.uint8), "is U8 [20], must be BOOL [20]"),
        ("midlayer.self_attn.k_proj.weight", torch.ones(16, 16, dtype=torch.bfloat16), "must be BF16 [8, 16]"),
    ],
)
def test_a_tensor_of_another_form_is_named(tmp_path: Path, name: str, value: Tensor, expected: str) -> None:
    message = refusal(write_folder(tmp_path, CONFIG, good_tensors("midlayer") | {name: value}))
    assert name in message
    assert expected in message


def test_a_d2t_of_absolute_ids_is_refused(tmp_path: Path) -> None:
    message = refusal(write_folder(tmp_path, CONFIG, good_tensors("midlayer") | {"d2t": torch.tensor(KEPT_IDS)}))
    assert "but t2d marks the 6 ids [0, 3, 4, 9]" in message


def test_a_t2d_with_one_token_too_many_is_refused(tmp_path: Path) -> None:
    tensors = good_tensors("midlayer")
    tensors["t2d"][1] = True
    assert "t2d marks the 7 ids" in refusal(write_folder(tmp_path, CONFIG, tensors))


@pytest.mark.parametrize("limit", [2048, 511])
def test_a_length_limit_other_than_the_targets_is_refused(tmp_path: Path, limit: int) -> None:
    folder = write_folder(tmp_path, CONFIG | {"max_position_embeddings": limit}, good_tensors("midlayer"))
    assert f"max_position_embeddings is {limit}, must be the target's 512" in refusal(folder)


@pytest.mark.parametrize("name", ["rope_theta", "rope_scaling", "rope_parameters"])
def test_either_rope_schema_missing_is_refused(tmp_path: Path, name: str) -> None:
    config = {key: value for key, value in CONFIG.items() if key != name}
    assert f"{name} is absent" in refusal(write_folder(tmp_path, config, good_tensors("midlayer")))


def test_rope_schemas_that_disagree_are_refused(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    config = CONFIG | {"rope_scaling": yarn, "rope_theta": 500000.0}
    message = refusal(write_folder(tmp_path, config, good_tensors("midlayer")))
    assert "rope_theta is 500000.0, but 10000.0 in rope_parameters" in message
    assert "rope_scaling is {'rope_type': 'yarn', 'factor': 4.0}" in message


def test_a_scaled_rope_in_both_schemas_passes(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    config = CONFIG | {"rope_scaling": yarn, "rope_parameters": yarn | {"rope_theta": 10000.0}}
    check_serving_folder(write_folder(tmp_path, config, good_tensors("midlayer")), TARGET_CONFIG)


def test_a_rope_that_servers_would_scale_otherwise_is_refused(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    config = CONFIG | {"rope_scaling": yarn, "rope_parameters": yarn | {"rope_theta": 10000.0}}
    message = refusal(write_folder(tmp_path, config, good_tensors("midlayer")))
    assert "rope_parameters has mscale, which training reads and servers do not" in message


@pytest.mark.parametrize("name", ["norm_before_residual", "fc_norm", "norm_output"])
def test_a_flag_left_to_the_servers_default_is_refused(tmp_path: Path, name: str) -> None:
    config = {key: value for key, value in CONFIG.items() if key != name}
    assert f"{name} is 'absent'" in refusal(write_folder(tmp_path, config, good_tensors("midlayer")))


def test_an_epsilon_left_to_the_servers_default_is_refused(tmp_path: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "rms_norm_eps"}
    assert "rms_norm_eps is absent" in refusal(write_folder(tmp_path, config, good_tensors("midlayer")))


def test_the_norms_of_eagle_3_1_are_there_exactly_if_the_flag_says_so(tmp_path: Path) -> None:
    norms = {f"fc_norm.{i}.weight": torch.ones(8, dtype=torch.bfloat16) for i in range(3)}
    assert "fc_norm.2.weight is missing" in refusal(
        write_folder(tmp_path, CONFIG | {"fc_norm": True}, good_tensors("midlayer"))
    )
    assert "fc_norm.0.weight is not a name" in refusal(write_folder(tmp_path, CONFIG, good_tensors("midlayer") | norms))
    check_serving_folder(
        write_folder(tmp_path, CONFIG | {"fc_norm": True}, good_tensors("midlayer") | norms), TARGET_CONFIG
    )


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 3, 7], "the server reaches the outputs of layers 0 to 6"),
        ([-1, 3, 4], "the server reaches the outputs of layers 0 to 6"),
        ([4, 3, 1], "must be 3 ascending layers"),
        ([1, 3], "must be 3 ascending layers"),
        (None, "must be 3 ascending layers"),
    ],
)
def test_captured_layers_that_the_server_cannot_reach_are_refused(tmp_path: Path, ids: Any, expected: str) -> None:
    eagle_config = {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True}
    folder = write_folder(tmp_path, CONFIG | {"eagle_config": eagle_config}, good_tensors("midlayer"))
    assert expected in refusal(folder)


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    config = CONFIG | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 40, "attention_bias": True}
    tensors = good_tensors("midlayer")
    del tensors["norm.weight"]
    message = refusal(write_folder(tmp_path, config, tensors))
    for part in ("['LlamaForCausalLM']", "num_hidden_layers is 40", "attention_bias is true", "norm.weight is missing"):
        assert part in message


@pytest.mark.parametrize("value", [None, 0, -1, "8", 8.0, True])
def test_a_size_that_is_no_positive_integer_is_refused(tmp_path: Path, value: Any) -> None:
    folder = write_folder(tmp_path, CONFIG | {"head_dim": value}, good_tensors("midlayer"))
    assert f"head_dim is {value!r}, must be a positive integer" in refusal(folder)
