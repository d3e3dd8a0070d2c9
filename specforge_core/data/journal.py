"""What an unfinished stage asked and was answered, kept line by line: a kill costs what was in flight and no more."""

import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from specforge_core.targets import Completion, FinishReason, GenerationRequest

logger = logging.getLogger(__name__)

SYNC_INTERVAL_S = 1.0
"""What a power failure may cost. What a killed process wrote is safe with the kernel."""


class Exchange(NamedTuple):
    """A prompt as it was put to the target, and its answer, as token ids."""

    prompt_ids: tuple[int, ...]
    """Kept because a chat template may write today's date: rendered again, it might be another prompt."""
    answer_ids: tuple[int, ...]
    finish_reason: FinishReason


class Journal:
    """An append-only JSON Lines file of exchanges; memory holds only where each one lies."""

    def __init__(self, path: Path, *, key: str) -> None:
        """Open the journal, or begin one. Raises: ValueError if it was begun for another key."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._offsets: dict[str, int] = {}
        self._synced_at = time.monotonic()
        self._file.seek(0)
        end = 0
        for line in self._file:
            # A kill in the middle of a write leaves a line without its end.
            if not line.endswith(b"\n"):
                logger.warning("%s: dropped an unfinished line of %d bytes", path, len(line))
                break
            fields = json.loads(line)
            if end > 0:
                self._offsets[fields["id"]] = end
            elif fields["key"] != key:
                raise ValueError(
                    f"{path} was begun for spec {fields['key']}, this is {key}: delete it or name another folder"
                )
            end += len(line)
        self._file.truncate(end)
        if end == 0:
            self._write({"key": key})

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[str]:
        """Ids of the requests, in the order of their answers."""
        return iter(self._offsets)

    def __getitem__(self, request_id: str) -> Exchange:
        """What was asked and answered. Raises: KeyError if it is not there."""
        self._file.seek(self._offsets[request_id])
        fields = json.loads(self._file.readline())
        return Exchange(tuple(fields["prompt_ids"]), tuple(fields["answer_ids"]), fields["finish_reason"])

    def append(self, request: GenerationRequest, completion: Completion) -> None:
        """Add an exchange. Raises: ValueError if the request has one already."""
        if request.id in self:
            raise ValueError(f"request {request.id} was answered twice")
        exchange = Exchange(tuple(request.input_ids), completion.token_ids, completion.finish_reason)
        self._offsets[request.id] = self._write({"id": request.id, **exchange._asdict()})

    def close(self) -> None:
        """Bring everything to the disk and close the file."""
        os.fsync(self._file.fileno())
        self._file.close()

    def _write(self, value: dict[str, object]) -> int:
        """Where the new line starts, in bytes."""
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._synced_at >= SYNC_INTERVAL_S:
            os.fsync(self._file.fileno())
            self._synced_at = time.monotonic()
        return offset
