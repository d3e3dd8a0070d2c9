"""Checkpoints: whole or absent, the last ones and the best one kept, everything restored, written beside the training.

On several processes: `test_train.py`.
"""

import functools
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.utils._pytree import tree_map_only

from specforge_core.manifest_sections import TrainingConfig
from specforge_core.training import checkpoint
from specforge_core.training.checkpoint import Checkpointer, TrainingState, checkpoints
from specforge_core.training.optim import build_optimizers
from specforge_core.training.sharding import Sharding
from specforge_core.training.step import train_step
from specforge_core.training.workers import Workers
from tests.drafts.synthetic import make_document, make_draft, pack
from tests.pickle_bomb import PickleBomb, plant
from tests.processes import on_processes
from tests.training.factory import make_batch, make_gpu_draft

CONFIG = TrainingConfig(optimizer="muon", learning_rate=1e-2)
ALONE = Workers(rank=0, world_size=1, device=torch.device("cpu"))


def state(step: int, *, acceptance_length: float | None = None, key: str = "mine") -> TrainingState:
    return TrainingState(key=key, step=step, tokens_seen=10 * step, acceptance_length=acceptance_length)


class Trainee:
    """A draft with all that steps it, and its checkpoints in a folder."""

    def __init__(self, directory: Path, *, seed: int = 2) -> None:
        self.draft = make_draft(seed=seed)
        self.sharding = Sharding(self.draft)
        self.optimizers = build_optimizers(self.sharding, CONFIG)
        self.checkpointer = Checkpointer(directory, self.sharding, self.optimizers, ALONE)

    def take_steps(self, count: int) -> list[float]:
        """Losses."""
        batch = self.draft.prepare(pack([make_document("PPAAAAAA", seed=3)]))
        results = [train_step(self.draft, self.optimizers, [batch], 0.5, ALONE, self.sharding) for _ in range(count)]
        return [result.losses.loss_sum.item() for result in results]

    def save(self, *states: TrainingState) -> None:
        for one in states:
            self.checkpointer.save(one)
        self.checkpointer.finish()


def names(directory: Path) -> list[str]:
    return [path.name for path in checkpoints(directory)]


def test_training_goes_on_bit_for_bit_with_both_optimizers(tmp_path: Path):
    trainee = Trainee(tmp_path)
    trainee.take_steps(3)
    trainee.save(state(3, acceptance_length=1.5))
    expected = trainee.take_steps(3)

    other = Trainee(tmp_path, seed=99)
    assert other.checkpointer.newest() == tmp_path / "step-00000003"
    assert other.checkpointer.load(tmp_path / "step-00000003", key="mine") == state(3, acceptance_length=1.5)
    assert other.take_steps(3) == expected
    assert expected[0] != expected[1]


def save_and_load(directory: Path, rank: int) -> tuple[str, str]:
    """What the default group of this process has backends for, and the key of a checkpoint that went round."""
    trainee = Trainee(directory)
    trainee.save(state(1))
    assert dist.group.WORLD is not None
    return str(dist.group.WORLD._device_types), trainee.checkpointer.load(directory / "step-00000001", key="mine").key


def test_a_process_that_torchrun_started_alone_on_a_gpu_saves(tmp_path: Path):
    # As `nccl` is: of no use to tensors of a CPU.
    work = functools.partial(save_and_load, tmp_path / "checkpoints")
    [(devices, key)] = on_processes(1, work, tmp_path, backend="cuda:gloo")
    assert devices == "[device(type='cuda')]"
    assert key == "mine"


def test_a_pickle_in_the_place_of_the_metadata_does_not_run(tmp_path: Path):
    trainee = Trainee(tmp_path / "checkpoints")
    trainee.save(state(1))
    path, mark = tmp_path / "checkpoints" / "step-00000001", tmp_path / "ran"
    plant(path / ".metadata", mark)
    with pytest.raises(ValueError, match=r"a checkpoint's \.metadata names pathlib\.Path\."):
        trainee.checkpointer.load(path, key="mine")
    assert not mark.exists()
    # It would have.
    pickle.loads((path / ".metadata").read_bytes())
    assert mark.exists()


def test_a_pickle_in_the_place_of_a_tensor_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainee = Trainee(tmp_path / "checkpoints")
    tensors, mark = trainee.sharding.state(trainee.optimizers), tmp_path / "ran"
    tensors["draft"] |= {"fc.weight": PickleBomb(mark)}
    monkeypatch.setattr(Sharding, "state", lambda *args: tensors)
    trainee.save(state(1))
    monkeypatch.undo()
    mark.unlink(missing_ok=True)
    with pytest.raises(CheckpointException, match=r"draft\.fc\.weight is no tensor"):
        trainee.checkpointer.load(tmp_path / "checkpoints" / "step-00000001", key="mine")
    assert not mark.exists()


def test_a_checkpoint_is_of_the_moment_when_it_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    may_write = threading.Event()
    write_data = FileSystemWriter.write_data

    def slow_disk(self, plan, planner):
        assert may_write.wait(60)
        return write_data(self, plan, planner)

    monkeypatch.setattr(checkpoint._Writer, "write_data", slow_disk)
    trainee = Trainee(tmp_path)
    trainee.take_steps(1)
    trainee.checkpointer.save(state(1))
    expected = trainee.take_steps(2)
    assert names(tmp_path) == []
    assert trainee.checkpointer.is_writing
    may_write.set()
    trainee.checkpointer.finish()
    assert not trainee.checkpointer.is_writing

    trainee.checkpointer.load(tmp_path / "step-00000001", key="mine")
    assert trainee.take_steps(2) == expected


def test_the_last_two_and_the_best_are_kept(tmp_path: Path):
    trainee = Trainee(tmp_path)
    trainee.save(state(5, acceptance_length=1.2), state(90, acceptance_length=1.7), state(1000))
    assert names(tmp_path) == ["step-00000090", "step-00001000"]
    trainee.save(state(2000, acceptance_length=1.3), state(3000))
    assert names(tmp_path) == ["step-00000090", "step-00002000", "step-00003000"]
    assert trainee.checkpointer.best() == tmp_path / "step-00000090"
    # As good, and trained for longer.
    trainee.save(state(4000, acceptance_length=1.7))
    assert names(tmp_path) == ["step-00003000", "step-00004000"]
    assert trainee.checkpointer.best() == trainee.checkpointer.newest() == tmp_path / "step-00004000"


def test_there_is_no_newest_and_no_best_of_none(tmp_path: Path):
    trainee = Trainee(tmp_path / "not there yet")
    assert trainee.checkpointer.newest() is None
    assert trainee.checkpointer.best() is None


def test_a_half_written_checkpoint_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainee = Trainee(tmp_path)
    trainee.save(state(1), state(2))

    def out_of_space(self, metadata, results) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(FileSystemWriter, "finish", out_of_space)
    trainee.checkpointer.save(state(3))
    # The training goes on until the next one is due.
    trainee.take_steps(1)
    with pytest.raises(BaseException, match="no space left"):
        trainee.checkpointer.save(state(4))
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert len(list(tmp_path.glob(".step-00000003*"))) == 1
    monkeypatch.undo()
    # The next try begins without it.
    again = Trainee(tmp_path)
    assert not list(tmp_path.glob(".step*"))
    again.save(state(3))
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_half_deleted_checkpoint_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainee = Trainee(tmp_path)
    trainee.save(state(1), state(2))

    def killed(path: Path) -> None:
        (path / "state.json").unlink()
        raise OSError("killed")

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(BaseException, match="killed"):
        trainee.save(state(3))
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_what_is_on_its_way_gets_there_behind_an_error(tmp_path: Path):
    trainee = Trainee(tmp_path)

    def diverge() -> None:
        with trainee.checkpointer:
            trainee.checkpointer.save(state(1))
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        diverge()
    assert names(tmp_path) == ["step-00000001"]


def test_a_checkpoint_of_another_spec_is_refused(tmp_path: Path):
    trainee = Trainee(tmp_path)
    trainee.save(state(1, key="theirs"))
    with pytest.raises(ValueError, match=r"another spec \(key theirs, not mine\)"):
        trainee.checkpointer.load(tmp_path / "step-00000001", key="mine")


@pytest.mark.gpu
def test_a_checkpoint_of_a_gpu_is_written_while_the_gpu_trains_on(tmp_path: Path):
    workers = Workers(rank=0, world_size=1, device=torch.device("cuda"))
    draft = make_gpu_draft()
    batch = tree_map_only(Tensor, Tensor.cuda, draft.prepare(make_batch([(40, 200), (30, 100)], seed=1)))
    sharding = Sharding(draft)
    optimizers = build_optimizers(sharding, CONFIG)
    checkpointer = Checkpointer(tmp_path, sharding, optimizers, workers)
    for step in (1, 2):
        # The second one fills the pinned memory of the first again.
        train_step(draft, optimizers, [batch], 0.5, workers, sharding)
        checkpointer.save(state(step))
        expected = {name: parameter.detach().cpu() for name, parameter in draft.named_parameters()}
        moments = [value.cpu() for optimizer in optimizers for f in optimizer.state.values() for value in f.values()]
        train_step(draft, optimizers, [batch], 0.5, workers, sharding)
        checkpointer.finish()
        checkpointer.load(tmp_path / f"step-{step:08d}", key="mine")
        assert all(torch.equal(parameter.cpu(), expected[name]) for name, parameter in draft.named_parameters())
        restored = [value.cpu() for optimizer in optimizers for f in optimizer.state.values() for value in f.values()]
        assert all(torch.equal(a, b) for a, b in zip(restored, moments, strict=True))
