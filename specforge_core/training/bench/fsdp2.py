"""What the conventional path takes under FSDP2: a training step to compare `training/sharding.py` with.

`fully_shard` holds float32 weights and the moments of AdamW in shards, gathers all weights in bfloat16 before the first
forward pass of a step and keeps them, as one layer that every pass reads needs them, and reduces the gradient in
float32 behind the last backward pass. Autograd adds up gradients of the S steps in bfloat16.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.func import functional_call

from specforge_core.drafts.base import DraftBatch
from specforge_core.manifest_sections import TrainingConfig
from specforge_core.training.bench.batch import make_draft
from specforge_core.training.bench.conventional import ConventionalDraft, pad_batch
from specforge_core.training.bench.measure import release_memory
from specforge_core.training.bench.shapes import Shape
from specforge_core.training.workers import Workers, compute_dtype


def conventional_step(
    shape: Shape, num_steps: int, steps: Sequence[Sequence[DraftBatch]], workers: Workers
) -> Callable[[], Tensor]:
    """The training steps of a repeat; they return the norm of the last gradient.

    Args: steps: this replica's micro-batches of each step, on the CPU; workers: dp alone. One process has no FSDP2: it
    casts its weights for each micro-batch.
    """
    assert workers.cp == workers.tp == 1
    dtype = compute_dtype(workers.device)
    module = ConventionalDraft(make_draft(shape, num_steps=num_steps, seed=0, device=workers.device), dtype)
    module.weights.float()
    # The draft whose weights these were is not part of the path.
    release_memory()
    if workers.world_size > 1:
        _shard(module, dtype, workers)
    config = TrainingConfig()
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    padded = [[pad_batch(batch, num_steps, workers.device) for batch in batches] for batches in steps]

    def step() -> Tensor:
        norm = torch.zeros(())
        for batches in padded:
            num_tokens = torch.stack([(batch.depth_BT > 0).sum() for batch in batches]).sum().float()
            workers.add_up([num_tokens])
            for number, batch in enumerate(batches, start=1):
                if isinstance(module, FSDPModule):
                    # Weights are gathered once a step, and gradients reduced once.
                    module.set_requires_gradient_sync(number == len(batches))
                    module.set_reshard_after_backward(number == len(batches))
                    loss = module(batch)
                else:
                    weights = {name: weight.to(dtype) for name, weight in module.named_parameters()}
                    loss = functional_call(module, weights, (batch,))
                (loss / num_tokens).backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        return norm

    return step


def _shard(module: nn.Module, dtype: torch.dtype, workers: Workers) -> None:
    """All weights in one group: there is one layer, and it is needed at every step of training-time test."""
    mesh = init_device_mesh(workers.device.type, (workers.world_size,))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    sharded = fully_shard(module, mesh=mesh, reshard_after_forward=False, mp_policy=precision)
    # The number of tokens of all processes has divided the loss already.
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
