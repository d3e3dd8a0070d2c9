"""Train: the draft, from the target's hidden states, or beside the target that makes them."""

from specforge_core.artifacts import Artifact
from specforge_core.facts import Conversations, DraftCheckpoint, HiddenStates, Vocabulary
from specforge_core.plan import train_spec
from tasks.stage import EntryBuild, StageResult, run_stage, stage_task


@stage_task()
def train(
    build: EntryBuild,
    hidden_states: Artifact[HiddenStates],
    vocabulary: Artifact[Vocabulary],
    conversations: Artifact[Conversations],
) -> StageResult[DraftCheckpoint]:
    """The trained draft; an interrupted training goes on from its last checkpoint."""
    return run_stage(train_spec(build.recipe, hidden_states, vocabulary, conversations), build)
