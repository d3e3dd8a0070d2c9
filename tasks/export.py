"""Export: the draft as a folder that a server loads."""

from specforge_core.artifacts import Artifact
from specforge_core.facts import DraftCheckpoint, ServingDraft
from specforge_core.plan import export_spec
from tasks.stage import EntryBuild, StageResult, run_stage, stage_task


@stage_task()
def export(build: EntryBuild, checkpoint: Artifact[DraftCheckpoint]) -> StageResult[ServingDraft]:
    """The draft in its serving format, reloaded and compared."""
    return run_stage(export_spec(build.recipe, checkpoint), build)
