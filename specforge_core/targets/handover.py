"""Hidden states from the files that `sglang_hook.py` writes inside SGLang servers, in this process.

    with Handover(layout, traffic, fallback=out) as handover:
        ...                                     # start servers with handover.hooks_option() and handover.environment
        for features in captured(handover, servers, requests): ...

The folder lies in memory (`/dev/shm`) if there is room. It goes with the block; what a killed run left goes with the
next one. A server that dies takes the files with it that it had not finished; the same document, sent again, gets files
of its own.

T tokens of one document, U teaching tokens of it, L captured layers, D target width.
"""

import contextlib
import itertools
import json
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from specforge_core.benchmark.client import Job, Reply, RequestFailed, RequestRefused, completed
from specforge_core.benchmark.server import Server
from specforge_core.benchmark.server_flags import Options
from specforge_core.data.shards import NUM_COPIERS
from specforge_core.scratch import MEMORY, locked_folder, remove_leftovers
from specforge_core.targets import CaptureRequest, TargetFeatures, sglang_hook
from specforge_core.targets.forward_files import ForwardFiles, Layout
from specforge_core.targets.sglang_hook import request_id, wanted

logger = logging.getLogger(__name__)

PREFIX = "specbundle-capture-"
HOOK_MODULE = "sglang_hook"
IN_FLIGHT_BATCHES = 6
"""For each server: one computed, one launched, two queued, and those whose files are on their way to a shard."""
NUM_BUFFERS = 3
"""Forwards in pinned memory of each server, so that its scheduler does not wait for the files of one."""
MAX_REQUESTS = 256
"""In flight for each server, however short they are."""
ROOM_SHARE = 0.8
"""Of the free space; others write there too."""
HELD_BATCHES = NUM_COPIERS + 2
"""Of documents that are no more in flight, but still mapped: they are written to a shard, and one is gathered."""
WAIT_S = 30.0
"""For the files of a request that has been answered."""
POLL_S = 0.002
MAX_LOST = 3
"""Times that a document is sent again whose files did not come."""
LOST = "#lost"
PREFILL_ONLY = {"max_new_tokens": 0, "temperature": 0.0}
LAYER_PATTERNS = ("model.layers.{}", "*.layers.{}", "transformer.h.{}")
"""Names of decoder layer {} in SGLang; multimodal models have theirs deeper. A vision tower may fit too: it does not
run where there are no images."""
END_PATTERNS = ("logits_processor", "*.logits_processor")


class FilesLost(RuntimeError):
    """A request was answered, but its files did not come: its server died in between, or runs without the hook."""


class Traffic(NamedTuple):
    """How much is on its way."""

    max_document_tokens: int
    batch_tokens: int
    """Of a forward of one server."""
    num_servers: int

    @property
    def forward_tokens(self) -> int:
        """At most, in one forward: a document that is longer than a batch is a forward of its own."""
        return max(self.max_document_tokens, self.batch_tokens)

    def held_tokens(self, in_flight_tokens: int) -> int:
        """At most, with memory in the folder while so many are in flight.

        The memory of a forward is one piece, so more is held than is in flight: one forward of each server that is read
        in part, and those of what is on its way to a shard.
        """
        forward_tokens = min(self.forward_tokens, in_flight_tokens)
        return in_flight_tokens + (self.num_servers + HELD_BATCHES) * forward_tokens


class _Room(NamedTuple):
    parent: Path
    num_tokens: int


class Handover:
    """The folder between servers and this process, as a context manager."""

    def __init__(self, layout: Layout, traffic: Traffic, *, fallback: Path) -> None:
        """Args: fallback: where the folder lies if there is no room in memory."""
        self._layout, self._traffic, self._fallback = layout, traffic, fallback
        self.numbers = itertools.count()
        """Of documents, over all streams."""

    def __enter__(self) -> "Handover":
        """Raises: ValueError if there is no room for the longest document anywhere."""
        parents = [parent for parent in (MEMORY, self._fallback) if parent.is_dir()]
        for parent in parents:
            remove_leftovers(parent, PREFIX)
        with contextlib.ExitStack() as stack:
            parent, self.in_flight_tokens = _choose(parents, self._traffic, self._layout.token_bytes)
            self._folder = stack.enter_context(locked_folder(parent, PREFIX))
            self._directory = self._folder / "forwards"
            self._directory.mkdir()
            self._forwards = ForwardFiles(self._directory, self._layout)
            (self._folder / "hook").mkdir()
            shutil.copy(sglang_hook.__file__, self._folder / "hook" / f"{HOOK_MODULE}.py")
            self._stack = stack.pop_all()
        gib = self.in_flight_tokens * self._layout.token_bytes / 2**30
        logger.info("hidden states come through %s: %d tokens (%.2f GiB)", self._folder, self.in_flight_tokens, gib)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that a server needs to import the hook, and nothing else of this package."""
        # A variable of the child takes the place of this process's own, which may be where the child finds SGLang.
        inherited = os.environ.get("PYTHONPATH", "")
        return {"PYTHONPATH": os.pathsep.join(filter(None, [str(self._folder / "hook"), inherited]))}

    @property
    def options(self) -> Options:
        """What a server has on top of those for its target: it computes prompts, each in full, and writes no token."""
        return {
            "--forward-hooks": self.hooks_option(),
            # What comes out of a cache is not computed, so no hook sees it.
            "--disable-radix-cache": True,
            "--chunked-prefill-size": -1,
            # The server takes a request while it has fewer tokens than there is room for.
            "--max-prefill-tokens": self._traffic.batch_tokens + 1,
            # It counts the requests of the forward that runs, and launches the next one only if there are places left.
            "--max-running-requests": MAX_REQUESTS,
            "--cuda-graph-backend-decode": "disabled",
            # With tensor parallelism a layer of some models hands its output on before it is summed over the ranks.
            "--enforce-disable-flashinfer-allreduce-fusion": True,
        }

    def hooks_option(self) -> str:
        """The value of `--forward-hooks`."""
        config = {
            "directory": str(self._directory),
            "layers": list(self._layout.layers),
            "num_buffers": NUM_BUFFERS,
            "buffer_bytes": self._traffic.forward_tokens * self._layout.token_bytes,
        }

        def spec(factory: str, patterns: Iterable[str], **more: int) -> dict[str, object]:
            return {
                "name": " ".join(["capture", *map(str, more.values())]),
                "target_modules": list(patterns),
                "hook_factory": f"{HOOK_MODULE}:{factory}",
                "config": {**config, **more},
            }

        layers = [
            spec("layer_hook", (pattern.format(layer) for pattern in LAYER_PATTERNS), layer=layer)
            for layer in self._layout.layers
        ]
        return json.dumps([*layers, spec("forward_hook", END_PATTERNS)])

    def rid(self, index: int, is_teaching_T: Tensor) -> str:
        """The id of the request for document number `index`."""
        return request_id(index, len(is_teaching_T), teaching_runs(is_teaching_T))

    def collect(self, rid: str) -> TargetFeatures:
        """The features of an answered request, on the CPU. Documents are collected in the order of their numbers.

        Args: rid: as the server heard it.
        Raises: HookError with what the hook says, FilesLost.
        """
        request = wanted(rid)
        assert request is not None, rid
        deadline = time.monotonic() + WAIT_S
        while (features := self._forwards.take(request)) is None:
            if time.monotonic() > deadline:
                raise FilesLost(f"{rid} was answered, but its files did not come within {WAIT_S:g} s")
            time.sleep(POLL_S)
        return features


def captured(
    handover: Handover, servers: Sequence[Server], requests: Iterable[CaptureRequest]
) -> Generator[TargetFeatures]:
    """Features of each document, in order, on the CPU. The requests are read only as far as there is room.

    Raises: HookError, FilesLost, RequestRefused, RequestFailed, ServerLost.
    """
    window = _Window(handover, iter(requests))
    for outcome in completed(servers, window, max_in_flight=MAX_REQUESTS * len(servers)):
        if isinstance(outcome.result, RequestRefused | RequestFailed):
            raise outcome.result
        window.answered(outcome.job, outcome.result)
        yield from window.collected()
    assert not window.is_open


class _Window(Iterator[Job]):
    """The documents in flight. As an iterator: jobs while there is room; it may be asked again after it ended."""

    def __init__(self, handover: Handover, requests: Iterator[CaptureRequest]) -> None:
        self._handover, self._requests = handover, requests
        self._next: CaptureRequest | None = next(requests, None)
        self._num_tokens = 0
        self._open: deque[Job] = deque()
        """In order, as they were sent first."""
        self._answers: dict[str, str] = {}
        """By a document's first id: the one by which a server answered."""
        self._lost: deque[Job] = deque()

    @property
    def is_open(self) -> bool:
        """Whether there is a document that was not yielded."""
        return bool(self._open) or self._next is not None

    def __next__(self) -> Job:
        if self._lost:
            return self._lost.popleft()
        request = self._next
        if request is None:
            raise StopIteration
        num_tokens = len(request.input_ids_T)
        if self._open and self._num_tokens + num_tokens > self._handover.in_flight_tokens:
            raise StopIteration
        rid = self._handover.rid(next(self._handover.numbers), request.is_teaching_T)
        job = Job(rid, request.input_ids_T.tolist(), PREFILL_ONLY)
        self._open.append(job)
        self._num_tokens += num_tokens
        self._next = next(self._requests, None)
        return job

    def answered(self, job: Job, reply: Reply) -> None:
        """Note that a server computed it."""
        assert reply.meta["prompt_tokens"] == len(job.input_ids), f"{job.rid}: {reply.meta}"
        self._answers[job.rid.partition("#")[0]] = reply.meta["id"]

    def collected(self) -> Iterator[TargetFeatures]:
        """Features of the oldest documents, as far as they are answered. Raises: HookError, FilesLost."""
        while self._open and (rid := self._answers.pop(self._open[0].rid, None)):
            job = self._open[0]
            try:
                features = self._handover.collect(rid)
            except FilesLost as error:
                if (num_lost := rid.count(LOST)) == MAX_LOST:
                    raise
                logger.warning("%s; sending it again", error)
                self._lost.append(job._replace(rid=f"{job.rid}{LOST * (num_lost + 1)}"))
                return
            self._open.popleft()
            yield features
            # Until then its pages take up the folder's room.
            self._num_tokens -= len(job.input_ids)


def teaching_runs(is_teaching_T: Tensor) -> list[range]:
    """The stretches of tokens that teach."""
    padded = torch.nn.functional.pad(is_teaching_T.int(), (1, 1)).diff()
    starts, stops = (padded == 1).nonzero()[:, 0].tolist(), (padded == -1).nonzero()[:, 0].tolist()
    return [range(start, stop) for start, stop in zip(starts, stops, strict=True)]


def _choose(parents: Sequence[Path], traffic: Traffic, token_bytes: int) -> _Room:
    """The first folder with room for the best number of tokens in flight, else for half of that, and so on.

    Raises: ValueError if there is none for the longest document.
    """
    most, least = IN_FLIGHT_BATCHES * traffic.num_servers * traffic.forward_tokens, traffic.max_document_tokens
    room = {parent: int(ROOM_SHARE * shutil.disk_usage(parent).free) for parent in parents}
    num_tokens = most
    while True:
        needed = traffic.held_tokens(num_tokens) * token_bytes
        if fitting := [parent for parent in parents if needed <= room[parent]]:
            if (fitting[0], num_tokens) != (parents[0], most):
                logger.warning(
                    "hidden states go through %s, %d tokens at a time: %s has %.2f GiB to use, %.2f GiB would be best",
                    fitting[0], num_tokens, parents[0], room[parents[0]] / 2**30,
                    traffic.held_tokens(most) * token_bytes / 2**30,
                )  # fmt: skip
            return _Room(fitting[0], num_tokens)
        if num_tokens == least:
            sizes = ", ".join(f"{parent} has {size / 2**30:.2f} GiB" for parent, size in room.items())
            raise ValueError(
                f"hidden states of documents of {least} tokens take {needed / 2**30:.2f} GiB on their way, but {sizes} "
                "to use: free some, or lower training.max_document_tokens"
            )
        num_tokens = max(least, num_tokens // 2)
