"""An entry on its way through the stages, for tests of tasks and flows."""

from pathlib import Path
from typing import Any

from specforge_core.manifest import ManifestEntry
from specforge_core.manifest_sections import EngineConfig, ResourcesConfig, TrainingConfig
from specforge_core.plan import Recipe
from specforge_core.stages import ResolvedBenchmark, ResolvedData, ServedEngine
from tasks.stage import EntryBuild
from tasks.tracking import TrackedRun
from tests import made_build


def recipe_of(entry: ManifestEntry) -> Recipe:
    """The recipe, with made-up content ids."""
    sources = [{**dict(source), "content_id": "of a source"} for source in entry.data.sources]
    suites = [
        {**dict(suite), "source": {**dict(suite.source), "content_id": "of a suite"}}
        for suite in entry.benchmark.suites
    ]
    return Recipe(
        entry=entry,
        engine=ServedEngine(**dict(entry.engine)),
        target=made_build.TARGET,
        data=ResolvedData(**{**dict(entry.data), "sources": sources}),
        benchmark=ResolvedBenchmark(**{**dict(entry.benchmark), "suites": suites}),
        hardware="Made-up CPU 9000",
    )


def entry_build(
    store: Path,
    *,
    num_gpus: int = 0,
    gpus: tuple[str, ...] = (),
    publish: bool = True,
    tracking: TrackedRun | None = None,
    **changes: Any,
) -> EntryBuild:
    """A build of the made-up entry, without tracking unless it is given."""
    entry = made_build.entry(
        engine=EngineConfig(name="transformers"),
        resources=ResourcesConfig(num_gpus=num_gpus),
        training=TrainingConfig(tokens_per_batch=8192 * max(1, num_gpus)),
        **changes,
    )
    tracking = tracking or TrackedRun(uri="none")
    return EntryBuild(
        recipe=recipe_of(entry),
        store=store,
        gpus=gpus,
        publish_to="directory" if publish else "none",
        tracking=tracking,
    )
