"""Publish: the draft's repository as a folder, and then on the Hub if that is where it goes.

What is transient is tried again in `specforge_core.hub.client` alone, so the task has no retries of its own.
"""

import os
from pathlib import Path

from huggingface_hub import get_token
from prefect import task
from prefect.blocks.system import Secret
from prefect.cache_policies import NO_CACHE

from specforge_core.artifacts import BuildArtifacts, write_atomically
from specforge_core.benchmark.headline import headline
from specforge_core.benchmark.report import EntryReport, make_report
from specforge_core.digests import folder_sha256
from specforge_core.facts import Published, Withheld
from specforge_core.hub.access import check_write_access
from specforge_core.hub.client import Hub
from specforge_core.hub.dataset import dataset_files
from specforge_core.hub.publication import Part, PublishPlan, plan_parts, publish_parts
from specforge_core.hub.repository import publish_directory, repository_files
from specforge_core.hub.upload import Repository
from specforge_core.manifest import ManifestEntry
from specforge_core.manifest_publish import Destination
from tasks.stage import EntryBuild, run_logger

TOKEN_BLOCK = "hf-token"
"""Name of a Prefect Secret block, for workers whose environment has no token."""
ENDPOINT = "https://huggingface.co"
# No entry can have these names.
DRY_RUN = "dry_run"
DATASETS = "conversation_datasets"


@task(task_run_name="{build.recipe.entry.name} publish", cache_policy=NO_CACHE, persist_result=False)
def publish(build: EntryBuild, artifacts: BuildArtifacts) -> Published | Withheld:
    """Where a draft that passed its gates lies now; content that is there already is left alone.

    A dry run fills another folder, and says what publishing would change.
    """
    entry, target = build.recipe.entry, build.recipe.target
    root = build.store / (DRY_RUN if build.dry_run else entry.publish.directory)
    report = make_report(entry, target, artifacts, failures=())
    files = repository_files(report, artifacts, target)
    published = publish_directory(root, entry.name, files, recorded=artifacts.draft.sha256_by_name)
    contents = [(published.path, collection_note(report))]
    if entry.publish.dataset:
        files = dataset_files(entry, build.recipe.data, target, artifacts.conversations)
        note = f"{report.conversations.num_conversations:,} conversations, answered by {entry.target.model}"
        recorded = artifacts.conversations.sha256_by_name
        contents.insert(0, (publish_directory(root / DATASETS, entry.name, files, recorded=recorded).path, note))
    hub = open_hub() if build.publish_to == "hub" else None
    parts = [Part(one, *content) for one, content in zip(repositories(entry), contents, strict=True)] if hub else []
    if build.dry_run:
        return Withheld(plan=_write_plan(build, published, hub, parts))
    if hub:
        uploaded = publish_parts(hub, parts, entry.publish.collection)
        on_hub = {"repository": entry.publish.repository, "revision": uploaded.revision, "url": uploaded.url}
        published = published.model_copy(update={**on_hub, "changed": uploaded.changed})
    where = published.url or published.path
    run_logger().info("%s %s", where, "published" if published.changed else "is unchanged")
    return published


def check_destination(entry: ManifestEntry, destination: Destination) -> None:
    """Return if a draft of this entry may go where it is to go: asked before the first stage, which may take days.

    Raises: ValueError without repository, token or the right to write; ConnectionError if the Hub is out of reach.
    """
    if destination != "hub":
        return
    wanted, hub = repositories(entry), open_hub()
    for repository in wanted:
        owner = check_write_access(hub, repository)
        run_logger().info("%s may write %s at %s", owner, repository.title, hub.endpoint)


def repositories(entry: ManifestEntry) -> list[Repository]:
    """What an entry publishes on the Hub, in that order: its conversations, if they are published, and its draft."""
    config = entry.publish
    if config.repository is None:
        raise ValueError(
            f"{entry.name} cannot go to the Hub without a repository; add `publish: {{repository: organization/name}}` "
            "to it, or build it with --publish-to directory"
        )
    draft = Repository(config.repository, private=config.private)
    return [*([Repository(config.dataset, "dataset", config.private)] if config.dataset else []), draft]


def open_hub() -> Hub:
    """The Hub at HF_ENDPOINT, or the public one, as the owner of the first token that is found.

    It is looked for in HF_TOKEN, in the file of HF_TOKEN_PATH or the one that `hf auth login` writes, and in a Prefect
    block. Raises: ValueError if there is none.
    """
    token = get_token() or _token_of_block()
    if token is None:
        raise ValueError(
            "publishing to the Hub needs a token that may write: set HF_TOKEN, log in with `hf auth login`, or store a "
            f"Prefect Secret block named {TOKEN_BLOCK}; without the Hub: --publish-to directory"
        )
    return Hub(os.environ.get("HF_ENDPOINT") or ENDPOINT, token)


def _token_of_block() -> str | None:
    try:
        block = Secret.load(TOKEN_BLOCK)
    except ValueError:
        # There is none of that name.
        return None
    assert isinstance(block, Secret)
    return str(block.get())


def collection_note(report: EntryReport) -> str:
    """What a collection says of a draft."""
    benchmark, means = report.benchmark, headline(report.benchmark)
    assert means is not None
    first, made_on = benchmark.measurements[0].serving, benchmark.environment
    return (
        f"Acceptance length {means.acceptance_length:.2f}, speedup {means.speedup:.2f}x: means over the suites with "
        f"chain {first.chain()} at concurrency {first.concurrency} on {made_on.gpu or made_on.cpu}"
    )


def _write_plan(build: EntryBuild, made: Published, hub: Hub | None, parts: list[Part]) -> Path:
    """The plan's file, beside the folder of the dry run."""
    entry = build.recipe.entry
    uploads, listings = plan_parts(hub, parts, entry.publish.collection) if hub else ((), ())
    wanted, there = folder_sha256(made.path), folder_sha256(build.store / entry.publish.directory / entry.name)
    plan = PublishPlan(
        entry=entry.name,
        folder=made.path,
        files=wanted,
        differing=tuple(sorted({name for name, _ in wanted.items() ^ there.items()})),
        endpoint=hub.endpoint if hub else None,
        uploads=uploads,
        listings=listings,
    )
    path = made.path.with_name(f"{entry.name}.publish_plan.json")
    write_atomically(path, plan.model_dump_json(indent=1) + "\n")
    run_logger().info("nothing is published; %s says what would be", path)
    return path
