"""Which implementation of a kernel runs: Triton on a GPU or in Triton's interpreter, the reference elsewhere."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Literal

import torch
import triton
from torch import Tensor

logger = logging.getLogger(__name__)

Implementation = Literal["references", "interpreter"]

# Of the process and not of the context: autograd runs backward passes in threads of its own.
_forced: Implementation | None = None


def uses_triton(kernel: str, tensor: Tensor) -> bool:
    """Whether `kernel` runs in Triton on this tensor; the first time that it cannot, the log says so."""
    # The kernels compute in float32: who asks in float64 wants more than that.
    if _forced == "references" or tensor.dtype == torch.float64:
        return False
    if tensor.is_cuda or _forced == "interpreter":
        return True
    _say_fallback(kernel, tensor.device.type)
    return False


def num_programs(device: torch.device, per_processor: int) -> int:
    """How many programs fill a device whose multiprocessors run `per_processor` at a time each."""
    if device.type != "cuda":
        # The interpreter runs one after the other; two show whether they share the work rightly.
        return 2
    return per_processor * torch.cuda.get_device_properties(device).multi_processor_count


@contextlib.contextmanager
def references() -> Iterator[None]:
    """Inside, every kernel is its plain PyTorch reference, also on a GPU."""
    with _force("references"):
        yield


@contextlib.contextmanager
def interpreter() -> Iterator[None]:
    """Inside, every kernel runs in Triton's interpreter, on tensors of the CPU.

    Raises: RuntimeError if the kernels were not made for it: Triton decides that when they are imported.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are compiled in this process; set TRITON_INTERPRET=1 before triton is imported")
    with _force("interpreter"):
        yield


@contextlib.contextmanager
def _force(implementation: Implementation) -> Iterator[None]:
    global _forced
    before, _forced = _forced, implementation
    try:
        yield
    finally:
        _forced = before


@functools.cache
def _say_fallback(kernel: str, device: str) -> None:
    logger.info("%s: no Triton on the %s, its PyTorch reference is used", kernel, device)
