"""Means of sums, and a metrics file that an interruption leaves in order."""

import json
from pathlib import Path

import pytest
import torch

from specforge_core.drafts.base import DraftLoss
from specforge_core.training.metrics import Meter, append_metrics, drop_metrics_after, loss_metrics, milestones


def losses(loss_sum: float) -> DraftLoss:
    parts = ([3.0, 1.0], [2.0, 0.5], [4.0, 0.0])
    return DraftLoss(torch.tensor(loss_sum), torch.tensor(4.0), *(torch.tensor(part) for part in parts))


def test_metrics_divide_each_sum_by_its_count_and_nothing_by_zero():
    assert loss_metrics(losses(6.0), "eval") == {
        "eval/loss": 1.5,
        "eval/accuracy_0": 0.75,
        "eval/accuracy_1": 1.0,
        "eval/acceptance_0": 0.5,
        "eval/acceptance_1": 0.5,
    }


def test_a_report_covers_the_steps_since_the_last_one():
    meter = Meter(2, torch.device("cpu"))
    meter.add(losses(100.0), num_tokens=10)
    meter.restart()
    meter.add(losses(6.0), num_tokens=10)
    meter.add(losses(2.0), num_tokens=10)
    assert meter.metrics(0.1, torch.tensor(0.5))["train/loss"] == 8.0 / 8.0


def test_a_loss_that_is_no_number_stops_training():
    meter = Meter(2, torch.device("cpu"))
    meter.add(losses(float("nan")), num_tokens=10)
    with pytest.raises(FloatingPointError, match=r"learning rate of 0\.1"):
        meter.metrics(0.1, torch.tensor(1.0))


def test_a_gradient_that_is_no_number_stops_training_before_the_weights_that_it_spoilt_are_saved():
    meter = Meter(2, torch.device("cpu"))
    meter.add(losses(6.0), num_tokens=10)
    for norm in ("nan", "inf"):
        with pytest.raises(FloatingPointError, match=rf"gradient is {norm} at a learning rate of 0\.1"):
            meter.metrics(0.1, torch.tensor(float(norm)))


def test_lines_behind_the_checkpoint_and_unfinished_ones_are_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    drop_metrics_after(path, 3)
    for step in (1, 2, 3):
        append_metrics(path, step, {"train/loss": step / 2})
    with path.open("a") as file:
        file.write('{"step": 2, "tr')
    drop_metrics_after(path, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "train/loss": 0.5},
        {"step": 2, "train/loss": 1.0},
    ]


def test_milestones_are_spread_evenly_and_end_with_the_last_step():
    assert milestones(10, 4) == {3, 5, 8, 10}
    assert milestones(3, 200) == {1, 2, 3}
