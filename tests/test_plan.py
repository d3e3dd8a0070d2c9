"""Which stages a build would run, and why: over real artifacts of a made-up build, placed under their real keys."""

import shutil
from pathlib import Path
from typing import Any, Literal

import pytest

from specforge_core import plan as plan_module
from specforge_core.artifacts import PROGRESS_DIRECTORY, SPEC_NAME, Artifact, Store, seal
from specforge_core.facts import Published
from specforge_core.ledger import last_artifact, load_entry_record, record_outcome, record_stage
from specforge_core.manifest_sections import Eagle3Config, EngineConfig, FeaturesConfig, ResourcesConfig, TrainingConfig
from specforge_core.plan import (
    STEPS,
    Recipe,
    StagePlan,
    benchmark_spec,
    capture_spec,
    plan_entry,
    plan_unbuilt,
    regenerate_spec,
)
from specforge_core.stages import ServedEngine
from tests import made_build
from tests.builds import recipe_of


def build_all(store: Store, recipe: Recipe, made: Path) -> dict[str, Artifact[Any]]:
    """The artifacts of a finished build, as stages would have left them."""
    facts = {artifact.stage: artifact.facts for artifact in made_build.artifacts(made)}
    found: dict[str, Artifact[Any]] = {}
    for stage, step in STEPS.items():
        spec = step.make_spec(recipe, *(found[name] for name in step.reads))
        place = store.root / stage / spec.key()
        place.mkdir(parents=True)
        (place / SPEC_NAME).write_text(spec.model_dump_json())
        (place / "content").write_text(f"{stage} {spec.key()}")
        seal(place, facts[stage], stage=stage, key=spec.key(), inputs=spec.inputs(), elapsed_s=1.0, hardware="any")
        artifact = store.find(stage, spec.key(), spec.facts_type)
        assert artifact is not None
        found[stage] = artifact
        record_stage(store.root, recipe.entry.name, stage=stage, key=spec.key())
    return found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def built(store: Store, tmp_path: Path) -> dict[str, Artifact[Any]]:
    return build_all(store, recipe_of(made_build.entry()), tmp_path / "made")


def by_stage(plans: list[StagePlan]) -> dict[str, tuple[str, str]]:
    return {plan.stage: (plan.status, plan.reason) for plan in plans}


def test_before_the_first_build_all_wait_for_the_first_stage(store: Store) -> None:
    assert by_stage(plan_entry(recipe_of(made_build.entry()), store)) == {
        "regenerate": ("stale", "never built"),
        "vocabulary": ("waits", "waits for regenerate"),
        "capture": ("waits", "waits for regenerate"),
        "train": ("waits", "waits for capture, vocabulary, regenerate"),
        "export": ("waits", "waits for train"),
        "benchmark": ("waits", "waits for export, regenerate"),
    }


def test_an_entry_without_artifacts_is_planned_without_knowing_what_it_reads(store: Store) -> None:
    assert plan_unbuilt() == plan_entry(recipe_of(made_build.entry()), store)


def test_after_a_build_all_are_fresh_under_their_keys(store: Store, built: dict[str, Artifact[Any]]) -> None:
    assert by_stage(plan_entry(recipe_of(made_build.entry()), store)) == {
        stage: ("fresh", artifact.key) for stage, artifact in built.items()
    }


@pytest.mark.usefixtures("built")
def test_a_learning_rate_concerns_training_and_what_follows_alone(store: Store) -> None:
    plans = by_stage(
        plan_entry(recipe_of(made_build.entry(training=TrainingConfig(learning_rate=3e-4, seed=1))), store)
    )
    assert plans["train"] == ("stale", "training.learning_rate: 0.0001 -> 0.0003; training.seed: 0 -> 1")
    assert {stage: status for stage, (status, _) in plans.items()} == {
        "regenerate": "fresh",
        "vocabulary": "fresh",
        "capture": "fresh",
        "train": "stale",
        "export": "waits",
        "benchmark": "waits",
    }


@pytest.mark.usefixtures("built")
def test_another_engine_concerns_whatever_ran_the_target(store: Store) -> None:
    transformers = EngineConfig(name="transformers")
    plans = by_stage(plan_entry(recipe_of(made_build.entry(engine=transformers)), store))
    assert plans["regenerate"] == ("stale", "engine.name: sglang -> transformers")


@pytest.mark.usefixtures("built")
def test_the_size_of_servers_concerns_what_is_measured_on_them_alone(store: Store) -> None:
    engine = EngineConfig(max_running_requests=128, mem_fraction_static=0.5)
    plans = by_stage(plan_entry(recipe_of(made_build.entry(engine=engine)), store))
    assert {stage for stage, (status, _) in plans.items() if status != "fresh"} == {"benchmark"}
    assert plans["benchmark"] == (
        "stale",
        "engine.max_running_requests: 64 -> 128; engine.mem_fraction_static: 0.85 -> 0.5",
    )


@pytest.mark.parametrize(("engine", "reads"), [("sglang", {"draft"}), ("transformers", {"draft", "conversations"})])
def test_a_new_version_of_the_engine_has_the_draft_measured_again(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: Literal["sglang", "transformers"],
    reads: set[str],
) -> None:
    monkeypatch.setattr(plan_module, "engine_version", lambda engine: f"{engine.name} 1.0")
    recipe = recipe_of(made_build.entry(engine=EngineConfig(name=engine)))
    built = build_all(store, recipe, tmp_path / "made")
    # Only a drafter in process learns from them.
    assert built["benchmark"].inputs.keys() == reads
    monkeypatch.setattr(plan_module, "engine_version", lambda engine: f"{engine.name} 1.1")
    plans = by_stage(plan_entry(recipe, store))
    assert {stage for stage, (status, _) in plans.items() if status != "fresh"} == {"benchmark"}
    assert plans["benchmark"] == ("stale", f"engine_version: {engine} 1.0 -> {engine} 1.1")


def test_running_servers_serve_regenerate_alone_and_are_no_part_of_its_key(
    store: Store, built: dict[str, Artifact[Any]]
) -> None:
    alone = recipe_of(made_build.entry())
    attached = alone.model_copy(
        update={"engine": ServedEngine(**{**dict(alone.engine), "urls": ("http://a:1",), "python": "/opt/python"})}
    )
    regenerate = regenerate_spec(attached)
    assert (regenerate.engine.urls, regenerate.device) == (("http://a:1",), "cpu")
    assert regenerate_spec(alone).device == "cuda"
    assert {status for status, _ in by_stage(plan_entry(attached, store)).values()} == {"fresh"}
    for spec in (
        capture_spec(attached, built["regenerate"]),
        benchmark_spec(attached, built["export"], built["regenerate"]),
    ):
        assert (spec.engine.urls, spec.engine.python, spec.device) == ((), "/opt/python", "cuda")


@pytest.mark.usefixtures("built")
def test_a_new_vocabulary_size_does_not_capture_again(store: Store) -> None:
    plans = by_stage(plan_entry(recipe_of(made_build.entry(draft=Eagle3Config(draft_vocab_size=500))), store))
    assert plans["vocabulary"] == ("stale", "draft_vocab_size: 32000 -> 500")
    assert plans["capture"][0] == "fresh"
    assert plans["train"] == ("waits", "waits for vocabulary")


def test_other_bytes_upstream_are_named_as_the_input_that_changed(
    store: Store, built: dict[str, Artifact[Any]]
) -> None:
    old = built["train"]
    (old.path / "content").write_text("weights of another run")
    remade = seal(old.path, old.facts, stage="train", key=old.key, inputs=old.inputs, elapsed_s=1.0, hardware="any")
    plans = by_stage(plan_entry(recipe_of(made_build.entry()), store))
    assert plans["train"] == ("fresh", old.key)
    assert plans["export"] == ("stale", f"input checkpoint: {old.content_id} -> {remade.content_id}")


def test_damaged_and_deleted_and_interrupted_artifacts_are_told_apart(
    store: Store, built: dict[str, Artifact[Any]]
) -> None:
    (built["vocabulary"].path / "content").unlink()
    shutil.rmtree(built["capture"].path)
    plans = by_stage(plan_entry(recipe_of(made_build.entry()), store))
    assert plans["vocabulary"] == ("stale", "files of its artifact are missing or changed")
    assert plans["capture"] == ("stale", f"its last artifact {built['capture'].key} was deleted")
    building = built["capture"].path.with_name(f".building-{built['capture'].key}")
    (building / PROGRESS_DIRECTORY).mkdir(parents=True)
    (building / SPEC_NAME).write_text("{}")
    plans = by_stage(plan_entry(recipe_of(made_build.entry()), store))
    assert plans["capture"] == ("stale", "an interrupted build goes on from where it was")


def test_a_new_version_of_a_stages_code_is_the_reason_when_nothing_else_is(
    store: Store, built: dict[str, Artifact[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specforge_core.stages.ExportSpec.version", 99)
    plans = by_stage(plan_entry(recipe_of(made_build.entry()), store))
    assert plans["export"] == ("stale", "the stage's code changed: it is version 99 now")


def test_an_outcome_is_forgotten_once_a_stage_has_another_artifact(
    store: Store, built: dict[str, Artifact[Any]]
) -> None:
    outcome = Published(path=Path("/published/demo"), content_id="c", changed=True)
    record_outcome(store.root, "demo", outcome)
    record_stage(store.root, "demo", stage="train", key=built["train"].key)
    assert load_entry_record(store.root, "demo").outcome == outcome
    record_stage(store.root, "demo", stage="train", key="another")
    assert load_entry_record(store.root, "demo").outcome is None
    assert last_artifact(store, "demo", "train") is None
    assert last_artifact(store, "demo", "export") == built["export"]


def test_live_features_put_the_target_beside_the_training(
    store: Store, built: dict[str, Artifact[Any]], tmp_path: Path
) -> None:
    recipe = recipe_of(made_build.entry())
    features = FeaturesConfig(mode="live", serve_gpus=2, buffer_gib=3.0)
    resources, engine = ResourcesConfig(num_gpus=8), EngineConfig(name="sglang")
    entry = recipe.entry.model_copy(update={"features": features, "resources": resources, "engine": engine})
    live = recipe.model_copy(
        update={
            "entry": entry,
            "engine": ServedEngine(name="sglang", urls=("http://running",), python="/sglang/python"),
        }
    )
    inputs = [built[name] for name in STEPS["train"].reads]
    stored_spec, spec = STEPS["train"].make_spec(recipe, *inputs), STEPS["train"].make_spec(live, *inputs)
    assert (stored_spec.live, stored_spec.conversations) == (None, None)
    assert capture_spec(recipe, built["regenerate"]).held_out_fraction is None
    assert capture_spec(live, built["regenerate"]).held_out_fraction == entry.training.eval_fraction
    assert spec.num_processes == 6
    assert spec.conversations == built["regenerate"].path
    assert (spec.live.serve_gpus, spec.live.buffer_gib) == (2, 3.0)
    # Servers that run already have no hook; those that it starts come from the same environment.
    assert (spec.live.engine.name, spec.live.engine.urls, spec.live.engine.python) == ("sglang", (), "/sglang/python")
