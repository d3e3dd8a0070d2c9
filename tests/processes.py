"""Work on several processes that can talk to each other.

They are forked from one process that has imported what trainings need: imports take longer than the work.
"""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

FORKED = "forkserver"


def _process(rank: int, num_processes: int, backend: str, work: Callable[[int], Any], directory: Path) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{directory}/rendezvous", rank=rank, world_size=num_processes)
    try:
        torch.save(work(rank), directory / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_processes(
    num_processes: int, work: Callable[[int], Any], directory: Path, *, backend: str = "gloo"
) -> list[Any]:
    """What `work(rank)` returns in each of so many processes."""
    # Counts at the first start alone.
    multiprocessing.get_context(FORKED).set_forkserver_preload(["tests.training.float64_training"])
    arguments = (num_processes, backend, work, directory)
    torch.multiprocessing.start_processes(_process, arguments, nprocs=num_processes, start_method=FORKED)
    return [torch.load(directory / f"{rank}.pt") for rank in range(num_processes)]
