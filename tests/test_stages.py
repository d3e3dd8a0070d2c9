"""Keys of the stages: what changes them, and what must not."""

from pathlib import Path
from typing import Any

import pytest

from specforge_core.artifacts import seal
from specforge_core.facts import Vocabulary
from specforge_core.manifest_sections import (
    AnswerConfig,
    BenchmarkConfig,
    Eagle3Config,
    FeaturesConfig,
    ParallelConfig,
    TrainingConfig,
)
from specforge_core.stages import (
    SPECS,
    BenchmarkSpec,
    CaptureSpec,
    ExportSpec,
    LiveSource,
    RegenerateSpec,
    ResolvedBenchmark,
    ResolvedData,
    ResolvedSource,
    ResolvedSuite,
    ResolvedTarget,
    StageSpec,
    TrainSpec,
    UnmeasuredEngine,
    VocabularySpec,
    key_fields,
)

TARGET = ResolvedTarget(model="/here/target", content_id="weights")
SOURCE = ResolvedSource(dataset="/here/prompts.jsonl", content_id="rows")


def artifact(directory: Path, content: str = "content") -> Path:
    """An artifact on disk; its type does not matter to who reads its content id."""
    directory.mkdir(parents=True)
    (directory / "rows.txt").write_text(content)
    facts = Vocabulary(draft_vocab_size=2, target_vocab_size=4, coverage=0.5)
    seal(directory, facts, stage="any", key=str(directory), inputs={}, elapsed_s=0.0)
    return directory


@pytest.fixture
def specs(tmp_path: Path) -> dict[str, StageSpec]:
    """One spec of each stage, over artifacts on disk."""
    names = ("conversations", "hidden_states", "vocabulary", "checkpoint", "draft")
    inputs = {name: artifact(tmp_path / name, name) for name in names}
    training = TrainingConfig()
    suite = ResolvedSuite(name="s", source=SOURCE)
    made = (
        RegenerateSpec(target=TARGET, data=ResolvedData(sources=(SOURCE,))),
        VocabularySpec(target=TARGET, conversations=inputs["conversations"], draft_vocab_size=10),
        capture_spec(inputs["conversations"], training),
        train_spec(inputs["hidden_states"], inputs["vocabulary"], training),
        ExportSpec(target=TARGET, checkpoint=inputs["checkpoint"], num_steps=3),
        BenchmarkSpec(
            target=TARGET,
            draft=inputs["draft"],
            conversations=inputs["conversations"],
            benchmark=ResolvedBenchmark(suites=(suite,)),
            hardware="a processor",
        ),
    )
    return {spec.stage: spec for spec in made}


def capture_spec(conversations: Path, training: TrainingConfig) -> CaptureSpec:
    return CaptureSpec(
        target=TARGET,
        conversations=conversations,
        algorithm="eagle3",
        aux_layers=None,
        features=FeaturesConfig(),
        max_document_tokens=training.max_document_tokens,
    )


def train_spec(hidden_states: Path, vocabulary: Path, training: TrainingConfig) -> TrainSpec:
    return TrainSpec(
        target=TARGET, hidden_states=hidden_states, vocabulary=vocabulary, draft=Eagle3Config(), training=training
    )


def changed(spec: StageSpec, **changes: Any) -> str:
    return spec.model_copy(update=changes).key()


def test_every_stage_has_a_key_of_its_own_that_survives_its_file(specs: dict[str, StageSpec]) -> None:
    assert set(specs) == set(SPECS)
    keys = {stage: spec.key() for stage, spec in specs.items()}
    assert len(set(keys.values())) == len(SPECS)
    for stage, spec in specs.items():
        assert SPECS[stage].model_validate_json(spec.model_dump_json()).key() == keys[stage]


def test_where_and_how_fast_a_stage_runs_does_not_change_its_key(specs: dict[str, StageSpec]) -> None:
    for spec in specs.values():
        assert changed(spec, device="cuda") == spec.key()
    assert changed(specs["regenerate"], batch_size=1) == specs["regenerate"].key()
    assert changed(specs["capture"], batch_tokens=1) == specs["capture"].key()
    assert changed(specs["capture"], features=FeaturesConfig(buffer_gib=1)) == specs["capture"].key()
    assert changed(specs["train"], num_processes=2) == specs["train"].key()
    assert changed(specs["train"], training=TrainingConfig(parallel=ParallelConfig(cp=2))) == specs["train"].key()


def test_the_learning_rate_changes_training_and_never_captures_again(tmp_path: Path) -> None:
    conversations, states, vocabulary = (artifact(tmp_path / name, name) for name in ("c", "h", "v"))
    slow, fast = TrainingConfig(learning_rate=1e-4), TrainingConfig(learning_rate=2e-4)
    assert capture_spec(conversations, slow).key() == capture_spec(conversations, fast).key()
    assert train_spec(states, vocabulary, slow).key() != train_spec(states, vocabulary, fast).key()
    # Documents are cut at capture, so this one is read by both.
    short = TrainingConfig(max_document_tokens=100)
    assert capture_spec(conversations, short).key() != capture_spec(conversations, slow).key()


CHECKED_SUITE = ResolvedSuite(name="s", source=SOURCE, answer=AnswerConfig(kind="number"))


def test_every_unmarked_field_changes_the_key(specs: dict[str, StageSpec]) -> None:
    changes: list[tuple[str, dict[str, Any]]] = [
        ("regenerate", {"target": TARGET.model_copy(update={"dtype": "float32"})}),
        ("regenerate", {"data": ResolvedData(sources=(SOURCE,), seed=1)}),
        ("regenerate", {"data": ResolvedData(sources=(SOURCE, SOURCE))}),
        ("vocabulary", {"draft_vocab_size": 11}),
        ("capture", {"aux_layers": (1, 2, 3)}),
        ("capture", {"algorithm": "other"}),
        ("capture", {"features": FeaturesConfig(dtype="float32")}),
        ("train", {"draft": Eagle3Config(num_steps=3)}),
        ("benchmark", {"hardware": "another processor"}),
        ("benchmark", {"benchmark": ResolvedBenchmark(suites=(ResolvedSuite(name="t", source=SOURCE),))}),
        ("benchmark", {"benchmark": ResolvedBenchmark(suites=(CHECKED_SUITE,))}),
    ]
    for stage, change in changes:
        assert changed(specs[stage], **change) != specs[stage].key(), change


def test_live_features_change_the_key_of_a_training_and_leave_those_without_as_they_are(
    specs: dict[str, StageSpec], tmp_path: Path
) -> None:
    stored = specs["train"]
    # As digests were made before there were any.
    assert "held_out_fraction" not in key_fields(specs["capture"])
    assert changed(specs["capture"], held_out_fraction=0.02) != specs["capture"].key()
    assert set(key_fields(stored)) == {"target", "draft", "training"}
    assert set(stored.inputs()) == {"hidden_states", "vocabulary"}
    live = LiveSource(engine=UnmeasuredEngine(name="sglang"))
    conversations = artifact(tmp_path / "dialogues", "some")
    key = changed(stored, live=live, conversations=conversations)
    assert key != stored.key()
    assert key != changed(stored, live=live, conversations=artifact(tmp_path / "other", "others"))
    other = live.model_copy(update={"engine": UnmeasuredEngine(name="transformers")})
    assert key != changed(stored, live=other, conversations=conversations)
    roomier = LiveSource(engine=live.engine, serve_gpus=2, buffer_gib=1.0, batch_tokens=7)
    assert key == changed(stored, live=roomier, conversations=conversations)


def test_content_that_moves_keeps_the_key_and_content_that_changes_does_not(specs: dict[str, StageSpec]) -> None:
    moved = SOURCE.model_copy(update={"dataset": "/there/prompts.jsonl", "revision": "branch"})
    other = SOURCE.model_copy(update={"content_id": "other rows"})
    for stage, field, made in (
        ("regenerate", "data", lambda source: ResolvedData(sources=(source,))),
        ("benchmark", "benchmark", lambda source: ResolvedBenchmark(suites=(ResolvedSuite(name="s", source=source),))),
    ):
        assert changed(specs[stage], **{field: made(moved)}) == specs[stage].key()
        assert changed(specs[stage], **{field: made(other)}) != specs[stage].key()
    for spec in specs.values():
        assert changed(spec, target=TARGET.model_copy(update={"model": "/there/target"})) == spec.key()
        assert changed(spec, target=TARGET.model_copy(update={"content_id": "other weights"})) != spec.key()


def test_an_input_counts_by_its_content(specs: dict[str, StageSpec], tmp_path: Path) -> None:
    for stage, name in (
        ("vocabulary", "conversations"),
        ("capture", "conversations"),
        ("train", "hidden_states"),
        ("train", "vocabulary"),
        ("export", "checkpoint"),
        ("benchmark", "draft"),
        ("benchmark", "conversations"),
    ):
        same = artifact(tmp_path / f"{stage}-{name}-again", name)
        other = artifact(tmp_path / f"{stage}-{name}-other", "changed")
        assert changed(specs[stage], **{name: same}) == specs[stage].key()
        assert changed(specs[stage], **{name: other}) != specs[stage].key()
        with pytest.raises(FileNotFoundError):
            changed(specs[stage], **{name: tmp_path / "nowhere"})


def test_a_new_version_of_a_stage_changes_its_key(specs: dict[str, StageSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    before = specs["export"].key()
    monkeypatch.setattr(ExportSpec, "version", ExportSpec.version + 1)
    assert specs["export"].key() != before


def test_a_resolved_config_keeps_the_checks_of_its_config() -> None:
    assert issubclass(ResolvedBenchmark, BenchmarkConfig)
    suite = ResolvedSuite(name="s", source=SOURCE)
    with pytest.raises(ValueError, match="another suite's name"):
        ResolvedBenchmark(suites=(suite, suite))
