"""The order of the stages, what each is given, and what the gates decide: with fakes, without Prefect's engine."""

from pathlib import Path
from typing import Any

import pytest

from flows import draft
from specforge_core.artifacts import BuildArtifacts
from specforge_core.benchmark.compare import Standing
from specforge_core.facts import GateFailure, Published, Rejected, Withheld
from tests import made_build
from tests.builds import entry_build

PUBLISHED = Published(path=Path("/published/demo"), content_id="c", changed=True)
FAILURE = GateFailure(gate="min_speedup", suite="math", measured=1.1, required=1.5, message="too slow")


class FakeStages:
    """Answers every stage with its artifact of a made-up build, and writes down who was called with what."""

    def __init__(
        self,
        artifacts: BuildArtifacts,
        *,
        failures: tuple[GateFailure, ...] = (),
        broken: str = "",
        published: Published | Withheld = PUBLISHED,
    ) -> None:
        self.answers: dict[str, Any] = {
            "regenerate": artifacts.conversations,
            "vocabulary": artifacts.vocabulary,
            "capture": artifacts.hidden_states,
            "train": artifacts.checkpoint,
            "export": artifacts.draft,
            "benchmark": artifacts.benchmark,
            "check_gates": failures,
            "standing": Standing(),
            "report": "report of the build",
            "register": "its version",
            "publish": published,
            "promote": None,
        }
        self.broken = broken
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, stage: str) -> Any:
        def call(*args: Any) -> Any:
            self.calls.append((stage, args))
            if stage == self.broken:
                raise RuntimeError(f"{stage} broke")
            return self.answers[stage]

        return call

    @property
    def order(self) -> list[str]:
        return [stage for stage, _ in self.calls]


@pytest.fixture
def artifacts(tmp_path: Path) -> BuildArtifacts:
    return made_build.artifacts(tmp_path / "made", made_build.result(made_build.measurement()))


def test_stages_run_in_order_and_each_gets_what_it_reads(
    tmp_path: Path, artifacts: BuildArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = FakeStages(artifacts)
    monkeypatch.setattr(draft, "stages", fakes)
    build = entry_build(tmp_path)
    outcome = draft.build_draft.fn(build)
    assert isinstance(outcome, Published)
    facts = artifacts.vocabulary.facts, artifacts.benchmark.facts
    assert fakes.calls == [
        ("regenerate", (build,)),
        ("vocabulary", (build, artifacts.conversations)),
        ("capture", (build, artifacts.conversations)),
        ("train", (build, artifacts.hidden_states, artifacts.vocabulary, artifacts.conversations)),
        ("export", (build, artifacts.checkpoint)),
        ("benchmark", (build, artifacts.draft, artifacts.conversations)),
        ("standing", (build, artifacts.draft, artifacts.benchmark)),
        ("check_gates", (build.recipe.entry.gates, *facts, Standing())),
        ("report", (build, artifacts, (), Standing())),
        ("register", (build, "report of the build")),
        ("publish", (build, artifacts)),
        ("promote", (build, "its version", PUBLISHED)),
    ]


def test_a_draft_that_fails_a_gate_is_reported_and_not_published(
    tmp_path: Path, artifacts: BuildArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = FakeStages(artifacts, failures=(FAILURE,))
    monkeypatch.setattr(draft, "stages", fakes)
    build = entry_build(tmp_path)
    assert draft.build_draft.fn(build) == Rejected(failures=(FAILURE,))
    assert fakes.order[-3:] == ["check_gates", "report", "register"]
    assert fakes.calls[-2][1] == (build, artifacts, (FAILURE,), Standing())


def test_a_build_that_publishes_nothing_still_measures_and_checks(
    tmp_path: Path, artifacts: BuildArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = FakeStages(artifacts)
    monkeypatch.setattr(draft, "stages", fakes)
    assert draft.build_draft.fn(entry_build(tmp_path, publish=False)) == Withheld()
    assert fakes.order[-3:] == ["check_gates", "report", "register"]


def test_a_dry_run_promotes_nothing(tmp_path: Path, artifacts: BuildArtifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = FakeStages(artifacts, published=Withheld(plan=Path("/plan")))
    monkeypatch.setattr(draft, "stages", fakes)
    assert draft.build_draft.fn(entry_build(tmp_path)) == Withheld(plan=Path("/plan"))
    assert fakes.order[-1] == "publish"


def test_a_draft_that_could_not_be_published_is_not_promoted(
    tmp_path: Path, artifacts: BuildArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = FakeStages(artifacts, broken="publish")
    monkeypatch.setattr(draft, "stages", fakes)
    with pytest.raises(RuntimeError, match="publish broke"):
        draft.build_draft.fn(entry_build(tmp_path))
    assert fakes.order[-2:] == ["register", "publish"]


def test_nothing_runs_after_a_stage_that_failed(
    tmp_path: Path, artifacts: BuildArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = FakeStages(artifacts, broken="train")
    monkeypatch.setattr(draft, "stages", fakes)
    with pytest.raises(RuntimeError, match="train broke"):
        draft.build_draft.fn(entry_build(tmp_path))
    assert fakes.order == ["regenerate", "vocabulary", "capture", "train"]
