"""How the GPU time of a step divides among its parts, from a trace of PyTorch's profiler.

The forward pass names its parts by `record_function` ranges. A kernel of the forward pass belongs to the innermost one
in which the host launched it. A kernel of the backward pass was launched by a node of autograd, and belongs to the part
in which the operation was called that made the node: both carry one sequence number.
"""

import json
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

PARTS = ("attention", "projections", "feed-forward", "head", "teacher", "optimizer")
OTHER = "other"
"""Embedding, copies, sums of gradients, and whatever the ranges leave out."""
BACKWARD_PREFIX = "autograd::engine::evaluate_function"
GPU_CATEGORIES = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
LAUNCH_CATEGORIES = frozenset({"cuda_runtime", "cuda_driver"})
HOST_CATEGORIES = frozenset({"cpu_op", "user_annotation"})

TraceEvent = dict[str, Any]
MICROSECONDS_PER_MS = 1e3


class Range(NamedTuple):
    """What a host thread was doing, and inside what."""

    event: TraceEvent
    parent: "Range | None"

    def ancestry(self) -> Iterator[TraceEvent]:
        """This event and those around it, the innermost first."""
        innermost: Range | None = self
        while innermost is not None:
            yield innermost.event
            innermost = innermost.parent


def profiled_parts(step: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of GPU time by part of one step; parts that took none are left out."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return parts_of_trace(events)


def parts_of_trace(events: Iterable[TraceEvent]) -> dict[str, float]:
    """The same, from the events of a trace in Chrome's format."""
    by_category: defaultdict[str, list[TraceEvent]] = defaultdict(list)
    for event in events:
        by_category[event.get("cat", "")].append(event)
    host = [event for category in HOST_CATEGORIES for event in by_category[category]]
    timelines = {thread: Timeline(of_thread) for thread, of_thread in _by_thread(host).items()}
    part_of_node = _parts_of_nodes(host, timelines)
    launches = {
        event["args"].get("correlation"): event for category in LAUNCH_CATEGORIES for event in by_category[category]
    }
    parts: defaultdict[str, float] = defaultdict(float)
    for category in GPU_CATEGORIES:
        for event in by_category[category]:
            launch = launches.get(event["args"].get("correlation"))
            parts[_part(launch, timelines, part_of_node)] += event["dur"] / MICROSECONDS_PER_MS
    return {part: parts[part] for part in (*PARTS, OTHER) if part in parts}


class Timeline:
    """The nested ranges of one host thread."""

    def __init__(self, events: list[TraceEvent]) -> None:
        # Of two that start together the longer is the outer one.
        events = sorted(events, key=lambda event: (event["ts"], -event["dur"]))
        self._starts = [event["ts"] for event in events]
        self._ranges: list[Range] = []
        open_range: Range | None = None
        for event in events:
            while open_range is not None and _end(open_range.event) <= event["ts"]:
                open_range = open_range.parent
            open_range = Range(event, open_range)
            self._ranges.append(open_range)

    def around(self, time: float) -> Iterator[TraceEvent]:
        """The ranges that the thread was in at a time, the innermost first."""
        last_started = bisect_right(self._starts, time) - 1
        if last_started < 0:
            return
        yield from (event for event in self._ranges[last_started].ancestry() if _end(event) >= time)


def _parts_of_nodes(host: list[TraceEvent], timelines: dict[Any, Timeline]) -> dict[int, str]:
    """The part of the operation that made each node of autograd, by sequence number."""
    parts: dict[int, str] = {}
    for event in sorted(host, key=lambda event: event["ts"]):
        number = event.get("args", {}).get("Sequence number", -1)
        if number < 0 or event["name"].startswith(BACKWARD_PREFIX) or event["args"].get("Fwd thread id", 0):
            continue
        # Operations that make no node carry the number of the next one, so the last one is it.
        parts[number] = _named_part(timelines[_thread(event)].around(event["ts"])) or OTHER
    return parts


def _part(launch: TraceEvent | None, timelines: dict[Any, Timeline], part_of_node: dict[int, str]) -> str:
    if launch is None or _thread(launch) not in timelines:
        return OTHER
    around = list(timelines[_thread(launch)].around(launch["ts"]))
    if named := _named_part(around):
        return named
    numbers = [
        event["args"].get("Sequence number", -1) for event in around if event["name"].startswith(BACKWARD_PREFIX)
    ]
    return next((part_of_node[number] for number in numbers if number in part_of_node), OTHER)


def _named_part(around: Iterable[TraceEvent]) -> str | None:
    return next((event["name"] for event in around if event["name"] in PARTS), None)


def _by_thread(events: Iterable[TraceEvent]) -> dict[Any, list[TraceEvent]]:
    threads: defaultdict[Any, list[TraceEvent]] = defaultdict(list)
    for event in events:
        threads[_thread(event)].append(event)
    return threads


def _thread(event: TraceEvent) -> tuple[Any, Any]:
    return event["pid"], event["tid"]


def _end(event: TraceEvent) -> float:
    return float(event["ts"] + event["dur"])
