"""A training is the same on any number of processes, and goes on from a checkpoint of any other number."""

import functools
import shutil
from pathlib import Path

import pytest

from specforge_core.data.loader import FeatureSet
from specforge_core.manifest_sections import ParallelConfig
from specforge_core.stages import TrainSpec
from specforge_core.training.train import plan_training
from tests.processes import on_processes
from tests.training.factory import make_spec
from tests.training.float64_training import Training, curve, train_all

STOP_AT = 3


@pytest.fixture(scope="module")
def spec(inputs: Path) -> TrainSpec:
    # Five micro-batches a step, which neither two nor four processes share evenly.
    return make_spec(inputs, tokens_per_batch=240, num_epochs=1, evals_per_run=2, checkpoints_per_run=7)


@pytest.fixture(scope="module")
def alone(spec: TrainSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`: a training of one process. `stopped`: the same, stopped on its way."""
    directory = tmp_path_factory.mktemp("alone")
    train_all(spec, 1, [Training(directory / "whole"), Training(directory / "stopped", STOP_AT)])
    return directory


def assert_same_curve(out: Path, expected: Path) -> None:
    lines, expected_lines = curve(out), curve(expected)
    assert len(lines) == len(expected_lines)
    for line, expected_line in zip(lines, expected_lines, strict=True):
        # Losses, norms, accuracies and acceptance at every step. float64 leaves nothing open but the order of sums.
        assert line == pytest.approx(expected_line, rel=1e-10, abs=1e-12)


def assert_goes_on_in_both_directions(
    spec: TrainSpec, num_processes: int, parallel: ParallelConfig, alone: Path, directory: Path
) -> None:
    shutil.copytree(alone / "stopped", directory / "begun alone")
    trainings = [
        Training(directory / "whole"),
        Training(directory / "begun alone"),
        Training(directory / "begun on many", STOP_AT),
    ]
    on_many = spec.model_copy(update={"training": spec.training.model_copy(update={"parallel": parallel})})
    on_processes(num_processes, functools.partial(train_all, on_many, num_processes, trainings), directory)
    assert len(curve(directory / "begun on many")) == STOP_AT
    train_all(spec, 1, [Training(directory / "begun on many")])
    for training in trainings:
        assert_same_curve(training.out, alone / "whole")


def test_the_shares_of_these_processes_are_uneven(spec: TrainSpec, alone: Path):
    features = FeatureSet(spec.hidden_states)
    plan = plan_training(features, spec.training, 4)
    shares = [[len(features.share(step, replica, 4)) for replica in range(4)] for step in plan.steps]
    assert [1, 1, 1, 2] in map(sorted, shares)
    assert min(min(share) for share in shares) == 0, "in none of the steps has a process nothing to do"
    assert len(curve(alone / "whole")) == len(plan.steps) > 2 * STOP_AT
    assert len(curve(alone / "stopped")) == STOP_AT


def test_two_processes_train_what_one_trains_and_go_on_from_its_checkpoint_and_it_from_theirs(
    spec: TrainSpec, alone: Path, tmp_path: Path
):
    assert_goes_on_in_both_directions(spec, 2, ParallelConfig(), alone, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "parallel"),
    [
        (4, ParallelConfig()),
        (2, ParallelConfig(cp=2)),
        (2, ParallelConfig(tp=2)),
        (4, ParallelConfig(cp=2)),
        (4, ParallelConfig(tp=2)),
    ],
    ids=["dp 4", "cp 2", "tp 2", "dp 2 cp 2", "dp 2 tp 2"],
)
def test_every_mesh_trains_what_one_process_trains_and_each_goes_on_from_the_other(
    num_processes: int, parallel: ParallelConfig, spec: TrainSpec, alone: Path, tmp_path: Path
):
    assert_goes_on_in_both_directions(spec, num_processes, parallel, alone, tmp_path)
