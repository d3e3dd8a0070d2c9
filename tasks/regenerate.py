"""Regenerate: every assistant turn of the prompts, answered by the target."""

from specforge_core.facts import Conversations
from specforge_core.plan import regenerate_spec
from tasks.stage import EntryBuild, StageResult, run_stage, stage_task


# Prompts may come from a network; a second try goes on from the answers that are there.
@stage_task(retries=2)
def regenerate(build: EntryBuild) -> StageResult[Conversations]:
    """Conversations in the target's own words, with the tokens that it produced marked."""
    return run_stage(regenerate_spec(build.recipe), build)
