"""What flows over a manifest share: its entries side by side, each on record, and one that fails stops no other."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from prefect import Task
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from flows.summary import BuildSummary, EntryRow, Status, row_of_error, row_of_outcome, show_summary
from specforge_core.engine import sglang_version
from specforge_core.facts import Record
from specforge_core.gpus import Gpu, list_gpus
from specforge_core.ledger import Outcome, record_outcome
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


class Request(Record):
    """What a user asks of a flow."""

    manifest: Path
    only: tuple[str, ...]
    """Names of entries; none: all that this host has the GPUs for."""
    publish_to: Destination | None
    """Where drafts that pass their gates go; None leaves it to each entry."""
    dry_run: bool
    """Instead of publishing, write what would be published and what that would change."""
    store: Path | None
    """Where artifacts are kept; `.specbundle` beside the manifest when None."""


class RunSettings(Record):
    """What the entries of one run share."""

    request: Request
    base_dir: Path
    """Folder that the manifest's relative paths start from."""
    store: Path
    gpus: tuple[Gpu, ...]
    run: TrackedRun
    """The tracker's run of the whole run."""


def run_name() -> str:
    """Of a flow run: its entries, and when it began."""
    only = flow_run.parameters.get("only")
    return f"{', '.join(only) if only else 'all'} {time.strftime('%H:%M:%S')}"


# No decorator of its own: Prefect also reads a flow's name off its source, where it looks for `@flow`.
FLOW_OPTIONS: dict[str, Any] = {
    "flow_run_name": run_name,
    "task_runner": ThreadPoolTaskRunner(max_workers=MAX_ENTRIES_AT_ONCE),
    "persist_result": False,
}


def run_entries(task: Task[[ManifestEntry, RunSettings], EntryRow], request: Request) -> BuildSummary:
    """How the selected entries ended, each run by the task; also on this run's page, in the tracker and the site."""
    gpus = list_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    loaded = Manifest.load(request.manifest)
    entries, skipped = select_entries(loaded, only=request.only, num_gpus=len(gpus))
    if skipped:
        run_logger().info("skipped for want of GPUs, of which this host has %d: %s", len(gpus), ", ".join(skipped))
    store = (request.store or loaded.base_dir / ".specbundle").absolute()
    run = tracking.start_run(
        tracking.BUILDS,
        f"{flow_run.flow_name} {', '.join(request.only) or 'all'} {time.strftime('%F %T')}",
        store=store,
        tags={"prefect.flow_run_id": str(flow_run.id), "manifest": str(request.manifest.absolute())},
    )
    run.log_params(
        {"entries": ", ".join(entry.name for entry in entries), "publish_to": request.publish_to or "as the entry says"}
    )
    settings = RunSettings(request=request, base_dir=loaded.base_dir, store=store, gpus=gpus, run=run)
    with children_end_on_error():
        futures = [task.submit(entry, settings) for entry in entries]
        results = [future.result(raise_on_failure=False) for future in futures]
    rows = [
        result if isinstance(result, EntryRow) else row_of_error(entry.name, result)
        for entry, result in zip(entries, results, strict=True)
    ]
    rows += [EntryRow(entry=name, status="skipped", detail=reason) for name, reason in skipped.items()]
    return _finish(rows, settings, update_site(store, loaded.entries))


def run_entry(entry: ManifestEntry, settings: RunSettings, make_draft: Callable[[EntryBuild], Outcome]) -> EntryRow:
    """The row of an entry, whose draft is made and tracked. Raises: whatever stopped it."""
    if reason := missing_gpus(entry, len(settings.gpus)):
        raise ValueError(f"{reason}; build it on a host that has them, or choose others with --only")
    started_at, publish_to = time.monotonic(), settings.request.publish_to or entry.publish.to
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
        dry_run=settings.request.dry_run,
        tracking=run,
    )
    try:
        outcome = make_draft(build)
    except BaseException:
        run.end("FAILED")
        raise
    if not build.dry_run:
        # After one the entry still is what it was.
        record_outcome(settings.store, entry.name, outcome)
    row = row_of_outcome(entry.name, outcome, store=settings.store, elapsed_s=time.monotonic() - started_at)
    page = entry_page(site_directory(settings.store), entry.name).as_uri()
    run.log_tags({"specbundle.status": row.status, "specbundle.detail": row.detail, SITE_TAG: page})
    run.end("FINISHED")
    return row


def _finish(rows: list[EntryRow], settings: RunSettings, site: Path | None) -> BuildSummary:
    """The summary, shown and tracked. Args: site: its first page."""
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
    for status in get_args(Status):
        run.log_metrics({f"num_{status}": sum(row.status == status for row in rows)})
    run.log_text("summary.md", summary.markdown())
    run.end("FAILED" if summary.is_failure else "FINISHED")
    return summary


def final_state(summary: BuildSummary, message: str) -> State[Any]:
    """What a run ends in: failed if one of its entries did not pass."""
    state = Failed if summary.is_failure else Completed
    return state(message=message, data=summary)
