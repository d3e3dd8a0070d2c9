"""The published draft of an entry, as the artifacts that a benchmark reads and a report speaks of."""

from pathlib import Path

from huggingface_hub.errors import LocalEntryNotFoundError
from prefect import task
from prefect.cache_policies import NO_CACHE

from specforge_core.artifacts import Artifact, BuildArtifacts
from specforge_core.benchmark.report import EntryReport
from specforge_core.facts import Conversations
from specforge_core.hub.restore import DRAFT_FILES, recorded_artifacts, restore_draft
from specforge_core.ledger import record_stage
from tasks.publish import open_hub
from tasks.registry import DraftVersion
from tasks.stage import EntryBuild, find_artifact, run_logger


@task(task_run_name="{build.recipe.entry.name} champion", cache_policy=NO_CACHE, persist_result=False)
def champion(build: EntryBuild, version: DraftVersion, report: EntryReport) -> BuildArtifacts:
    """What the champion was made of; its draft is what users get now, from the Hub or out of the published folder.

    Raises: ValueError if that is not the draft that was published, or if what a benchmark reads beside it is gone.
    """
    entry, recorded = build.recipe.entry, recorded_artifacts(report, build.store)
    folder = _download(version) if version.repository else build.store / entry.publish.directory / entry.name
    draft = restore_draft(folder, recorded.draft, build.store)
    run_logger().info("version %d of %s is whole in %s", version.number, entry.name, folder)
    found = recorded._replace(draft=draft, conversations=_conversations(build, recorded.conversations))
    for artifact in found[:-1]:
        # What the entry rests on from now: its reports speak of these, whatever was built and rejected since.
        record_stage(build.store, entry.name, stage=artifact.stage, key=artifact.key)
    return found


def _download(version: DraftVersion) -> Path:
    """The folder of the repository as it was published; nothing that could run is taken."""
    repository, revision, hub = version.repository, version.revision, open_hub()
    assert repository is not None
    what = f"{repository} at {revision}"

    def snapshot() -> str:
        return hub.api.snapshot_download(repository, revision=revision, allow_patterns=list(DRAFT_FILES))

    try:
        return Path(hub.call(f"downloading {what}", snapshot))
    except LocalEntryNotFoundError:
        # The client's way to say that it did not get through. Its cause holds the request, and that the token.
        reason = f"{what} is not on this host, and the Hub at {hub.endpoint} cannot be reached; try again later"
    raise ConnectionError(reason)


def _conversations(build: EntryBuild, recorded: Artifact[Conversations]) -> Artifact[Conversations]:
    """With their files, where something reads them."""
    entry = build.recipe.entry
    if found := find_artifact(recorded, build.store):
        return found
    if entry.engine.name == "transformers" or entry.publish.dataset:
        raise ValueError(
            f"the conversations of {entry.name} ({recorded.stage}/{recorded.key}) are not in {build.store}, and its "
            "n-gram drafter or its published data set needs them: measure it where it was built, or set "
            "SPECBUNDLE_MIRROR to where that host's artifacts are"
        )
    return recorded
