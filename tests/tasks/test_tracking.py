"""What the tracker keeps, on a real MLflow over sqlite; and that a tracker out of reach costs nothing."""

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from specforge_core.artifacts import seal
from specforge_core.facts import Conversations
from tasks import tracking
from tasks.comparison import SHOWN_TAG
from tasks.tracking import TrackedRun, comparison_url, start_run, tracking_uri
from tests import made_build


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # One for all: creating the database takes a second.
    return tmp_path_factory.mktemp("store")


@pytest.fixture(autouse=True)
def _no_tracking_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def run(store: Path) -> TrackedRun:
    return start_run(tracking.ENTRIES, "demo", store=store, tags={"specbundle.build": "b1"})


def read(run: TrackedRun) -> Run:
    assert run.run_id is not None
    return MlflowClient(run.uri).get_run(run.run_id)


def curve(run: TrackedRun, name: str) -> list[tuple[int, float]]:
    assert run.run_id is not None
    return [(metric.step, metric.value) for metric in MlflowClient(run.uri).get_metric_history(run.run_id, name)]


def test_the_database_is_an_absolute_path_in_the_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(Path("store")) == f"sqlite:///{tmp_path}/store/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert tracking_uri(Path("store")) == "http://tracker:5000"


def test_builds_and_entries_are_runs_of_two_experiments(store: Path, run: TrackedRun) -> None:
    build = start_run(tracking.BUILDS, "all", store=store, tags={})
    client = MlflowClient(run.uri)
    names = {client.get_experiment(read(one).info.experiment_id).name for one in (run, build)}
    assert names == {"specbundle-builds", "specbundle-entries"}
    assert read(run).data.tags["specbundle.build"] == "b1"


def test_the_comparison_page_charts_the_entries(store: Path, run: TrackedRun) -> None:
    experiment = read(run).info.experiment_id
    url = comparison_url(store, port=5001)
    assert url is not None
    page, _, query = url.partition("?")
    assert page == f"http://127.0.0.1:5001/#/experiments/{experiment}/runs"
    assert parse_qs(query) == {"compareRunsMode": ["CHART"], "viewStateShareKey": ["specbundle"]}


def test_the_view_of_the_comparison_page_has_each_draft_once_and_every_suite_that_one_has(store: Path) -> None:
    run, broken, superseded = (start_run(tracking.ENTRIES, "demo", store=store, tags={}) for _ in range(3))
    run.log_metrics({"accept_length/math": 3.0, "speedup/math": 2.0})
    assert comparison_url(store)
    assert _view(run)["compareRunCharts"][0]["yaxis"]["key"] == "speedup/math"
    for other in (broken, superseded):
        other.log_metrics({"accept_length/old": 3.0, "speedup/old": 2.0})
    broken.end("FAILED")
    superseded.log_tags({SHOWN_TAG: "false"})
    assert comparison_url(store)
    # The page asks the server so itself.
    view, client = _view(run), MlflowClient(run.uri)
    shown = {found.info.run_id for found in client.search_runs([read(run).info.experiment_id], view["searchFilter"])}
    assert run.run_id in shown
    assert not shown & {broken.run_id, superseded.run_id}
    assert "speedup/old" not in {chart["yaxis"]["key"] for chart in view["compareRunCharts"]}


def _view(run: TrackedRun) -> dict[str, Any]:
    experiment = MlflowClient(run.uri).get_experiment(read(run).info.experiment_id)
    view: dict[str, Any] = json.loads(experiment.tags["mlflow.sharedViewState.specbundle"])
    return view


def test_nested_parameters_get_dotted_names(run: TrackedRun) -> None:
    run.log_params({"training": {"learning_rate": 0.001, "betas": [0.9, 0.95]}, "publish": True})
    assert read(run).data.params == {
        "training.learning_rate": "0.001",
        "training.betas": "[0.9, 0.95]",
        "publish": "True",
    }


def test_an_artifact_leaves_its_digests_and_its_record(run: TrackedRun, tmp_path: Path) -> None:
    facts = Conversations(
        num_conversations=1,
        num_tokens=2,
        num_loss_tokens=1,
        num_failed=0,
        num_cut_off=0,
        chat_template_sha256="ab" * 32,
    )
    artifact = seal(
        tmp_path, facts, stage="regenerate", key="k1", inputs={"prompts": "p1"}, elapsed_s=1.0, hardware="any"
    )
    run.log_artifact_record(artifact)
    tags = read(run).data.tags
    assert tags["regenerate.key"] == "k1"
    assert tags["regenerate.content_id"] == artifact.content_id
    assert tags["regenerate.input.prompts"] == "p1"
    assert run.run_id is not None
    kept = MlflowClient(run.uri).list_artifacts(run.run_id, "regenerate")
    assert [file.path for file in kept] == ["regenerate/artifact.json"]


def test_curves_grow_while_a_stage_runs(run: TrackedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FOLLOW_INTERVAL_S", 0.05)
    path = tmp_path / "metrics.jsonl"
    with run.follow(path, stage="train"), path.open("a") as file:
        file.write(json.dumps({"step": 10, "train/loss": 2.5, "lr": 0.1}) + "\n")
        file.write('{"step": 20, "train/lo')
        file.flush()
        deadline = time.monotonic() + 20
        while not curve(run, "train/loss"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # A line that is half written is not read yet.
        assert curve(run, "train/loss") == [(10, 2.5)]
        file.write('ss": 2.0, "note": "text"}\n')
    assert curve(run, "train/loss") == [(10, 2.5), (20, 2.0)]
    # A name without a section gets the stage's.
    assert curve(run, "train/lr") == [(10, 0.1)]


def test_a_resumed_stage_that_writes_its_lines_again_adds_none_twice(
    run: TrackedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FOLLOW_INTERVAL_S", 0.05)
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 10.0 - step}) + "\n" for step in (1, 2, 3)]
    path.write_text("".join(lines[:2]))
    with run.follow(path, stage="train"):
        deadline = time.monotonic() + 20
        while len(curve(run, "train/loss")) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # It went back to its checkpoint after step 1.
        path.write_text(lines[0])
        path.write_text("".join(lines))
    assert curve(run, "train/loss") == [(1, 9.0), (2, 8.0), (3, 7.0)]


def test_the_host_is_watched_from_outside_of_the_stage(run: TrackedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    with run.watch_host():
        deadline = time.monotonic() + 20
        while not curve(run, "system/cpu_utilization_percentage"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        threads = {thread.name for thread in threading.enumerate()}
        assert "SystemMetricsMonitor" in threads
    assert "SystemMetricsMonitor" not in {thread.name for thread in threading.enumerate()}
    (_, percentage), *_ = curve(run, "system/system_memory_usage_percentage")
    assert 0 < percentage < 100


def test_a_sweep_is_curves_over_the_concurrency_and_acceptance_one_over_the_position(run: TrackedRun) -> None:
    run.log_result(made_build.served_result(made_build.measurement()))
    assert curve(run, "throughput/7-1-8") == [(1, 340.0), (8, 1300.0), (16, 1900.0), (32, 2600.0)]
    assert curve(run, "throughput/without-draft") == [(1, 155.0), (8, 1130.0), (16, 2200.0), (32, 4200.0)]
    # Medians 3800 and 4200 at 32.
    steps, values = zip(*curve(run, "speedup_at/2-1-3"), strict=True)
    assert steps == (1, 8, 16, 32)
    assert values == pytest.approx((295 / 155, 1470 / 1130, 1.0, 3800 / 4200))
    assert curve(run, "suites/by_position/math") == [(1, 0.9), (2, 0.7), (3, 0.4)]
    assert curve(run, "accept_length/math") == [(0, 3.0)]


def test_more_than_a_request_may_hold_is_sent_in_several(run: TrackedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    log_batch = MlflowClient.log_batch

    def count(client: MlflowClient, run_id: str, **content: list[Any]) -> None:
        sizes.append((len(content.get("params", ())), len(content.get("metrics", ()))))
        log_batch(client, run_id, **content)

    monkeypatch.setattr(MlflowClient, "log_batch", count)
    run.log_params({f"p{i}": i for i in range(101)})
    run.log_curves({"long/curve": dict.fromkeys(range(1001), 1.0)})
    # An MLflow server refuses more than 100 parameters and more than 1,000 metrics at once.
    assert sizes == [(100, 0), (1, 0), (0, 1000), (0, 1)]
    assert len(read(run).data.params) == 101
    assert len(curve(run, "long/curve")) == 1001


def test_a_tracker_out_of_reach_is_warned_of_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Port 9 is the discard service's: nobody listens there.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING, logger="tasks.tracking"):
        run = start_run(tracking.ENTRIES, "demo", store=tmp_path, tags={})
        run.log_params({"a": 1})
        with run.follow(tmp_path / "metrics.jsonl", stage="train"), run.watch_host():
            pass
        run.end("FINISHED")
        assert comparison_url(tmp_path) is None
    warnings = [record.getMessage() for record in caplog.records if record.name == "tasks.tracking"]
    assert len(warnings) == 1
    assert "tracking at http://127.0.0.1:9 fails, and the build goes on without it" in warnings[0]


def test_a_tracker_that_dies_on_the_way_is_left_out_from_there_on(
    store: Path, run: TrackedRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr(tracking, "_failed_uris", set())
    monkeypatch.setattr(MlflowClient, "log_batch", fail)
    run.log_params({"a": 1})
    run.log_metrics({"b": 2.0})
    assert caplog.text.count("gone") == 1
    # The next run tries again.
    monkeypatch.undo()
    again = start_run(tracking.ENTRIES, "demo", store=store, tags={})
    again.log_metrics({"b": 2.0})
    assert read(again).data.metrics == {"b": 2.0}
