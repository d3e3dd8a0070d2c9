"""What bounds a step of several processes: their exchanges, or waiting for the slowest between two of them.

A process computes, enters an exchange, and leaves it together with the others. The last to enter waits for nobody, so
the shortest stay of all is the exchange itself; what the others stay longer, they wait. So a step takes the sum of the
shortest stays, and of the longest computations between them. Nothing is overlapped with an exchange by design.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from specforge_core.training.bench.results import MILLISECONDS
from specforge_core.training.parallel import ProcessPeers
from specforge_core.training.sharding import Sharding
from specforge_core.training.workers import Workers

EXCHANGES = (
    (Workers, "add_up"),
    (Sharding, "reduce_gradients"),
    (Sharding, "gradient_norm"),
    (Sharding, "gather_parameters"),
    (ProcessPeers, "gather"),
    (ProcessPeers, "sum_to_share"),
    (ProcessPeers, "add_up_parts"),
)
"""All that processes of a step say to each other, with the copies that it takes."""


class Times(NamedTuple):
    """Of each repeat, in milliseconds."""

    ms: tuple[float, ...]
    communication_ms: tuple[float, ...]
    slowest_ms: tuple[float, ...]
    """Computing, of the slowest process between each two exchanges."""
    mean_ms: tuple[float, ...]
    """Of all processes."""


class Clock:
    """Moments in the work of the device, which goes on while the host runs ahead."""

    def __init__(self, *, is_cuda: bool) -> None:
        self._is_cuda = is_cuda
        self._moments: list[Any] = []

    def mark(self) -> None:
        """Note a moment."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._moments.append(event)
        else:
            self._moments.append(time.perf_counter())

    def spans_ms(self) -> list[float]:
        """The time between each two moments that follow each other; the device has done everything then."""
        if self._is_cuda:
            torch.cuda.synchronize()
            return [start.elapsed_time(stop) for start, stop in pairwise(self._moments)]
        return [MILLISECONDS * (stop - start) for start, stop in pairwise(self._moments)]


def timed(step: Callable[[], Any], num_repeats: int, workers: Workers) -> Times:
    """The times of repeats of a step. All its processes call this together."""
    clocks = [Clock(is_cuda=workers.device.type == "cuda") for _ in range(num_repeats)]
    for clock in clocks:
        clock.mark()
        with _marked(clock):
            step()
        clock.mark()
    spans = [clock.spans_ms() for clock in clocks]
    of_all = [spans] * workers.world_size
    if workers.world_size > 1:
        dist.all_gather_object(of_all, spans)
    return attribute(of_all)


def attribute(spans: Sequence[Sequence[Sequence[float]]]) -> Times:
    """Where the time goes.

    Args: spans: milliseconds by process and repeat, in turn of computing and of an exchange, with computing at the end.
    """
    parts = []
    for of_repeat in zip(*spans, strict=True):
        # Each is what all processes do between the same two moments.
        by_span = list(zip(*of_repeat, strict=True))
        computing, exchanges = by_span[::2], by_span[1::2]
        parts.append(
            (
                sum(of_repeat[0]),
                sum(map(min, exchanges)),
                sum(map(max, computing)),
                sum(sum(times) / len(times) for times in computing),
            )
        )
    return Times(*zip(*parts, strict=True))


@contextlib.contextmanager
def _marked(clock: Clock) -> Iterator[None]:
    """Inside, the clock has a mark at the beginning and the end of each exchange."""

    def marking(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def marked(*args: Any, **kwargs: Any) -> Any:
            clock.mark()
            result = call(*args, **kwargs)
            clock.mark()
            return result

        return marked

    with contextlib.ExitStack() as stack:
        for owner, name in EXCHANGES:
            stack.enter_context(mock.patch.object(owner, name, marking(getattr(owner, name))))
        yield
