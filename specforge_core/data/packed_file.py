"""A safetensors file that is written part by part, each straight to its place, and a follower that hashes it meanwhile.

`safetensors.save_file` takes whole tensors: a shard would have to be in memory, for which fresh pages cost more time
than the copy, and then goes to the file at 0.4-0.5 GB/s where plain writes reach 0.9-3.6 (measured on one virtual
machine, 1.6 GB a file).
Source of the format: https://github.com/huggingface/safetensors, section "Format".
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.bool: "BOOL",
        torch.int32: "I32",
        torch.int64: "I64",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.float32: "F32",
    }
)
HEADER_ALIGNMENT = 8
WRITE_BYTES = 2**20
"""Of one call. Larger ones take five times as long into pages that are not there yet (ext4 on Linux 6.18)."""
HASH_BLOCK_BYTES = 2**23
SYNC_BYTES = 2**28
"""New ones that are brought to the disk at a time: what is left at the end is little."""


class Rows(NamedTuple):
    """What a tensor of the file will be."""

    num_rows: int
    row_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * self.dtype.itemsize


class PackedFile:
    """An open file of tensors whose sizes are known, as a context manager. Threads may write different rows at once."""

    def __init__(self, path: Path, tensors: Mapping[str, Rows], metadata: Mapping[str, str]) -> None:
        """Args: tensors: in the file's order."""
        self._tensors = tensors
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        self._begin: dict[str, int] = {}
        end = 0
        for name in tensors:
            num_rows, row_shape, dtype = tensors[name]
            assert end % dtype.itemsize == 0, f"{name} would lie at byte {end}, where its elements are not aligned"
            begin, end = end, end + num_rows * tensors[name].row_bytes
            self._begin[name] = begin
            shape = [num_rows, *row_shape]
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % HEADER_ALIGNMENT)
        start = len(text).to_bytes(8, "little") + text
        self._data_begins = len(start)
        # What lies there already is overwritten in place: new memory takes longer to get than to fill.
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.ftruncate(self._file, len(start) + end)
        # The disk's blocks at once: rows are written faster into them, and a full disk is known before the work.
        os.posix_fallocate(self._file, 0, len(start) + end)
        os.pwrite(self._file, start, 0)

    def __enter__(self) -> "PackedFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def place(self, name: str, row: int) -> int:
        """Where a row of that tensor begins in the file, in bytes."""
        return self._data_begins + self._begin[name] + row * self._tensors[name].row_bytes

    def write(self, name: str, first: int, parts: Sequence[Tensor]) -> None:
        """Put rows of that tensor, of any device, end to end behind its first `first` ones."""
        expected = self._tensors[name]
        for rows in parts:
            assert (tuple(rows.shape[1:]), rows.dtype) == expected[1:], (
                f"{name}: {rows.shape[1:]} {rows.dtype}, {expected}"
            )
        last = first + sum(map(len, parts))
        assert last <= expected.num_rows, f"{name}: rows {first} to {last}, {expected}"
        if (last - first) * expected.row_bytes <= WRITE_BYTES:
            parts = [torch.cat(list(parts))]
        place = self.place(name, first)
        for rows in parts:
            rest = rows.cpu().contiguous().view(-1).view(torch.uint8).numpy().data if rows.numel() else b""
            while rest:
                num_written = os.pwrite(self._file, rest[:WRITE_BYTES], place)
                rest, place = rest[num_written:], place + num_written


class Follower:
    """Hashes a file and brings it to the disk while it is written from front to back, in threads of its own."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._sha256 = hashlib.sha256()
        self._buffer = memoryview(bytearray(HASH_BLOCK_BYTES))
        self._hasher, self._syncer = ThreadPoolExecutor(1, "hash"), ThreadPoolExecutor(1, "sync")
        self._sync: Future[None] | None = None
        self._synced = 0

    def advance(self, end: int) -> None:
        """Note that the bytes up to `end` will not change any more."""
        self._hasher.submit(self._hash, end)
        if end - self._synced >= SYNC_BYTES and (self._sync is None or self._sync.done()):
            self._synced = end
            self._sync = self._syncer.submit(os.fdatasync, self._file.fileno())

    def finish(self) -> str:
        """The sha256 of the whole file, which is safe on the disk."""
        with self._file, self._hasher, self._syncer:
            hashed = self._hasher.submit(self._hash, os.fstat(self._file.fileno()).st_size)
            os.fsync(self._file.fileno())
            hashed.result()
        return self._sha256.hexdigest()

    def _hash(self, end: int) -> None:
        begin = self._file.tell()
        while begin < end:
            num_read = self._file.readinto(self._buffer[: end - begin])
            assert num_read, f"{self._file.name} ends at byte {begin}, not {end}"
            self._sha256.update(self._buffer[:num_read])
            begin += num_read
