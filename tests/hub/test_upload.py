"""A repository of the Hub is what the folder is: through the real client, against a local server."""

import hashlib
from pathlib import Path

import pytest

from specforge_core.hub import client
from specforge_core.hub.upload import CHAMPION_TAG, Repository, UploadPlan, plan_upload, set_tag, upload_folder
from tests.hub_like import server
from tests.hub_like.injection import Fault

REPOSITORY = Repository("specbundle/demo")
OLD = {"README.md": b"# old\n", "config.json": b"{}", "model.safetensors": b"old weights", "base_model/LICENSE": b"a"}
NEW = {"README.md": b"# new\n", "config.json": b"{}", "model.safetensors": b"new weights", "plots/a.svg": b"<svg/>"}


def folder_of(root: Path, files: dict[str, bytes]) -> Path:
    folder = root / hashlib.sha1(repr(files).encode()).hexdigest()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def stored(hub_server: server.Hub, revision: str = "main") -> dict[str, bytes]:
    """What the server holds at a revision, without what the Hub itself puts there."""
    repository = hub_server.storage.repositories[REPOSITORY.kind, REPOSITORY.name]
    commit = repository.commit(revision)
    assert commit is not None
    files = {name: hub_server.storage.blob(file.sha256).read_bytes() for name, file in commit.files.items()}
    assert files.pop(".gitattributes")
    return files


def count(hub_server: server.Hub, *words: str) -> int:
    return sum(all(word in call for word in words) for call in hub_server.calls)


def test_a_repository_is_made_and_filled_in_one_commit(tmp_path: Path, hub: client.Hub, hub_server: server.Hub) -> None:
    uploaded = upload_folder(hub, folder_of(tmp_path, OLD), REPOSITORY)
    assert stored(hub_server) == OLD
    repository = hub_server.storage.repositories["model", "specbundle/demo"]
    assert [commit.title for commit in repository.commits.values()] == ["initial commit", f"Publish {uploaded.tag}"]
    assert uploaded.changed
    assert uploaded.revision == repository.head.oid
    assert repository.tags == {uploaded.tag: uploaded.revision, CHAMPION_TAG: uploaded.revision}
    assert uploaded.url == f"{hub_server.url}/specbundle/demo"
    # Every file was read back, by a request each.
    assert count(hub_server, "GET", f"/resolve/{uploaded.revision}/") == len(OLD)


def test_a_new_version_deletes_what_is_gone_and_sends_only_what_changed(
    tmp_path: Path, hub: client.Hub, hub_server: server.Hub
) -> None:
    old = upload_folder(hub, folder_of(tmp_path, OLD), REPOSITORY)
    new = upload_folder(hub, folder_of(tmp_path, NEW), REPOSITORY)
    assert stored(hub_server) == NEW
    assert stored(hub_server, old.tag) == OLD
    assert stored(hub_server, CHAMPION_TAG) == NEW
    assert new.tag != old.tag
    assert count(hub_server, "PUT") == 2
    assert count(hub_server, "/commit/") == 2
    back = upload_folder(hub, folder_of(tmp_path, OLD), REPOSITORY)
    assert stored(hub_server) == OLD
    assert stored(hub_server, back.tag) == OLD
    # LFS had the old weights still.
    assert count(hub_server, "PUT") == 2


def test_the_same_folder_again_writes_nothing(tmp_path: Path, hub: client.Hub, hub_server: server.Hub) -> None:
    first = upload_folder(hub, folder_of(tmp_path, OLD), REPOSITORY)
    hub_server.calls.clear()
    again = upload_folder(hub, folder_of(tmp_path, OLD), REPOSITORY)
    assert (again.changed, again.revision) == (False, first.revision)
    assert {call.partition(" ")[0] for call in hub_server.calls} == {"GET"}


def test_a_plan_says_what_an_upload_would_do_and_writes_nothing(
    tmp_path: Path, hub: client.Hub, hub_server: server.Hub
) -> None:
    first = plan_upload(hub, folder_of(tmp_path, OLD), REPOSITORY)
    assert (first.parent, first.tagged, first.is_commit_needed) == (None, None, True)
    assert {file.change for file in first.files.values()} == {"added"}
    assert hub_server.storage.repositories == {}
    old = upload_folder(hub, folder_of(tmp_path, OLD), REPOSITORY)
    hub_server.calls.clear()
    second = plan_upload(hub, folder_of(tmp_path, NEW), REPOSITORY)
    assert second.parent == old.revision
    assert {name: file.change for name, file in second.files.items()} == {
        "README.md": "changed",
        "config.json": "unchanged",
        "model.safetensors": "changed",
        "plots/a.svg": "added",
    }
    assert second.deleted == ("base_model/LICENSE",)
    assert second.files["config.json"].sha256 == hashlib.sha256(b"{}").hexdigest()
    assert {call.partition(" ")[0] for call in hub_server.calls} == {"GET"}
    assert UploadPlan.model_validate_json(second.model_dump_json()) == second


def test_a_tag_moves_to_the_commit_it_is_given(tmp_path: Path, hub: client.Hub, hub_server: server.Hub) -> None:
    old = upload_folder(hub, folder_of(tmp_path, OLD), REPOSITORY)
    new = upload_folder(hub, folder_of(tmp_path, NEW), REPOSITORY)
    set_tag(hub, REPOSITORY, CHAMPION_TAG, old.revision)
    assert stored(hub_server, CHAMPION_TAG) == OLD
    assert stored(hub_server) == NEW
    # Published again, it is the champion again.
    again = upload_folder(hub, folder_of(tmp_path, NEW), REPOSITORY)
    assert (again.changed, again.revision) == (False, new.revision)
    assert stored(hub_server, CHAMPION_TAG) == NEW


def test_what_another_client_commits_in_between_is_followed_not_overwritten(
    tmp_path: Path, hub: client.Hub, hub_server: server.Hub
) -> None:
    upload_folder(hub, folder_of(tmp_path, OLD), REPOSITORY)
    other = client.Hub(hub_server.url, server.TOKEN)

    def commit_first() -> None:
        other.api.upload_file(
            path_or_fileobj=b"theirs", path_in_repo="theirs.txt", repo_id=REPOSITORY.name, commit_message="theirs"
        )

    hub_server.faults.add(Fault("POST .*/commit/", on_hit=commit_first, when="before", passes=True))
    uploaded = upload_folder(hub, folder_of(tmp_path, NEW), REPOSITORY)
    assert stored(hub_server) == NEW
    titles = [c.title for c in hub_server.storage.repositories["model", REPOSITORY.name].commits.values()]
    assert titles[-2:] == ["theirs", f"Publish {uploaded.tag}"]


def test_bytes_that_the_hub_keeps_wrong_are_found_and_the_last_complete_state_is_put_back(
    tmp_path: Path, hub: client.Hub, hub_server: server.Hub
) -> None:
    upload_folder(hub, folder_of(tmp_path, OLD), REPOSITORY)
    hub_server.faults.add(Fault("GET .*/resolve/.*/model.safetensors", change=lambda content: content[:-1], times=1))
    with pytest.raises(RuntimeError, match=r"other bytes than were sent, in model\.safetensors of commit .* complete"):
        upload_folder(hub, folder_of(tmp_path, NEW), REPOSITORY)
    assert stored(hub_server) == OLD
    assert stored(hub_server, CHAMPION_TAG) == OLD
    upload_folder(hub, folder_of(tmp_path, NEW), REPOSITORY)
    assert stored(hub_server) == NEW


def test_a_first_version_that_is_kept_wrong_leaves_an_empty_repository(
    tmp_path: Path, hub: client.Hub, hub_server: server.Hub
) -> None:
    hub_server.faults.add(Fault("GET .*/resolve/", change=lambda content: b"else", times=1))
    with pytest.raises(RuntimeError, match="other bytes"):
        upload_folder(hub, folder_of(tmp_path, OLD), REPOSITORY)
    assert stored(hub_server) == {}


def test_a_private_draft_is_never_put_into_a_public_repository(
    tmp_path: Path, hub: client.Hub, hub_server: server.Hub
) -> None:
    private = REPOSITORY._replace(private=True)
    upload_folder(hub, folder_of(tmp_path, OLD), private)
    assert hub_server.storage.repositories["model", REPOSITORY.name].private
    hub_server.storage.repositories["model", REPOSITORY.name].private = False
    with pytest.raises(ValueError, match=r"model specbundle/demo is public and `publish\.private` is true; make it"):
        upload_folder(hub, folder_of(tmp_path, NEW), private)
    assert stored(hub_server) == OLD


def test_a_server_that_starts_again_has_what_it_had(tmp_path: Path, hub: client.Hub, hub_server: server.Hub) -> None:
    uploaded = upload_folder(hub, folder_of(tmp_path, OLD), REPOSITORY)
    with server.running(hub_server.storage.root) as restarted:
        again = upload_folder(client.Hub(restarted.url, server.TOKEN), folder_of(tmp_path, OLD), REPOSITORY)
        assert (again.changed, again.revision) == (False, uploaded.revision)
        assert stored(restarted) == OLD
