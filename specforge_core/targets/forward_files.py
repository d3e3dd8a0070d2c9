"""Forwards of SGLang servers, from the files that `sglang_hook.py` writes there, and the documents in them.

A file loses its name as soon as it is mapped: its memory is free again when the last document of it is let go.

N rows of a forward, U of them teach, T tokens of one document, L captured layers, D target width.
"""

import json
import math
import mmap
import os
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from specforge_core.targets import TargetFeatures
from specforge_core.targets.sglang_hook import Piece, Wanted


class HookError(RuntimeError):
    """The hook inside the server failed. Its traceback."""


class Layout(NamedTuple):
    """What a token has."""

    layers: tuple[int, ...]
    hidden_size: int
    dtype: torch.dtype
    """Of the target."""

    @property
    def token_bytes(self) -> int:
        """Of a token that teaches: captured layers, last hidden state, greedy token, log-sum-exp."""
        return self.forward_bytes(1, 1)

    def forward_bytes(self, num_rows: int, num_teaching: int) -> int:
        """Of a forward with so many rows, of which so many teach."""
        state_bytes = self.hidden_size * self.dtype.itemsize
        return num_rows * len(self.layers) * state_bytes + num_teaching * (state_bytes + 2 * 4)


class _Part(NamedTuple):
    """What one forward has of a document."""

    rows: range
    """In the document."""
    features: TargetFeatures


class ForwardFiles:
    """What servers have left in a folder. Documents are taken in the order of their numbers."""

    def __init__(self, directory: Path, layout: Layout) -> None:
        self._directory, self._layout = directory, layout
        self._next = 0
        # By document and attempt.
        self._parts: defaultdict[int, defaultdict[str, list[_Part]]] = defaultdict(lambda: defaultdict(list))
        self._errors: dict[str, str] = {}

    def take(self, request: Wanted) -> TargetFeatures | None:
        """The features of a request, as views of a forward; None while some are missing.

        What there is of the document's other attempts is forgotten, and so are those of documents before it.
        Raises: HookError with what the hook says.
        """
        parts = self._whole(request)
        if parts is None:
            self._read_new()
            parts = self._whole(request)
        if parts is None:
            return None
        for number in range(self._next, request.document + 1):
            self._parts.pop(number, None)
        self._next = request.document + 1
        if len(parts) == 1:
            return parts[0]
        return TargetFeatures(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def _whole(self, request: Wanted) -> list[TargetFeatures] | None:
        """The parts of a request, in order; None while some are missing. Raises: HookError."""
        if request.attempt in self._errors:
            raise HookError(self._errors[request.attempt])
        by_start: dict[int, _Part] = {}
        for part in self._parts[request.document][request.attempt]:
            # A request that a server had to put aside was computed again from its first row.
            by_start[part.rows.start] = max(part, by_start.get(part.rows.start, part), key=lambda part: len(part.rows))
        found = []
        num_rows = 0
        while num_rows in by_start:
            found.append(by_start[num_rows].features)
            num_rows = by_start[num_rows].rows.stop
        return found if num_rows == request.num_tokens else None

    def _read_new(self) -> None:
        for name in os.listdir(self._directory):
            if not name.startswith("."):
                self._read(self._directory / name)

    def _read(self, path: Path) -> None:
        """Take in one file. Raises: HookError if it is not what the target's config says."""
        with path.open("r+b") as file:
            line = file.readline()
            header = json.loads(line)
            size_bytes = os.fstat(file.fileno()).st_size
            if "error" in header:
                self._errors.update((attempt, header["error"]) for _, attempt in header["failed"])
            else:
                self._check(header, size_bytes - len(line))
                # Its pages are mapped when they are copied: all at once they would hold up the interpreter for 30 ms.
                self._take_in(header, mmap.mmap(file.fileno(), size_bytes), len(line))
        path.unlink()

    def _check(self, header: dict[str, Any], size_bytes: int) -> None:
        expected = self._layout.forward_bytes(header["num_rows"], header["num_teaching"])
        if (f"torch.{header['dtype']}", size_bytes) != (str(self._layout.dtype), expected):
            raise HookError(
                f"{header['num_rows']} rows have {size_bytes} bytes in {header['dtype']} instead of {expected} in "
                f"{self._layout.dtype}: the server's model has another width or dtype than the target's config says"
            )

    def _take_in(self, header: dict[str, Any], memory: mmap.mmap, begin: int) -> None:
        """Note whose rows the forward has. Its pages are the tensors' memory."""
        layers, width, dtype = self._layout
        num_teaching = header["num_teaching"]
        shapes = ((num_teaching,), (num_teaching,), (num_teaching, width), (header["num_rows"], len(layers), width))
        dtypes = (torch.float32, torch.int32, dtype, dtype)
        sizes = [math.prod(shape) * part_dtype.itemsize for shape, part_dtype in zip(shapes, dtypes, strict=True)]
        parts = torch.frombuffer(memory, dtype=torch.uint8, offset=begin).split(sizes)
        logsumexp_U, argmax_U, last_hidden_UD, aux_hidden_NLD = (
            part.view(part_dtype).view(shape) for part, part_dtype, shape in zip(parts, dtypes, shapes, strict=True)
        )
        for piece in (Piece(*values) for values in header["pieces"]):
            if piece.document < self._next:
                # Sent again meanwhile, and taken.
                continue
            rows = slice(piece.first, piece.first + piece.stop - piece.start)
            teaching = slice(piece.first_teaching, piece.first_teaching + piece.num_teaching)
            features = TargetFeatures(
                aux_hidden_NLD[rows], last_hidden_UD[teaching], argmax_U[teaching], logsumexp_U[teaching]
            )
            part = _Part(range(piece.start, piece.stop), features)
            self._parts[piece.document][piece.attempt].append(part)
