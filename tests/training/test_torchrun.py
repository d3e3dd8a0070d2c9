"""Training under torchrun, on one node and on two: what fails is named, nobody stays behind, and the rest is resumed.

The nodes are two launchers on this machine, which meet as those of two machines do.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from safetensors.torch import load_file

from specforge_core.artifacts import PROGRESS_DIRECTORY, load_artifact
from specforge_core.benchmark.server import free_port
from specforge_core.data.loader import FeatureSet
from specforge_core.facts import DraftCheckpoint
from specforge_core.launch import LOOPBACK as LOOPBACK_ONLY
from specforge_core.launch import stage_command
from specforge_core.manifest_sections import ParallelConfig
from specforge_core.process import ProcessError, SupervisedProcess
from specforge_core.stages import TrainSpec
from specforge_core.training.checkpoint import checkpoints
from specforge_core.training.metrics import milestones
from specforge_core.training.train import DRAFT_NAME, main, plan_training
from tasks.stage import StageError
from tests.test_security import LOOPBACK, listening
from tests.training.factory import make_gpu_spec, make_spec
from tests.training.float64_training import curve

END_TIMEOUT_S = 90.0
"""torchrun gives processes 30 s to end before it kills them."""


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_NNODES", "2")
    monkeypatch.setenv("PET_RDZV_ENDPOINT", f"127.0.0.1:{free_port()}")


def command(spec: TrainSpec, out: Path) -> list[str]:
    out.mkdir(exist_ok=True)
    spec_path = out.with_suffix(".spec.json")
    spec_path.write_text(spec.model_dump_json())
    return stage_command(spec, spec_path, out)


def first_checkpoints(spec: TrainSpec) -> list[int]:
    """The steps of the first two."""
    num_steps = len(plan_training(FeatureSet(spec.hidden_states), spec.training, 2).steps)
    return sorted(milestones(num_steps, spec.training.checkpoints_per_run))[:2]


def hanging_at(step: int, stage: Sequence[str]) -> list[str]:
    """The same command with a second process that never ends its part of a checkpoint."""
    place = stage.index("specforge_core")
    return [*stage[:place], "tests.training.hanging_save", str(step), "1", *stage[place + 1 :]]


def checkpoint_directory(out: Path) -> Path:
    return out / PROGRESS_DIRECTORY / "checkpoints"


def is_half_written(out: Path, step: int) -> bool:
    """Whether both processes have written what the second never gets done."""
    return len(list(checkpoint_directory(out).glob(f".step-{step:08d}*/*.distcp"))) == 2


def processes_of(out: Path) -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["cmdline"]) if str(out) in (process.info["cmdline"] or [])]


def rank_of(process: psutil.Process) -> str | None:
    return process.environ().get("RANK")


def wait_until_gone(out: Path) -> None:
    deadline = time.monotonic() + END_TIMEOUT_S
    while left := processes_of(out):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


def start(commands: Sequence[list[str]]) -> list[subprocess.Popen[str]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return [subprocess.Popen(one, env=environment, stderr=subprocess.PIPE, text=True) for one in commands]


class Alone(NamedTuple):
    """What one process trained."""

    out: Path
    facts: DraftCheckpoint


def train_alone(spec: TrainSpec, out: Path) -> Alone:
    out.mkdir()
    return Alone(out, main(spec, out))


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return train_alone(make_spec(inputs), tmp_path_factory.mktemp("alone") / "one")


def assert_trained_like_one(out: Path, alone: Alone) -> None:
    found = load_artifact(out, DraftCheckpoint).facts
    assert (found.step, found.tokens_seen) == (alone.facts.step, alone.facts.tokens_seen)
    assert len(curve(out)) == len(curve(alone.out))
    drafts = [load_file(directory / DRAFT_NAME) for directory in (out, alone.out)]
    assert {name: x.shape for name, x in drafts[0].items()} == {name: x.shape for name, x in drafts[1].items()}
    for theirs, ours in zip(curve(out), curve(alone.out), strict=True):
        # float32 sums in another order; a wrong divisor or a lost micro-batch is off by tens of percent.
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6)


def with_processes(spec: TrainSpec, num_processes: int) -> TrainSpec:
    return spec.model_copy(update={"num_processes": num_processes})


class Watched(NamedTuple):
    """What two processes trained, and where they listened meanwhile."""

    out: Path
    addresses: set[tuple[str, int]]


@pytest.fixture(scope="module")
def two(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    out, found = tmp_path_factory.mktemp("two") / "two", set[tuple[str, int]]()
    stage = command(with_processes(make_spec(inputs), 2), out)
    process = subprocess.Popen(stage, env=os.environ | LOOPBACK_ONLY | {"OMP_NUM_THREADS": "1"})
    launcher = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= listening(launcher)
        time.sleep(0.05)
    assert process.returncode == 0
    return Watched(out, found)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(two: Watched, alone: Alone):
    assert_trained_like_one(two.out, alone)


@pytest.mark.slow
def test_processes_of_one_host_listen_on_loopback_but_for_the_store_of_torchrun(two: Watched):
    # Both ranks meet over gloo.
    assert len([ip for ip, _ in two.addresses if ip in LOOPBACK]) >= 2
    # It takes no address to listen at, and holds addresses alone: see SECURITY.md.
    assert len([ip for ip, _ in two.addresses if ip not in LOOPBACK]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["cp", "tp"])
def test_two_processes_that_share_a_document_or_a_matrix_train_what_one_trains(
    axis: str, inputs: Path, alone: Alone, tmp_path: Path
):
    spec = make_spec(inputs, parallel=ParallelConfig(**{axis: 2}))
    (launcher,) = start([command(with_processes(spec, 2), tmp_path / "two")])
    _, errors = launcher.communicate(timeout=END_TIMEOUT_S)
    assert launcher.returncode == 0, errors
    assert_trained_like_one(tmp_path / "two", alone)


@pytest.mark.slow
def test_a_process_killed_in_a_checkpoint_ends_both_nodes_and_another_start_finishes(
    inputs: Path, tmp_path: Path, two_nodes: None
):
    spec = with_processes(make_spec(inputs, num_epochs=2, checkpoints_per_run=8), 1)
    out = tmp_path / "two"
    whole, hanging = first_checkpoints(spec)
    launchers = start([hanging_at(hanging, command(spec, out))] * 2)
    while not is_half_written(out, hanging):
        assert all(launcher.poll() is None for launcher in launchers), [one.communicate()[1] for one in launchers]
        time.sleep(0.05)
    (victim,) = [process for process in processes_of(out) if rank_of(process) == "1"]
    victim.kill()
    reports = [launcher.communicate(timeout=END_TIMEOUT_S)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [1, 1]
    assert any(f"Signal 9 (SIGKILL) received by PID {victim.pid}" in report for report in reports)
    wait_until_gone(out)
    assert [path.name for path in checkpoints(checkpoint_directory(out))] == [f"step-{whole:08d}"]

    launchers = start([command(spec, out)] * 2)
    reports = [launcher.communicate(timeout=END_TIMEOUT_S)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], reports
    assert_trained_like_one(out, train_alone(spec, tmp_path / "one"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("parallel", [{}, {"cp": 2}, {"tp": 2}], ids=["dp", "cp", "tp"])
def test_two_gpus_train_what_one_trains_and_one_goes_on_from_their_checkpoint(parallel: dict[str, int], tmp_path: Path):
    of_one = make_gpu_spec(tmp_path, num_epochs=4, checkpoints_per_run=4)
    training = of_one.training.model_copy(update={"parallel": ParallelConfig(**parallel)})
    of_two = with_processes(of_one, 2).model_copy(update={"training": training})
    one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
    _, hanging = first_checkpoints(of_one)
    hanging_command = hanging_at(hanging, command(of_two, resumed))
    with SupervisedProcess("two GPUs", hanging_command, log=tmp_path / "interrupted.log") as process:
        process.wait_ready(lambda: is_half_written(resumed, hanging), END_TIMEOUT_S)
    for spec, out in ((of_one, resumed), (of_one, one), (of_two, two)):
        subprocess.run(command(spec, out), check=True, timeout=END_TIMEOUT_S)
    for out in (two, resumed):
        for theirs, ours in zip(curve(out), curve(one), strict=True):
            # bfloat16 keeps 8 bits of the weights, of which the order of float32 sums may turn the last.
            assert theirs["train/loss"] == pytest.approx(ours["train/loss"], rel=1e-2)
        evaluations = [curve(directory)[-1] for directory in (out, one)]
        assert evaluations[0]["eval/loss"] == pytest.approx(evaluations[1]["eval/loss"], rel=1e-2)


def failure(spec: TrainSpec, out: Path) -> str:
    """What a build says of a stage that fails."""
    log = out.with_suffix(".log")
    with (
        SupervisedProcess("stage train", command(spec, out), log=log) as process,
        pytest.raises(ProcessError) as caught,
    ):
        process.wait(END_TIMEOUT_S)
    return str(StageError("train", caught.value, log))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"tokens_per_batch": 48}, "ValueError: a step of tokens_per_batch=48 has 1 micro-batches"),
        ({"learning_rate": 1e25, "max_grad_norm": 1e30}, "FloatingPointError: the training loss is nan"),
    ],
)
def test_the_exception_of_the_process_that_failed_is_what_a_build_says(
    training: dict[str, Any], said: str, inputs: Path, tmp_path: Path
):
    assert said in failure(with_processes(make_spec(inputs, **training), 2), tmp_path / "out")
    wait_until_gone(tmp_path / "out")
