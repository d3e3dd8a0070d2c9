"""The package that defines the format loads what we write, and computes the logits of the draft that was trained.

`make test-slow` installs it apart (constraints/speculators.txt), because it asks for older packages than ours.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from specforge_core.draft_limits import NUM_AUX_LAYERS
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.export.run import draft_logits, main, read_folder
from specforge_core.manifest_sections import Eagle3Config
from specforge_core.stages import ExportSpec, ResolvedTarget
from tests.export.folders import TINY_KEPT_IDS, write_checkpoint

speculators = pytest.importorskip("speculators", reason="`make test-slow` installs speculators, and runs this with it")

pytestmark = pytest.mark.slow

NUM_TOKENS = 24
NUM_STEPS = 4
VOCABULARIES = {"part": TINY_KEPT_IDS, "whole": torch.arange(259)}
# What the package takes from the target, and what it trains with alone.
OF_THE_TARGET = {"embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight"}


@pytest.fixture(params=[(flags, vocabulary) for flags in range(4) for vocabulary in VOCABULARIES], ids=str)
def exported(request: pytest.FixtureRequest, tmp_path: Path, tiny_target: ResolvedTarget) -> Path:
    """A draft with random weights, with neither, either or both flags of EAGLE-3.1."""
    flags, vocabulary = request.param
    config = Eagle3Config(num_steps=NUM_STEPS, fc_norm=bool(flags & 1), norm_output=bool(flags & 2))
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_target, config, VOCABULARIES[vocabulary])
    main(ExportSpec(target=tiny_target, checkpoint=checkpoint, num_steps=NUM_STEPS), tmp_path / "draft")
    return tmp_path / "draft"


def with_its_target(folder: Path, target: ResolvedTarget) -> Path:
    """A copy that names the target, as that of a target on the Hub does; the package's `from_pretrained` insists."""
    named = folder.with_name("named")
    shutil.copytree(folder, named)
    config = json.loads((named / "config.json").read_text())
    config["speculators_config"]["verifier"]["name_or_path"] = target.model
    (named / "config.json").write_text(json.dumps(config))
    return named


def packages_model(folder: Path) -> nn.Module:
    """The package's model of a folder, in float32 and with all tensors of the folder, but for those of the target."""
    config = speculators.SpeculatorModelConfig.from_pretrained(folder)
    assert type(config).__name__ == "Eagle3SpeculatorConfig"
    # The way of its attention that runs on a CPU.
    config.transformer_layer_config._attn_implementation = "eager"
    model = speculators.SpeculatorModel.registered_model_class_from_config(config)(config)
    loaded = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert loaded.unexpected_keys == []
    assert set(loaded.missing_keys) == OF_THE_TARGET
    return model


def packages_logits(model: nn.Module, input_ids_T: Tensor, aux_hidden_TLD: Tensor) -> Tensor:
    """Logits [S, T, W] of the package's own loop over draft steps, which gets the tokens one further on."""
    logits: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    num_tokens = len(aux_hidden_TLD)
    with torch.inference_mode():
        model(
            hidden_states=aux_hidden_TLD.flatten(1)[None],
            input_ids=input_ids_T[None, 1:],
            document_ids=torch.zeros(1, num_tokens, dtype=torch.int64),
            position_ids=torch.arange(num_tokens)[None],
            ttt_steps=NUM_STEPS,
        )
    return torch.stack(logits)


def test_the_package_reads_every_tensor(exported: Path, tiny_target: ResolvedTarget) -> None:
    model = speculators.SpeculatorModel.from_pretrained(with_its_target(exported / "speculators", tiny_target))
    assert type(model).__name__ == model.config.architectures[0] == "Eagle3DraftModel"
    read = model.state_dict()
    for name, tensor in load_file(exported / "speculators/model.safetensors").items():
        assert torch.equal(read[name], tensor), name


def test_the_package_computes_the_logits_that_were_trained(exported: Path, tiny_target: ResolvedTarget) -> None:
    model = packages_model(with_its_target(exported / "speculators", tiny_target))
    model.load_verifier_weights()
    served = read_folder(exported)
    embedding_VD = load_file(Path(tiny_target.model) / "model.safetensors")["model.embed_tokens.weight"]
    draft = Eagle3Draft.from_serving(served.config, served.tensors, embedding_VD)
    generator = torch.Generator().manual_seed(2)
    # The package pads the tokens with zeros where a step would read beyond their end.
    input_ids_T = torch.randint(259, (NUM_TOKENS + 1,), generator=generator)
    padded_ids_T = torch.cat((input_ids_T, torch.zeros(NUM_STEPS - 1, dtype=torch.int64)))
    aux_hidden_TLD = torch.randn(NUM_TOKENS, NUM_AUX_LAYERS, 64, generator=generator)
    with torch.inference_mode():
        expected_STW = draft_logits(draft, padded_ids_T, aux_hidden_TLD)
        exact_STW = draft_logits(draft.double(), padded_ids_T, aux_hidden_TLD.double())
    found_STW = packages_logits(model, input_ids_T, aux_hidden_TLD)
    assert found_STW.shape == expected_STW.shape == (NUM_STEPS, NUM_TOKENS, len(draft.d2t))
    # Rounding in another order, and no more: a wrong flag, layer or position is off by more than 1.
    budget = 4 * float((expected_STW - exact_STW).abs().max())
    assert budget < 1e-3
    assert float((found_STW - exact_STW).abs().max()) <= budget
