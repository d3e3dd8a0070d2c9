"""The benchmark of checkpoints, on numbers made by hand and on processes of a CPU."""

import functools
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from specforge_core.environment import environment
from specforge_core.training.bench.batch import make_draft
from specforge_core.training.bench.checkpoints import CheckpointBench, CheckpointRow, Save, markdown, measured
from specforge_core.training.bench.shapes import SHAPES
from specforge_core.training.checkpoint import NUM_KEPT, checkpoints
from specforge_core.training.workers import Workers
from tests.processes import on_processes

BYTES_PER_PARAMETER = 12
"""A float32 weight and two float32 moments."""


def save(**changes: object) -> Save:
    whole = {"alone_ms": (10.0, 12.0, 9.0), "held_up_ms": 3.0, "beside_ms": (15.0, 11.0), "whole_s": 0.5}
    return Save.model_validate(whole | changes)


def test_a_checkpoint_costs_what_it_holds_up_and_what_steps_beside_it_take_longer():
    # The median step takes 10 ms alone.
    assert save().cost_ms == 3 + 5 + 1
    assert save(beside_ms=()).cost_ms == 3


def test_the_first_checkpoint_is_told_apart():
    later = [save(held_up_ms=ms, whole_s=ms / 10) for ms in (4.0, 6.0, 8.0)]
    row = CheckpointRow(shape="tiny", num_gpus=2, size_bytes=3 * 2**29, saves=(save(held_up_ms=99), *later), load_s=2)
    bench = CheckpointBench(environment=environment(num_threads=1, gpu=None), num_steps=3, dtype="float32", rows=(row,))
    (cells,) = [line.strip("| ").split(" | ") for line in markdown(bench).splitlines() if line.startswith("| tiny")]
    assert cells == ["tiny", "2", "1.50", "10 (9 - 12)", "6 (4 - 8)", "12 (10 - 14)", "0.6", "99", "2.0"]


def test_checkpoints_of_one_process_are_those_of_a_training(tmp_path: Path):
    row = measured("tiny", tmp_path, Workers(0, 1, torch.device("cpu")), num_steps=2, num_saves=3, num_alone=2)
    assert [len(one.alone_ms) for one in row.saves] == [2, 2, 2]
    for one in row.saves:
        assert one.whole_s * 1e3 >= one.held_up_ms + sum(one.beside_ms)
    assert len(checkpoints(tmp_path)) == NUM_KEPT
    draft = make_draft(SHAPES["tiny"], num_steps=2, seed=0, device=torch.device("cpu"))
    assert row.size_bytes > BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in draft.parameters())


def test_a_full_disk_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def out_of_space(self, metadata, results) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(FileSystemWriter, "finish", out_of_space)
    with pytest.raises(BaseException, match="no space left"):
        measured("tiny", tmp_path, Workers(0, 1, torch.device("cpu")), num_steps=2, num_saves=2, num_alone=1)


def _beside(num_processes: int, directory: Path, rank: int) -> list[int]:
    workers = Workers(rank, num_processes, torch.device("cpu"))
    row = measured("tiny", directory, workers, num_steps=2, num_saves=2, num_alone=1)
    return [len(one.beside_ms) for one in row.saves]


@pytest.mark.slow
def test_all_processes_take_as_many_steps_beside_a_checkpoint(tmp_path: Path):
    first, second = on_processes(2, functools.partial(_beside, 2, tmp_path / "checkpoints"), tmp_path)
    assert first == second
