"""Work on other processes, alone or on several that can talk to each other.

On CPUs they are forked from one process that has imported what trainings need: imports take longer than the work.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing

FORKED: Literal["forkserver"] = "forkserver"


def _context() -> ForkServerContext:
    """Where processes are forked."""
    context = multiprocessing.get_context(FORKED)
    # Counts until the first start.
    context.set_forkserver_preload(["tests.training.float64_training"])
    return context


def _process(rank: int, num_processes: int, backend: str, work: Callable[[int], Any], directory: Path) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{directory}/rendezvous", rank=rank, world_size=num_processes)
    try:
        torch.save(work(rank), directory / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def start(work: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A process that does the work, on one thread."""
    process = _context().Process(target=_alone, args=(work, *arguments))
    process.start()
    return process


def _alone(work: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(1)
    work(*arguments)


def on_processes(
    num_processes: int, work: Callable[[int], Any], directory: Path, *, backend: str = "gloo"
) -> list[Any]:
    """What `work(rank)` returns in each of so many processes."""
    _context()
    arguments = (num_processes, backend, work, directory)
    # Whatever touches CUDA must not be forked.
    start_method = FORKED if backend == "gloo" else "spawn"
    torch.multiprocessing.start_processes(_process, arguments, nprocs=num_processes, start_method=start_method)
    return [torch.load(directory / f"{rank}.pt") for rank in range(num_processes)]
