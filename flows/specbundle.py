"""The flow `specbundle`, deployed as `specbundle/build`: every selected entry of the manifest, side by side."""

import os
import time
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from flows.draft import build_draft
from flows.summary import BuildSummary, EntryRow, row_of_error, row_of_outcome, show_summary
from specforge_core.engine import sglang_version
from specforge_core.facts import Record
from specforge_core.gpus import Gpu, list_gpus
from specforge_core.ledger import record_outcome
from specforge_core.manifest import Manifest, ManifestEntry
from specforge_core.manifest_publish import Destination
from specforge_core.plan import make_recipe
from specforge_core.process import children_end_on_error
from specforge_core.selection import missing_gpus, select_entries
from specforge_core.site.render import entry_page, site_directory
from tasks import tracking
from tasks.publish import check_destination
from tasks.site import SITE_TAG, update_site
from tasks.stage import EntryBuild, run_logger
from tasks.tracking import TrackedRun

# Entries beyond this wait for a thread; those within it wait for their devices.
MAX_ENTRIES_AT_ONCE = 16


class BuildSettings(Record):
    """What the entries of one build share."""

    base_dir: Path
    """Folder that the manifest's relative paths start from."""
    store: Path
    publish_to: Destination | None
    """Where drafts that pass their gates go; None leaves it to each entry."""
    dry_run: bool
    gpus: tuple[Gpu, ...]
    run: TrackedRun
    """The tracker's run of the whole build."""


def _run_name() -> str:
    only = flow_run.parameters.get("only")
    return f"{', '.join(only) if only else 'all'} {time.strftime('%H:%M:%S')}"


@flow(
    name="specbundle",
    flow_run_name=_run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=MAX_ENTRIES_AT_ONCE),  # type: ignore[arg-type]
    persist_result=False,
)
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
    gpus = list_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    loaded = Manifest.load(manifest)
    entries, skipped = select_entries(loaded, only=only, num_gpus=len(gpus))
    for reason in skipped.values():
        run_logger().info("skipped: %s", reason)
    store = (store or loaded.base_dir / ".specbundle").absolute()
    run = tracking.start_run(
        tracking.BUILDS,
        f"{', '.join(only) if only else 'all'} {time.strftime('%F %T')}",
        store=store,
        tags={"prefect.flow_run_id": str(flow_run.id), "manifest": str(manifest.absolute())},
    )
    run.log_params(
        {"entries": ", ".join(entry.name for entry in entries), "publish_to": publish_to or "as the entry says"}
    )
    settings = BuildSettings(
        base_dir=loaded.base_dir, store=store, publish_to=publish_to, dry_run=dry_run, gpus=gpus, run=run
    )
    with children_end_on_error():
        futures = [build_entry.submit(entry, settings) for entry in entries]
        results = [future.result(raise_on_failure=False) for future in futures]
    rows = [
        result if isinstance(result, EntryRow) else row_of_error(entry.name, result)
        for entry, result in zip(entries, results, strict=True)
    ]
    rows += [EntryRow(entry=name, status="skipped", detail=reason) for name, reason in skipped.items()]
    return _finish(rows, settings, update_site(store, loaded.entries))


@task(name="build entry", task_run_name="{entry.name}", cache_policy=NO_CACHE, persist_result=False)
def build_entry(entry: ManifestEntry, settings: BuildSettings) -> EntryRow:
    """Build one entry, on record: its row in the summary. Raises: whatever stopped it."""
    if reason := missing_gpus(entry, len(settings.gpus)):
        raise ValueError(f"{reason}; build it on a host that has them, or choose others with --only")
    started_at, publish_to = time.monotonic(), settings.publish_to or entry.publish.to
    check_destination(entry, publish_to)
    recipe = make_recipe(
        entry, base_dir=settings.base_dir, store=settings.store, gpus=settings.gpus, environ=os.environ
    )
    if recipe.engine.name == "sglang":
        # Asked before the first stage, so that nobody waits for hours to hear of it from the last one.
        version = sglang_version(recipe.engine.python)
        run_logger().info("SGLang %s at %s", version, recipe.engine.python)
    run = tracking.start_run(
        tracking.ENTRIES,
        entry.name,
        store=settings.store,
        tags={
            "specbundle.build": settings.run.run_id or "",
            "prefect.flow_run_id": str(flow_run.id),
            "target": entry.target.model,
            "target.content_id": recipe.target.content_id,
            "method": entry.draft.algorithm,
            "hardware": recipe.hardware,
        },
    )
    run.log_params(entry.model_dump(mode="json", exclude={"name"}))
    build = EntryBuild(
        recipe=recipe,
        store=settings.store,
        gpus=tuple(gpu.id for gpu in settings.gpus),
        publish_to=publish_to,
        dry_run=settings.dry_run,
        tracking=run,
    )
    try:
        outcome = build_draft(build)
    except BaseException:
        run.end("FAILED")
        raise
    record_outcome(settings.store, entry.name, outcome)
    row = row_of_outcome(entry.name, outcome, store=settings.store, elapsed_s=time.monotonic() - started_at)
    page = entry_page(site_directory(settings.store), entry.name).as_uri()
    run.log_tags({"specbundle.status": row.status, "specbundle.detail": row.detail, SITE_TAG: page})
    run.end("FINISHED")
    return row


def _finish(rows: list[EntryRow], settings: BuildSettings, site: Path | None) -> State[Any]:
    """The run's final state, after its summary is shown and tracked. Args: site: its first page."""
    run = settings.run
    summary = BuildSummary(
        rows=tuple(rows),
        store=settings.store,
        tracking_uri=run.uri,
        comparison_url=tracking.comparison_url(settings.store),
        site=site,
    )
    show_summary(summary)
    if site:
        run.log_tags({SITE_TAG: site.as_uri()})
    for status in ("published", "passed", "rejected", "failed", "skipped"):
        run.log_metrics({f"num_{status}": sum(row.status == status for row in rows)})
    run.log_text("summary.md", summary.markdown())
    is_failure = any(row.is_failure for row in rows)
    run.end("FAILED" if is_failure else "FINISHED")
    state = Failed if is_failure else Completed
    return state(message=summary.message, data=summary)
