"""Published drafts measured again: with fakes and without the engine, then over a real registry; and, slow, all of it
on a tiny real target and a local Hub."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from prefect.states import State

from flows import draft
from flows import rebenchmark as module
from flows.rebenchmark import OF_TODAY, measure_again, published_entry, rebenchmark
from flows.specbundle import specbundle
from flows.summary import BuildSummary, EntryRow
from specforge_core import cli, plan
from specforge_core.artifacts import BuildArtifacts, Store
from specforge_core.benchmark.history import load_history
from specforge_core.benchmark.report import EntryReport, make_report
from specforge_core.digests import file_sha256
from specforge_core.facts import GateFailure, Published, Rejected
from specforge_core.ledger import last_artifact, load_entry_record
from specforge_core.manifest import Manifest, ManifestEntry
from specforge_core.manifest_gates import GatesConfig
from specforge_core.manifest_sections import BenchmarkConfig, DataConfig, PromptSource, SuiteConfig, TrainingConfig
from specforge_core.resolve import resolve_target
from tasks import stage, tracking
from tasks.registry import DraftVersion, promote, register, registered
from tasks.stage import EntryBuild
from tests import made_build
from tests.builds import entry_build
from tests.factory import gpu_entry, make_factory, tiny_entry
from tests.flows.test_draft import FakeStages
from tests.flows.test_specbundle import StagesByEntry
from tests.hub_like import server

TOO_SLOW = GateFailure(gate="min_speedup", suite="math", measured=1.1, required=1.5, message="speedup 1.10x, too slow")


def fake_stages(artifacts: BuildArtifacts, **how: Any) -> FakeStages:
    fakes = FakeStages(artifacts, **how)
    fakes.answers["champion"] = artifacts
    return fakes


def use(fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for flow_file in (draft, module):
        monkeypatch.setattr(flow_file, "stages", fakes)


@pytest.fixture
def artifacts(tmp_path: Path) -> BuildArtifacts:
    made = made_build.artifacts(tmp_path / "made", made_build.result(made_build.measurement()))
    place = tmp_path / "store" / "benchmark"
    place.mkdir(parents=True)
    shutil.move(made.benchmark.path, place / made.benchmark.key)
    return made


class Subject:
    """A build of the made-up entry, its report, and its version."""

    def __init__(self, store: Path, artifacts: BuildArtifacts) -> None:
        self.build: EntryBuild = entry_build(store)
        recipe = self.build.recipe
        self.report: EntryReport = make_report(recipe.entry, recipe.target, artifacts, ())
        self.version = DraftVersion(entry="demo", number=3, status="published", draft="c", run_id="run")


def test_a_champion_is_measured_judged_and_published_and_nothing_is_trained(
    tmp_path: Path, artifacts: BuildArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, fakes = Subject(tmp_path, artifacts), fake_stages(artifacts)
    use(fakes, monkeypatch)
    assert isinstance(measure_again.fn(subject.build, subject.version, subject.report), Published)
    assert fakes.calls[:2] == [
        ("champion", (subject.build, subject.version, subject.report)),
        ("benchmark", (subject.build, artifacts.draft, artifacts.conversations)),
    ]
    assert fakes.order[2:] == ["standing", "check_gates", "report", "register", "publish", "promote"]
    assert dict(fakes.calls)["publish"] == (subject.build, artifacts)


def test_a_champion_that_fails_a_gate_is_reported_and_neither_published_nor_promoted(
    tmp_path: Path, artifacts: BuildArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, fakes = Subject(tmp_path, artifacts), fake_stages(artifacts, failures=(TOO_SLOW,))
    use(fakes, monkeypatch)
    outcome = measure_again.fn(subject.build, subject.version, subject.report)
    assert outcome == Rejected(failures=(TOO_SLOW,))
    assert fakes.order[-2:] == ["report", "register"]


def test_a_draft_for_another_target_is_not_measured(
    tmp_path: Path, artifacts: BuildArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, fakes = Subject(tmp_path, artifacts), fake_stages(artifacts)
    use(fakes, monkeypatch)
    lineage = subject.report.lineage.model_copy(update={"target_content_id": "older"})
    with pytest.raises(ValueError, match=r"was made for content older of meta-llama/.*; pin that target's revision"):
        measure_again.fn(subject.build, subject.version, subject.report.model_copy(update={"lineage": lineage}))
    assert fakes.calls == []


def test_an_entry_says_how_its_draft_was_made_and_the_manifest_how_it_is_judged() -> None:
    made = made_build.entry(training=TrainingConfig(learning_rate=3e-4))
    today = made_build.entry(gates=GatesConfig(min_acceptance_length=2.0))
    entry = published_entry(made, today)
    assert (entry.training, entry.gates) == (made.training, today.gates)
    made_of = {"name", "target", "draft", "data", "features", "training"}
    assert made_of | set(OF_TODAY) == set(ManifestEntry.model_fields), "say for a new section who is asked for it"


def test_a_suite_that_the_draft_was_trained_on_is_refused() -> None:
    source = PromptSource(dataset="org/data", split="new")
    made = made_build.entry(data=DataConfig(sources=(source,)))
    today = made_build.entry(benchmark=BenchmarkConfig(suites=(SuiteConfig(name="math", source=source),)))
    with pytest.raises(ValueError, match="the draft is trained on org/data, split new"):
        published_entry(made, today)


def publish_by_hand(manifest: Path, store: Path, name: str, artifacts: BuildArtifacts) -> DraftVersion:
    """The version of a made-up draft that a build of this entry would have left."""
    loaded = Manifest.load(manifest)
    (entry,) = (one for one in loaded.entries if one.name == name)
    report = make_report(entry, resolve_target(entry.target, loaded.base_dir), artifacts, ())
    run = tracking.start_run(tracking.ENTRIES, name, store=store, tags={})
    run.log_text(f"{name}.json", report.model_dump_json())
    build = entry_build(store, tracking=run, name=name)
    version = register(build, report)
    assert version is not None
    promote(build, version, Published(path=store / "published" / name, content_id="c", changed=True))
    return version


def rows_of(state: State[Any]) -> dict[str, EntryRow]:
    summary = state.result(raise_on_failure=False)
    assert isinstance(summary, BuildSummary), summary
    return {row.entry: row for row in summary.rows}


def stages_by_entry(artifacts: BuildArtifacts, **by_entry: dict[str, Any]) -> StagesByEntry:
    stages = StagesByEntry(artifacts, **by_entry)
    for fakes in stages.fakes.values():
        fakes.answers["champion"] = artifacts
    return stages


@pytest.mark.usefixtures("prefect_engine")
def test_a_run_measures_what_is_published_and_fails_loudly_for_a_champion_that_fails(
    tmp_path: Path, artifacts: BuildArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    stages = stages_by_entry(artifacts, good={}, slow={"failures": (TOO_SLOW,)}, new={})
    use(stages, monkeypatch)
    store = tmp_path / "store"
    manifest = make_factory(tmp_path, *(tiny_entry(name) for name in ("good", "slow", "new")), gpu_entry("big", 8))
    for name in ("good", "slow"):
        publish_by_hand(manifest, store, name, artifacts)
    state = rebenchmark(manifest=manifest, store=store, return_state=True)
    assert state.is_failed()
    why = "version 1 stays published, but fails now: speedup 1.10x, too slow"
    assert state.message == f"1 of 2 entries did not pass: slow; slow: {why}"
    rows = rows_of(state)
    assert {name: (row.status, row.detail) for name, row in rows.items()} == {
        "good": ("published", "/published/demo"),
        "slow": ("rejected", why),
        "new": ("skipped", "no draft of new is published"),
        "big": ("skipped", "big needs 8 GPUs, this host has 0"),
    }
    assert "train" not in stages.fakes["good"].order
    champion = registered("slow", store=store).champion
    assert champion is not None
    assert champion.status == "published"
    assert (store / "site/index.html").is_file()

    asked = rebenchmark(manifest=manifest, store=store, only=["new"], return_state=True)
    assert asked.is_failed()
    assert "no draft of new is published; `specbundle build --only new` makes one" in rows_of(asked)["new"].detail


@pytest.mark.usefixtures("prefect_engine")
def test_the_command_says_that_nothing_is_published_and_what_makes_a_draft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("COLUMNS", "200")
    manifest = str(make_factory(tmp_path))
    assert cli.main(["--manifest", manifest, "rebenchmark"]) == 0
    printed = capsys.readouterr()
    assert "0 of 0 entries passed" in printed.out
    assert "skipped: no draft of tiny is published" in printed.err
    assert cli.main(["--manifest", manifest, "rebenchmark", "--only", "tiny"]) == 1
    assert "1 of 1 entries did not pass: tiny" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_engine")
def test_a_new_version_of_the_engine_renews_all_but_the_weights(
    tmp_path: Path, hub_server: server.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
    monkeypatch.setenv("HF_TOKEN", server.TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    # A build elsewhere on this host is not waited for.
    monkeypatch.setattr(stage, "device_lock_dir", lambda: tmp_path / "devices")
    on_hub = tiny_entry() | {"publish": {"to": "hub", "repository": "specbundle/tiny"}}
    manifest, store = make_factory(tmp_path, on_hub), tmp_path / ".specbundle"
    repository = hub_server.storage.repositories

    def commits() -> list[dict[str, str]]:
        """Sha256 by file of each, but the first, which made the repository."""
        of_all = repository["model", "specbundle/tiny"].commits.values()
        return [{name: file.sha256 for name, file in commit.files.items()} for commit in of_all][1:]

    built = rows_of(specbundle(manifest=manifest, return_state=True))["tiny"]
    assert built.status == "published", built
    first = registered("tiny", store=store).champion
    assert first is not None

    same = rows_of(rebenchmark(manifest=manifest, return_state=True))["tiny"]
    assert (same.status, len(commits())) == ("published", 1), same
    assert same.detail.endswith(" (unchanged)")

    # A host that has nothing but the registry and the conversations.
    for name in ("capture", "train", "export", "vocabulary", "benchmark", "published", "restored_drafts"):
        shutil.rmtree(store / name)
    monkeypatch.setattr(plan, "engine_version", lambda engine: "transformers 99")
    renewed = rows_of(rebenchmark(manifest=manifest, return_state=True))["tiny"]
    assert renewed.status == "published", renewed
    before, after = commits()
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert {"README.md", "benchmark_result.json", "lineage.json"} <= changed
    assert not {name for name in changed if name.endswith((".safetensors", "config.json"))}
    assert after["model.safetensors"] == file_sha256(store / "published/tiny/model.safetensors")
    lineages = [
        json.loads((hub_server.storage.root / "blobs" / files["lineage.json"]).read_text()) for files in (before, after)
    ]
    assert [one["stages"]["train"] for one in lineages] == [lineages[0]["stages"]["train"]] * 2
    assert lineages[0]["stages"]["benchmark"]["key"] != lineages[1]["stages"]["benchmark"]["key"]

    champion = registered("tiny", store=store).champion
    assert champion is not None
    assert (champion.number, champion.draft) == (first.number, first.draft)
    assert champion.revision == repository["model", "specbundle/tiny"].head.oid != first.revision
    assert champion.run_id != first.run_id
    assert len(load_history(store, "tiny").reports) == 2
    record = load_entry_record(store, "tiny")
    assert isinstance(record.outcome, Published)
    assert last_artifact(Store(store), "tiny", "benchmark") is not None
    assert "tiny" in (store / "site/entries/tiny.html").read_text()
