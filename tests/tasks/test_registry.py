"""Which draft is whose champion, on a real MLflow over sqlite; once, slow, over HTTP from a server of its own."""

import logging
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from specforge_core.benchmark.compare import Standing
from specforge_core.benchmark.report import EntryReport, make_report
from specforge_core.facts import GateFailure, Measurement, Published
from tasks import registry, tracking
from tasks.comparison import SHOWN_TAG
from tasks.registry import begin_rollback, champions, finish_rollback, plan_rollback, promote, register, registered
from tasks.stage import EntryBuild
from tests import builds, made_build
from tests.made_build import measurement, prompts
from tests.tasks.mlflow_page import mlflow_page

TOO_SLOW = GateFailure(gate="min_speedup", suite="math", measured=1.1, required=1.5, message="speedup 1.10x, too slow")
FIGURES = measurement(prompts=prompts(10, 10, 10))


class Factory:
    """Builds of made-up drafts, in one store."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.artifacts = made_build.artifacts(store / "artifacts", made_build.result(FIGURES))

    def build(self, entry: str = "demo") -> EntryBuild:
        run = tracking.start_run(tracking.ENTRIES, entry, store=self.store, tags={})
        return builds.entry_build(self.store, tracking=run, name=entry)

    def report(
        self, build: EntryBuild, draft: str, *measurements: Measurement, failures: tuple[GateFailure, ...] = ()
    ) -> EntryReport:
        """The report of a build that made this draft, kept by its run."""
        result = made_build.result(*(measurements or (FIGURES,)))
        made = make_report(build.recipe.entry, build.recipe.target, self.artifacts, failures)
        export = made.lineage.stages["export"].model_copy(update={"content_id": draft})
        lineage = made.lineage.model_copy(update={"stages": made.lineage.stages | {"export": export}})
        made = made.model_copy(update={"lineage": lineage, "benchmark": result})
        build.tracking.log_text(f"{build.recipe.entry.name}.json", made.model_dump_json())
        return made

    def publish(self, draft: str, entry: str = "demo") -> registry.DraftVersion:
        """The version of a draft that was built, passed and published."""
        build = self.build(entry)
        version = register(build, self.report(build, draft))
        assert version is not None
        promote(build, version, published(draft))
        return registered(entry, store=self.store).versions[version.number - 1]

    def standing(self, draft: str, *measurements: Measurement, entry: str = "demo") -> Standing:
        """That of a new draft."""
        made = self.artifacts.benchmark.model_copy(
            update={"facts": made_build.result(*(measurements or (FIGURES,)))},
        )
        export = self.artifacts.draft.model_copy(update={"content_id": draft})
        return registry.standing(builds.entry_build(self.store, name=entry), export, made)

    def roll_back(self, to: int | None = None) -> int:
        """The champion after it."""
        rollback = plan_rollback("demo", to, store=self.store)
        begin_rollback(rollback, store=self.store)
        finish_rollback(rollback, published(rollback.to.draft), store=self.store)
        return self.champion()

    def champion(self) -> int:
        champion = registered("demo", store=self.store).champion
        assert champion is not None
        return champion.number

    def aliases(self) -> dict[str, int]:
        """The version of each."""
        aliases = self.client.get_registered_model("specbundle.demo").aliases
        return {name: int(number) for name, number in aliases.items()}

    def statuses(self) -> list[str]:
        return [version.status for version in registered("demo", store=self.store).versions]

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking.tracking_uri(self.store))

    def stored(self, number: int) -> ModelVersion:
        """As MLflow has it."""
        return self.client.get_model_version("specbundle.demo", str(number))


def published(draft: str) -> Published:
    return Published(
        path=Path("/published/demo"),
        content_id=f"files of {draft}",
        changed=True,
        repository="org/demo",
        revision="abc",
    )


@pytest.fixture(autouse=True)
def _no_tracking_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracking, "_failed_uris", set())


@pytest.fixture
def factory(tracked_store: Path) -> Factory:
    return Factory(tracked_store)


def test_a_draft_is_a_candidate_until_it_is_published_and_then_the_champion(factory: Factory) -> None:
    build = factory.build()
    version = register(build, factory.report(build, "d1"))
    assert version is not None
    assert (version.number, version.status, version.draft) == (1, "candidate", "d1")
    assert factory.aliases() == {"candidate": 1}
    assert registered("demo", store=factory.store).champion is None

    promote(build, version, published("d1"))
    assert factory.aliases() == {"champion": 1}
    champion = registered("demo", store=factory.store).champion
    assert champion is not None
    assert (champion.status, champion.content_id) == ("published", "files of d1")
    assert (champion.repository, champion.revision) == ("org/demo", "abc")
    assert champions(factory.store) == {"demo": champion}


def test_a_version_has_every_digest_and_figure_and_its_run_the_report(factory: Factory) -> None:
    version = factory.publish("d1")
    stored, report = factory.stored(1), registry.report_of(version, store=factory.store)
    assert stored.source == f"runs:/{version.run_id}/demo.json"
    stages = report.lineage.stages
    assert {f"{name}.key" for name in stages} | {f"{name}.content_id" for name in stages} <= stored.tags.keys()
    assert stored.tags["train.content_id"] == stages["train"].content_id
    # 300 tokens in 100 steps; the median without draft; see made_build.
    expected = {"accept_length/math": "3", "speedup/math": "2", "baseline/math-c1": "102", "eval/loss": "1.25"}
    assert {name: stored.tags[name] for name in expected} == expected
    assert (stored.tags["target.content_id"], stored.tags["failed_gates"]) == (made_build.REVISION, "none")
    # So that the comparison page tells the versions of one entry apart.
    assert factory.client.get_run(version.run_id).info.run_name == "demo v1"


def test_the_same_draft_built_again_is_the_same_version_measured_again(factory: Factory) -> None:
    first = factory.publish("d1")
    build = factory.build()
    again = register(build, factory.report(build, "d1", measurement("code", speedup=1.75)))
    assert again is not None
    assert (again.number, again.status, again.run_id) == (1, "published", build.tracking.run_id)
    tags = factory.stored(1).tags
    assert tags["speedup/code"] == "1.75"
    # That suite is no longer measured.
    assert "speedup/math" not in tags
    shown = [factory.client.get_run(run_id).data.tags[SHOWN_TAG] for run_id in (first.run_id, again.run_id)]
    assert shown == ["false", "true"]
    promote(build, again, published("d1"))
    champion = registered("demo", store=factory.store).champion
    assert champion is not None
    assert champion.promoted_at == first.promoted_at


def test_drafts_are_told_apart_on_the_comparison_page_by_name_and_colour(factory: Factory) -> None:
    versions = [factory.publish("d1"), factory.publish("d2"), factory.publish("d3", entry="other")]
    build = factory.build()
    register(build, factory.report(build, "d2", failures=(TOO_SLOW,)))
    runs = [factory.client.get_run(run_id) for run_id in [*(one.run_id for one in versions), build.tracking.run_id]]
    assert [run.info.run_name for run in runs] == ["demo v1", "demo v2", "other v1", "demo v2 (rejected)"]
    colors = [run.data.tags["mlflow.runColor"] for run in runs]
    assert len(set(colors[:3])) == 3
    # The second run of a draft takes the place of the first.
    assert colors[3] == colors[1]


def test_a_rejected_draft_is_kept_with_what_it_failed_and_moves_nothing(factory: Factory) -> None:
    factory.publish("d1")
    build = factory.build()
    version = register(build, factory.report(build, "d2", failures=(TOO_SLOW,)))
    assert version is not None
    assert (version.number, version.status) == (2, "rejected")
    assert factory.stored(2).tags["failed_gates"] == "min_speedup"
    assert factory.stored(2).description == "speedup 1.10x, too slow"
    assert factory.aliases() == {"champion": 1}
    # Its gates were lowered.
    assert factory.publish("d2").number == 2
    assert factory.champion() == 2


@pytest.mark.slow
def test_a_champion_that_fails_a_gate_when_it_is_measured_again_stays_the_champion(factory: Factory) -> None:
    factory.publish("d1")
    build = factory.build()
    register(build, factory.report(build, "d1", failures=(TOO_SLOW,)))
    assert (factory.champion(), factory.statuses()) == (1, ["published"])
    assert factory.stored(1).tags["failed_gates"] == "min_speedup"


def test_a_new_draft_stands_against_the_champions_own_figures(factory: Factory) -> None:
    assert factory.standing("d1").comparison is None
    factory.publish("d1")
    worse = measurement(num_output_tokens=90, num_verify_steps=33, prompts=prompts(11, 11, 11))
    comparison = factory.standing("d2", worse).comparison
    assert comparison is not None
    assert comparison.version == 1
    # 30 tokens in 10 steps for each prompt before, in 11 now.
    change = comparison.changes[0]
    assert (change.metric, change.champion) == ("acceptance length", 3.0)
    assert change.ratio == pytest.approx((10 / 11, 10 / 11, 10 / 11))
    # A draft is not held against itself, and another entry has a champion of its own.
    assert factory.standing("d1", worse).comparison is None
    assert factory.standing("d2", worse, entry="other").comparison is None


def test_usual_speeds_are_medians_over_other_drafts_for_that_target_in_that_setting(factory: Factory) -> None:
    assert factory.standing("d1").usual_speeds == {}
    speeds = {"d1": 90.0, "d2": 100.0, "d3": 170.0}
    for draft, speed in speeds.items():
        build = factory.build("demo" if draft != "d3" else "other")
        figures = FIGURES.model_copy(update={"baseline_output_tokens_per_s": (speed,)})
        register(build, factory.report(build, draft, figures, failures=(TOO_SLOW,)))
    standing = factory.standing("new")
    assert standing.usual_speeds == {"math-c1": 100.0}
    assert standing.setting == "transformers 5.23.0 on Made-up CPU 9000"
    assert factory.standing("d3").usual_speeds == {"math-c1": 95.0}
    # On another host nothing is known yet.
    facts = made_build.result(FIGURES)
    made_on = facts.environment.model_copy(update={"cpu": "Another CPU"})
    elsewhere = factory.artifacts.benchmark.model_copy(
        update={"facts": facts.model_copy(update={"environment": made_on})}
    )
    build = builds.entry_build(factory.store, name="demo")
    assert registry.standing(build, factory.artifacts.draft, elsewhere).usual_speeds == {}


def test_a_rollback_goes_to_the_champion_before_and_twice_to_the_one_before_that(factory: Factory) -> None:
    for draft in ("d1", "d2", "d3"):
        factory.publish(draft)
    assert factory.roll_back() == 2
    assert factory.roll_back() == 1
    assert factory.statuses() == ["published", "rolled-back", "rolled-back"]
    with pytest.raises(ValueError, match="demo has nothing to go back to: 1 champion, 2 rolled-back, 3 rolled-back"):
        plan_rollback("demo", None, store=factory.store)
    # A new draft follows the one that is there now.
    factory.publish("d4")
    assert factory.roll_back() == 1


@pytest.mark.slow
def test_the_champion_before_is_the_one_that_was_promoted_before_whatever_its_number(factory: Factory) -> None:
    factory.publish("d1")
    factory.publish("d2")
    assert factory.publish("d1").number == 1
    assert factory.champion() == 1
    assert factory.roll_back() == 2


def test_no_build_publishes_again_what_was_rolled_back_but_a_person_may(factory: Factory) -> None:
    factory.publish("d1")
    factory.publish("d2")
    factory.roll_back()
    assert factory.standing("d2").rolled_back == 2
    assert factory.standing("d3").rolled_back is None
    # That build is rejected, and no version's status follows from it.
    build = factory.build()
    register(build, factory.report(build, "d2", failures=(TOO_SLOW,)))
    assert factory.statuses() == ["published", "rolled-back"]
    assert factory.roll_back(to=2) == 2
    assert factory.standing("d2").rolled_back is None
    assert factory.roll_back() == 1


@pytest.mark.slow
def test_a_rollback_over_several_undoes_all_that_were_promoted_since(factory: Factory) -> None:
    for draft in ("d1", "d2", "d3"):
        factory.publish(draft)
    assert factory.roll_back(to=1) == 1
    assert factory.statuses() == ["published", "rolled-back", "rolled-back"]
    assert factory.roll_back(to=2) == 2
    assert factory.statuses() == ["published", "published", "rolled-back"]


def test_a_rollback_that_was_cut_short_is_completed_by_the_next(factory: Factory) -> None:
    factory.publish("d1")
    factory.publish("d2")
    begin_rollback(plan_rollback("demo", None, store=factory.store), store=factory.store)
    # Users still get the second, and no build publishes it again.
    assert factory.champion() == 2
    assert factory.standing("d2").rolled_back == 2
    assert factory.roll_back() == 1


@pytest.mark.slow
def test_a_rollback_that_was_cut_short_can_be_called_off(factory: Factory) -> None:
    factory.publish("d1")
    factory.publish("d2")
    begin_rollback(plan_rollback("demo", None, store=factory.store), store=factory.store)
    assert factory.roll_back(to=2) == 2
    assert factory.statuses() == ["published", "published"]


def test_versions_that_cannot_be_gone_back_to_are_refused(factory: Factory) -> None:
    with pytest.raises(ValueError, match="demo has no champion in sqlite:"):
        plan_rollback("demo", None, store=factory.store)
    factory.publish("d1")
    build = factory.build()
    register(build, factory.report(build, "d2", failures=(TOO_SLOW,)))
    with pytest.raises(ValueError, match="version 1 of demo is the champion already"):
        plan_rollback("demo", 1, store=factory.store)
    for number in (2, 7):
        with pytest.raises(ValueError, match=f"no version {number} that was published: 1 champion, 2 rejected"):
            plan_rollback("demo", number, store=factory.store)


def test_a_registry_out_of_reach_is_said_and_loses_no_build(
    factory: Factory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Port 9 is the discard service's: nobody listens there.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    unknown = factory.standing("d1").unknown
    assert unknown is not None
    assert "the registry at http://127.0.0.1:9 cannot be asked (" in unknown
    build = factory.build()
    with caplog.at_level(logging.WARNING):
        version = register(build, factory.report(build, "d1"))
        assert version is None
        promote(build, version, published("d1"))
    assert "demo is published, but no registry knows of it" in caplog.text
    assert champions(factory.store) == {}
    with (
        pytest.raises(ConnectionError, match=r"the registry at http://127.0.0.1:9 cannot be asked"),
        registry.must_answer(factory.store),
    ):
        plan_rollback("demo", None, store=factory.store)


def test_the_password_of_a_registry_is_in_no_message(
    factory: Factory,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:hunter2@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    unknown = factory.standing("d1").unknown
    assert unknown is not None
    assert "the registry at http://127.0.0.1:9 cannot be asked" in unknown
    factory.build()
    champions(factory.store)
    assert "hunter2" not in unknown + caplog.text + "".join(capfd.readouterr())


@pytest.mark.slow
def test_a_draft_whose_report_the_tracker_lost_is_not_registered(factory: Factory) -> None:
    factory.publish("d1")
    build = factory.build()
    tracking._failed_uris.add(build.tracking.uri)
    version = register(build, factory.report(build, "d2"))
    assert version is None
    promote(build, version, published("d2"))
    assert (factory.champion(), factory.statuses()) == (1, ["published"])


def test_a_champion_whose_report_is_gone_is_unknown(factory: Factory) -> None:
    version = factory.publish("d1")
    (report,) = (factory.store / "mlflow").rglob(f"{version.run_id}/artifacts/demo.json")
    report.write_text("{}")
    unknown = factory.standing("d2").unknown
    assert unknown is not None
    assert "cannot be asked" in unknown


def test_a_registry_that_answers_again_is_used_again(factory: Factory) -> None:
    uri = tracking.tracking_uri(factory.store)
    build = factory.build()
    tracking._failed_uris.add(uri)
    build.tracking.log_metrics({"lost": 1.0})
    factory.standing("d1")
    build.tracking.log_metrics({"kept": 1.0})
    assert build.tracking.run_id is not None
    assert factory.client.get_run(build.tracking.run_id).data.metrics == {"kept": 1.0}


@pytest.mark.slow
def test_a_model_or_version_that_somebody_made_by_hand_is_left_alone(factory: Factory) -> None:
    build = factory.build()
    factory.client.create_registered_model("specbundle.demo")
    factory.client.create_model_version("specbundle.demo", f"runs:/{build.tracking.run_id}/x", build.tracking.run_id)
    assert registered("demo", store=factory.store) == ((), None)
    version = register(build, factory.report(build, "d1"))
    assert version is not None
    assert version.number == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_over_http_a_server_keeps_drafts_champions_and_rollbacks_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mlflow_page(f"sqlite:///{tmp_path / 'server.db'}", directory=tmp_path) as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        check_drafts_champions_and_rollbacks(Factory(tmp_path))


def check_drafts_champions_and_rollbacks(factory: Factory) -> None:
    factory.publish("d1")
    factory.publish("d2")
    worse = measurement(num_output_tokens=90, num_verify_steps=33, prompts=prompts(11, 11, 11))
    comparison = factory.standing("d3", worse).comparison
    assert comparison is not None
    assert comparison.version == 2
    assert factory.roll_back() == 1
    assert factory.statuses() == ["published", "rolled-back"]
    assert factory.standing("d2").rolled_back == 2
    assert champions(factory.store)["demo"].number == 1
