"""Folders that go with the process that made them, or with the next one if it was killed. Torch-free."""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

MEMORY = Path("/dev/shm")


@contextlib.contextmanager
def locked_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder that `remove_leftovers` leaves alone while this process lives; it goes with the block."""
    # Renamed once it is locked: a folder without a lock is a leftover.
    hidden = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))
    lock = os.open(hidden, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = hidden.rename(parent / hidden.name.removeprefix("."))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove the folders there whose makers are gone."""
    for folder in parent.glob(f"{prefix}*"):
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
