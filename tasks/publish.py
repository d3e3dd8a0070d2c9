"""Publish: the draft's repository, in a folder that is replaced as a whole."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from specforge_core.artifacts import BuildArtifacts
from specforge_core.benchmark.report import make_report
from specforge_core.facts import Published
from specforge_core.hub.repository import publish_directory, repository_files
from tasks.stage import EntryBuild, run_logger


@task(task_run_name="{build.recipe.entry.name} publish", cache_policy=NO_CACHE, persist_result=False)
def publish(build: EntryBuild, artifacts: BuildArtifacts) -> Published:
    """Where a draft that passed its gates lies now; content that is there already is left alone."""
    entry, target = build.recipe.entry, build.recipe.target
    report = make_report(entry, target, artifacts, failures=())
    root = build.store / entry.publish.directory
    published = publish_directory(root, entry.name, repository_files(report, artifacts, target))
    run_logger().info("%s %s", published.path, "published" if published.changed else "is unchanged")
    return published
