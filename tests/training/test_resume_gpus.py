"""A training goes on from its checkpoint on fewer processes, with the same losses; on GPUs as on CPUs.

On two GPUs or four: `pytest -m gpu tests/training/test_resume_gpus.py`.
"""

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from specforge_core.data.loader import FeatureSet
from specforge_core.stages import TrainSpec
from specforge_core.training.train import Run, create_draft, plan_training, train
from specforge_core.training.workers import BACKENDS, Workers
from tests.processes import on_processes
from tests.training.factory import make_gpu_spec
from tests.training.float64_training import Training, curve, stopped_at

STOP_AT = 3
TOLERANCES = {torch.float64: 1e-10, torch.bfloat16: 1e-4}
"""Relative, of every loss. float64 leaves nothing open but the order of sums. With bfloat16 they turn the last bit of a
few weights: on a CPU losses are off by 5e-6 at most, and by 2e-4 to 2e-3 if the moments of AdamW are lost."""


def train_all(
    spec: TrainSpec, num_processes: int, device: str, trainings: Sequence[tuple[torch.dtype, Training]], rank: int
) -> None:
    """Train on this one of the processes, on from what is in each folder; float64 by the kernels' references."""
    workers = Workers(rank, num_processes, torch.device(device))
    for dtype, training in trainings:
        training.out.mkdir(exist_ok=True)
        features = FeatureSet(spec.hidden_states)
        plan = plan_training(features, spec.training, num_processes)
        draft = create_draft(spec).to(workers.device, torch.promote_types(dtype, torch.float32))
        draft.compute_dtype = dtype
        with stopped_at(training.stop_at):
            train(Run(spec.training, draft, features, plan, workers), training.out, spec.key())


def losses(out: Path) -> list[float]:
    return [line["train/loss"] for line in curve(out)]


def assert_goes_on(device: str, directory: Path, begin_on: int, go_on_on: Sequence[int]) -> None:
    """A training that stops on so many processes, and goes on on fewer, beside one that does not stop."""
    # Five micro-batches a step, which neither four nor two processes share evenly.
    spec = make_gpu_spec(directory, tokens_per_batch=240, evals_per_run=2, checkpoints_per_run=7)
    folders = {dtype: directory / str(dtype) for dtype in TOLERANCES}

    def run(num_processes: int, *trainings: tuple[str, int | None]) -> None:
        place = directory / f"{num_processes} processes"
        place.mkdir()
        here = [
            (dtype, Training(folder / name, stop_at))
            for dtype, folder in folders.items()
            for name, stop_at in trainings
        ]
        work = functools.partial(train_all, spec, num_processes, device, here)
        on_processes(num_processes, work, place, backend=BACKENDS[device])

    for folder in folders.values():
        folder.mkdir()
    run(begin_on, ("whole", None), ("stopped", STOP_AT))
    for num_processes in go_on_on:
        for folder in folders.values():
            shutil.copytree(folder / "stopped", folder / f"on {num_processes}")
        run(num_processes, (f"on {num_processes}", None))
    for dtype, folder in folders.items():
        whole = losses(folder / "whole")
        assert len(losses(folder / "stopped")) == STOP_AT < len(whole) - 2
        for num_processes in go_on_on:
            resumed = losses(folder / f"on {num_processes}")
            assert resumed == pytest.approx(whole, rel=TOLERANCES[dtype]), f"on {num_processes}, {dtype}"


@pytest.mark.slow
def test_a_training_of_four_processes_goes_on_on_two_and_on_one(tmp_path: Path):
    assert_goes_on("cpu", tmp_path, 4, [2, 1])


@pytest.mark.gpu
@pytest.mark.parametrize(("begin_on", "go_on_on"), [(4, [2, 1]), (2, [1])])
def test_a_training_goes_on_on_fewer_gpus(tmp_path: Path, begin_on: int, go_on_on: list[int]):
    if torch.cuda.device_count() < begin_on:
        pytest.skip(f"needs {begin_on} GPUs")
    assert_goes_on("cuda", tmp_path, begin_on, go_on_on)
