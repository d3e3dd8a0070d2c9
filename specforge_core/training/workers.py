"""The processes that train together: one, or those that torchrun started.

They form a mesh of dp x cp x tp processes, neighbours in tp first: dp replicas take micro-batches of their own, the cp
x tp processes of a replica work on each of its micro-batches together (`parallel.py`).
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from specforge_core.manifest_sections import ParallelConfig

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


class Workers(NamedTuple):
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device
    cp: int = 1
    tp: int = 1

    def arranged(self, parallel: ParallelConfig) -> "Workers":
        """This process in such a mesh. Raises: ValueError if the processes do not fill it."""
        if self.world_size % parallel.gpus_per_replica:
            raise ValueError(
                f"training.parallel cp={parallel.cp} x tp={parallel.tp} does not divide {self.world_size} processes; "
                "change it or resources.num_gpus"
            )
        return self._replace(cp=parallel.cp, tp=parallel.tp)

    @property
    def num_replicas(self) -> int:
        """dp: shares in which the micro-batches of a step are dealt out."""
        return self.world_size // (self.cp * self.tp)

    @property
    def replica(self) -> int:
        """Which of these shares is this process's."""
        return self.rank // (self.cp * self.tp)

    @property
    def leads_replica(self) -> bool:
        """Whether this process counts what all processes of its replica have found alike."""
        return self.rank % (self.cp * self.tp) == 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def wait(self) -> None:
        """Return when all processes have called it."""
        if self.world_size > 1:
            dist.barrier()

    @property
    def compute_dtype(self) -> torch.dtype:
        """`compute_dtype` of the device."""
        return compute_dtype(self.device)


def compute_dtype(device: torch.device) -> torch.dtype:
    """Of losses and gradients: bfloat16 on a GPU, float32 on a CPU. Weights and sums are float32 on both."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@contextlib.contextmanager
def join_workers(device: str, parallel: ParallelConfig | None = None) -> Iterator[Workers]:
    """The processes that torchrun started, or this one alone.

    Args: device: `cpu` or `cuda`. Raises: ValueError if so many processes cannot form the replicas of `parallel`.
    """
    arrangement = parallel or ParallelConfig()
    if not dist.is_torchelastic_launched():
        yield Workers(0, 1, torch.device(device)).arranged(arrangement)
        return
    if device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    dist.init_process_group(BACKENDS[device])
    try:
        yield Workers(dist.get_rank(), dist.get_world_size(), torch.device(device)).arranged(arrangement)
    finally:
        dist.destroy_process_group()
