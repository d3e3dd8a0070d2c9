"""Checkpoints to go on from: safetensors and JSON, whole or absent, the last two kept.

step-00000100/draft.safetensors      the draft under its serving names
step-00000100/optimizer.safetensors  "<optimizer>.<parameter>.<name>", numbered in the order of the optimizers
step-00000100/state.json             `TrainingState`
"""

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from specforge_core.artifacts import PARTIAL_SUFFIX
from specforge_core.drafts.base import DraftModel
from specforge_core.facts import Record

logger = logging.getLogger(__name__)

NUM_KEPT = 2
DRAFT_NAME = "draft.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
STATE_NAME = "state.json"


class TrainingState(Record):
    """Where a training stands. Nothing in it is random: the order of documents follows from seed and epoch."""

    key: str
    """Of the stage spec that is trained; a checkpoint of another one is not gone on from."""
    step: int
    """Optimizer steps done."""
    tokens_seen: int
    """Packed tokens, over all processes."""


def save_checkpoint(directory: Path, draft: DraftModel, optimizers: Sequence[Optimizer], state: TrainingState) -> Path:
    """The new checkpoint's folder, once it is safe on disk; older ones but the last go."""
    path = directory / f"step-{state.step:08d}"
    partial = directory / f".{path.name}{PARTIAL_SUFFIX}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(draft.serving_state_dict(), partial / DRAFT_NAME)
    save_file(_optimizer_tensors(optimizers), partial / OPTIMIZER_NAME)
    (partial / STATE_NAME).write_text(state.model_dump_json() + "\n", encoding="utf-8")
    for file_path in partial.iterdir():
        with file_path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    for old in checkpoints(directory)[:-NUM_KEPT]:
        shutil.rmtree(old)
    return path


def checkpoints(directory: Path) -> list[Path]:
    """Whole checkpoints, the oldest first."""
    return sorted(directory.glob("step-*"))


def load_checkpoint(path: Path, draft: DraftModel, optimizers: Sequence[Optimizer], *, key: str) -> TrainingState:
    """Where the checkpoint stands; draft and optimizers are set to what they were then.

    Raises: ValueError if it is of another stage spec.
    """
    state = TrainingState.model_validate_json((path / STATE_NAME).read_text(encoding="utf-8"))
    if state.key != key:
        raise ValueError(
            f"{path} was trained by another spec (key {state.key}, not {key}); "
            f"name another --out or delete {path.parent}"
        )
    draft.load_state_dict(load_file(path / DRAFT_NAME))
    tensors = load_file(path / OPTIMIZER_NAME)
    for number, optimizer in enumerate(optimizers):
        saved: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            optimizer_number, parameter, field = name.split(".", 2)
            if int(optimizer_number) == number:
                saved.setdefault(int(parameter), {})[field] = tensor
        # Hyperparameters follow from the spec, so only the tensors were saved.
        optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
    logger.info("going on from %s", path)
    return state


def _optimizer_tensors(optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    return {
        f"{number}.{parameter}.{field}": tensor.cpu()
        for number, optimizer in enumerate(optimizers)
        for parameter, fields in optimizer.state_dict()["state"].items()
        for field, tensor in fields.items()
    }
