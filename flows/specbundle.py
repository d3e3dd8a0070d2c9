"""The flow `specbundle`, deployed as `specbundle/build`: every selected entry of the manifest, built and published."""

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import State

from flows.draft import build_draft
from flows.entries import FLOW_OPTIONS, Request, RunSettings, final_state, run_entries, run_entry
from flows.summary import EntryRow
from specforge_core.manifest import ManifestEntry
from specforge_core.manifest_publish import Destination


@flow(name="specbundle", **FLOW_OPTIONS)
def specbundle(
    manifest: Path = Path("bundle_manifest.yaml"),
    only: list[str] | None = None,
    publish_to: Destination | None = None,
    dry_run: bool = False,
    store: Path | None = None,
) -> State[Any]:
    """Build the selected entries; one that fails does not stop the others, but makes this run fail at its end.

    Args:
        manifest: the file that says what to build.
        only: names of entries; without it, all that this host has the GPUs for.
        publish_to: where drafts that pass their gates go, whatever their entries say.
        dry_run: instead of publishing, write what would be published and what that would change.
        store: where artifacts are kept; `.specbundle` beside the manifest when absent.

    Returns: a state whose data is a BuildSummary.
    """
    request = Request(manifest=manifest, only=tuple(only or ()), publish_to=publish_to, dry_run=dry_run, store=store)
    summary = run_entries(build_entry, request)
    return final_state(summary, summary.message)


@task(name="build entry", task_run_name="{entry.name}", cache_policy=NO_CACHE, persist_result=False)
def build_entry(entry: ManifestEntry, settings: RunSettings) -> EntryRow:
    """Build one entry, on record: its row in the summary. Raises: whatever stopped it."""
    return run_entry(entry, settings, build_draft)
