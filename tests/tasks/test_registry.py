"""Which draft is whose champion, on a real MLflow over sqlite; once, slow, over HTTP from a server of its own."""

import logging
from pathlib import Path

import pytest

from tasks import registry, tracking
from tasks.comparison import SHOWN_TAG
from tasks.registry import champions, plan_rollback, promote, register, registered
from tests import builds, made_build
from tests.made_build import measurement, prompts
from tests.tasks.made_drafts import FIGURES, TOO_SLOW, Factory, published
from tests.tasks.mlflow_page import mlflow_page


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
