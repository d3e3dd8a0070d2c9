"""Drafts as folders, written by hand and by training's own words, for the tests of both formats."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from specforge_core.drafts.base import TargetHead
from specforge_core.drafts.eagle3 import Eagle3Draft
from specforge_core.export.run import load_target_config
from specforge_core.manifest_sections import Eagle3Config
from specforge_core.stages import ResolvedTarget

# Of the tiny target's 259 tokens.
TINY_KEPT_IDS = torch.arange(3, 243, 5)
# Of the 20 of the folders that are written by hand.
KEPT_IDS = [0, 3, 4, 9, 15, 19]


def write_checkpoint(
    directory: Path, target: ResolvedTarget, config: Eagle3Config, kept_ids: Tensor = TINY_KEPT_IDS
) -> Path:
    """A checkpoint as training leaves it, of a draft with random weights."""
    target_config = load_target_config(target)
    torch.manual_seed(1)
    width, vocab_size = target_config["hidden_size"], target_config["vocab_size"]
    head = TargetHead(torch.randn(vocab_size, width), torch.randn(vocab_size, width), torch.rand(width))
    layers = Eagle3Draft.capture_layers(None, target_config["num_hidden_layers"])
    draft = Eagle3Draft.create(config, target_config, head, kept_ids, layers)
    directory.mkdir()
    save_file(draft.serving_state_dict(), directory / "draft.safetensors")
    (directory / "draft_config.json").write_text(json.dumps(draft.serving_config()), encoding="utf-8")
    return directory


def good_tensors(layer: str) -> dict[str, Tensor]:
    """H = 8, I = 12, 4 query heads and 2 KV heads of 4, V = 20, Vd = 6."""
    shapes = {
        "fc.weight": (8, 24),
        f"{layer}.input_layernorm.weight": (8,),
        f"{layer}.hidden_norm.weight": (8,),
        f"{layer}.self_attn.q_proj.weight": (16, 16),
        f"{layer}.self_attn.k_proj.weight": (8, 16),
        f"{layer}.self_attn.v_proj.weight": (8, 16),
        f"{layer}.self_attn.o_proj.weight": (8, 16),
        f"{layer}.post_attention_layernorm.weight": (8,),
        f"{layer}.mlp.gate_proj.weight": (12, 8),
        f"{layer}.mlp.up_proj.weight": (12, 8),
        f"{layer}.mlp.down_proj.weight": (8, 12),
        "norm.weight": (8,),
        "lm_head.weight": (6, 8),
    }
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    # Worked by hand: offsets of 0, 3, 4, 9, 15, 19 from 0, 1, 2, 3, 4, 5.
    tensors["d2t"] = torch.tensor([0, 2, 2, 6, 11, 14])
    tensors["t2d"] = torch.zeros(20, dtype=torch.bool)
    tensors["t2d"][KEPT_IDS] = True
    return tensors


def write_folder(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, directory / "model.safetensors")
    return directory
