"""Training on features that are made meanwhile: the spool's readers in each process, its producer beside the first one.

The producer (`targets/live.py`) is a child of the first process and ends with it. One that dies is started again and
goes on with what is still to be made. A training that was interrupted asks, in a new spool, for what comes behind its
last checkpoint.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import torch.distributed as dist

from specforge_core.artifacts import PROGRESS_DIRECTORY, write_atomically
from specforge_core.data.loader import DocumentSet, FeatureSet, StoredBatch, packed, prefetched, prepared
from specforge_core.data.shards import Shard
from specforge_core.data.spool import Order, Production, SpoolReader, fail, spool_folder
from specforge_core.drafts.base import DraftBatch
from specforge_core.gpus import visible_devices
from specforge_core.process import ProcessError, SupervisedProcess
from specforge_core.stages import USER_ERROR_STATUS, TrainSpec
from specforge_core.targets.capture import DocumentSize, document_size, supervised_documents
from specforge_core.targets.live import REQUEST_NAME, Request
from specforge_core.training.workers import Workers

logger = logging.getLogger(__name__)

PRODUCER_MODULE = "specforge_core.targets.live"
SPEC_NAME = "producer.spec.json"
LOG_NAME = "producer.log"
MAX_RESTARTS = 3
POLL_S = 0.2
NOTABLE_SHARE = 0.05
"""Of its time that one side waits for the other, before that is worth a line."""
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
    "TORCH_NCCL_ASYNC_",
)
"""Beginnings of what torchrun sets: the producer is none of its ranks."""


@contextmanager
def live_features(spec: TrainSpec, out: Path, workers: Workers) -> Iterator["LiveFeatures"]:
    """The documents of a training whose spec says what makes their features; the block ends the producer."""
    assert spec.live is not None
    assert spec.conversations is not None
    limit = spec.training.max_document_tokens
    stored = FeatureSet(spec.hidden_states, max_document_tokens=limit)
    sizes = {document.id: document_size(document) for document in supervised_documents(spec.conversations, limit)}
    max_bytes = int(spec.live.buffer_gib * 2**30)
    with ExitStack() as stack:
        folder = None
        if workers.is_first:
            folder = stack.enter_context(spool_folder(max_bytes, fallback=out / PROGRESS_DIRECTORY))
        spool = _of_first(folder, workers)
        if not spool.is_dir():
            # TODO: one producer for the processes of each node, once an entry trains live on several.
            raise ValueError(f"{spool} of the first process is not there: live features need all processes on one host")

        def start_producer() -> None:
            assert spec.live is not None
            gpus = visible_devices()[-spec.live.serve_gpus :] if spec.live.serve_gpus else ()
            # It is handed on, not read: what the trainer inherited is for the target's libraries as well.
            stack.enter_context(Producer(spec, spool, out, producer_environment(os.environ, gpus)))

        held_out = HeldOut(stored, spec.training.eval_fraction)
        yield LiveFeatures(sizes, held_out, spool, workers, start_producer, serve_gpus=spec.live.serve_gpus)


def _of_first(folder: Path | None, workers: Workers) -> Path:
    """What the first process has, in every process."""
    values = [folder]
    if workers.world_size > 1:
        dist.broadcast_object_list(values, src=0, device=workers.device)
    assert values[0] is not None
    return values[0]


class HeldOut(NamedTuple):
    """Which documents are not trained on, and their features."""

    features: FeatureSet
    """Of at least these documents."""
    fraction: float
    """As of `DocumentSet.split`."""


class LiveFeatures(DocumentSet):
    """Documents of which the held-out ones have stored features, and the others get theirs in time."""

    def __init__(
        self,
        sizes: Mapping[str, DocumentSize],
        held_out: HeldOut,
        spool: Path,
        workers: Workers,
        start_producer: Callable[[], None],
        *,
        serve_gpus: int,
    ) -> None:
        """Args: sizes: by document, cut already; start_producer: called by the first process, once it is said what is
        wanted; serve_gpus: that the producer has.
        """
        lengths, num_teaching = zip(*sizes.values(), strict=True)
        super().__init__(list(sizes), lengths, num_teaching, max_document_tokens=None)
        self._held_out = held_out
        self._is_held_out = frozenset(self.split(held_out.fraction).eval)
        self._spool, self._workers, self._start_producer = spool, workers, start_producer
        self._reader: SpoolReader | None = None
        self._place_by_id = {document_id: i for i, document_id in enumerate(held_out.features.document_ids)}
        self._serve_gpus, self._slower = serve_gpus, ""
        self._production = Production(0, 0.0, 0.0)
        self._restart()

    def begin(self, steps: Sequence[Sequence[Sequence[int]]], first_step: int) -> None:
        """See `DocumentSet`. Every process calls it with the same steps, those of all processes."""
        num_replicas = self._workers.num_replicas
        num_members = self._workers.world_size // num_replicas
        order = Order(
            first=sum(map(len, steps[:first_step])),
            groups=tuple(replica for step in steps[first_step:] for replica in self.dealt(step, num_replicas)),
            num_members=num_members,
        )
        self._reader = SpoolReader(
            self._spool, order, group=self._workers.replica, member=self._workers.rank % num_members
        )
        if not (self._workers.is_first and order.groups):
            return
        micro_batches = tuple(tuple(documents) for step in steps[first_step:] for documents in step)
        request = Request(order=order, micro_batches=micro_batches)
        write_atomically(self._spool / REQUEST_NAME, request.model_dump_json())
        self._start_producer()

    def batches(
        self,
        micro_batches: Iterable[Sequence[int]],
        *,
        prepare: Callable[[DraftBatch], DraftBatch],
        pin_memory: bool = False,
    ) -> Iterator[StoredBatch]:
        """See `DocumentSet`: micro-batches that are held out, or all that this process said it would want."""
        wanted = iter(micro_batches)
        first = next(wanted, None)
        if first is None:
            return iter(())
        micro_batches = chain([first], wanted)
        if first[0] in self._is_held_out:
            return self._held_out.features.batches(
                map(self._stored_places, micro_batches), prepare=prepare, pin_memory=pin_memory
            )
        assert self._reader is not None, "say first what is wanted"

        def load(item: tuple[int, Sequence[int]]) -> StoredBatch:
            return prepared(self._take(*item, pin_memory=pin_memory), prepare, pin_memory=pin_memory)

        return self._timed(prefetched(load, zip(self._reader.numbers, micro_batches, strict=True)))

    def metrics(self) -> dict[str, float]:
        """See `DocumentSet`. A rate is of the time in which that side does not wait for the other."""
        if self._reader is None or self._began_at is None or (production := self._reader.production()) is None:
            return {}
        made = production.since(self._production)
        if not made.num_tokens:
            # It waits since the last time, for longer than it has said.
            return {}
        elapsed_s = time.monotonic() - self._began_at
        metrics = {
            "live/produced_tokens_per_s": made.tokens_per_s,
            "live/producer_wait_share": made.waited_s / made.elapsed_s,
            "live/consumed_tokens_per_s": self._num_tokens * self._workers.num_replicas / (elapsed_s - self._waited_s),
            "live/trainer_wait_share": self._waited_s / elapsed_s,
        }
        self._production = production
        self._restart()
        self._say_who_is_slower(metrics)
        return metrics

    def _restart(self) -> None:
        """Count from the next batch on: in between there may be an evaluation."""
        self._num_tokens, self._waited_s = 0, 0.0
        self._began_at: float | None = None

    def _stored_places(self, documents: Sequence[int]) -> list[int]:
        """The same documents, as the stored ones are numbered."""
        return [self._place_by_id[self.document_ids[i]] for i in documents]

    def _take(self, number: int, documents: Sequence[int], *, pin_memory: bool) -> StoredBatch:
        """A batch out of the spool, which is not needed there any more."""
        assert self._reader is not None
        shard = Shard(self._reader.wait(number))
        expected = [self.document_ids[i] for i in documents]
        assert shard.document_ids == expected, f"item {number} holds {shard.document_ids}, wanted {expected}"
        parts = [shard.read(place, self.lengths[i]) for place, i in enumerate(documents)]
        stored = packed(parts, pin_memory=pin_memory)
        self._reader.done(number)
        return stored

    def _timed(self, batches: Iterator[StoredBatch]) -> Iterator[StoredBatch]:
        """The same, noting how long they are waited for."""
        while True:
            asked_at = time.monotonic()
            self._began_at = self._began_at or asked_at
            batch = next(batches, None)
            if batch is None:
                return
            self._waited_s += time.monotonic() - asked_at
            self._num_tokens += len(batch.batch.input_ids_T)
            yield batch

    def _say_who_is_slower(self, metrics: Mapping[str, float]) -> None:
        slower = slower_side(metrics)
        if slower and slower != self._slower:
            advice = {"target": "more", "training": "fewer"}[slower]
            logger.info(
                "the target makes %.0f tokens/s, the training takes %.0f: the slower is the %s%s",
                metrics["live/produced_tokens_per_s"], metrics["live/consumed_tokens_per_s"], slower,
                f", so {advice} of the GPUs should serve" if self._serve_gpus else "",
            )  # fmt: skip
            self._slower = slower


def slower_side(metrics: Mapping[str, float]) -> Literal["", "target", "training"]:
    """For whom the other one waits, by its rate as well; the empty text if neither is the slower by both.

    A wait alone proves little: the first one is for the start, and on shared cores each side holds up the other.
    """
    produced, consumed = metrics["live/produced_tokens_per_s"], metrics["live/consumed_tokens_per_s"]
    if metrics["live/trainer_wait_share"] > NOTABLE_SHARE and produced < consumed:
        return "target"
    if metrics["live/producer_wait_share"] > NOTABLE_SHARE and consumed < produced:
        return "training"
    return ""


class Producer:
    """The producer's process, started again when it dies, as a context manager: leaving the block ends it."""

    def __init__(self, spec: TrainSpec, spool: Path, out: Path, environment: Mapping[str, str]) -> None:
        """Args: spool: its folder, with the request; out: for logs; environment: as of `producer_environment`."""
        progress = out / PROGRESS_DIRECTORY
        spec_path = progress / SPEC_NAME
        progress.mkdir(parents=True, exist_ok=True)
        write_atomically(spec_path, spec.model_dump_json(indent=1) + "\n")
        paths = ["--spec", str(spec_path), "--spool", str(spool), "--out", str(out)]
        self._command = [sys.executable, "-m", PRODUCER_MODULE, *paths]
        self._environment, self._spool, self._log = environment, spool, progress / LOG_NAME
        self._ending = threading.Event()
        self._watcher = threading.Thread(target=self._run, name="producer")

    def __enter__(self) -> "Producer":
        self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        self._watcher.join()

    def _run(self) -> None:
        for num_starts in range(1, MAX_RESTARTS + 2):
            try:
                self._run_once()
            except ProcessError as error:
                is_last = num_starts > MAX_RESTARTS or error.status == USER_ERROR_STATUS
                if is_last:
                    fail(self._spool, str(error))
                    return
                logger.warning("starting the producer again (%d of %d times): %s", num_starts, MAX_RESTARTS, error)
            else:
                return

    def _run_once(self) -> None:
        """Return when it has made everything, or should end. Raises: ProcessError if it dies."""
        with SupervisedProcess(
            "the producer of features",
            self._command,
            log=self._log,
            env=self._environment,
            on_line=_pass_on,
        ) as process:
            while process.is_running and not self._ending.wait(POLL_S):
                pass
            if not self._ending.is_set():
                process.wait()


def _pass_on(line: str) -> None:
    sys.stderr.write(line + "\n")


def producer_environment(environ: Mapping[str, str], gpus: Sequence[str]) -> dict[str, str]:
    """The producer's variables: a trainer's own, but for its GPUs and what a launcher of ranks has set."""
    inherited = {name: value for name, value in environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    return {**inherited, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
