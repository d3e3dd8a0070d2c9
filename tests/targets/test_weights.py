"""Config and head out of a target's files are those of the loaded model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from specforge_core.demo import target as demo_target
from specforge_core.stages import ResolvedTarget
from specforge_core.targets.capture import portable_config
from specforge_core.targets.hf import HFTarget
from specforge_core.targets.weights import TargetFiles, stored_name
from tests import tiny

SHAPE: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": 258, "pad_token_id": 257, "bos_token_id": None,
}  # fmt: skip
DEMO = Path(demo_target.__path__[0])


def check_same(target: ResolvedTarget) -> None:
    files, loaded = TargetFiles(target), HFTarget(target, device="cpu")
    assert files.num_layers == loaded.num_layers
    assert portable_config(files.config) == portable_config(loaded.config)
    found, expected = files.load_target_head(), loaded.load_target_head()
    for name, tensor in expected._asdict().items():
        assert getattr(found, name).dtype == tensor.dtype, name
        assert torch.equal(getattr(found, name), tensor), name
    assert (found.lm_head_VD is found.embedding_VD) == (expected.lm_head_VD is expected.embedding_VD)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo_targets_files_say_what_the_loaded_model_says(dtype: str) -> None:
    check_same(ResolvedTarget(model=str(DEMO), content_id="demo", dtype=dtype))


@pytest.mark.parametrize("is_tied", [True, False])
def test_so_do_sharded_files_with_and_without_a_head_of_their_own(tmp_path: Path, is_tied: bool) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=is_tied))
    torch.nn.init.normal_(model.model.norm.weight)
    model.save_pretrained(tmp_path, max_shard_size="80KB")
    tiny.make_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    check_same(ResolvedTarget(model=str(tmp_path), content_id="sharded", dtype="bfloat16"))


def test_a_final_norm_that_stores_its_factor_minus_one_is_understood(tmp_path: Path) -> None:
    # Without its caps, which a draft cannot follow.
    config = Gemma2Config(**SHAPE, final_logit_softcapping=None, attn_logit_softcapping=None, sliding_window=32)
    model = Gemma2ForCausalLM(config)
    torch.nn.init.normal_(model.model.norm.weight)
    model.save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    target = ResolvedTarget(model=str(tmp_path), content_id="gemma", dtype="float32")
    check_same(target)
    torch.testing.assert_close(
        TargetFiles(target).load_target_head().final_norm_D, model.model.norm.weight.detach() + 1
    )


def test_a_tensor_is_found_behind_other_prefixes_but_never_guessed() -> None:
    stored = ["language_model.model.norm.weight", "visual.norm.weight", "language_model.lm_head.weight"]
    assert stored_name("model.norm.weight", stored) == stored[0]
    assert stored_name("model.language_model.norm.weight", stored) == stored[0]
    assert stored_name("lm_head.weight", stored) == stored[2]
    with pytest.raises(ValueError, match=r"no stored tensor is clearly norm.weight: .*visual"):
        stored_name("norm.weight", stored)
    with pytest.raises(ValueError, match=r"no stored tensor is clearly model.embed_tokens.weight"):
        stored_name("model.embed_tokens.weight", stored)


@pytest.mark.parametrize("name", ["../../elsewhere.safetensors", "/etc/passwd", "pytorch_model.bin", "a/b.safetensors"])
def test_an_index_that_names_other_files_than_the_targets_safetensors_is_refused(tmp_path: Path, name: str) -> None:
    shutil.copytree(DEMO, tmp_path / "target")
    index = {"weight_map": {"lm_head.weight": name}}
    (tmp_path / "target/model.safetensors.index.json").write_text(json.dumps(index))
    target = ResolvedTarget(model=str(tmp_path / "target"), content_id="x", dtype="float32")
    with pytest.raises(ValueError, match="which is no safetensors file beside it"):
        TargetFiles(target).load_target_head()
    with pytest.raises(ValueError, match="which is no safetensors file beside it"):
        HFTarget(target, device="cpu")
