"""The exported folder computes what was trained, and says so in the server's words."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge_core.export.run import load_target_config, main, read_folder, reload_error
from specforge_core.export.speculators import DraftFiles
from specforge_core.export.verify import check_serving_folder
from specforge_core.manifest_sections import Eagle3Config
from specforge_core.stages import ExportSpec, ResolvedTarget
from tests.export.folders import TINY_KEPT_IDS, write_checkpoint


def export(tmp_path: Path, target: ResolvedTarget, **flags: Any) -> Path:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", target, Eagle3Config(num_steps=3, **flags))
    out = tmp_path / "draft"
    out.mkdir()
    facts = main(ExportSpec(target=target, checkpoint=checkpoint, num_steps=3), out)
    assert facts.max_reload_error == 0.0
    assert facts.architecture == "LlamaForCausalLMEagle3"
    return out


def test_the_folder_holds_the_trained_weights_in_bfloat16_and_the_maps_as_they_are(
    tmp_path: Path, tiny_target: ResolvedTarget
) -> None:
    out = export(tmp_path, tiny_target)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "speculators"]
    trained = load_file(tmp_path / "checkpoint/draft.safetensors")
    exported = load_file(out / "model.safetensors")
    assert exported.keys() == trained.keys()
    assert "embed_tokens" not in " ".join(exported)
    for name in exported.keys() - {"d2t", "t2d"}:
        assert torch.equal(exported[name], trained[name].bfloat16()), name
    assert exported["d2t"].dtype == torch.int64
    assert (exported["d2t"] + torch.arange(len(TINY_KEPT_IDS))).tolist() == TINY_KEPT_IDS.tolist()
    assert exported["t2d"].nonzero().squeeze(1).tolist() == TINY_KEPT_IDS.tolist()


def test_captured_layers_are_written_as_outputs(tmp_path: Path, tiny_target: ResolvedTarget) -> None:
    config = json.loads((export(tmp_path, tiny_target) / "config.json").read_text())
    ids = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    assert ids == [1, 3, 4]
    # The server adds 1 and captures these INPUTS, its own default [2, n // 2, n - 3] for the 8 layers.
    assert [i + 1 for i in ids] == [2, 4, 5]


def test_limits_and_rope_are_the_targets(tmp_path: Path, tiny_target: ResolvedTarget) -> None:
    config = json.loads((export(tmp_path, tiny_target) / "config.json").read_text())
    assert config["max_position_embeddings"] == 512
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["rope_scaling"] is None
    assert config["norm_before_residual"] is False


@pytest.mark.parametrize("fc_norm", [False, True])
@pytest.mark.parametrize("norm_output", [False, True])
def test_flags_of_eagle_3_1_say_what_was_trained(
    tmp_path: Path, tiny_target: ResolvedTarget, fc_norm: bool, norm_output: bool
) -> None:
    out = export(tmp_path, tiny_target, fc_norm=fc_norm, norm_output=norm_output)
    config = json.loads((out / "config.json").read_text())
    assert (config["fc_norm"], config["norm_output"]) == (fc_norm, norm_output)
    assert ("fc_norm.0.weight" in load_file(out / "model.safetensors")) is fc_norm


def test_a_tensor_changed_on_its_way_to_disk_is_named(tmp_path: Path, tiny_target: ResolvedTarget) -> None:
    out = export(tmp_path, tiny_target)
    trained = load_file(out / "model.safetensors")
    damaged = {name: tensor.clone() for name, tensor in trained.items()}
    damaged["midlayer.mlp.up_proj.weight"][0, 0] += 1
    save_file(damaged, out / "model.safetensors")
    with pytest.raises(ValueError, match=r"midlayer\.mlp\.up_proj\.weight in .* differs from the trained tensor"):
        reload_error(DraftFiles(read_folder(out).config, trained), read_folder(out), out)


def test_a_flag_that_training_did_not_use_is_seen_in_the_logits(tmp_path: Path, tiny_target: ResolvedTarget) -> None:
    out = export(tmp_path, tiny_target)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"norm_output": True}))
    # The folder alone is plausible; only the comparison with the trained draft shows it.
    check_serving_folder(out, load_target_config(tiny_target))
    with pytest.raises(ValueError, match="its logits differ by"):
        reload_error(DraftFiles(config, load_file(out / "model.safetensors")), read_folder(out), out)


def test_a_diverged_draft_is_not_exported(tmp_path: Path, tiny_target: ResolvedTarget) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_target, Eagle3Config(num_steps=3))
    tensors = load_file(checkpoint / "draft.safetensors")
    tensors["norm.weight"][:2] = torch.nan
    # Finite in float32, infinite in bfloat16.
    tensors["fc.weight"][0, 0] = torch.finfo(torch.float32).max
    save_file(tensors, checkpoint / "draft.safetensors")
    with pytest.raises(ValueError, match=r"fc\.weight has 1 values of 12288 that are not finite"):
        main(ExportSpec(target=tiny_target, checkpoint=checkpoint, num_steps=3), tmp_path)


def test_a_draft_of_another_target_is_not_exported(tmp_path: Path, tiny_target: ResolvedTarget) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_target, Eagle3Config(num_steps=3))
    config = json.loads((checkpoint / "draft_config.json").read_text())
    (checkpoint / "draft_config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    with pytest.raises(ValueError, match="max_position_embeddings is 2048, must be the target's 512"):
        main(ExportSpec(target=tiny_target, checkpoint=checkpoint, num_steps=3), tmp_path)
