"""The folder for vLLM is the draft that SGLang serves, in other words."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge_core.export.run import main, read_folder, reload_error, verifier
from specforge_core.export.speculators import DraftFiles, Verifier, from_speculators
from specforge_core.manifest_sections import Eagle3Config
from specforge_core.stages import ExportSpec, ResolvedTarget
from tests.export.folders import write_checkpoint


def export(tmp_path: Path, target: ResolvedTarget, config: Eagle3Config, **checkpoint: torch.Tensor) -> Path:
    made = write_checkpoint(tmp_path / "checkpoint", target, config, **checkpoint)
    main(ExportSpec(target=target, checkpoint=made, num_steps=config.num_steps), tmp_path / "draft")
    return tmp_path / "draft"


@pytest.mark.parametrize("is_3_1", [False, True])
def test_the_two_folders_hold_one_draft(tmp_path: Path, tiny_target: ResolvedTarget, is_3_1: bool) -> None:
    out = export(tmp_path, tiny_target, Eagle3Config(num_steps=5, fc_norm=is_3_1, norm_output=is_3_1))
    served, spoken = read_folder(out), read_folder(out / "speculators")
    assert spoken.config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert served.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
    assert (spoken.config["fc_norm"], spoken.config["norm_output"]) == (is_3_1, is_3_1)
    assert spoken.config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 5
    assert {name.replace("layers.0.", "midlayer.") for name in spoken.tensors} == served.tensors.keys()
    assert not [name for name in spoken.tensors if "embed" in name]
    back = from_speculators(spoken)
    assert back.config == served.config
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in served.tensors.items())


def test_a_target_of_the_hub_is_named_and_a_folder_on_a_disk_is_not(
    tmp_path: Path, tiny_target: ResolvedTarget
) -> None:
    out = export(tmp_path, tiny_target, Eagle3Config(num_steps=3))
    config = json.loads((out / "speculators/config.json").read_text())
    named = {"name_or_path": None, "architectures": ["LlamaForCausalLM"]}
    assert config["speculators_config"]["verifier"] == named
    # A revision is what a target of the Hub has.
    on_hub = verifier(tiny_target.model_copy(update={"revision": "0" * 40}))
    assert on_hub == Verifier(tiny_target.model, ("LlamaForCausalLM",))


def test_a_draft_of_the_whole_vocabulary_comes_back_with_its_maps(tmp_path: Path, tiny_target: ResolvedTarget) -> None:
    out = export(tmp_path, tiny_target, Eagle3Config(num_steps=3), kept_ids=torch.arange(259))
    assert not {"d2t", "t2d"} & load_file(out / "speculators/model.safetensors").keys()
    back = from_speculators(read_folder(out / "speculators")).tensors
    assert back["d2t"].tolist() == [0] * 259
    assert back["t2d"].tolist() == [True] * 259


def test_a_tensor_changed_on_its_way_is_named(tmp_path: Path, tiny_target: ResolvedTarget) -> None:
    out = export(tmp_path, tiny_target, Eagle3Config(num_steps=3))
    trained = read_folder(out)
    path = out / "speculators/model.safetensors"
    damaged = load_file(path)
    damaged["layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(damaged, path)
    with pytest.raises(ValueError, match=r"midlayer\.mlp\.up_proj\.weight in .*speculators/model\.safetensors differs"):
        reload_error(trained, from_speculators(read_folder(path.parent)), path.parent)


def test_a_flag_that_differs_is_seen_in_the_logits(tmp_path: Path, tiny_target: ResolvedTarget) -> None:
    out = export(tmp_path, tiny_target, Eagle3Config(num_steps=3))
    spoken = read_folder(out / "speculators")
    other = DraftFiles(spoken.config | {"norm_output": True}, spoken.tensors)
    with pytest.raises(ValueError, match="its logits differ by"):
        reload_error(read_folder(out), from_speculators(other), out / "speculators")
