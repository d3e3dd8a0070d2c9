"""Which implementation of a kernel runs: Triton on a GPU or in Triton's interpreter, the reference elsewhere."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from contextvars import ContextVar

import triton
from torch import Tensor

logger = logging.getLogger(__name__)

_references_wanted: ContextVar[bool] = ContextVar("references_wanted", default=False)


def uses_triton(kernel: str, tensor: Tensor) -> bool:
    """Whether `kernel` runs in Triton on this tensor; the first time that it cannot, the log says so."""
    if _references_wanted.get():
        return False
    if tensor.is_cuda or triton.knobs.runtime.interpret:
        return True
    _say_fallback(kernel, tensor.device.type)
    return False


@contextlib.contextmanager
def references() -> Iterator[None]:
    """Inside, every kernel is its plain PyTorch reference, also on a GPU."""
    token = _references_wanted.set(True)
    try:
        yield
    finally:
        _references_wanted.reset(token)


@functools.cache
def _say_fallback(kernel: str, device: str) -> None:
    logger.info("%s: no Triton on the %s, its PyTorch reference is used", kernel, device)
