"""The whole chain on prompts that people wrote, stage by stage in their own processes, without Prefect."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from specforge_core.artifacts import Artifact, BuildArtifacts, damaged_files, load_artifact
from specforge_core.benchmark.compare import Standing
from specforge_core.benchmark.report import make_report
from specforge_core.data.conversations import load_conversations
from specforge_core.export.run import load_target_config
from specforge_core.export.verify import check_serving_folder
from specforge_core.hub.repository import publish_directory, repository_files
from specforge_core.manifest import ManifestEntry
from specforge_core.manifest_gates import GatesConfig
from specforge_core.manifest_sections import (
    BenchmarkConfig,
    DataConfig,
    Eagle3Config,
    EngineConfig,
    PromptSource,
    ResourcesConfig,
    SuiteConfig,
    TargetConfig,
    TrainingConfig,
)
from specforge_core.plan import STEPS, Recipe, make_recipe
from tasks.gates import check_gates

REPO_ROOT = Path(__file__).parents[2]
GSM8K = REPO_ROOT.parent / "shared/data/gsm8k"
DEMO_TARGET = REPO_ROOT / "specforge_core/demo/target"
NUM_PROMPTS = 48
NUM_TEST_PROMPTS = 6
MAX_NEW_TOKENS = 64
DRAFT_VOCAB_SIZE = 128

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not GSM8K.is_dir(), reason=f"no folder of real prompts at {GSM8K}"),
]


@pytest.fixture(scope="module")
def recipe(tiny_target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    # Both are real targets; the one that ships is also a trained one.
    target = DEMO_TARGET if (DEMO_TARGET / "config.json").is_file() else tiny_target_dir
    train = PromptSource(dataset=str(GSM8K / "train.jsonl"), limit=NUM_PROMPTS, column="question")
    test = PromptSource(dataset=str(GSM8K / "test.jsonl"), limit=NUM_TEST_PROMPTS, column="question")
    entry = ManifestEntry(
        name="real-prompts",
        target=TargetConfig(model=str(target), dtype="float32"),
        draft=Eagle3Config(num_steps=3, draft_vocab_size=DRAFT_VOCAB_SIZE),
        data=DataConfig(sources=(train,), max_prompt_tokens=448, max_new_tokens=MAX_NEW_TOKENS),
        training=TrainingConfig(
            num_epochs=2,
            tokens_per_batch=1024,
            tokens_per_micro_batch=1024,
            max_document_tokens=512,
            optimizer="muon",
            eval_fraction=0.1,
        ),
        benchmark=BenchmarkConfig(
            suites=(SuiteConfig(name="gsm8k", source=test, max_new_tokens=MAX_NEW_TOKENS),), repeats=2
        ),
        gates=GatesConfig(min_speedup=0.0),
        engine=EngineConfig(name="transformers"),
        resources=ResourcesConfig(num_gpus=0),
    )
    return make_recipe(entry, base_dir=REPO_ROOT, store=tmp_path_factory.mktemp("store"), gpus=(), environ={})


@pytest.fixture(scope="module")
def artifacts(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> BuildArtifacts:
    """Every stage run as its own command."""
    root = tmp_path_factory.mktemp("build")
    made: dict[str, Artifact[Any]] = {}
    for stage, step in STEPS.items():
        spec = step.make_spec(recipe, *(made[name] for name in step.reads))
        spec_path, out = root / f"{stage}.json", root / stage
        spec_path.write_text(spec.model_dump_json())
        command = [sys.executable, "-m", "specforge_core", stage, "--spec", str(spec_path), "--out", str(out)]
        subprocess.run(command, check=True, cwd=REPO_ROOT)
        made[stage] = load_artifact(out, spec.facts_type)
    return BuildArtifacts(*made.values())


def test_every_artifact_is_whole_and_made_from_the_ones_before(artifacts: BuildArtifacts) -> None:
    for artifact in artifacts:
        assert damaged_files(artifact, read_content=True) == []
    conversations, vocabulary, hidden_states, checkpoint, draft, benchmark = artifacts
    assert hidden_states.inputs == {"conversations": conversations.content_id}
    assert checkpoint.inputs == {"hidden_states": hidden_states.content_id, "vocabulary": vocabulary.content_id}
    assert draft.inputs == {"checkpoint": checkpoint.content_id}
    assert benchmark.inputs == {"draft": draft.content_id, "conversations": conversations.content_id}


def test_the_conversations_ask_the_data_sets_questions(artifacts: BuildArtifacts) -> None:
    facts = artifacts.conversations.facts
    assert facts.num_conversations + facts.num_failed == NUM_PROMPTS
    assert facts.num_conversations > NUM_PROMPTS // 2
    lines = (GSM8K / "train.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_PROMPTS]
    questions = {json.loads(line)["question"] for line in lines}
    rows = list(load_conversations(artifacts.conversations.path))
    asked = [message["content"] for row in rows for message in row["messages"] if message["role"] == "user"]
    assert len(asked) == facts.num_conversations
    assert set(asked) <= questions
    assert sum(sum(row["loss_mask"]) for row in rows) == facts.num_loss_tokens
    assert all(0 < sum(row["loss_mask"]) <= MAX_NEW_TOKENS for row in rows)


def test_training_saw_what_was_captured(artifacts: BuildArtifacts, recipe: Recipe) -> None:
    conversations, hidden_states, checkpoint = artifacts.conversations, artifacts.hidden_states, artifacts.checkpoint
    assert hidden_states.facts.num_documents == conversations.facts.num_conversations
    assert hidden_states.facts.num_tokens == conversations.facts.num_tokens
    assert hidden_states.facts.num_loss_tokens == conversations.facts.num_loss_tokens
    epochs = recipe.entry.training.num_epochs
    # A few conversations are held out.
    assert 0.5 < checkpoint.facts.tokens_seen / (epochs * conversations.facts.num_tokens) < 1.0
    assert len(checkpoint.facts.eval_accuracy) == recipe.entry.draft.num_steps


def test_the_exported_folder_is_one_that_a_server_loads_as_trained(artifacts: BuildArtifacts, recipe: Recipe) -> None:
    check_serving_folder(artifacts.draft.path, load_target_config(recipe.target))
    assert artifacts.draft.facts.max_reload_error == 0.0
    assert artifacts.draft.facts.num_parameters == artifacts.checkpoint.facts.num_parameters


def test_the_benchmark_is_lossless_and_counts_add_up(artifacts: BuildArtifacts) -> None:
    (measurement,) = artifacts.benchmark.facts.measurements
    assert measurement.lossless is not None
    assert measurement.lossless.num_different == 0
    assert measurement.lossless.num_identical + measurement.lossless.num_near_tie == NUM_TEST_PROMPTS
    assert 1.0 <= measurement.acceptance_length <= 4.0
    # A later position can be accepted only in steps that accepted the ones before it.
    assert measurement.num_verify_steps >= measurement.accepted_by_position[0]
    assert list(measurement.accepted_by_position) == sorted(measurement.accepted_by_position, reverse=True)
    # Each step gives its accepted tokens and one of the target's own, the first of each answer comes before any step,
    # and the last step of an answer may be cut.
    most = sum(measurement.accepted_by_position) + measurement.num_verify_steps + NUM_TEST_PROMPTS
    assert measurement.num_output_tokens <= most


def test_the_result_can_be_judged_and_published(artifacts: BuildArtifacts, recipe: Recipe, tmp_path: Path) -> None:
    failures = check_gates(recipe.entry.gates, artifacts.vocabulary.facts, artifacts.benchmark.facts, Standing())
    assert [failure.message for failure in failures] == []
    report = make_report(recipe.entry, recipe.target, artifacts, failures)
    published = publish_directory(tmp_path, "real-prompts", repository_files(report, artifacts, recipe.target))
    check_serving_folder(published.path, load_target_config(recipe.target))
