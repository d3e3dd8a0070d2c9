"""Report: everything that one build made and measured, for people and as JSON."""

from collections.abc import Sequence

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from specforge_core.artifacts import BuildArtifacts
from specforge_core.benchmark.compare import Standing
from specforge_core.benchmark.history import record_report
from specforge_core.benchmark.report import EntryReport, make_report, report_markdown, write_report
from specforge_core.facts import GateFailure
from tasks.progress import artifact_key
from tasks.stage import EntryBuild


@task(task_run_name="{build.recipe.entry.name} report", cache_policy=NO_CACHE, persist_result=False)
def report(
    build: EntryBuild, artifacts: BuildArtifacts, failures: Sequence[GateFailure], standing: Standing
) -> EntryReport:
    """The report, also written to the store's `reports/` with its plots and history, shown by Prefect and tracked."""
    recipe = build.recipe
    made = make_report(recipe.entry, recipe.target, artifacts, failures, standing.comparison)
    files = write_report(build.store / "reports", made)
    record_report(build.store, made)
    create_markdown_artifact(
        key=artifact_key(f"report-{recipe.entry.name}"),
        markdown=report_markdown(made),
        description=f"Build of {recipe.entry.name}",
    )
    build.tracking.log_result(made.benchmark)
    for file in files:
        build.tracking.log_file(file)
    return made
