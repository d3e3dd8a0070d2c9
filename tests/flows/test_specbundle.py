"""A whole build: states, artifacts, tracking, and entries that fail. Stages are fakes; Prefect and MLflow are real."""

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.states import State

from flows import draft, entries
from flows.specbundle import specbundle
from flows.summary import BuildSummary
from specforge_core import cli
from specforge_core.artifacts import BuildArtifacts
from specforge_core.facts import GateFailure
from specforge_core.gpus import Gpu
from specforge_core.ledger import load_entry_record, record_stage
from tasks.site import SITE_TAG
from tasks.stage import EntryBuild, run_stage, stage_task
from tests import made_build
from tests.builds import entry_build
from tests.factory import gpu_entry, make_factory, served_entry, tiny_entry
from tests.flows.test_draft import FakeStages
from tests.tasks.echo import EchoSpec

pytestmark = pytest.mark.usefixtures("prefect_engine")

TOO_SLOW = GateFailure(gate="min_speedup", suite="math", measured=1.1, required=1.5, message="speedup 1.10x, too slow")


class StagesByEntry:
    """Fake stages for several entries at once: each entry fails, or not, in its own way."""

    def __init__(self, artifacts: BuildArtifacts, **by_entry: dict[str, Any]) -> None:
        self.fakes = {name: FakeStages(artifacts, **how) for name, how in by_entry.items()}
        self.benchmark_key = artifacts.benchmark.key
        self.meeting: threading.Barrier | None = None
        """Where all entries wait for each other before their first stage."""
        self.local = threading.local()

    def __getattr__(self, stage: str) -> Any:
        def call(*args: Any) -> Any:
            if isinstance(args[0], EntryBuild):
                self.local.build = args[0]
            build: EntryBuild = self.local.build
            name = build.recipe.entry.name
            if stage == "regenerate" and self.meeting:
                self.meeting.wait()
            answer = getattr(self.fakes[name], stage)(*args)
            if stage == "benchmark":
                record_stage(build.store, name, stage=stage, key=self.benchmark_key)
            return answer

        return call


@pytest.fixture
def artifacts(tmp_path: Path) -> BuildArtifacts:
    """In the store that builds of these tests use, where the summary reads the benchmark again."""
    made = made_build.artifacts(tmp_path / "made", made_build.result(made_build.measurement()))
    place = tmp_path / "store" / "benchmark"
    place.mkdir(parents=True)
    made.benchmark.path.rename(place / made.benchmark.key)
    return made


def run_build(tmp_path: Path, *entries: dict[str, Any], **parameters: Any) -> State[Any]:
    manifest = make_factory(tmp_path, *entries)
    state: State[Any] = specbundle(manifest=manifest, store=tmp_path / "store", return_state=True, **parameters)
    return state


def summary_of(state: State[Any]) -> BuildSummary:
    summary = state.result(raise_on_failure=False)
    assert isinstance(summary, BuildSummary), summary
    return summary


def latest_artifact(key: str) -> Any:
    async def read() -> Any:
        async with get_client() as client:
            found = await client.read_artifacts(
                artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])), sort="UPDATED_DESC"
            )
            return found[0].data

    return asyncio.run(read())


def test_a_build_ends_completed_with_a_row_on_its_page_and_in_its_result(
    tmp_path: Path, artifacts: BuildArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft, "stages", StagesByEntry(artifacts, tiny={}))
    state = run_build(tmp_path)
    assert state.is_completed()
    (row,) = summary_of(state).rows
    # 300 tokens in 100 verification steps; see made_build.
    assert (row.entry, row.status, row.acceptance_length, row.speedup) == ("tiny", "published", 3.0, 2.0)
    assert row.detail == "/published/demo"
    (shown,) = yaml.safe_load(latest_artifact("specbundle"))
    assert (shown["entry"], shown["acceptance length"], shown["speedup"]) == ("tiny", "3.00", "2.00x")
    assert "1 of 1 entries passed" in latest_artifact("specbundle-summary")
    assert latest_artifact("draft-tiny") == "[/published/demo](file:///published/demo)"
    assert load_entry_record(tmp_path / "store", "tiny").outcome is not None
    site = tmp_path / "store" / "site"
    assert latest_artifact("specbundle-site") == f"[Site of all results]({(site / 'index.html').as_uri()})"
    assert (site / "entries" / "tiny.html").is_file()


def test_entries_run_side_by_side_and_one_that_fails_stops_no_other_but_fails_the_build(
    tmp_path: Path, artifacts: BuildArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = StagesByEntry(artifacts, good={}, broken={"broken": "train"}, slow={"failures": (TOO_SLOW,)})
    monkeypatch.setattr(draft, "stages", stages)
    # One after the other, the first would wait here alone and break the barrier.
    stages.meeting = threading.Barrier(3, timeout=60)
    state = run_build(tmp_path, *(tiny_entry(name) for name in ("broken", "good", "slow")))
    assert state.is_failed()
    assert state.message == "2 of 3 entries did not pass: broken, slow"
    rows = {row.entry: row for row in summary_of(state).rows}
    assert {name: row.status for name, row in rows.items()} == {
        "broken": "failed",
        "good": "published",
        "slow": "rejected",
    }
    assert rows["broken"].detail == "RuntimeError: train broke"
    assert rows["slow"].detail == "speedup 1.10x, too slow"
    client = MlflowClient(f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("specbundle-entries")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.run_name: run.info.status for run in runs} == {
        "broken": "FAILED",
        "good": "FINISHED",
        "slow": "FINISHED",
    }
    pages = {run.info.run_name: run.data.tags.get(SITE_TAG) for run in runs}
    folder = tmp_path / "store" / "site" / "entries"
    assert pages == {"broken": None, "good": (folder / "good.html").as_uri(), "slow": (folder / "slow.html").as_uri()}


def test_an_entry_for_gpus_that_this_host_lacks_is_skipped_unless_it_is_asked_for(
    tmp_path: Path, artifacts: BuildArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(draft, "stages", StagesByEntry(artifacts, tiny={}))
    big = gpu_entry("big", 8)
    state = run_build(tmp_path, big, tiny_entry())
    assert state.is_completed()
    rows = {row.entry: row for row in summary_of(state).rows}
    assert rows["tiny"].status == "published"
    assert (rows["big"].status, rows["big"].detail) == ("skipped", "big needs 8 GPUs, this host has 0")
    asked = specbundle(
        manifest=tmp_path / "bundle_manifest.yaml", store=tmp_path / "store", only=["big"], return_state=True
    )
    assert asked.is_failed()
    (row,) = summary_of(asked).rows
    assert row.detail == (
        "ValueError: big needs 8 GPUs, this host has 0; build it on a host that has them, or choose others with --only"
    )


def test_the_command_names_what_it_skips_on_one_line_and_says_where_to_look_with_its_own_options(
    tmp_path: Path,
    artifacts: BuildArtifacts,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(draft, "stages", StagesByEntry(artifacts, tiny={}))
    manifest, store = (
        make_factory(tmp_path, gpu_entry("big", 2), tiny_entry(), gpu_entry("huge", 8)),
        tmp_path / "store",
    )
    with caplog.at_level("INFO"):
        assert cli.main(["--manifest", str(manifest), "--store", str(store), "build"]) == 0
    printed = capsys.readouterr()
    told = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert told == ["skipped for want of GPUs, of which this host has 0: big, huge"]
    assert "skipped:" not in printed.err
    command = f"specbundle --manifest {manifest} --store {store}"
    assert f"look at:  {command} show conversation --entry tiny; {command} report\n" in printed.out
    assert f", or `{command} up`\n" in printed.out


def test_an_entry_that_needs_sglang_fails_before_its_first_stage_where_there_is_none(
    tmp_path: Path, artifacts: BuildArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECBUNDLE_SGLANG_PYTHON", str(tmp_path / "no-python"))
    monkeypatch.setattr(entries, "list_gpus", lambda visible: (Gpu("0", "Made-up GPU"),))
    stages = StagesByEntry(artifacts, served={}, tiny={})
    monkeypatch.setattr(draft, "stages", stages)
    state = run_build(tmp_path, served_entry("served"), tiny_entry())
    rows = {row.entry: row for row in summary_of(state).rows}
    assert (rows["served"].status, rows["tiny"].status) == ("failed", "published")
    assert "no-python has no SGLang (" in rows["served"].detail
    assert "set SPECBUNDLE_SGLANG_PYTHON to the interpreter" in rows["served"].detail
    assert stages.fakes["served"].calls == []


def test_a_name_that_the_manifest_does_not_have_fails_before_anything_is_built(
    tmp_path: Path, artifacts: BuildArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = StagesByEntry(artifacts, tiny={})
    monkeypatch.setattr(draft, "stages", stages)
    state = run_build(tmp_path, only=["tinny"])
    assert state.is_failed()
    with pytest.raises(ValueError, match="the manifest has no entry 'tinny'; did you mean tiny"):
        state.result()
    assert stages.fakes["tiny"].calls == []


def echo_task(retries: int = 0) -> Any:
    @stage_task(retries=retries)
    def echo(build: EntryBuild, spec: EchoSpec) -> Any:
        return run_stage(spec, build)

    return echo


@pytest.fixture
def _echo_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import stage
    from tests.tasks.echo import echo_command

    monkeypatch.setattr(stage, "stage_command", echo_command)
    monkeypatch.setattr(stage, "device_lock_dir", lambda: tmp_path / "devices")
    monkeypatch.setattr(stage, "RETRY_DELAYS_S", [0.0, 0.0])


def task_states(name: str) -> list[str]:
    async def read() -> list[str]:
        async with get_client() as client:
            runs = await client.read_task_runs(sort="EXPECTED_START_TIME_ASC")
            return [run.state.name for run in runs if run.name == name and run.state]

    return asyncio.run(read())


@pytest.mark.usefixtures("_echo_stage")
def test_a_reused_stage_shows_as_cached_and_gives_its_artifact(tmp_path: Path) -> None:
    build = entry_build(tmp_path / "store", name="echoing")
    first = echo_task()(build, EchoSpec(text="hello"))
    second = echo_task()(build, EchoSpec(text="hello"))
    assert first == second
    assert first.path.is_dir()
    # The server hears of task runs by events, a moment later.
    deadline = time.monotonic() + 20
    while task_states("echoing echo") != ["Completed", "Cached"]:
        assert time.monotonic() < deadline, task_states("echoing echo")
        time.sleep(0.1)
    # The last bar that it printed.
    assert latest_artifact("echoing-echo") == 50.0


@pytest.mark.usefixtures("_echo_stage")
def test_a_transient_failure_is_retried_where_a_stage_allows_it(tmp_path: Path) -> None:
    build = entry_build(tmp_path / "store")
    artifact = echo_task(retries=1)(build, EchoSpec(text="hello", behaviour="fail once"))
    assert (artifact.path / "stage.log").read_text().count("hearing hello") == 2


@pytest.mark.usefixtures("_echo_stage")
def test_what_a_user_got_wrong_is_not_retried(tmp_path: Path) -> None:
    build = entry_build(tmp_path / "store")
    with pytest.raises(RuntimeError, match="stage echo ended with status 2: hearing hello"):
        echo_task(retries=2)(build, EchoSpec(text="hello", behaviour="refuse"))
    (log,) = build.store.glob("echo/.building-*/stage.log")
    assert log.read_text().count("hearing hello") == 1
