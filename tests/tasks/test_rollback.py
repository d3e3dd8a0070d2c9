"""What users load after a rollback is the older draft, whole, in the folder and on a Hub; with a real registry."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from specforge_core import cli
from specforge_core.artifacts import BuildArtifacts, load_artifact, seal
from specforge_core.benchmark.report import make_report
from specforge_core.digests import folder_sha256
from specforge_core.facts import Published, Rejected, ServingDraft
from specforge_core.ledger import load_entry_record, record_outcome, record_stage
from specforge_core.manifest_publish import PublishConfig
from tasks import rollback as rollback_module
from tasks import tracking
from tasks.publish import publish
from tasks.registry import promote, register, registered
from tasks.rollback import roll_back
from tests import builds, made_build
from tests.factory import make_factory, tiny_entry
from tests.hub_like import server

HUB = PublishConfig(to="hub", repository="specbundle/demo")


class Factory:
    """Builds of drafts whose weights are their number, published where the entry says."""

    def __init__(self, store: Path, to: PublishConfig) -> None:
        self.store, self.entry = store, made_build.entry(name="demo", publish=to)

    def draft(self, number: int) -> BuildArtifacts:
        made = made_build.artifacts(self.store / f"made-{number}")
        (made.draft.path / "model.safetensors").write_bytes(bytes([number]) * 1000)
        key, place = f"key-{number}", self.store / "export" / f"key-{number}"
        seal(made.draft.path, made.draft.facts, stage="export", key=key, inputs={}, elapsed_s=1.0, hardware=None)
        place.parent.mkdir(exist_ok=True)
        made.draft.path.rename(place)
        return made._replace(draft=load_artifact(place, ServingDraft))

    def publish(self, number: int) -> Published:
        """What a build of a draft that passes its gates does at its end."""
        run = tracking.start_run(tracking.ENTRIES, "demo", store=self.store, tags={})
        build = builds.entry_build(self.store, tracking=run, name="demo").model_copy(
            update={"recipe": builds.recipe_of(self.entry), "publish_to": self.entry.publish.to}
        )
        artifacts = self.draft(number)
        report = make_report(self.entry, build.recipe.target, artifacts, ())
        run.log_text("demo.json", report.model_dump_json())
        version = register(build, report)
        published = publish.fn(build, artifacts)
        assert isinstance(published, Published)
        promote(build, version, published)
        record_stage(self.store, "demo", stage="export", key=artifacts.draft.key)
        record_outcome(self.store, "demo", published)
        return published

    def roll_back(self, to: int | None = None) -> tuple[int, int]:
        """From which version to which."""
        done = roll_back(self.entry, to, base_dir=self.store, store=self.store)
        return done.rollback.left.number, done.rollback.to.number

    @property
    def weights(self) -> int:
        """The number of the draft that the folder has, all of it."""
        (number,) = set((self.store / "published/demo/model.safetensors").read_bytes())
        return number

    @property
    def champion(self) -> int:
        champion = registered("demo", store=self.store).champion
        assert champion is not None
        return champion.number


@pytest.fixture(autouse=True)
def _no_tracking_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def factory(tracked_store: Path) -> Factory:
    return Factory(tracked_store, PublishConfig())


@pytest.fixture
def on_hub(tracked_store: Path, hub_server: server.Hub, monkeypatch: pytest.MonkeyPatch) -> Factory:
    monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
    monkeypatch.setenv("HF_TOKEN", server.TOKEN)
    return Factory(tracked_store, HUB)


def test_the_folder_is_the_older_draft_again_and_twice_the_one_before(factory: Factory) -> None:
    first, _, _ = (factory.publish(number) for number in (1, 2, 3))
    assert factory.roll_back() == (3, 2)
    assert (factory.weights, factory.champion) == (2, 2)
    assert factory.roll_back() == (2, 1)
    assert (factory.weights, factory.champion) == (1, 1)
    # The same files as then, the card included.
    champion = registered("demo", store=factory.store).champion
    assert champion is not None
    assert champion.content_id == first.content_id
    with pytest.raises(ValueError, match="demo has nothing to go back to"):
        factory.roll_back()
    assert factory.roll_back(to=3) == (1, 3)
    assert (factory.weights, factory.champion) == (3, 3)


@pytest.mark.slow
def test_the_last_build_counts_as_rejected_after_its_draft_was_rolled_back(factory: Factory) -> None:
    factory.publish(1)
    factory.publish(2)
    factory.roll_back()
    outcome = load_entry_record(factory.store, "demo").outcome
    assert isinstance(outcome, Rejected)
    assert "this draft is version 2, from which the entry was rolled back" in outcome.failures[0].message
    factory.roll_back(to=2)
    assert isinstance(load_entry_record(factory.store, "demo").outcome, Published)


def test_the_hub_gets_one_commit_with_the_older_files_and_the_champions_tag(
    on_hub: Factory, hub_server: server.Hub
) -> None:
    first, second = on_hub.publish(1), on_hub.publish(2)
    on_hub.roll_back()
    repository = hub_server.storage.repositories["model", "specbundle/demo"]
    head = repository.head.oid
    assert head not in (first.revision, second.revision)
    assert repository.tags["champion"] == head
    assert repository.tags[f"v{first.content_id[:12]}"] == head
    api = HfApi(hub_server.url, token=server.TOKEN)
    downloaded = Path(api.snapshot_download("specbundle/demo", cache_dir=on_hub.store / "cache"))
    files = folder_sha256(downloaded)
    assert files.pop(".gitattributes")
    assert files == folder_sha256(on_hub.store / "published/demo")
    assert on_hub.weights == 1
    champion = registered("demo", store=on_hub.store).champion
    assert champion is not None
    assert (champion.number, champion.revision, champion.repository) == (1, head, "specbundle/demo")


@pytest.mark.slow
def test_a_hub_that_fails_leaves_the_newer_draft_there_and_the_next_try_completes_it(
    on_hub: Factory, hub_server: server.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_hub.publish(1)
    second = on_hub.publish(2)

    def fail(*args: Any) -> None:
        raise ConnectionError("the Hub is gone")

    with monkeypatch.context() as broken:
        broken.setattr(rollback_module, "publish_parts", fail)
        with pytest.raises(ConnectionError, match="the Hub is gone"):
            on_hub.roll_back()
    repository = hub_server.storage.repositories["model", "specbundle/demo"]
    assert repository.head.oid == second.revision
    assert on_hub.champion == 2
    assert on_hub.roll_back() == (2, 1)
    assert (on_hub.weights, on_hub.champion) == (1, 1)
    assert repository.head.oid == repository.tags["champion"] != second.revision


@pytest.mark.slow
def test_without_the_right_to_write_nothing_changes(on_hub: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    on_hub.publish(1)
    on_hub.publish(2)
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(ValueError, match="token is not accepted"):
        on_hub.roll_back()
    assert (on_hub.weights, on_hub.champion) == (2, 2)
    assert [version.status for version in registered("demo", store=on_hub.store).versions] == ["published"] * 2


@pytest.mark.parametrize("damage", ["changed", pytest.param("gone", marks=pytest.mark.slow)])
def test_a_draft_that_is_no_longer_in_the_store_is_refused_before_anything_changes(
    factory: Factory, damage: str
) -> None:
    factory.publish(1)
    factory.publish(2)
    weights = factory.store / "export/key-1/model.safetensors"
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_bytes(b"\7" * 1000)
    with pytest.raises(
        ValueError, match=r"version 1 of demo cannot be published again: its draft, [0-9a-f]{20}, is no"
    ):
        factory.roll_back()
    assert (factory.weights, factory.champion) == (2, 2)
    assert [version.status for version in registered("demo", store=factory.store).versions] == ["published"] * 2


def test_the_command_says_what_it_did(factory: Factory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factory.publish(1)
    factory.publish(2)
    manifest = make_factory(tmp_path, tiny_entry("demo"))
    command = ["--manifest", str(manifest), "--store", str(factory.store), "rollback", "demo"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert f"demo: version 2 is replaced by version 1, at {factory.store / 'published/demo'}\n" in printed
    assert "no build publishes version 2 again; to take it back: --to 2\n" in printed
    assert cli.main(command) == 2
    assert "error: demo has nothing to go back to: 1 champion, 2 rolled-back" in capsys.readouterr().err
