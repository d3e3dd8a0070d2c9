"""Stage `export`: the folders that servers load, from a training checkpoint, each shown to compute the same logits.

SGLang's lies at the root, because the draft's own config and tensors are in its words; vLLM's beside it in
`speculators/` (`speculators.py` says what differs). No folder holds the embedding: a server takes the target's.

T tokens of the fixture, L captured layers, D draft width, V target vocabulary, W draft vocabulary, S draft steps.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from specforge_core.artifacts import write_atomically
from specforge_core.draft_limits import NUM_AUX_LAYERS
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.drafts.eagle3_reference import attend
from specforge_core.export.speculators import DraftFiles, Verifier, from_speculators, to_speculators
from specforge_core.export.verify import CONFIG_NAME, WEIGHTS_NAME, check_serving_folder
from specforge_core.export.verify_speculators import SPECULATORS_FOLDER, check_speculators_folder
from specforge_core.facts import ServingDraft
from specforge_core.stages import ExportSpec, ResolvedTarget
from specforge_core.training.train import DRAFT_CONFIG_NAME, DRAFT_NAME

logger = logging.getLogger(__name__)

SERVING_DTYPE = torch.bfloat16
FIXTURE_TOKENS = 16
# More than one, so that the recurrence between draft steps (`norm_output`) takes part.
FIXTURE_STEPS = 3
FIXTURE_SEED = 0


def main(spec: ExportSpec, out: Path) -> ServingDraft:
    """Facts about the folders written: `model.safetensors` and `config.json`, for SGLang and under `speculators/`.

    Raises: ValueError if the trained draft is not one that a server would serve as trained.
    """
    config = json.loads((spec.checkpoint / DRAFT_CONFIG_NAME).read_text(encoding="utf-8"))
    trained = DraftFiles(config, serving_tensors(load_file(spec.checkpoint / DRAFT_NAME)))
    target_config = load_target_config(spec.target)
    write_folder(out, trained)
    check_serving_folder(out, target_config)
    folder = out / SPECULATORS_FOLDER
    write_folder(folder, to_speculators(trained, verifier(spec.target), num_speculative_tokens=spec.num_steps))
    check_speculators_folder(folder, target_config)
    error = max(
        reload_error(trained, read_folder(out), out),
        reload_error(trained, from_speculators(read_folder(folder)), folder),
    )
    num_parameters = sum(tensor.numel() for tensor in trained.tensors.values() if tensor.dtype == SERVING_DTYPE)
    logger.info("exported %d parameters to %s, reload error %g", num_parameters, out, error)
    return ServingDraft(architecture=config["architectures"][0], num_parameters=num_parameters, max_reload_error=error)


def write_folder(folder: Path, draft: DraftFiles) -> None:
    """Write a draft as a server loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG_NAME, json.dumps(draft.config, indent=2, sort_keys=True) + "\n")
    save_file(draft.tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def read_folder(folder: Path) -> DraftFiles:
    """The draft in a folder, in the words that it is written in."""
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    return DraftFiles(config, load_file(folder / WEIGHTS_NAME))


def serving_tensors(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are served: weights in bfloat16, vocabulary maps unchanged.

    Raises: ValueError that names a tensor with a value that is not finite.
    """
    served = {
        name: tensor.to(SERVING_DTYPE) if tensor.is_floating_point() else tensor for name, tensor in state_dict.items()
    }
    for name, tensor in served.items():
        if tensor.is_floating_point() and not (is_finite := tensor.isfinite()).all():
            raise ValueError(
                f"{name} has {int((~is_finite).sum())} values of {tensor.numel()} that are not finite in "
                f"{SERVING_DTYPE}: training diverged; lower training.learning_rate or training.max_grad_norm"
            )
    return served


def load_target_config(target: ResolvedTarget) -> dict[str, Any]:
    """The text part of the target's `config.json`."""
    text_config: dict[str, Any] = _auto_config(target).get_text_config().to_dict()
    return text_config


def verifier(target: ResolvedTarget) -> Verifier:
    """The target as a draft's folder names it. A folder on someone's disk has no name that others could load."""
    name = target.model if target.revision is not None else None
    return Verifier(name, tuple(_auto_config(target).architectures or ()))


def _auto_config(target: ResolvedTarget) -> PretrainedConfig:
    return AutoConfig.from_pretrained(
        target.model, revision=target.revision or "main", trust_remote_code=target.trust_remote_code
    )


def reload_error(trained: DraftFiles, reloaded: DraftFiles, folder: Path) -> float:
    """The largest difference of logits between the trained draft and the one read back from `folder`, which is 0.

    Raises: ValueError that names the tensor, or says by how much the logits differ.
    """
    for name, tensor in trained.tensors.items():
        if not torch.equal(tensor, reloaded.tensors[name]):
            raise ValueError(f"{name} in {folder / WEIGHTS_NAME} differs from the trained tensor; export it again")
    generator = torch.Generator().manual_seed(FIXTURE_SEED)
    # Any embedding serves: both drafts get the same one.
    shape = (trained.config["vocab_size"], trained.config["hidden_size"])
    embedding_VD = torch.randn(shape, generator=generator, dtype=SERVING_DTYPE)
    logits_STW = fixture_logits(Eagle3Draft.from_serving(trained.config, trained.tensors, embedding_VD))
    reloaded_logits_STW = fixture_logits(Eagle3Draft.from_serving(reloaded.config, reloaded.tensors, embedding_VD))
    error = float((logits_STW - reloaded_logits_STW).abs().max())
    # Not "error > 0": a NaN must fail too.
    if not error == 0.0:
        raise ValueError(
            f"the draft in {folder} has the trained tensors, but its logits differ by {error}: "
            f"its {CONFIG_NAME} describes another model than {DRAFT_CONFIG_NAME} of the checkpoint"
        )
    return error


@torch.inference_mode()
def fixture_logits(draft: Eagle3Draft) -> Tensor:
    """Logits [S, T, W] of some draft steps from every slot of one random document, the same for the same shapes."""
    vocab_size, width = draft.embed_tokens.shape
    generator = torch.Generator().manual_seed(FIXTURE_SEED)
    input_ids_T = torch.randint(vocab_size, (FIXTURE_TOKENS + FIXTURE_STEPS,), generator=generator)
    aux_hidden_TLD = torch.randn(FIXTURE_TOKENS, NUM_AUX_LAYERS, width, generator=generator)
    return draft_logits(draft, input_ids_T, aux_hidden_TLD)


def draft_logits(draft: Eagle3Draft, input_ids_T: Tensor, aux_hidden_TLD: Tensor) -> Tensor:
    """Logits [S, T, W] from every slot of one document of T hidden states and T + S tokens."""
    num_tokens = len(aux_hidden_TLD)
    hidden_TD = draft.fuse(aux_hidden_TLD)
    position_ids_T = torch.arange(num_tokens)
    keys, values, logits = [], [], []
    for step in range(len(input_ids_T) - num_tokens):
        embedding_TD = draft.embed(input_ids_T[step + 1 : step + 1 + num_tokens])
        qkv = draft.midlayer.project_qkv(embedding_TD, hidden_TD, position_ids_T + step)
        keys.append(qkv.key_TMC)
        values.append(qkv.value_TMC)
        hidden_TD = draft.midlayer.finish(hidden_TD, attend(qkv.query_TNC, keys, values, [num_tokens]))
        logits.append(draft.logits(hidden_TD))
        hidden_TD = draft.recurrent(hidden_TD)
    return torch.stack(logits)
