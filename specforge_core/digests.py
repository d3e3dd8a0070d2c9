"""Digests of values and of files. Torch-free."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from specforge_core.progress import progress

NUM_THREADS = 8
# A bar for files that are read in less than this would only be noise.
SILENT_S = 5.0


def digest(value: Any) -> str:
    """The first 20 hexadecimal digits of the sha256 of a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def file_sha256(path: Path) -> str:
    """The sha256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(paths: Sequence[Path], *, desc: str) -> list[str]:
    """The sha256 of each file. Several at once: hashing lets go of the interpreter lock."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        hashes = pool.map(file_sha256, paths)
        return list(progress(hashes, desc=desc, total=len(paths), unit="file", delay=SILENT_S))


def folder_sha256(folder: Path) -> dict[str, str]:
    """The sha256 of every file below a folder, by its name there; empty if there is no folder."""
    root = folder.resolve()
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    hashes = files_sha256(paths, desc=f"reading {folder.name}")
    return {path.relative_to(root).as_posix(): sha256 for path, sha256 in zip(paths, hashes, strict=True)}
