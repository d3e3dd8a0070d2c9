"""What a training run reports: lines of `metrics.jsonl`, one JSON object with `step` and numbers each."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from specforge_core.artifacts import write_atomically
from specforge_core.drafts.base import DraftLoss


def loss_metrics(losses: DraftLoss, prefix: str) -> dict[str, float]:
    """Means by name; 0 at a draft position that no token reaches."""
    valid_K = losses.valid_K.clamp(min=1)
    metrics = {f"{prefix}/loss": (losses.loss_sum / losses.num_tokens.clamp(min=1)).item()}
    metrics |= {f"{prefix}/accuracy_{k}": value for k, value in enumerate((losses.correct_K / valid_K).tolist())}
    metrics |= {f"{prefix}/acceptance_{k}": value for k, value in enumerate((losses.accepted_K / valid_K).tolist())}
    return metrics


class Meter:
    """Sums over the steps since the last report. They stay on the device until they are reported."""

    def __init__(self, num_positions: int, device: torch.device) -> None:
        self._nothing = DraftLoss.zero(num_positions, device)
        self.restart()

    def restart(self) -> None:
        """Begin again at zero, and now."""
        self._losses, self._num_tokens, self._started_at = self._nothing, 0, time.monotonic()

    def add(self, losses: DraftLoss, num_tokens: int) -> None:
        """Count a step. Args: num_tokens: packed tokens, supervised or not."""
        self._losses = self._losses.plus(losses)
        self._num_tokens += num_tokens

    def metrics(self, learning_rate: float, grad_norm: Tensor) -> dict[str, float]:
        """For `metrics.jsonl`.

        Args: grad_norm: of the last step. Raises: FloatingPointError if the losses or that are no numbers any more.
        """
        metrics = loss_metrics(self._losses, "train") | {"train/grad_norm": grad_norm.item()}
        # The norm too: the step has spoilt weights whose loss nobody has seen yet, and they must not be saved.
        for name, what in (("train/loss", "the training loss"), ("train/grad_norm", "the norm of the gradient")):
            if not math.isfinite(metrics[name]):
                raise FloatingPointError(
                    f"{what} is {metrics[name]} at a learning rate of {learning_rate:.3g}; "
                    "lower training.learning_rate (training.muon_learning_rate) or training.max_grad_norm"
                )
        elapsed_s = time.monotonic() - self._started_at
        return metrics | {
            "train/learning_rate": learning_rate,
            "train/tokens_per_s": self._num_tokens / elapsed_s,
            "train/supervised_tokens_per_s": self._losses.num_tokens.item() / elapsed_s,
        }


def append_metrics(path: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Add one line. Args: step: optimizer steps done."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **metrics}) + "\n")


def drop_metrics_after(path: Path, step: int) -> None:
    """Take out the lines of later steps, which an interrupted run wrote behind its last checkpoint."""
    if not path.exists():
        return
    # A kill in the middle of a write leaves a line without its end.
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    write_atomically(path, "".join(line for line in lines if json.loads(line)["step"] <= step))


def milestones(num_steps: int, count: int) -> frozenset[int]:
    """`count` numbers of steps done, evenly spaced, the last one `num_steps`; fewer if there are fewer steps."""
    return frozenset(-(-num_steps * i // count) for i in range(1, count + 1))
