"""A champion comes back from where users get it: out of its folder, or from a local Hub by the real client."""

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from specforge_core.artifacts import BuildArtifacts, Store, damaged_files
from specforge_core.benchmark.report import EntryReport, make_report
from specforge_core.facts import Published
from specforge_core.hub.client import Hub
from specforge_core.manifest_publish import PublishConfig
from specforge_core.mirror import Mirror
from tasks.champion import champion
from tasks.publish import publish
from tasks.registry import DraftVersion
from tasks.stage import EntryBuild
from tests import made_build
from tests.builds import entry_build, recipe_of
from tests.hub_like import server
from tests.pickle_bomb import plant

HUB = PublishConfig(to="hub", repository="specbundle/demo")


@pytest.fixture
def artifacts(tmp_path: Path) -> BuildArtifacts:
    """In a store, each under its key."""
    made = made_build.artifacts(tmp_path / "made")
    found = []
    for artifact in made:
        place = tmp_path / "built" / artifact.stage / artifact.key
        place.parent.mkdir(parents=True)
        shutil.move(artifact.path, place)
        found.append(Store(tmp_path / "built").find(artifact.stage, artifact.key, type(artifact.facts)))
    return BuildArtifacts(*found)


def hub_build(store: Path) -> EntryBuild:
    build = entry_build(store)
    recipe = recipe_of(build.recipe.entry.model_copy(update={"publish": HUB}))
    return build.model_copy(update={"recipe": recipe, "publish_to": "hub"})


def report_of(build: EntryBuild, artifacts: BuildArtifacts) -> EntryReport:
    return make_report(build.recipe.entry, build.recipe.target, artifacts, ())


def version_of(published: Published, artifacts: BuildArtifacts) -> DraftVersion:
    where: dict[str, Any] = {name: getattr(published, name) for name in ("content_id", "repository", "revision", "url")}
    return DraftVersion(
        entry="demo", number=1, status="published", draft=artifacts.draft.content_id, run_id="run", **where
    )


def restored(build: EntryBuild, published: Published, artifacts: BuildArtifacts) -> BuildArtifacts:
    return champion.fn(build, version_of(published, artifacts), report_of(build, artifacts))


def check_same_draft(found: BuildArtifacts, built: BuildArtifacts) -> None:
    assert found.draft.files == built.draft.files
    assert found.draft.content_id == built.draft.content_id
    assert damaged_files(found.draft, read_content=True) == []


def test_out_of_its_folder(tmp_path: Path, artifacts: BuildArtifacts) -> None:
    build = entry_build(tmp_path / "built")
    published = publish.fn(build, artifacts)
    found = restored(build, published, artifacts)
    check_same_draft(found, artifacts)
    assert found.conversations == artifacts.conversations
    assert found.vocabulary.facts == artifacts.vocabulary.facts

    (published.path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not the draft that was published"):
        restored(build, published, artifacts)


def test_what_a_benchmark_reads_beside_it_comes_from_a_mirror_or_is_missed(
    tmp_path: Path, artifacts: BuildArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = publish.fn(entry_build(tmp_path / "built"), artifacts)
    elsewhere = entry_build(tmp_path / "elsewhere")
    shutil.copytree(published.path, tmp_path / "elsewhere/published/demo")
    with pytest.raises(ValueError, match=r"conversations of demo \(regenerate/key-regenerate\) are not in .*MIRROR"):
        restored(elsewhere, published, artifacts)
    url = f"file://{tmp_path}/mirror"
    Mirror(url).push(artifacts.conversations)
    monkeypatch.setenv("SPECBUNDLE_MIRROR", url)
    found = restored(elsewhere, published, artifacts)
    check_same_draft(found, artifacts)
    assert damaged_files(found.conversations, read_content=True) == []
    assert found.conversations.path == tmp_path / "elsewhere/regenerate/key-regenerate"

    # Other conversations under the same key, as a target on a GPU may write them.
    record = tmp_path / "elsewhere/regenerate/key-regenerate/artifact.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"content_id": "other"}))
    with pytest.raises(ValueError, match="conversations of demo"):
        restored(elsewhere, published, artifacts)


def test_from_the_hub_at_its_commit_and_nothing_that_could_run(
    tmp_path: Path, artifacts: BuildArtifacts, hub_server: server.Hub, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
    monkeypatch.setenv("HF_TOKEN", server.TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    build = hub_build(tmp_path / "built")
    published = publish.fn(build, artifacts)
    # Somebody has put more there since, and the registry were told of that commit.
    plant(tmp_path / "pytorch_model.bin", tmp_path / "ran")
    later = hub.api.upload_file(
        repo_id="specbundle/demo", path_or_fileobj=tmp_path / "pytorch_model.bin", path_in_repo="pytorch_model.bin"
    )
    published = published.model_copy(update={"revision": later.oid})
    elsewhere = hub_build(tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "built/regenerate", tmp_path / "elsewhere/regenerate")
    hub_server.calls.clear()
    check_same_draft(restored(elsewhere, published, artifacts), artifacts)
    fetched = {call.rpartition("/")[2] for call in hub_server.calls if "/resolve/" in call}
    assert fetched == {"config.json", "model.safetensors", "lineage.json", "benchmark_result.json"}
    assert all(later.oid in call for call in hub_server.calls if "/resolve/" in call)


@pytest.mark.parametrize("name", ["../../../evil.json", "/evil.json", "a/../../../../evil.json"])
def test_a_name_in_the_hubs_listing_leads_nowhere_else(
    tmp_path: Path, artifacts: BuildArtifacts, hub_server: server.Hub, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
    monkeypatch.setenv("HF_TOKEN", server.TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    storage = hub_server.storage
    repository = storage.create("model", "specbundle/demo")
    commit = storage.add_commit(repository, {name: storage.regular_file(b"{}")}, title="as a git server may hold it")
    published = Published(
        path=tmp_path,
        content_id="c",
        changed=True,
        repository="specbundle/demo",
        revision=commit.oid,
        url=hub_server.url,
    )
    with pytest.raises(ValueError, match="Invalid filename"):
        restored(hub_build(tmp_path / "built"), published, artifacts)
    assert list(tmp_path.rglob("evil.json")) == []
    assert not Path("/evil.json").exists()


def test_a_hub_out_of_reach_is_said_without_the_token(
    tmp_path: Path, artifacts: BuildArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_test")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    # The client waits longer before each try of its own.
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda delay_s: None, time=time.time))
    build = entry_build(tmp_path / "built")
    published = Published(
        path=tmp_path, content_id="c", changed=True, repository="org/demo", revision="0" * 40, url="http://127.0.0.1:9"
    )
    with pytest.raises(ConnectionError, match=f"org/demo at {'0' * 40} is not on this host, and the Hub at") as raised:
        restored(build, published, artifacts)
    error: BaseException | None = raised.value
    while error:
        assert "hf_secret" not in repr(error)
        error = error.__cause__ or error.__context__
