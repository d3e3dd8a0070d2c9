"""One optimizer step: the gradient of the mean loss over all micro-batches of all workers, clipped."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from specforge_core.drafts.base import DraftBatch, DraftLoss, DraftModel
from specforge_core.training.optim import take_step
from specforge_core.training.sharding import Sharding
from specforge_core.training.workers import Workers


class StepResult(NamedTuple):
    """Sums over all processes, and the norm of the gradient before it was clipped."""

    losses: DraftLoss
    grad_norm: Tensor


def train_step(
    draft: DraftModel,
    optimizers: Sequence[Optimizer],
    micro_batches: Iterable[DraftBatch],
    max_grad_norm: float,
    workers: Workers,
    sharding: Sharding | None = None,
) -> StepResult:
    """One optimizer step over the micro-batches of all replicas; each gives its own share, which may be none.

    Args: optimizers: of `sharding`; of the draft itself if there is none, in a process on its own.

    The loss is a sum until every micro-batch of every replica is in. Then it is divided once, by the number of
    supervised tokens, so that neither packing nor the number of workers changes the gradient. Nothing is read from the
    device, so the host stays ahead of it.
    """
    assert sharding or workers.world_size == 1, "several processes step what `parallelize` gives them"
    stepped = sharding or Sharding(draft)
    stepped.zero_gradients()
    losses = DraftLoss.zero(draft.num_positions, workers.device)
    for batch in micro_batches:
        losses = losses.plus(draft.accumulate_gradients(batch))
    workers.add_up(losses)
    stepped.reduce_gradients()
    num_tokens = losses.num_tokens.clamp(min=1)
    grad_norm = stepped.gradient_norm() / num_tokens
    # The division and the clipping in one: gradients are gigabytes, and each pass over them takes its time.
    take_step(optimizers, num_tokens * (grad_norm / max_grad_norm).clamp(min=1))
    stepped.gather_parameters()
    return StepResult(losses, grad_norm)
