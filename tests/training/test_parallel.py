"""However a step is spread over processes, losses, gradients and stepped weights are those of one process."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from specforge_core.manifest_sections import ParallelConfig, TrainingConfig
from specforge_core.training.optim import build_optimizers
from specforge_core.training.parallel import check_splits
from specforge_core.training.sharding import Sharding
from specforge_core.training.step import train_step
from specforge_core.training.workers import Workers
from tests.processes import on_processes
from tests.training.parallel_cases import (
    MAX_GRAD_NORM,
    Case,
    batches_of_the_cases,
    draft_of_the_cases,
    step_in_bfloat16,
    step_in_float64,
    trained,
    trained_on,
)


@functools.cache
def alone(optimizer: Literal["adamw", "muon"]) -> dict[str, Any]:
    return trained(Case(optimizer=optimizer), 0)


def assert_same(num_processes: int, cases: Sequence[Case], directory: Path) -> None:
    """All that float64 leaves open is the order of sums, but for Muon: it orthogonalises in bfloat16."""
    for rank, by_case in enumerate(trained_on(num_processes, cases, directory)):
        for case, found in zip(cases, by_case, strict=True):
            expected = alone(case.optimizer)
            assert found.keys() == expected.keys()
            tolerance = 1e-12 if case.optimizer == "adamw" else 1e-2
            for name, value in found.items():
                scale = expected[name].abs().max().item()
                error = (value - expected[name]).abs().max().item()
                assert error <= tolerance * scale, f"{case}, rank {rank}: {name} is off by {error} at {scale}"


def test_two_processes_step_like_one_in_any_mesh(tmp_path: Path):
    assert_same(2, [Case(dp=2), Case(cp=2), Case(tp=2), Case(dp=2, optimizer="muon")], tmp_path)


@pytest.mark.slow
def test_four_processes_step_like_one_in_any_mesh(tmp_path: Path):
    pairs = [Case(dp=2, cp=2), Case(dp=2, tp=2), Case(cp=2, tp=2)]
    assert_same(4, [*pairs, Case(dp=4), Case(cp=4), Case(cp=4, optimizer="muon")], tmp_path)


@pytest.mark.slow
def test_three_processes_step_like_one_although_no_rows_divide(tmp_path: Path):
    assert_same(3, [Case(dp=3), Case(cp=3)], tmp_path)


@functools.cache
def errors_alone() -> dict[str, float]:
    return errors(step_in_bfloat16(Case(), 0))


def errors(found: dict[str, Tensor]) -> dict[str, float]:
    """By name, the norm of what is off from float64, relative to the norm of that."""
    expected = step_in_float64()
    return {name: ((value - expected[name]).norm() / expected[name].norm()).item() for name, value in found.items()}


def assert_within_the_error_budget(case: Case, directory: Path) -> None:
    num_gpus = case.dp * case.cp * case.tp
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs")
    for found in on_processes(num_gpus, functools.partial(step_in_bfloat16, case), directory, backend="nccl"):
        for name, error in errors(found).items():
            assert error <= 2 * errors_alone()[name] + 1e-4, f"{name}: {error}, alone {errors_alone()[name]}"


@pytest.mark.gpu
@pytest.mark.parametrize("case", [Case(dp=2), Case(cp=2), Case(tp=2)], ids=str)
def test_two_gpus_are_as_exact_as_one(case: Case, tmp_path: Path):
    assert_within_the_error_budget(case, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [Case(dp=2, cp=2), Case(dp=2, tp=2), Case(cp=2, tp=2)], ids=str)
def test_four_gpus_are_as_exact_as_one(case: Case, tmp_path: Path):
    assert_within_the_error_budget(case, tmp_path)


def test_the_cases_clip_and_are_uneven():
    norms = [alone("adamw")[f"step {step} grad_norm"].item() for step in range(3)]
    assert min(norms) > MAX_GRAD_NORM
    # Of the one document of the last step: its answer's tokens, less the one that no other follows.
    assert alone("adamw")["step 2 num_tokens"].item() == 24


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


def test_processes_that_fill_no_replica_are_refused():
    with pytest.raises(ValueError, match=r"cp=2 x tp=2 does not divide 6 processes; change it or resources\.num_gpus"):
        Workers(0, 6, torch.device("cpu")).arranged(ParallelConfig(cp=2, tp=2))


def test_the_ranks_of_a_replica_stand_next_to_each_other():
    workers = [Workers(rank, 8, torch.device("cpu")).arranged(ParallelConfig(cp=2, tp=2)) for rank in range(8)]
    assert [one.replica for one in workers] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [one.num_replicas for one in workers] == [2] * 8
    assert [one.leads_replica for one in workers] == [True, False, False, False] * 2


def test_a_layer_that_does_not_split_is_refused():
    # The draft of the cases has two KV heads and a feed-forward of 12; Muon wants whole matrices.
    draft = draft_of_the_cases()
    with pytest.raises(ValueError, match=r"2 KV heads cannot be split over training\.parallel\.tp=3; lower it"):
        check_splits(draft, TrainingConfig(), 3)
    with pytest.raises(ValueError, match=r"optimizer=muon .* training\.parallel\.tp=2 splits"):
        check_splits(draft, TrainingConfig(optimizer="muon"), 2)
