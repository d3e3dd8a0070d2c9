"""Time and memory of a training path on one batch, and how fast the card itself is."""

import gc
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from specforge_core.drafts.base import DraftBatch
from specforge_core.environment import environment
from specforge_core.facts import Environment
from specforge_core.training.bench.paths import TrainingPath
from specforge_core.training.bench.results import MILLISECONDS

MATMUL_WIDTH = 8192
COPY_BYTES = 2**32
CARD_REPEATS = 10


class Card(NamedTuple):
    """What the device reaches on the simplest work."""

    matmul_flops: float
    """FLOP/s of a large product of random matrices, in the dtype that training computes in."""
    copy_bytes_per_s: float
    """Read and written, in a copy within the device's memory."""


class Timing(NamedTuple):
    """Repeats of one step on one batch."""

    ms: tuple[float, ...]
    prepare_ms: float
    """Row index or padding, on the CPU, and the copy to the device: work of a loader, in no other number here."""
    peak_bytes: int | None
    """Everything allocated on the device at the worst moment of a step; None on a CPU."""
    weight_bytes: int
    """Parameters, frozen embedding, teacher's head."""
    gradient_bytes: int
    input_bytes: int


def measure(path: TrainingPath, batch: DraftBatch, *, num_warm_ups: int, num_repeats: int) -> Timing:
    """The timing of `path` on a batch of the CPU. Gradients are added up over the repeats, and then gone."""
    path.module.zero_grad()
    started_at = time.perf_counter()
    inputs = path.load(batch)
    is_cuda = next(path.module.parameters()).is_cuda
    if is_cuda:
        torch.cuda.synchronize()
    prepare_ms = MILLISECONDS * (time.perf_counter() - started_at)
    for _ in range(num_warm_ups):
        path.step(inputs)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    ms = timed_ms(lambda: path.step(inputs), num_repeats, is_cuda=is_cuda)
    timing = Timing(
        ms=ms,
        prepare_ms=prepare_ms,
        peak_bytes=torch.cuda.max_memory_allocated() if is_cuda else None,
        weight_bytes=size_bytes([*path.module.parameters(), *path.module.buffers(), *_frozen(path.module)]),
        gradient_bytes=size_bytes([parameter.grad for parameter in path.module.parameters()]),
        input_bytes=size_bytes(inputs),
    )
    path.module.zero_grad()
    return timing


def timed_ms(step: Callable[[], Any], num_repeats: int, *, is_cuda: bool) -> tuple[float, ...]:
    """Milliseconds of each step. On a GPU the host runs ahead, as it does in training, and waits once, at the end."""
    if not is_cuda:
        times = []
        for _ in range(num_repeats):
            started_at = time.perf_counter()
            step()
            times.append(MILLISECONDS * (time.perf_counter() - started_at))
        return tuple(times)
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_repeats + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return tuple(start.elapsed_time(stop) for start, stop in pairwise(events))


def size_bytes(tree: Any) -> int:
    """Bytes of all different tensors of a tree."""
    tensors = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def measured_environment(device: torch.device, named_commit: str | None) -> Environment:
    """What this process measures training on. Args: named_commit: as of `environment`."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return environment(
        num_threads=torch.get_num_threads(), gpu=gpu, more_versions=["triton"], named_commit=named_commit
    )


def release_memory() -> None:
    """Give back what is unreachable, so that the next measurement starts from the same memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_card(device: torch.device, dtype: torch.dtype) -> Card:
    """What the device reaches, each a median."""
    is_cuda = device.type == "cuda"
    width, copy_bytes = (MATMUL_WIDTH, COPY_BYTES) if is_cuda else (MATMUL_WIDTH // 16, COPY_BYTES // 2**8)
    left, right = torch.randn(2, width, width, device=device).to(dtype)
    matmul_ms = _median_ms(lambda: left @ right, is_cuda)
    source = torch.zeros(copy_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = _median_ms(lambda: target.copy_(source), is_cuda)
    return Card(2 * width**3 * MILLISECONDS / matmul_ms, copy_bytes * MILLISECONDS / copy_ms)


def _median_ms(work: Callable[[], Any], is_cuda: bool) -> float:
    timed_ms(work, CARD_REPEATS, is_cuda=is_cuda)
    return median(timed_ms(work, CARD_REPEATS, is_cuda=is_cuda))


def _frozen(module: nn.Module) -> list[Tensor]:
    """Tensors that a module holds without having registered them."""
    return [value for value in vars(module).values() if isinstance(value, Tensor)]
