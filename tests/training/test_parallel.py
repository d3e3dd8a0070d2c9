"""However a step is spread over processes, losses, gradients and stepped weights are those of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_core.manifest_sections import TrainingConfig
from specforge_core.training.optim import build_optimizers
from specforge_core.training.sharding import Sharding
from specforge_core.training.step import train_step
from specforge_core.training.workers import Workers
from tests.training.parallel_cases import (
    MAX_GRAD_NORM,
    Mesh,
    batches_of_the_cases,
    draft_of_the_cases,
    trained,
    trained_on,
)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {optimizer: trained(Mesh(), 0, optimizer) for optimizer in ("adamw", "muon")}


def assert_same(mesh: Mesh, optimizer: str, expected: dict[str, Any], directory: Path) -> None:
    """All that float64 leaves open is the order of sums, but for Muon: it orthogonalises in bfloat16."""
    for rank, found in enumerate(trained_on(mesh, optimizer, directory)):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            scale = expected[name].abs().max().item()
            # A fused AdamW divides gradients by a float32 scalar, whose last bit may turn with the order of a sum.
            tolerance = 1e-11 if optimizer == "adamw" else 1e-2
            error = (value - expected[name]).abs().max().item()
            assert error <= tolerance * scale, f"rank {rank}: {name} is off by {error} at {scale}"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_data_parallel_steps_are_those_of_one_process(optimizer: str, alone, tmp_path: Path):
    assert_same(Mesh(dp=2), optimizer, alone[optimizer], tmp_path)


@pytest.mark.parametrize("mesh", [Mesh(cp=2), Mesh(tp=2)], ids=str)
def test_processes_that_share_a_batch_step_like_one(mesh: Mesh, alone, tmp_path: Path):
    assert_same(mesh, "adamw", alone["adamw"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [Mesh(dp=2, cp=2), Mesh(dp=2, tp=2), Mesh(cp=2, tp=2), Mesh(dp=4), Mesh(dp=3), Mesh(cp=4)], ids=str
)
def test_any_mesh_steps_like_one_process(mesh: Mesh, alone, tmp_path: Path):
    assert_same(mesh, "adamw", alone["adamw"], tmp_path)


def test_the_cases_clip_and_are_uneven(alone):
    norms = [alone["adamw"][f"step {step} grad_norm"].item() for step in range(3)]
    assert min(norms) > 0.05
    assert torch.equal(alone["adamw"]["step 2 num_tokens"], torch.tensor(24.0).double())


def test_state_is_there_before_the_first_step_and_changes_nothing():
    config = TrainingConfig(optimizer="muon", learning_rate=1e-2)
    draft, other = draft_of_the_cases(), draft_of_the_cases()
    sharding, begun = Sharding(draft), Sharding(other)
    optimizers, begun_optimizers = build_optimizers(sharding, config), build_optimizers(begun, config)
    state = begun.state(begun_optimizers)
    assert state["draft"].keys() == state["state"].keys() == dict(draft.named_parameters()).keys()
    assert all(not value.any() for fields in state["state"].values() for value in fields.values())
    workers = Workers(0, 1, torch.device("cpu"))
    for step in range(2):
        batches = [draft.prepare(batch) for batch in batches_of_the_cases(step)]
        train_step(draft, optimizers, batches, MAX_GRAD_NORM, workers, sharding)
        train_step(other, begun_optimizers, batches, MAX_GRAD_NORM, workers, begun)
    for (name, parameter), same in zip(draft.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, same), name
