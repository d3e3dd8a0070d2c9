"""Whole trainings in float64, on one process or several, that may stop at a checkpoint: run by `test_resume.py`."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from specforge_core.data.loader import FeatureSet
from specforge_core.stages import TrainSpec
from specforge_core.training.checkpoint import Checkpointer, TrainingState
from specforge_core.training.train import Run, create_draft, plan_training, train
from specforge_core.training.workers import Workers


class Training(NamedTuple):
    out: Path
    stop_at: int | None = None
    """The step of a checkpoint; none: it runs to its end."""


def train_all(spec: TrainSpec, num_processes: int, trainings: Sequence[Training], rank: int = 0) -> None:
    """Run trainings one after the other on this one of the processes, each on from what is in its folder."""
    workers = Workers(rank, num_processes, torch.device("cpu")).arranged(spec.training.parallel)
    for training in trainings:
        training.out.mkdir(exist_ok=True)
        features = FeatureSet(spec.hidden_states)
        plan = plan_training(features, spec.training, workers.num_replicas)
        draft = create_draft(spec).double()
        with stopped_at(training.stop_at):
            train(Run(spec.training, draft, features, plan, workers), training.out, spec.key())


@contextlib.contextmanager
def stopped_at(step: int | None) -> Iterator[None]:
    """Leave the block once the checkpoint of that step is whole."""

    class Stop(Exception):
        pass

    save = Checkpointer.save

    def save_and_stop(self: Checkpointer, state: TrainingState) -> None:
        save(self, state)
        if state.step == step:
            self.finish()
            raise Stop

    with mock.patch.object(Checkpointer, "save", save_and_stop), contextlib.suppress(Stop):
        yield


def curve(out: Path) -> list[dict[str, float]]:
    """What a training reported, but for what a clock measured."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("_per_s")} for line in lines]
