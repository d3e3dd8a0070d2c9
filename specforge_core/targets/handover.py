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
import fcntl
import json
import logging
import math
import mmap
import os
import shutil
import tempfile
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
from specforge_core.targets import CaptureRequest, TargetFeatures, sglang_hook
from specforge_core.targets.sglang_hook import ERROR_NAME, Wanted, overlap, piece_name, request_id, wanted

logger = logging.getLogger(__name__)

MEMORY = Path("/dev/shm")
PREFIX = "specbundle-capture-"
HOOK_MODULE = "sglang_hook"
IN_FLIGHT_BATCHES = 6
"""For each server: one computed, one launched, two queued, and those whose files are on their way to a shard."""
RING_BATCHES = 3
"""Of pinned memory in each server, so that its scheduler does not wait for the files of a forward."""
MAX_REQUESTS = 256
"""In flight for each server, however short they are."""
ROOM_SHARE = 0.8
"""Of the free space; others write there too."""
HELD_DOCUMENTS = NUM_COPIERS + 1
"""Longest ones that are no more in flight, but still mapped: a shard is being filled with them."""
NUM_WRITERS = 4
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


class HookError(RuntimeError):
    """The hook inside the server failed. Its traceback."""


class FilesLost(RuntimeError):
    """A request was answered, but its files did not come: its server died in between, or runs without the hook."""


class Layout(NamedTuple):
    """What a token has."""

    layers: tuple[int, ...]
    hidden_size: int
    dtype: torch.dtype
    """Of the target."""

    @property
    def token_bytes(self) -> int:
        """Of a token that teaches: captured layers, last hidden state, greedy token, log-sum-exp."""
        return (len(self.layers) + 1) * self.hidden_size * self.dtype.itemsize + 2 * 4


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


class _Room(NamedTuple):
    parent: Path
    num_tokens: int


class _Folder(NamedTuple):
    path: Path
    lock: int
    """File descriptor."""


class Handover:
    """The folder between servers and this process, as a context manager."""

    def __init__(self, layout: Layout, traffic: Traffic, *, fallback: Path) -> None:
        """Args: fallback: where the folder lies if there is no room in memory."""
        self._layout, self._traffic, self._fallback = layout, traffic, fallback

    def __enter__(self) -> "Handover":
        """Raises: ValueError if there is no room for the longest document anywhere."""
        most = IN_FLIGHT_BATCHES * self._traffic.num_servers * self._traffic.forward_tokens
        parents = [parent for parent in (MEMORY, self._fallback) if parent.is_dir()]
        for parent in parents:
            remove_leftovers(parent)
        with contextlib.ExitStack() as stack:
            least = self._traffic.max_document_tokens
            parent, self.in_flight_tokens = _choose(parents, self._layout.token_bytes, most=most, least=least)
            self._folder, lock = _make_folder(parent)
            stack.callback(os.close, lock)
            stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
            self._pieces = self._folder / "pieces"
            self._pieces.mkdir()
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
            "--max-prefill-tokens": self._traffic.batch_tokens,
            "--cuda-graph-backend-decode": "disabled",
            # With tensor parallelism a layer of some models hands its output on before it is summed over the ranks.
            "--enforce-disable-flashinfer-allreduce-fusion": True,
        }

    def hooks_option(self) -> str:
        """The value of `--forward-hooks`."""
        config = {
            "directory": str(self._pieces),
            "layers": list(self._layout.layers),
            "ring_bytes": RING_BATCHES * self._traffic.forward_tokens * self._layout.token_bytes,
            "num_threads": NUM_WRITERS,
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
        """The features of an answered request, on the CPU: views of files that have no name any more.

        Args: rid: as the server heard it.
        Raises: HookError with what the hook says, FilesLost.
        """
        request = wanted(rid)
        assert request is not None, rid
        deadline = time.monotonic() + WAIT_S
        while (paths := self._whole(request)) is None:
            if time.monotonic() > deadline:
                raise FilesLost(f"{rid} was answered, but its files did not come within {WAIT_S:g} s")
            time.sleep(POLL_S)
        pieces = [self._read(path, request) for path in paths]
        self._forget(request)
        if len(pieces) == 1:
            return pieces[0]
        return TargetFeatures(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))

    def _whole(self, request: Wanted) -> list[Path] | None:
        """The files of the request in order; None while some are missing. Raises: HookError."""
        folder = self._pieces / request.attempt
        # The usual case first: a request that was computed in one forward.
        path = folder / piece_name(0, request.num_tokens, self._layout.dtype)
        if path.exists():
            return [path]
        names = os.listdir(folder) if folder.exists() else []
        if ERROR_NAME in names:
            raise HookError((folder / ERROR_NAME).read_text(encoding="utf-8"))
        by_start: dict[int, tuple[int, str]] = {}
        for name in names:
            if not name.startswith("."):
                rows = _rows(name)
                by_start[rows.start] = max(by_start.get(rows.start, (0, "")), (rows.stop, name))
        paths = []
        num_rows = 0
        while num_rows in by_start:
            num_rows, name = by_start[num_rows]
            paths.append(folder / name)
        return paths if num_rows == request.num_tokens else None

    def _read(self, path: Path, request: Wanted) -> TargetFeatures:
        """One file. Its pages are the tensors' memory."""
        layers, width, dtype = self._layout
        rows = _rows(path.name)
        num_teaching = sum(len(overlap(run, rows.start, rows.stop)) for run in request.teaching)
        shapes = ((num_teaching,), (num_teaching,), (num_teaching, width), (len(rows), len(layers), width))
        dtypes = (torch.float32, torch.int32, dtype, dtype)
        sizes = [math.prod(shape) * part_dtype.itemsize for shape, part_dtype in zip(shapes, dtypes, strict=True)]
        with path.open("r+b") as file:
            found = os.fstat(file.fileno()).st_size
            if (path.name, found) != (piece_name(rows.start, rows.stop, dtype), sum(sizes)):
                raise HookError(
                    f"{path.name} has {found} bytes instead of {sum(sizes)} in {dtype}: the server's model has another "
                    "width or dtype than the target's config says"
                )
            # All pages at once: each one would be a fault of its own when it is copied.
            memory = mmap.mmap(file.fileno(), found, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        parts = torch.frombuffer(memory, dtype=torch.uint8).split(sizes)
        logsumexp_U, argmax_U, last_hidden_UD, aux_hidden_TLD = (
            part.view(part_dtype).view(shape) for part, part_dtype, shape in zip(parts, dtypes, shapes, strict=True)
        )
        return TargetFeatures(aux_hidden_TLD, last_hidden_UD, argmax_U, logsumexp_U)

    def _forget(self, request: Wanted) -> None:
        """Remove the files of a document, of earlier attempts too."""
        document, is_again, _ = request.attempt.partition("#")
        earlier = [self._pieces / document, *self._pieces.glob(f"{document}#*")] if is_again else []
        for folder in (self._pieces / request.attempt, *earlier):
            shutil.rmtree(folder, ignore_errors=True)


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
        self._num_sent = self._num_tokens = 0
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
        rid = self._handover.rid(self._num_sent, request.is_teaching_T)
        job = Job(rid, request.input_ids_T.tolist(), PREFILL_ONLY)
        self._open.append(job)
        self._num_tokens += num_tokens
        self._num_sent += 1
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


def remove_leftovers(parent: Path) -> None:
    """Remove the folders there whose makers are gone."""
    for folder in parent.glob(f"{PREFIX}*"):
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            logger.info("removing %s, left by a run that was cut short", folder)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _make_folder(parent: Path) -> _Folder:
    """A new folder that `remove_leftovers` leaves alone while this process lives."""
    # Renamed once it is locked: a folder without a lock is a leftover.
    folder = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return _Folder(folder.rename(parent / folder.name.removeprefix(".")), lock)


def _choose(parents: Sequence[Path], token_bytes: int, *, most: int, least: int) -> _Room:
    """The first folder with room for `most` tokens in flight, else for half of that, and so on down to `least`.

    Args: least: of the longest document. Raises: ValueError if there is none.
    """
    held_bytes = HELD_DOCUMENTS * least * token_bytes
    free = {parent: int(ROOM_SHARE * shutil.disk_usage(parent).free) - held_bytes for parent in parents}
    num_tokens = most
    while True:
        for parent, free_bytes in free.items():
            if num_tokens * token_bytes <= free_bytes:
                if (parent, num_tokens) != (parents[0], most):
                    logger.warning(
                        "hidden states go through %s, %d tokens at a time: %s has room for %d tokens, %d would be best",
                        parent, num_tokens, parents[0], free[parents[0]] // token_bytes, most,
                    )  # fmt: skip
                return _Room(parent, num_tokens)
        if num_tokens == least:
            sizes = ", ".join(f"{parent} has {(size + held_bytes) / 2**30:.2f} GiB" for parent, size in free.items())
            needed = f"{(held_bytes + least * token_bytes) / 2**30:.2f} GiB"
            raise ValueError(
                f"hidden states of documents of {least} tokens take {needed} on their way, but {sizes} to use: free "
                "some, or lower training.max_document_tokens"
            )
        num_tokens = max(least, num_tokens // 2)


def _rows(name: str) -> range:
    """Of a document, in a file of that name."""
    return range(*map(int, name.partition(".")[0].split("-")))
