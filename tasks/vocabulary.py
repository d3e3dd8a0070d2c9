"""Vocabulary: the tokens that the draft may propose."""

from specforge_core.artifacts import Artifact
from specforge_core.facts import Conversations, Vocabulary
from specforge_core.plan import vocabulary_spec
from tasks.stage import EntryBuild, StageResult, run_stage, stage_task


@stage_task()
def vocabulary(build: EntryBuild, conversations: Artifact[Conversations]) -> StageResult[Vocabulary]:
    """The draft's vocabulary, from what the target said most."""
    return run_stage(vocabulary_spec(build.recipe, conversations), build)
