"""Checkpoints to go on from, written beside the training by torch.distributed.checkpoint (DCP).

step-00000100/state.json      `TrainingState`
step-00000100/.metadata       where in the files below each tensor lies
step-00000100/__R_0.distcp    what process R wrote: parts of the draft and of its optimizers' state, by parameter name

What some processes wrote in one mesh, any others read in theirs. A checkpoint has its name once all of it is safe on
disk, and older ones go after that. All processes write to one folder: several nodes need a file system that they share.
"""

import io
import logging
import os
import pickle
import shutil
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import WriteResult
from torch.optim import Optimizer

from specforge_core.artifacts import PARTIAL_SUFFIX
from specforge_core.facts import Record
from specforge_core.training.sharding import Sharding
from specforge_core.training.workers import Workers

logger = logging.getLogger(__name__)

NUM_KEPT = 2
"""Newest checkpoints; the best one is kept as well."""
STATE_NAME = "state.json"
METADATA_NAMES = frozenset(
    {
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
    }
)
METADATA_RECORDS = frozenset(
    name for name, found in vars(dcp_metadata).items() if getattr(found, "__module__", "") == dcp_metadata.__name__
)
"""`Metadata` and the classes that it is made of, as this version of torch has them."""


class TrainingState(Record):
    """Where a training stands. Nothing in it is random: the order of documents follows from seed and epoch, and their
    micro-batches are the same for any number of processes, so the step says which come next.
    """

    key: str
    """Of the stage spec that is trained; a checkpoint of another one is not gone on from."""
    step: int
    """Optimizer steps done."""
    tokens_seen: int
    """Packed tokens, over all processes."""
    acceptance_length: float | None = None
    """On held-out conversations; None if nothing was evaluated at this step."""


class Checkpointer:
    """The checkpoints of one training. All its processes call each method, in the same order."""

    def __init__(self, directory: Path, sharding: Sharding, optimizers: Sequence[Optimizer], workers: Workers) -> None:
        """Args: optimizers: of `sharding`."""
        self.directory = directory
        self._sharding, self._optimizers = sharding, tuple(optimizers)
        # Of its own, so that what the writers tell each other never meets the collective calls of the training. DCP
        # would take that of the training for one process too, which on GPUs has no backend for CPUs.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        # Pinned memory is kept for the next checkpoint: to get gigabytes of it takes longer than to fill them.
        self._stager = BlockingAsyncStager(cache_staged_state_dict=workers.device.type == "cuda")
        self._writing: Future[Metadata] | None = None
        if self._group is None:
            # That is how a process alone is meant to be saved.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        if workers.is_first:
            for leftover in directory.glob(f".*{PARTIAL_SUFFIX}"):
                shutil.rmtree(leftover)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Behind an error too: what is on its way may be what the next try goes on from.
        wait([self._writing] if self._writing else [])

    def save(self, state: TrainingState) -> None:
        """Begin a checkpoint of this moment; once its tensors are copied the training may go on, and this returns.

        Raises: what the last one failed by.
        """
        self.finish()
        writing = dcp.async_save(
            self._sharding.state(self._optimizers),
            storage_writer=_Writer(self.directory, state),
            process_group=self._group,
            async_stager=self._stager,
            no_dist=self._group is None,
        )
        # The other answer is that of a stager with threads of its own.
        assert isinstance(writing, Future)
        self._writing = writing

    @property
    def is_writing(self) -> bool:
        """Whether this process still writes the last checkpoint, or the first one waits for others that do."""
        return self._writing is not None and not self._writing.done()

    def finish(self) -> None:
        """Return when the last checkpoint is whole. Raises: what it failed by."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def newest(self) -> Path | None:
        """The whole checkpoint of the latest step, or None."""
        return self._agreed(max(checkpoints(self.directory), default=None))

    def best(self) -> Path | None:
        """The whole checkpoint of the greatest acceptance length, or None if none has one."""
        return self._agreed(best_checkpoint(self.directory))

    @torch.no_grad()
    def load(self, path: Path, *, key: str) -> TrainingState:
        """Where the checkpoint stands; draft and optimizers are set to what they were then.

        Raises: ValueError if it is of another stage spec, or no checkpoint of a draft.
        """
        state = load_state(path)
        if state.key != key:
            raise ValueError(
                f"{path} was trained by another spec (key {state.key}, not {key}); "
                f"name another --out or delete {path.parent}"
            )
        # DCP will read it as a pickle, which could run anything.
        with (path / ".metadata").open("rb") as file:
            _MetadataUnpickler(file).load()
        # In place. What is no tensor of these, such as a learning rate, follows from the spec.
        tensors = self._sharding.state(self._optimizers)
        dcp.load(
            tensors,
            storage_reader=dcp.FileSystemReader(path),
            planner=_TensorsOnly(),
            process_group=self._group,
            no_dist=self._group is None,
        )
        self._sharding.gather_parameters()
        return state

    def _agreed(self, path: Path | None) -> Path | None:
        """What the first process found: the others' file systems may be a little behind."""
        found = [path]
        if self._group is not None:
            dist.broadcast_object_list(found, src=0, group=self._group)
        return found[0]


class _Writer(dcp.FileSystemWriter):
    """Writes a checkpoint under a name that does not count. The first process gives it its own when it is whole."""

    def __init__(self, directory: Path, state: TrainingState) -> None:
        self._place = directory / f"step-{state.step:08d}"
        self._partial = _partial_name(self._place)
        self._state = state
        self._started_at = time.monotonic()
        super().__init__(self._partial)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called in the first process, once all of them have written and synchronised their parts."""
        super().finish(metadata, results)
        with (self._partial / STATE_NAME).open("w", encoding="utf-8") as file:
            file.write(self._state.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._partial.rename(self._place)
        size_gib = sum(path.stat().st_size for path in self._place.iterdir()) / 2**30
        logger.info("saved %s (%.2f GiB in %.1f s)", self._place, size_gib, time.monotonic() - self._started_at)
        _remove_old(self._place.parent)


class _TensorsOnly(dcp.DefaultLoadPlanner):
    """A checkpoint of this project holds tensors; DCP would read anything else as a pickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise ValueError(f"{read_item.storage_index.fqn} is no tensor, so this is no checkpoint of a draft: delete it")


class _MetadataUnpickler(pickle.Unpickler):
    """What `.metadata` may name: dtypes, shapes, layouts, and the records that describe them."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in METADATA_NAMES or (module == dcp_metadata.__name__ and name in METADATA_RECORDS):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        raise ValueError(f"a checkpoint's .metadata names {module}.{name}, which DCP does not write: delete it")


def checkpoints(directory: Path) -> list[Path]:
    """Whole checkpoints, the oldest first."""
    return sorted(directory.glob("step-*"))


def best_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of the greatest acceptance length, the latest of several; None if none has one."""
    states = [(load_state(path), path) for path in checkpoints(directory)]
    evaluated = [(state.acceptance_length, path) for state, path in states if state.acceptance_length is not None]
    return max(evaluated)[1] if evaluated else None


def load_state(path: Path) -> TrainingState:
    """Where a whole checkpoint stands."""
    return TrainingState.model_validate_json((path / STATE_NAME).read_text(encoding="utf-8"))


def _remove_old(directory: Path) -> None:
    kept = {*checkpoints(directory)[-NUM_KEPT:], best_checkpoint(directory)}
    for path in checkpoints(directory):
        if path not in kept:
            # It may take a while to delete, and half of a checkpoint must not count.
            shutil.rmtree(path.rename(_partial_name(path)))


def _partial_name(path: Path) -> Path:
    return path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
