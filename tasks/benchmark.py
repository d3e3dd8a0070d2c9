"""Benchmark: what the draft does for the target."""

from specforge_core.artifacts import Artifact
from specforge_core.facts import BenchmarkResult, Conversations, ServingDraft
from specforge_core.plan import benchmark_spec
from tasks.stage import EntryBuild, StageResult, run_stage, stage_task


@stage_task()
def benchmark(
    build: EntryBuild, draft: Artifact[ServingDraft], conversations: Artifact[Conversations]
) -> StageResult[BenchmarkResult]:
    """Acceptance length, speedup and losslessness, by suite and serving configuration."""
    return run_stage(benchmark_spec(build.recipe, draft, conversations), build)
