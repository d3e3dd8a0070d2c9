"""Roll back: users get an older draft again, where they got the newer one.

The older draft is published as a build would do it: its repository is made from its artifact in the store and its
report, the folder's link moves, and the Hub's repository becomes what the folder is in one commit, which gets the tag
`champion`. So each place is whole at every moment. Before that, the newer versions are marked, so that no build
publishes them again; last, the registry's alias moves. What a kill leaves is completed by the same command, or called
off with `--to`.

The data set of the regenerated conversations stays as it is: no draft is loaded from there.
"""

from pathlib import Path
from typing import NamedTuple

from specforge_core.artifacts import BuildArtifacts, Store, damaged_files
from specforge_core.benchmark.report import EntryReport
from specforge_core.facts import Published, Rejected
from specforge_core.hub.access import check_write_access
from specforge_core.hub.publication import Part, publish_parts
from specforge_core.hub.repository import publish_directory, repository_files
from specforge_core.hub.restore import recorded_artifacts
from specforge_core.hub.upload import Repository
from specforge_core.ledger import last_artifact, record_outcome
from specforge_core.manifest import ManifestEntry
from specforge_core.resolve import resolve_target
from tasks.gates import rolled_back
from tasks.publish import collection_note, open_hub
from tasks.registry import (
    DraftVersion,
    Rollback,
    begin_rollback,
    finish_rollback,
    must_answer,
    plan_rollback,
    report_of,
)
from tasks.stage import find_artifact


class RolledBack(NamedTuple):
    """What a rollback did, and where the older draft lies now."""

    rollback: Rollback
    published: Published


def roll_back(entry: ManifestEntry, number: int | None, *, base_dir: Path, store: Path) -> RolledBack:
    """Give users an older draft of the entry again.

    Args: number: of its version; the champion before this one when absent.
    Raises: ValueError if there is no such version, its files are gone, or the Hub refuses; ConnectionError if registry
    or Hub are out of reach. What can be known before is asked before anything changes.
    """
    with must_answer(store):
        rollback = plan_rollback(entry.name, number, store=store)
        report = _as_published_now(report_of(rollback.to, store=store), entry)
        artifacts = _stored_artifacts(report, rollback.to, store)
        target = resolve_target(report.lineage.target(), base_dir, hash_cache=store / "digests")
        # It may have gone to the Hub, or not, whatever the manifest says now.
        name = rollback.left.repository
        hub, repository = (open_hub(), Repository(name, private=entry.publish.private)) if name else (None, None)
        if hub and repository:
            check_write_access(hub, repository)
        begin_rollback(rollback, store=store)
        files = repository_files(report, artifacts, target)
        published = publish_directory(store / entry.publish.directory, entry.name, files)
        if hub and repository:
            parts = [Part(repository, published.path, collection_note(report))]
            uploaded = publish_parts(hub, parts, entry.publish.collection)
            on_hub = {"repository": repository.name, "revision": uploaded.revision, "url": uploaded.url}
            published = published.model_copy(update=on_hub)
        finish_rollback(rollback, published, store=store)
    _record(rollback, published, store=store)
    return RolledBack(rollback, published)


def _record(rollback: Rollback, published: Published, *, store: Path) -> None:
    """Correct how the entry's last build ended, if that was with a draft of either version."""
    name = rollback.to.entry
    last = last_artifact(Store(store), name, "export")
    if last and last.content_id == rollback.to.draft:
        record_outcome(store, name, published)
    for version in rollback.undone:
        if last and last.content_id == version.draft:
            record_outcome(store, name, Rejected(failures=(rolled_back(version.number),)))


def _as_published_now(report: EntryReport, entry: ManifestEntry) -> EntryReport:
    """Without what was said at its gates, as the report that is published; and to where the entry publishes today."""
    lineage = report.lineage
    old_entry = lineage.entry.model_copy(update={"publish": entry.publish})
    lineage = lineage.model_copy(update={"entry": old_entry})
    return report.model_copy(update={"lineage": lineage, "failures": (), "comparison": None})


def _stored_artifacts(report: EntryReport, version: DraftVersion, store: Path) -> BuildArtifacts:
    recorded = recorded_artifacts(report, store)
    draft = find_artifact(recorded.draft, store)
    if draft is None or damaged_files(draft, read_content=True):
        raise ValueError(
            f"version {version.number} of {version.entry} cannot be published again: its draft, {version.draft}, is no "
            f"longer in {recorded.draft.path}; build it from the manifest of that time, or name another version"
        )
    return recorded._replace(draft=draft)
