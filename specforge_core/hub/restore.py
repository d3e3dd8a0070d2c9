"""A published draft as the artifact that it was: out of its repository's folder, by its report. Torch-free."""

import shutil
from pathlib import Path
from typing import Any

from specforge_core.artifacts import (
    RECORD_NAME,
    Artifact,
    BuildArtifacts,
    FileRecord,
    content_id_of_files,
    damaged_files,
    load_artifact,
    write_atomically,
)
from specforge_core.benchmark.report import EntryReport
from specforge_core.digests import files_sha256
from specforge_core.facts import Record, ServingDraft

RESTORED = "restored_drafts"
"""Folder of the store, which holds them by content id: a key may have been built again since, with another content."""
DRAFT_FILES = ("*.json", "*.safetensors")
"""All that is read of a repository."""
# What publishing adds to the draft's own.
ADDED = frozenset({"lineage.json", "benchmark_result.json"})


def recorded_artifacts(report: EntryReport, store: Path) -> BuildArtifacts:
    """The artifacts that a report speaks of, as it knows them; their files may be in the store, or not."""
    stages = report.lineage.stages.items()
    recorded = [
        _recorded(getattr(report, field), stage, dict(lineage), store)
        for field, (stage, lineage) in zip(BuildArtifacts._fields, stages, strict=True)
    ]
    return BuildArtifacts(*recorded)


def _recorded(facts: Record, stage: str, lineage: dict[str, Any], store: Path) -> Artifact[Any]:
    artifact: Artifact[Any] = Artifact[type(facts)](stage=stage, files={}, facts=facts, **lineage)  # type: ignore[misc, operator]
    artifact._path = store / stage / artifact.key
    return artifact


def restore_draft(folder: Path, recorded: Artifact[ServingDraft], store: Path) -> Artifact[ServingDraft]:
    """The draft in a repository's folder, as an artifact that a benchmark reads.

    Args: recorded: what the draft's report says of it.
    Raises: ValueError if the folder holds anything else than that draft.
    """
    paths = sorted(path for pattern in DRAFT_FILES for path in folder.rglob(pattern) if path.is_file())
    by_name = {name: path for path in paths if (name := path.relative_to(folder).as_posix()) not in ADDED}
    hashes = files_sha256(list(by_name.values()), desc=f"reading {folder.name}")
    content_id = content_id_of_files(recorded.facts, dict(zip(by_name, hashes, strict=True)))
    if content_id != recorded.content_id:
        raise ValueError(
            f"{folder} is not the draft that was published: its {len(by_name)} files have the content id {content_id}, "
            f"the draft's report says {recorded.content_id}; publish it again with `specbundle rollback` or a build"
        )
    place = store / RESTORED / content_id
    if (place / RECORD_NAME).is_file():
        found = load_artifact(place, ServingDraft)
        if not damaged_files(found):
            return found
        shutil.rmtree(place)
    copy = place.with_name(f".building-{content_id}")
    shutil.rmtree(copy, ignore_errors=True)
    for name, path in by_name.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy / name)
    files = {
        name: FileRecord(size_bytes=path.stat().st_size, sha256=sha256)
        for (name, path), sha256 in zip(by_name.items(), hashes, strict=True)
    }
    record = recorded.model_copy(update={"files": files})
    write_atomically(copy / RECORD_NAME, record.model_dump_json(indent=1) + "\n")
    return load_artifact(copy.rename(place), ServingDraft)
