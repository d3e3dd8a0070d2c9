"""The stages of one entry, in order."""

from prefect import flow

from flows import stages
from specforge_core.artifacts import BuildArtifacts
from specforge_core.facts import Published, Rejected, Withheld
from tasks.stage import EntryBuild


@flow(name="build-draft", flow_run_name="{build.recipe.entry.name}", persist_result=False, validate_parameters=False)
def build_draft(build: EntryBuild) -> Published | Rejected | Withheld:
    """Build one draft model, from prompts to a published checkpoint."""
    conversations = stages.regenerate(build)
    vocabulary = stages.vocabulary(build, conversations)
    hidden_states = stages.capture(build, conversations)
    checkpoint = stages.train(build, hidden_states, vocabulary, conversations)
    draft = stages.export(build, checkpoint)
    benchmark = stages.benchmark(build, draft, conversations)
    return settle(build, BuildArtifacts(conversations, vocabulary, hidden_states, checkpoint, draft, benchmark))


def settle(build: EntryBuild, artifacts: BuildArtifacts) -> Published | Rejected | Withheld:
    """What becomes of a draft that was measured: its gates, its report, its place in the registry, its publication."""
    vocabulary, benchmark = artifacts.vocabulary, artifacts.benchmark
    standing = stages.standing(build, artifacts.draft, benchmark)
    failures = stages.check_gates(build.recipe.entry.gates, vocabulary.facts, benchmark.facts, standing)
    report = stages.report(build, artifacts, failures, standing)
    version = stages.register(build, report)
    if failures:
        return Rejected(failures=failures)
    if not build.publish:
        return Withheld()
    outcome = stages.publish(build, artifacts)
    if isinstance(outcome, Published):
        stages.promote(build, version, outcome)
    return outcome
