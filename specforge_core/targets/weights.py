"""A target's config and head from its files, where the model itself runs elsewhere. And where a model has its parts.

V target vocabulary, D target width.
"""

import json
import re
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from specforge_core.drafts.base import TargetHead
from specforge_core.stages import ResolvedTarget

WEIGHT_FILE_PATTERN = r"[\w-][\w.-]*\.safetensors"


class TargetFiles:
    """A target of which only what training needs is read: a local folder, or of a Hub repository just those files."""

    def __init__(self, target: ResolvedTarget) -> None:
        self._target = target
        self._origin: dict[str, Any] = {"revision": target.revision or "main"}
        trust = target.trust_remote_code
        whole = AutoConfig.from_pretrained(target.model, trust_remote_code=trust, **self._origin)
        with torch.device("meta"):
            # Names, shapes and ties of all parts, no values.
            self._skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(
                whole, dtype=getattr(torch, target.dtype), trust_remote_code=trust
            )

    @property
    def config(self) -> PretrainedConfig:
        """Of the text model."""
        return self._skeleton.config.get_text_config()

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        num_layers: int = self.config.num_hidden_layers
        return num_layers

    def load_target_head(self) -> TargetHead:
        """The target's embedding, head and final norm, in its dtype, on the CPU; a tied pair stays one tensor.

        Raises: ValueError if the head has a bias, or if a tensor is not in the files.
        """
        embedding, head = self._skeleton.get_input_embeddings(), self._skeleton.get_output_embeddings()
        if not isinstance(head, nn.Linear) or head.bias is not None:
            name = type(self._skeleton).__name__
            raise ValueError(f"{name}: the head must be a linear layer without bias, it is {head}")
        embedding_VD = self._load(embedding.weight)
        lm_head_VD = embedding_VD if head.weight is embedding.weight else self._load(head.weight)
        norm = final_norm(decoder(self._skeleton, self.num_layers))
        if norm is None:
            return TargetHead(embedding_VD, lm_head_VD, None)
        values = {name: self._load(parameter) for name, parameter in norm.named_parameters()}
        norm.to_empty(device="cpu")
        norm.load_state_dict(values)
        return TargetHead(embedding_VD, lm_head_VD, norm_factor(norm, lm_head_VD[:1]))

    def _load(self, parameter: nn.Parameter) -> Tensor:
        """The values of one of the skeleton's parameters, in the target's dtype."""
        name = next(name for name, found in self._skeleton.named_parameters() if found is parameter)
        file_by_tensor = weight_files(self._target)
        stored = stored_name(name, list(file_by_tensor))
        path = cached_file(self._target.model, file_by_tensor[stored], **self._origin)
        with safe_open(path, framework="pt") as file:
            values: Tensor = file.get_tensor(stored)
        if values.shape != parameter.shape:
            raise ValueError(f"{stored} in {path} is {tuple(values.shape)}, the model has {tuple(parameter.shape)}")
        return values.to(parameter.dtype)


def weight_files(target: ResolvedTarget) -> dict[str, str]:
    """File by tensor name, as the target stores its weights.

    Raises: OSError if there are no safetensors, ValueError for an index that names other files than the target's.
    """
    origin: dict[str, Any] = {"revision": target.revision or "main"}
    index = cached_file(target.model, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **origin)
    if index is None:
        try:
            path = cached_file(target.model, SAFE_WEIGHTS_NAME, **origin)
        except OSError as error:
            raise OSError(
                f"{error} Weights are read from safetensors alone, because a pickle runs code when it is read: of a "
                "target that has only .bin files make a copy with `save_pretrained`, and name that"
            ) from error
        with safe_open(path, framework="pt") as file:
            return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
    with open(index, encoding="utf-8") as file:
        file_by_tensor: dict[str, str] = json.load(file)["weight_map"]
    for name in set(file_by_tensor.values()):
        if not re.fullmatch(WEIGHT_FILE_PATTERN, name):
            raise ValueError(f"{index} names {name!r}, which is no safetensors file beside it: do not use this target")
    return file_by_tensor


def stored_name(name: str, stored: list[str]) -> str:
    """The stored tensor for a parameter; a checkpoint may have other words in front of the last ones.

    Raises: ValueError if none fits, or several do equally well.
    """
    words = name.split(".")

    def fit(candidate: str) -> tuple[int, int]:
        """Words that agree, from the end; words in common."""
        others = candidate.split(".")
        pairs = zip(reversed(words), reversed(others), strict=False)
        num_agreeing = next(
            (i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(words), len(others))
        )
        return num_agreeing, len(set(words) & set(others))

    best = max(map(fit, stored), default=(0, 0))
    fitting = [candidate for candidate in stored if fit(candidate) == best]
    # The name of a parameter ("weight") alone says nothing.
    if best[0] < 2 or len(fitting) > 1:
        raise ValueError(f"no stored tensor is clearly {name}: candidates {fitting[:4]} of {len(stored)}")
    return fitting[0]


def decoder(model: PreTrainedModel, num_layers: int) -> nn.Module:
    """The model without its head: token ids in, the last hidden state after the final norm out.

    Raises: ValueError if no list of modules has the right length.
    """
    searched: nn.Module = model.get_decoder()
    lists = {name: module for name, module in searched.named_modules() if isinstance(module, nn.ModuleList)}
    for name, layers in lists.items():
        if len(layers) == num_layers:
            # Not `searched` itself: for some architectures that still has the head.
            return searched.get_submodule(name.rpartition(".")[0])
    found = {name: len(layers) for name, layers in lists.items()}
    raise ValueError(
        f"{type(model).__name__}: no list of {num_layers} decoder layers in its get_decoder(), a "
        f"{type(searched).__name__} with module lists {found}; it needs a case of its own in targets/weights.py"
    )


def final_norm(decoder: nn.Module) -> nn.Module | None:
    """The norm after the last layer, or None if the decoder has none of its own."""
    norms = [module for module in decoder.children() if "norm" in type(module).__name__.lower()]
    # A norm of the embeddings, where there is one, is registered before the final one.
    return norms[-1] if norms else None


def norm_factor(norm: nn.Module, like_1D: Tensor) -> Tensor | None:
    """[D], the factor that a norm applies, measured: some models store it minus 1. None if it is no RMSNorm.

    Args: like_1D: of the width, dtype and device that the norm works on.
    """
    generator = torch.Generator().manual_seed(0)
    sample_D = (torch.randn(like_1D.shape[-1], generator=generator) * 2**7).to(like_1D)
    with torch.no_grad():
        # Epsilon vanishes beside the square of a power of two this large, and the norm of a constant row is exact.
        weight_D = norm(torch.full_like(sample_D, 2.0**7))
        expected_D = sample_D.float() * sample_D.float().square().mean().rsqrt() * weight_D.float()
        rtol = 4 * torch.finfo(like_1D.dtype).eps
        is_rms_norm = torch.allclose(norm(sample_D).float(), expected_D, rtol=rtol, atol=1e-4)
    return weight_D.cpu() if is_rms_norm else None
