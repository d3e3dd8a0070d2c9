"""The whole chain on servers: each stage in its own process, the shipped target behind SGLang's API.

The server's answers are those of the in-process target, so every figure has to agree with an in-process build's.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from specforge_core.artifacts import Artifact, BuildArtifacts, damaged_files
from specforge_core.benchmark.compare import Standing
from specforge_core.benchmark.report import make_report, report_markdown
from specforge_core.data.conversations import load_conversations
from specforge_core.demo.inflate import DEMO_TARGET
from specforge_core.export.run import load_target_config
from specforge_core.export.verify import check_serving_folder
from specforge_core.export.verify_speculators import SPECULATORS_FOLDER, check_speculators_folder
from specforge_core.facts import BenchmarkResult, Record
from specforge_core.hub.repository import publish_directory, repository_files
from specforge_core.manifest import ManifestEntry
from specforge_core.manifest_gates import GatesConfig
from specforge_core.manifest_sections import (
    BenchmarkConfig,
    DataConfig,
    Eagle3Config,
    PromptSource,
    SuiteConfig,
    SweepConfig,
    TargetConfig,
    TrainingConfig,
)
from specforge_core.plan import STEPS, Recipe, capture_spec, make_recipe, regenerate_spec
from specforge_core.stages import StageSpec, UnmeasuredEngine
from tasks import stage as stage_module
from tasks.gates import check_gates
from tasks.stage import EntryBuild, StageError, run_stage
from tasks.tracking import TrackedRun
from tests.sglang_like import Behaviour, read_journal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REPO_ROOT = Path(__file__).parents[2]
NUM_PROMPTS = 24
NUM_TEST_PROMPTS = 6
MAX_NEW_TOKENS = 48
# The stage as it is, but for the server that it starts.
PROGRAM = """
import sys
from specforge_core.benchmark import server
from tests.sglang_like import MODULE
server.SGLANG_MODULE = MODULE
from specforge_core.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def like_sglang(spec: StageSpec, spec_path: Path, out: Path) -> list[str]:
    """In the place of `tasks.stage.stage_command`."""
    return [sys.executable, "-c", PROGRAM, spec.stage, "--spec", str(spec_path), "--out", str(out)]


def use_servers(monkeypatch: pytest.MonkeyPatch, directory: Path, behaviour: Behaviour) -> None:
    """Stages started from here on start servers that behave like this."""
    for name, value in (behaviour.variable(), ("PYTHONPATH", str(REPO_ROOT)), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(stage_module, "stage_command", like_sglang)
    monkeypatch.setattr(stage_module, "device_lock_dir", lambda: directory / "devices")


def make_entry() -> ManifestEntry:
    """The demo's target, few prompts, every way to measure."""
    train = PromptSource(dataset="builtin:demo", split="train", limit=NUM_PROMPTS)
    held_out = PromptSource(dataset="builtin:demo", split="heldout", config="arithmetic", limit=NUM_TEST_PROMPTS)
    return ManifestEntry(
        name="served",
        target=TargetConfig(model=str(DEMO_TARGET)),
        draft=Eagle3Config(num_steps=3, draft_vocab_size=128),
        data=DataConfig(sources=(train,), max_prompt_tokens=256, max_new_tokens=MAX_NEW_TOKENS),
        training=TrainingConfig(
            tokens_per_batch=512,
            tokens_per_micro_batch=512,
            max_document_tokens=512,
            eval_fraction=0.2,
            evals_per_run=1,
            checkpoints_per_run=1,
        ),
        benchmark=BenchmarkConfig(
            suites=(SuiteConfig(name="arithmetic", source=held_out, max_new_tokens=MAX_NEW_TOKENS),),
            repeats=2,
            num_in_process_prompts=NUM_TEST_PROMPTS,
            sweep=SweepConfig(
                chains=((1, 1, 2), (3, 1, 4)), concurrencies=(1, 2), max_new_tokens=16, requests_per_slot=1
            ),
        ),
        gates=GatesConfig(min_speedup=0.0),
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    store = tmp_path_factory.mktemp("digests")
    made = make_recipe(make_entry(), base_dir=REPO_ROOT, store=store, gpus=(), environ={})
    # SGLang has no float32; the server of the tests has, and there are no near-ties in it.
    return made.model_copy(update={"target": made.target.model_copy(update={"dtype": "float32"})})


def make_build(recipe: Recipe, store: Path) -> EntryBuild:
    return EntryBuild(recipe=recipe, store=store, gpus=(), publish_to="directory", tracking=TrackedRun(uri="none"))


def on_cpu(spec: StageSpec, **changes: Any) -> StageSpec:
    """The spec as a host without GPUs would need it, which no manifest may ask for."""
    return spec.model_copy(update={"device": "cpu", **changes})


def rows_of(artifact: Artifact[Any]) -> dict[str, tuple[list[int], list[int]]]:
    """Token ids and loss mask of each conversation."""
    return {row["id"]: (row["input_ids"], row["loss_mask"]) for row in load_conversations(artifact.path)}


@pytest.fixture(scope="module")
def build(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> EntryBuild:
    return make_build(recipe, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def artifacts(build: EntryBuild) -> BuildArtifacts:
    """Every stage as a build runs it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_servers(monkeypatch, build.store, Behaviour(answers="model"))
        made: dict[str, Artifact[Any]] = {}
        for stage, step in STEPS.items():
            spec = step.make_spec(build.recipe, *(made[name] for name in step.reads))
            made[stage] = run_stage(on_cpu(spec), build).artifact
    return BuildArtifacts(*made.values())


@pytest.fixture(scope="module")
def in_process(artifacts: BuildArtifacts, build: EntryBuild) -> Mapping[str, Artifact[Any]]:
    """The stages that run the target before training, without a server."""
    engine = UnmeasuredEngine(name="transformers")
    specs = (regenerate_spec(build.recipe), capture_spec(build.recipe, artifacts.conversations))
    return {spec.stage: run_stage(on_cpu(spec, engine=engine), build).artifact for spec in specs}


def test_the_conversations_are_the_in_process_ones(
    artifacts: BuildArtifacts, in_process: Mapping[str, Artifact[Any]]
) -> None:
    assert artifacts.conversations.key != in_process["regenerate"].key
    assert rows_of(artifacts.conversations) == rows_of(in_process["regenerate"])
    assert artifacts.conversations.facts == in_process["regenerate"].facts
    assert artifacts.conversations.facts.num_conversations == NUM_PROMPTS


def test_the_hidden_states_are_of_the_same_tokens(
    artifacts: BuildArtifacts, in_process: Mapping[str, Artifact[Any]]
) -> None:
    assert artifacts.hidden_states.facts == in_process["capture"].facts
    assert artifacts.hidden_states.facts.num_tokens == artifacts.conversations.facts.num_tokens


def test_the_benchmark_agrees_with_the_decoding_in_process(artifacts: BuildArtifacts) -> None:
    result = artifacts.benchmark.facts
    assert isinstance(result, BenchmarkResult)
    (measurement,) = result.measurements
    assert result.engine == "sglang"
    assert measurement.lossless is not None
    assert measurement.lossless.num_different == 0
    assert measurement.in_process_acceptance_length == pytest.approx(measurement.acceptance_length, rel=0.02)
    assert {(point.serving.chain(), point.serving.concurrency) for point in result.sweep} == {
        (chain, concurrency) for chain in ("1-1-2", "3-1-4") for concurrency in (1, 2)
    }
    assert "baseline" in result.servers
    assert {record.version for record in result.servers.values()} == {"0.5.14"}


def test_the_result_can_be_judged_reported_and_published(
    artifacts: BuildArtifacts, build: EntryBuild, tmp_path: Path
) -> None:
    for artifact in artifacts:
        assert damaged_files(artifact, read_content=True) == []
    recipe = build.recipe
    assert check_gates(recipe.entry.gates, artifacts.vocabulary.facts, artifacts.benchmark.facts, Standing()) == ()
    report = make_report(recipe.entry, recipe.target, artifacts, ())
    assert "3-1-4" in report_markdown(report)
    published = publish_directory(tmp_path, "served", repository_files(report, artifacts, recipe.target))
    check_serving_folder(published.path, load_target_config(recipe.target))
    check_speculators_folder(published.path / SPECULATORS_FOLDER, load_target_config(recipe.target))


def run_again(spec: StageSpec, recipe: Recipe, store: Path) -> Artifact[Record]:
    """The stage in a store of its own, where nothing can be reused."""
    return run_stage(on_cpu(spec), make_build(recipe, store)).artifact


def num_starts(journal: Path) -> int:
    return sum(line["event"] == "start" for line in read_journal(journal))


def sums(result: BenchmarkResult) -> list[tuple[object, ...]]:
    """All of a result that does not depend on time."""
    return [
        (one.suite, one.serving, one.num_output_tokens, one.num_verify_steps, one.accepted_by_position, one.lossless)
        for one in result.measurements
    ]


@pytest.mark.parametrize(("stage", "usual_starts"), [("regenerate", 1), ("capture", 1), ("benchmark", 3)])
def test_a_server_that_is_killed_in_a_stage_changes_nothing(
    artifacts: BuildArtifacts,
    build: EntryBuild,
    stage: str,
    usual_starts: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    journal = tmp_path / "journal"
    # The first server dies of SIGKILL in the middle, its successor lives.
    behaviour = Behaviour(answers="model", journal=str(journal), die_after=NUM_PROMPTS // 2, num_faulty_starts=1)
    use_servers(monkeypatch, tmp_path, behaviour)
    made = {artifact.stage: artifact for artifact in artifacts}
    spec = STEPS[stage].make_spec(build.recipe, *(made[name] for name in STEPS[stage].reads))
    again = run_again(spec, build.recipe, tmp_path)
    if isinstance(again.facts, BenchmarkResult):
        assert sums(again.facts) == sums(artifacts.benchmark.facts)
        assert again.facts.servers["baseline"].num_restarts == 1
    else:
        assert again.facts == made[stage].facts
    if stage == "regenerate":
        assert rows_of(again) == rows_of(artifacts.conversations)
    assert num_starts(journal) == usual_starts + 1


def test_a_stage_whose_servers_die_for_good_says_why_and_where_their_log_is(
    build: EntryBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_servers(monkeypatch, tmp_path, Behaviour(exit_at_start="CUDA out of memory"))
    with pytest.raises(StageError, match=r"ended with status 1: .*CUDA out of memory \(its log: .*\.log\)") as caught:
        run_again(regenerate_spec(build.recipe), build.recipe, tmp_path)
    assert "\n" not in str(caught.value)
    (log,) = tmp_path.glob("regenerate/.building-*/servers/*.log")
    assert str(log) in str(caught.value)


def test_a_stage_without_sglang_fails_with_the_way_out(
    build: EntryBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_servers(monkeypatch, tmp_path, Behaviour())
    engine = UnmeasuredEngine(name="sglang", python=str(tmp_path / "no-python"))
    spec = on_cpu(regenerate_spec(build.recipe), engine=engine)
    with pytest.raises(StageError, match=r"status 2: .*no SGLang server can be started: .*/no-python -m"):
        run_again(spec, build.recipe, tmp_path)
