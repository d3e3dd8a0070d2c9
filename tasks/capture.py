"""Capture: the target's hidden states, once, for every epoch of training."""

from specforge_core.artifacts import Artifact
from specforge_core.facts import Conversations, HiddenStates
from specforge_core.plan import capture_spec
from tasks.stage import EntryBuild, StageResult, run_stage, stage_task


@stage_task()
def capture(build: EntryBuild, conversations: Artifact[Conversations]) -> StageResult[HiddenStates]:
    """What the target computed on these conversations."""
    return run_stage(capture_spec(build.recipe, conversations), build)
