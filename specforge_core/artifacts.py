"""Typed records of artifacts, and the store that holds them by key. Torch-free.

An artifact is a directory, whole once its `artifact.json` is there, which is written last. The store builds each
artifact under `<root>/<stage>/.building-<key>/`, where an interrupted stage finds its progress again, and renames it
to `<root>/<stage>/<key>/`. Two builds with one key never run at once.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import PrivateAttr, ValidationError

from specforge_core.digests import digest, file_sha256, files_sha256
from specforge_core.facts import (
    BenchmarkResult,
    Conversations,
    DraftCheckpoint,
    HiddenStates,
    Record,
    ServingDraft,
    Vocabulary,
)

logger = logging.getLogger(__name__)

RECORD_NAME = "artifact.json"
SPEC_NAME = "spec.json"
LOG_NAME = "stage.log"
METRICS_NAME = "metrics.jsonl"
SERVERS_DIRECTORY = "servers"
"""Logs and records of the servers that a stage ran."""
PROGRESS_DIRECTORY = "progress"
"""What an interrupted stage goes on from, inside its artifact: gone once the record is written."""
# These say how an artifact came to be, not what it is: an upstream rerun with the same bytes must change nothing below.
NOT_CONTENT = frozenset({RECORD_NAME, SPEC_NAME, LOG_NAME, METRICS_NAME, SERVERS_DIRECTORY, PROGRESS_DIRECTORY})
PARTIAL_SUFFIX = ".partial"


FactsT = TypeVar("FactsT", bound=Record)


class FileRecord(Record):
    """One file of an artifact."""

    size_bytes: int
    sha256: str


class Artifact(Record, Generic[FactsT]):
    """A stored artifact: its facts, the digests of its files and of its inputs, and where it lies."""

    stage: str
    key: str
    """Digest of everything that the stage read."""
    content_id: str
    """Digest of the content files."""
    inputs: dict[str, str]
    """Content id by input name."""
    created_at: datetime
    elapsed_s: float
    hardware: str | None = None
    """What computed it, for people; None if it was not recorded."""
    files: dict[str, FileRecord]
    facts: FactsT
    _path: Path = PrivateAttr()

    @property
    def path(self) -> Path:
        """The artifact's directory."""
        return self._path

    @property
    def sha256_by_name(self) -> dict[str, str]:
        """Of each file, when it was sealed."""
        return {name: file.sha256 for name, file in self.files.items()}


class BuildArtifacts(NamedTuple):
    """What the stages of one build left, in their order."""

    conversations: Artifact[Conversations]
    vocabulary: Artifact[Vocabulary]
    hidden_states: Artifact[HiddenStates]
    checkpoint: Artifact[DraftCheckpoint]
    draft: Artifact[ServingDraft]
    benchmark: Artifact[BenchmarkResult]


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new content, never a part."""
    # One name per writer: two of them may write the same content at once.
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL_SUFFIX}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_result(directory: Path, stem: str, result: Record, text: str) -> Path:
    """A measurement as `<stem>.json`, and for people as `<stem>.md`, which is returned."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / f"{stem}.json", result.model_dump_json(indent=1) + "\n")
    write_atomically(path := directory / f"{stem}.md", text)
    return path


def seal(
    directory: Path,
    facts: FactsT,
    *,
    stage: str,
    key: str,
    inputs: dict[str, str],
    elapsed_s: float,
    hardware: str | None = None,
    known_sha256: Mapping[str, str] = MappingProxyType({}),
) -> Artifact[FactsT]:
    """The artifact made of the files now in `directory`; writes its `artifact.json`.

    Args: known_sha256: of files that were hashed when they were written, by name; they are not read again.
    """
    for leftover in directory.rglob(f".*{PARTIAL_SUFFIX}"):
        # From a writer that was killed; as content it would change what depends on this artifact.
        leftover.unlink()
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    by_name = {path.relative_to(directory).as_posix(): path for path in paths}
    content = {name: path for name, path in by_name.items() if name.partition("/")[0] not in NOT_CONTENT}
    unknown = [name for name in content if name not in known_sha256]
    hashes = files_sha256([content[name] for name in unknown], desc=f"sealing {stage}")
    sha256 = {**known_sha256, **dict(zip(unknown, hashes, strict=True))}
    files = {name: FileRecord(size_bytes=path.stat().st_size, sha256=sha256[name]) for name, path in content.items()}
    artifact: Artifact[FactsT] = Artifact[type(facts)](  # type: ignore[misc, operator]
        stage=stage,
        key=key,
        content_id=content_id_of_files(facts, {name: file.sha256 for name, file in files.items()}),
        inputs=inputs,
        created_at=datetime.now(UTC),
        elapsed_s=round(elapsed_s, 3),
        hardware=hardware,
        files=files,
        facts=facts,
    )
    write_atomically(directory / RECORD_NAME, artifact.model_dump_json(indent=1) + "\n")
    # Only now: hashing may take minutes, and a kill until then must cost no more than that.
    shutil.rmtree(directory / PROGRESS_DIRECTORY, ignore_errors=True)
    artifact._path = directory
    return artifact


def content_id_of_files(facts: Record, sha256_by_name: Mapping[str, str]) -> str:
    """The content id of an artifact with these facts and content files."""
    return digest({"facts": facts.model_dump(mode="json"), "files": dict(sha256_by_name)})


def load_artifact(directory: Path, facts_type: type[FactsT]) -> Artifact[FactsT]:
    """The artifact in `directory`.

    Raises: FileNotFoundError if there is none, pydantic.ValidationError if its record is of another type or version.
    """
    record = (directory / RECORD_NAME).read_bytes()
    artifact = Artifact[facts_type].model_validate_json(record)  # type: ignore[valid-type]
    artifact._path = directory
    return artifact


def content_id_of(directory: Path) -> str:
    """The content id of the artifact in `directory`, whatever its type. Raises: FileNotFoundError."""
    content_id: str = json.loads((directory / RECORD_NAME).read_text(encoding="utf-8"))["content_id"]
    return content_id


def damaged_files(artifact: Artifact[Any], *, read_content: bool = False) -> list[str]:
    """Names of files that are gone or of another size; with `read_content` also those of another sha256."""
    return [
        name
        for name, file in artifact.files.items()
        if not (path := artifact.path / name).is_file()
        or path.stat().st_size != file.size_bytes
        or (read_content and file_sha256(path) != file.sha256)
    ]


class Building(NamedTuple):
    """An artifact that is being built by this process alone."""

    directory: Path
    """What an interrupted build left here is still here."""
    lock_fd: int
    """Hand it to child processes that build: then the lock outlives this process as long as they do."""


class Store:
    """Artifacts by stage and key, on a local file system."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def find(
        self, stage: str, key: str, facts_type: type[FactsT], *, read_content: bool = False
    ) -> Artifact[FactsT] | None:
        """The whole artifact under this key, or None. A damaged one is reported and counts as absent.

        Args: read_content: as of `damaged_files`.
        """
        directory = self.root / stage / key
        try:
            artifact = load_artifact(directory, facts_type)
        except FileNotFoundError:
            return None
        except ValidationError as error:
            logger.warning("%s has an unreadable %s, so it is built again: %s", directory, RECORD_NAME, error)
            return None
        if damaged := damaged_files(artifact, read_content=read_content):
            logger.warning(
                "%s misses or has changed %d of %d files, so it is built again; the first one is %s",
                directory,
                len(damaged),
                len(artifact.files),
                damaged[0],
            )
            return None
        return artifact

    @contextlib.contextmanager
    def building(self, stage: str, key: str) -> Iterator[Building]:
        """Where to build this artifact, locked. Waits while another process builds it, so ask `find` again inside."""
        locks = self.root / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / f"{stage}-{key}").open("w") as lock:
            # The kernel lets go of the lock when its last holder dies.
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another process builds %s/%s; waiting for it", stage, key)
                fcntl.flock(lock, fcntl.LOCK_EX)
            directory = self.root / stage / f".building-{key}"
            if (directory / RECORD_NAME).is_file():
                # Its builder was killed after the last file and before the move.
                self._move(directory, stage, key)
            directory.mkdir(parents=True, exist_ok=True)
            yield Building(directory, lock.fileno())

    def commit(self, directory: Path, stage: str, key: str, facts_type: type[FactsT]) -> Artifact[FactsT]:
        """The sealed artifact in a building directory, moved to its place. Call it while the lock is held."""
        artifact = load_artifact(directory, facts_type)
        assert (artifact.stage, artifact.key) == (stage, key), f"{directory} was sealed as {artifact.key}, not {key}"
        return load_artifact(self._move(directory, stage, key), facts_type)

    def _move(self, directory: Path, stage: str, key: str) -> Path:
        place = self.root / stage / key
        if place.exists():
            # Only a damaged artifact is built again.
            shutil.rmtree(place)
        return directory.rename(place)
