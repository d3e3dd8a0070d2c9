"""Typed artifact records, and the store that holds them by key. Torch-free.

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
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, computed_field, model_validator

from specforge_core.digests import digest, file_sha256, files_sha256
from specforge_core.manifest import ServingConfig

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


class Record(BaseModel):
    """Base of everything that is written to a record file: frozen, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Conversations(Record):
    """Facts about regenerated conversations. Token counts are in target tokens."""

    num_conversations: int
    num_tokens: int
    num_loss_tokens: int
    """Tokens that the target produced."""
    num_failed: int
    """Prompts that gave no usable conversation."""
    num_cut_off: int
    """Conversations whose last answer reached the limit of new tokens."""
    chat_template_sha256: str


class Vocabulary(Record):
    """Facts about a draft vocabulary."""

    draft_vocab_size: int
    target_vocab_size: int
    coverage: float
    """Share of the supervised tokens that are in the draft vocabulary."""


class HiddenStates(Record):
    """Facts about captured features."""

    layers: tuple[int, ...]
    """Decoder layers whose output was captured, counted from 0, in the order stored."""
    num_target_layers: int
    hidden_size: int
    dtype: str
    num_documents: int
    num_tokens: int
    num_loss_tokens: int
    num_shards: int


class DraftCheckpoint(Record):
    """Facts about a trained draft. Positions are draft positions, the first one first."""

    algorithm: str
    step: int
    tokens_seen: int
    num_parameters: int
    eval_loss: float
    eval_accuracy: tuple[float, ...]
    """Greedy matches with the target, by position."""
    eval_acceptance: tuple[float, ...]
    """Expected acceptance probability, by position."""
    eval_acceptance_length: float
    """Tokens per verification step of a speculative loop over held-out conversations."""


class ServingDraft(Record):
    """Facts about an exported draft."""

    architecture: str
    num_parameters: int
    max_reload_error: float
    """Largest difference of logits between the trained and the re-loaded draft; must be 0."""


class Environment(Record):
    """What a measurement ran on."""

    cpu: str
    num_threads: int
    gpu: str | None
    versions: dict[str, str]
    commit: str | None
    command: str


class Lossless(Record):
    """Outputs with draft against outputs without, by prompt."""

    num_identical: int
    num_near_tie: int
    """First difference at two tokens whose float32 logits are closer than rounding."""
    num_different: int


class Measurement(Record):
    """One suite at one serving configuration. Sums, and what follows from them."""

    suite: str
    serving: ServingConfig
    num_prompts: int
    num_output_tokens: int
    num_verify_steps: int
    accepted_by_position: tuple[int, ...]
    """Verification steps in which the draft token at this position was accepted."""
    ngram_acceptance_length: float
    """The same engine with an n-gram drafter, so that predictable text is not oversold."""
    baseline_output_tokens_per_s: tuple[float, ...]
    """Without draft, one value per repeat."""
    output_tokens_per_s: tuple[float, ...]
    """With draft, one value per repeat, interleaved with the above."""
    speedup: float
    speedup_low: float
    speedup_high: float
    """Median of the repeats' ratios, and its 95 % interval."""
    lossless: Lossless | None
    """None for a sampled run: there the distribution is equal, not the text."""

    @model_validator(mode="before")
    @classmethod
    def _drop_derived(cls, values: Any) -> Any:
        # Files carry it for their readers; here it follows from the sums.
        return {k: v for k, v in values.items() if k != "acceptance_length"} if isinstance(values, dict) else values

    @computed_field  # type: ignore[prop-decorator]
    @property
    def acceptance_length(self) -> float:
        """Tokens per verification step, the target's own token included; SGLang's `spec_accept_length`."""
        return self.num_output_tokens / self.num_verify_steps


class BenchmarkResult(Record):
    """What a draft was measured to do."""

    measurements: tuple[Measurement, ...]
    environment: Environment


FactsT = TypeVar("FactsT", bound=Record)


class GateFailure(Record):
    """One threshold of the manifest that a draft did not reach."""

    gate: str
    """Field of `gates` in the manifest, or `speedup_is_possible`, which every measurement must pass."""
    suite: str | None
    """None if the gate is about the draft as a whole."""
    measured: float | None
    """None if nothing measured it."""
    required: float
    message: str
    """Both values, where they were measured, and what to try."""


class Published(Record):
    """A draft that passed its gates, and where it lies."""

    path: Path
    content_id: str
    """Digest of the repository's files."""
    changed: bool
    """False if exactly these files were there already."""


class Rejected(Record):
    """A draft that did not pass its gates."""

    failures: tuple[GateFailure, ...]


class Withheld(Record):
    """A draft that passed its gates in a build that publishes nothing."""


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


def seal(
    directory: Path,
    facts: FactsT,
    *,
    stage: str,
    key: str,
    inputs: dict[str, str],
    elapsed_s: float,
    hardware: str | None = None,
) -> Artifact[FactsT]:
    """The artifact made of the files now in `directory`; writes its `artifact.json`."""
    for leftover in directory.rglob(f".*{PARTIAL_SUFFIX}"):
        # From a writer that was killed; as content it would change what depends on this artifact.
        leftover.unlink()
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    by_name = {path.relative_to(directory).as_posix(): path for path in paths}
    content = {name: path for name, path in by_name.items() if name.partition("/")[0] not in NOT_CONTENT}
    hashes = files_sha256(list(content.values()), desc=f"sealing {stage}")
    files = {
        name: FileRecord(size_bytes=path.stat().st_size, sha256=sha256)
        for (name, path), sha256 in zip(content.items(), hashes, strict=True)
    }
    artifact: Artifact[FactsT] = Artifact[type(facts)](  # type: ignore[misc, operator]
        stage=stage,
        key=key,
        content_id=digest({"facts": facts.model_dump(mode="json"), "files": {n: f.sha256 for n, f in files.items()}}),
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

    def find(self, stage: str, key: str, facts_type: type[FactsT]) -> Artifact[FactsT] | None:
        """The whole artifact under this key, or None. A damaged one is reported and counts as absent."""
        directory = self.root / stage / key
        try:
            artifact = load_artifact(directory, facts_type)
        except FileNotFoundError:
            return None
        except ValidationError as error:
            logger.warning("%s has an unreadable %s, so it is built again: %s", directory, RECORD_NAME, error)
            return None
        if damaged := damaged_files(artifact):
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
