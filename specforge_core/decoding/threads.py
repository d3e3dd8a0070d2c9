"""How many CPU threads decoding runs with.

A decoding step is little work for each row, and threads that wait for each other, or for a core that something else is
using, may cost more than they bring: measured beats assumed.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from specforge_core.decoding.speculative import generate
from specforge_core.targets import GenerationRequest, Sampling

if TYPE_CHECKING:
    from specforge_core.targets.hf import HFTarget

logger = logging.getLogger(__name__)

PROBE_TOKENS = 24


def fastest_num_threads(target: "HFTarget", requests: Sequence[GenerationRequest]) -> int:
    """The number of CPU threads at which the target decodes these requests together fastest, without a draft.

    Doubles the number as long as that is faster. Off the CPU: torch's own number.
    """
    most = torch.get_num_threads()
    if target.device.type != "cpu":
        return most
    speeds: dict[int, float] = {}
    num_threads = 1
    while num_threads <= most:
        with torch_threads(num_threads):
            # The better of two: the first one also wakes the threads up.
            speeds[num_threads] = max(_output_tokens_per_s(target, requests) for _ in range(2))
        if speeds[num_threads] < max(speeds.values()):
            break
        num_threads *= 2
    shown = ", ".join(f"{speed:.0f} with {number}" for number, speed in speeds.items())
    logger.info("output tokens/s of %d rows by number of threads: %s", len(requests), shown)
    return max(speeds, key=lambda number: speeds[number])


def _output_tokens_per_s(target: "HFTarget", requests: Sequence[GenerationRequest]) -> float:
    started_at = time.perf_counter()
    generations = list(generate(target, requests, Sampling(PROBE_TOKENS), batch_size=len(requests)))
    num_tokens = sum(len(generation.completion.token_ids) for generation in generations)
    return num_tokens / (time.perf_counter() - started_at)


@contextlib.contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """Compute with so many threads, and then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
