"""The flow `rebenchmark`, deployed as `rebenchmark/run`: published drafts measured again.

A benchmark's key has the hardware and the engine's version in it, so on a new GPU or with a new server every published
draft is measured, and otherwise none: then what is published stays as it is, to the byte.
"""

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import State

from flows import stages
from flows.draft import settle
from flows.entries import FLOW_OPTIONS, Request, RunSettings, final_state, run_entries, run_entry
from flows.summary import EntryRow
from specforge_core.benchmark.report import EntryReport
from specforge_core.ledger import Outcome
from specforge_core.manifest import ManifestEntry
from specforge_core.manifest_publish import Destination
from tasks.registry import DraftVersion, registered, report_of
from tasks.stage import EntryBuild

OF_TODAY = ("engine", "benchmark", "gates", "publish", "resources")
"""Sections of an entry that say how a draft is measured, judged and published; the others say how it was made."""


@flow(name="rebenchmark", **FLOW_OPTIONS)
def rebenchmark(
    manifest: Path = Path("bundle_manifest.yaml"),
    only: list[str] | None = None,
    publish_to: Destination | None = None,
    dry_run: bool = False,
    store: Path | None = None,
) -> State[Any]:
    """Measure the champions of the selected entries with the engine and on the hardware of this host, and renew card,
    registry and site. One that now fails its gates stays published, and makes this run fail at its end.

    Args:
        manifest: the file that says how drafts are measured and judged.
        only: names of entries; without it, all that are published and that this host has the GPUs for.
        publish_to: where the renewed cards go, whatever the entries say.
        dry_run: instead of publishing, write what would be published and what that would change.
        store: where artifacts are kept; `.specbundle` beside the manifest when absent.

    Returns: a state whose data is a BuildSummary.
    """
    request = Request(manifest=manifest, only=tuple(only or ()), publish_to=publish_to, dry_run=dry_run, store=store)
    summary = run_entries(measure_entry, request)
    reasons = [f"{row.entry}: {row.detail}" for row in summary.rows if row.is_failure]
    return final_state(summary, "; ".join([summary.message, *reasons]))


@task(name="measure entry", task_run_name="{entry.name}", cache_policy=NO_CACHE, persist_result=False)
def measure_entry(entry: ManifestEntry, settings: RunSettings) -> EntryRow:
    """Measure an entry's champion, on record: its row in the summary. Raises: whatever stopped it."""
    champion = registered(entry.name, store=settings.store).champion
    if champion is None:
        reason = f"no draft of {entry.name} is published"
        if settings.request.only:
            raise ValueError(f"{reason}; `specbundle build --only {entry.name}` makes one")
        return EntryRow(entry=entry.name, status="skipped", detail=reason)
    report = report_of(champion, store=settings.store)
    row = run_entry(
        published_entry(report.lineage.entry, entry), settings, lambda build: measure_again(build, champion, report)
    )
    if row.status != "rejected":
        return row
    return row.model_copy(update={"detail": f"version {champion.number} stays published, but fails now: {row.detail}"})


def published_entry(made: ManifestEntry, today: ManifestEntry) -> ManifestEntry:
    """The entry of a published draft: how it was made, and what the manifest says today of the rest.

    Raises: ValueError if the two do not fit, say because a suite of today was trained on.
    """
    return ManifestEntry(**{**dict(made), **{name: getattr(today, name) for name in OF_TODAY}})


@flow(name="measure-again", flow_run_name="{build.recipe.entry.name}", persist_result=False, validate_parameters=False)
def measure_again(build: EntryBuild, champion: DraftVersion, report: EntryReport) -> Outcome:
    """Measure one published draft as it is, and publish it again with what was measured; its weights stay the same."""
    target = build.recipe.target
    if target.content_id != report.lineage.target_content_id:
        raise ValueError(
            f"the draft of {build.recipe.entry.name} was made for content {report.lineage.target_content_id} of "
            f"{target.model}, which now has {target.content_id}; pin that target's revision, or build a new draft"
        )
    artifacts = stages.champion(build, champion, report)
    benchmark = stages.benchmark(build, artifacts.draft, artifacts.conversations)
    return settle(build, artifacts._replace(benchmark=benchmark))
