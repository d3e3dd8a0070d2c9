"""The publish task, as a function: it fills the entry's folder, and the Hub's repositories where they are asked for."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard, constants, snapshot_download

from specforge_core.artifacts import BuildArtifacts, seal
from specforge_core.data.conversations import Conversation, write_conversations
from specforge_core.digests import folder_sha256
from specforge_core.facts import Published, Withheld
from specforge_core.hub.publication import PublishPlan
from specforge_core.manifest import ManifestEntry
from specforge_core.manifest_publish import PublishConfig
from specforge_core.plan import Recipe
from specforge_core.stages import ResolvedBenchmark, ResolvedData, ResolvedSource, ResolvedSuite, ServedEngine
from tasks import publish as publish_module
from tasks.publish import DATASETS, check_destination, publish
from tasks.stage import EntryBuild
from tasks.tracking import TrackedRun
from tests import made_build
from tests.hub_like import server
from tests.hub_like.api import Account


def build_of(entry: ManifestEntry, store: Path, **changes: Any) -> EntryBuild:
    (train,) = entry.data.sources
    sources = (ResolvedSource(**train.model_dump(), content_id="c0ffee"),)
    suites = tuple(
        ResolvedSuite(name=suite.name, source=ResolvedSource(**suite.source.model_dump(), content_id="c0ffee"))
        for suite in entry.benchmark.suites
    )
    recipe = Recipe(
        entry=entry,
        engine=ServedEngine(**dict(entry.engine)),
        target=made_build.TARGET,
        data=ResolvedData(sources=sources),
        benchmark=ResolvedBenchmark(suites=suites),
        hardware="Made-up CPU 9000",
    )
    values = {"publish_to": "directory", "tracking": TrackedRun(uri="none")} | changes
    return EntryBuild(recipe=recipe, store=store, gpus=(), **values)


@pytest.fixture
def artifacts(tmp_path: Path) -> BuildArtifacts:
    return made_build.artifacts(tmp_path / "store")


def test_a_draft_lies_in_the_store_under_its_entrys_name(tmp_path: Path, artifacts: BuildArtifacts) -> None:
    published = publish.fn(build_of(made_build.entry(), tmp_path / "store"), artifacts)
    assert published.changed
    assert published.path == tmp_path / "store/published/demo"
    weights = (artifacts.draft.path / "model.safetensors").read_bytes()
    assert (published.path / "model.safetensors").read_bytes() == weights
    assert "| math | 3-1-4 | 1 | 10 | 3.00 |" in (published.path / "README.md").read_text()


def test_publishing_the_same_build_again_changes_nothing(tmp_path: Path, artifacts: BuildArtifacts) -> None:
    build = build_of(made_build.entry(), tmp_path / "store")
    first, again = publish.fn(build, artifacts), publish.fn(build, artifacts)
    assert (again.changed, again.content_id) == (False, first.content_id)


def test_the_manifest_may_name_another_folder(tmp_path: Path, artifacts: BuildArtifacts) -> None:
    elsewhere = made_build.entry(publish=PublishConfig(directory=str(tmp_path / "elsewhere")))
    published = publish.fn(build_of(elsewhere, tmp_path / "store"), artifacts)
    assert published.path == tmp_path / "elsewhere/demo"


HUB = PublishConfig(
    to="hub", repository="specbundle/demo", dataset="specbundle/demo-conversations", collection="Our drafts"
)
MESSAGES = ({"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"})
CONVERSATION = Conversation("a1", "builtin:demo", MESSAGES, (5, 6, 7), (False, False, True), ("stop",))


@pytest.fixture
def on_hub(tmp_path: Path, hub_server: server.Hub, monkeypatch: pytest.MonkeyPatch) -> EntryBuild:
    """A build of an entry that goes to the local Hub, in the environment of someone who may write there."""
    monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
    monkeypatch.setenv("HF_TOKEN", server.TOKEN)
    return build_of(made_build.entry(publish=HUB), tmp_path / "store", publish_to="hub")


@pytest.fixture
def with_conversations(artifacts: BuildArtifacts) -> BuildArtifacts:
    """The made-up artifacts, with a conversation that is really there."""
    old = artifacts.conversations
    write_conversations(old.path, [CONVERSATION])
    sealed = seal(old.path, old.facts, stage="regenerate", key=old.key, inputs={}, elapsed_s=1.0, hardware=None)
    return artifacts._replace(conversations=sealed)


@pytest.mark.parametrize("publish_to", ["directory", "hub"])
@pytest.mark.parametrize("damaged", ["draft", "conversations"])
def test_a_file_that_changed_since_it_was_made_is_not_published(
    on_hub: EntryBuild, with_conversations: BuildArtifacts, hub_server: server.Hub, damaged: str, publish_to: str
) -> None:
    artifact = getattr(with_conversations, damaged)
    path = artifact.path / {"draft": "model.safetensors", "conversations": "conversations-00000.parquet"}[damaged]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} .* since .*; remove .* and build again"):
        publish.fn(on_hub.model_copy(update={"publish_to": publish_to}), with_conversations)
    assert hub_server.storage.repositories == {}
    assert not (on_hub.store / "published" / {"draft": "demo", "conversations": DATASETS}[damaged]).exists()


def test_the_hub_gets_what_the_folder_has(
    on_hub: EntryBuild, with_conversations: BuildArtifacts, hub_server: server.Hub, tmp_path: Path
) -> None:
    published = publish.fn(on_hub, with_conversations)
    assert isinstance(published, Published)
    assert published.url == f"{hub_server.url}/specbundle/demo"
    repository = hub_server.storage.repositories["model", "specbundle/demo"]
    assert published.revision == repository.head.oid
    assert repository.tags[f"v{published.content_id[:12]}"] == published.revision
    downloaded = snapshot_download(
        "specbundle/demo",
        revision=published.revision,
        endpoint=hub_server.url,
        cache_dir=tmp_path / "cache",
        token=server.TOKEN,
    )
    files = folder_sha256(Path(downloaded))
    assert files.pop(".gitattributes")
    assert files == folder_sha256(published.path)
    (collection,) = hub_server.storage.collections.values()
    assert {item.id: item.note for item in collection.items} == {
        "specbundle/demo-conversations": "768 conversations, answered by meta-llama/Llama-3.1-8B-Instruct",
        # The made-up numbers of both suites.
        "specbundle/demo": "Acceptance length 3.00, speedup 2.00x: means over the suites with chain 3-1-4 at "
        "concurrency 1 on Made-up CPU 9000",
    }


def test_publishing_twice_makes_no_second_commit(
    on_hub: EntryBuild, with_conversations: BuildArtifacts, hub_server: server.Hub
) -> None:
    first = publish.fn(on_hub, with_conversations)
    hub_server.calls.clear()
    again = publish.fn(on_hub, with_conversations)
    assert isinstance(first, Published)
    assert isinstance(again, Published)
    assert (again.changed, again.revision) == (False, first.revision)
    assert {call.partition(" ")[0] for call in hub_server.calls} == {"GET"}


def test_the_conversations_are_a_data_set_whose_card_says_what_they_are(
    on_hub: EntryBuild, with_conversations: BuildArtifacts, hub_server: server.Hub, tmp_path: Path
) -> None:
    publish.fn(on_hub, with_conversations)
    downloaded = Path(
        snapshot_download(
            "specbundle/demo-conversations",
            repo_type="dataset",
            endpoint=hub_server.url,
            cache_dir=tmp_path / "cache",
            token=server.TOKEN,
        )
    )
    (row,) = pq.read_table(downloaded / "conversations-00000.parquet").to_pylist()
    assert (row["id"], row["input_ids"], row["loss_mask"]) == ("a1", [5, 6, 7], [False, False, True])
    text = (downloaded / "README.md").read_text()
    data = DatasetCard(text).data.to_dict()
    assert data["configs"][0]["data_files"] == [{"split": "train", "path": "conversations-*.parquet"}]
    assert made_build.REVISION in text
    assert "| 768 | 123,456 | 65,432 | 5 | 3 |" in text
    assert "| `builtin:demo`, written by a program |  | train | all | `c0ffee` |" in text
    assert "ab" * 32 in text
    assert with_conversations.conversations.files["conversations-00000.parquet"].sha256 in text
    assert "the licence of\nthat model applies to them" in text
    for leftover in ("{{", "}}", "{%", "None", str(tmp_path)):
        assert leftover not in text


def test_a_dry_run_writes_the_folder_and_a_plan_and_publishes_nothing(
    on_hub: EntryBuild, with_conversations: BuildArtifacts, hub_server: server.Hub
) -> None:
    dry = on_hub.model_copy(update={"dry_run": True})
    outcome = publish.fn(dry, with_conversations)
    assert isinstance(outcome, Withheld)
    assert outcome.plan == dry.store / "dry_run/demo.publish_plan.json"
    assert hub_server.storage.repositories == {}
    assert not (dry.store / "published").exists()
    plan = PublishPlan.model_validate(json.loads(outcome.plan.read_text()))
    assert plan.files == folder_sha256(dry.store / "dry_run/demo")
    assert set(plan.differing) == set(plan.files)
    assert [(upload.repository, upload.parent, upload.tag) for upload in plan.uploads] == [
        ("specbundle/demo-conversations", None, plan.uploads[0].tag),
        ("specbundle/demo", None, plan.uploads[1].tag),
    ]
    assert {name: file.sha256 for name, file in plan.uploads[1].files.items()} == plan.files
    assert [listing.is_needed for listing in plan.listings] == [True, True]
    # The real one does what the plan says, after which there is nothing to do.
    published = publish.fn(on_hub, with_conversations)
    assert isinstance(published, Published)
    assert plan.uploads[1].tag == f"v{published.content_id[:12]}"
    assert folder_sha256(published.path) == plan.files
    publish.fn(dry, with_conversations)
    plan = PublishPlan.model_validate(json.loads(outcome.plan.read_text()))
    assert plan.differing == ()
    assert [upload.parent for upload in plan.uploads][1] == published.revision
    assert not any(upload.is_commit_needed for upload in plan.uploads)
    assert not any(listing.is_needed for listing in plan.listings)


def test_a_dry_run_of_a_folder_needs_no_hub(tmp_path: Path, artifacts: BuildArtifacts) -> None:
    build = build_of(made_build.entry(), tmp_path / "store", dry_run=True)
    outcome = publish.fn(build, artifacts)
    assert isinstance(outcome, Withheld)
    assert outcome.plan
    plan = PublishPlan.model_validate_json(outcome.plan.read_text())
    assert (plan.endpoint, plan.uploads, plan.listings) == (None, (), ())


def test_who_may_not_write_hears_it_before_the_first_stage(
    hub_server: server.Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entry = made_build.entry(publish=HUB)
    monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", server.TOKEN)
    check_destination(entry, "hub")
    elsewhere = made_build.entry(publish=PublishConfig(repository="other/demo"))
    with pytest.raises(
        ValueError, match="the token of tester may write under tester, specbundle, and model other/demo"
    ):
        check_destination(elsewhere, "hub")
    hub_server.accounts = {server.TOKEN: Account(role="read")}
    with pytest.raises(ValueError, match="may only read, and dataset specbundle/demo-conversations is to be written"):
        check_destination(entry, "hub")
    hub_server.accounts = {server.TOKEN: Account(organizations={"specbundle": "read"})}
    with pytest.raises(ValueError, match="tester may only read in specbundle; ask for the right"):
        check_destination(entry, "hub")
    hub_server.accounts = {}
    with pytest.raises(ValueError, match=r"asking whose token this is: .* answered 401 .* renew HF_TOKEN"):
        check_destination(entry, "hub")


def test_an_entry_without_repository_or_token_cannot_go_to_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nameless = made_build.entry(publish=PublishConfig())
    check_destination(nameless, "directory")
    with pytest.raises(ValueError, match=r"demo cannot go to the Hub without a repository; add `publish: \{repo"):
        check_destination(nameless, "hub")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(publish_module, "_token_of_block", lambda: None)
    with pytest.raises(ValueError, match=r"needs a token .* set HF_TOKEN, .* Prefect Secret block named hf-token"):
        check_destination(made_build.entry(publish=HUB), "hub")
    (tmp_path / "token").write_text("hf_of_a_file\n")
    assert publish_module.open_hub().api.token == "hf_of_a_file"
