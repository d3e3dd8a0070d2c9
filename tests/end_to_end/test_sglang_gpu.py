"""The chain of `test_sglang_like.py` on a real SGLang server: `SPECBUNDLE_SGLANG_PYTHON=... pytest -m gpu`."""

import os
from pathlib import Path
from typing import Any

import pytest

from specforge_core.artifacts import Artifact, BuildArtifacts
from specforge_core.engine import sglang_python, sglang_version
from specforge_core.gpus import list_gpus, visible_devices
from specforge_core.plan import STEPS, make_recipe
from tasks.stage import EntryBuild, run_stage
from tasks.tracking import TrackedRun
from tests.end_to_end.test_sglang_like import NUM_PROMPTS, NUM_TEST_PROMPTS, make_entry

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

REPO_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def version() -> str:
    try:
        return sglang_version(sglang_python(os.environ))
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def artifacts(version: str, tmp_path_factory: pytest.TempPathFactory) -> BuildArtifacts:
    """Every stage as a build runs it."""
    store, gpus = tmp_path_factory.mktemp("store"), visible_devices()
    listed = list_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    recipe = make_recipe(make_entry(), base_dir=REPO_ROOT, store=store, gpus=listed, environ=os.environ)
    build = EntryBuild(recipe=recipe, store=store, gpus=gpus, publish_to="none", tracking=TrackedRun(uri="none"))
    made: dict[str, Artifact[Any]] = {}
    for stage, step in STEPS.items():
        made[stage] = run_stage(step.make_spec(recipe, *(made[name] for name in step.reads)), build).artifact
    return BuildArtifacts(*made.values())


def test_every_prompt_is_answered_and_every_token_captured(artifacts: BuildArtifacts) -> None:
    conversations, hidden_states = artifacts.conversations.facts, artifacts.hidden_states.facts
    assert (conversations.num_conversations, conversations.num_failed) == (NUM_PROMPTS, 0)
    assert (hidden_states.num_documents, hidden_states.num_tokens) == (NUM_PROMPTS, conversations.num_tokens)


def test_the_served_draft_changes_no_answer_and_is_accepted_as_in_process(
    artifacts: BuildArtifacts, version: str
) -> None:
    (measurement,) = artifacts.benchmark.facts.measurements
    assert measurement.lossless is not None
    assert measurement.lossless.num_different == 0
    assert measurement.lossless.num_identical + measurement.lossless.num_near_tie == NUM_TEST_PROMPTS
    # In bfloat16 the texts of a few short answers may part at near-ties.
    assert measurement.in_process_acceptance_length == pytest.approx(measurement.acceptance_length, rel=0.1)
    assert {record.version for record in artifacts.benchmark.facts.servers.values()} == {version}
