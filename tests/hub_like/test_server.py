"""The local Hub, seen by the programs that read from the real one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from specforge_core.digests import folder_sha256
from specforge_core.hub import client
from specforge_core.hub.upload import Repository, upload_folder
from tests.hub_like import server

TINY = Repository("specbundle/tiny")


@pytest.fixture
def _reads_from_it(hub_server: server.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT and HF_HOME say it to a process that starts with them."""
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub_server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_reads_from_it")
def test_transformers_loads_a_model_that_was_published(hub: client.Hub, tiny_target_dir: Path, tmp_path: Path) -> None:
    revision = upload_folder(hub, tiny_target_dir, TINY).revision
    arguments = {"revision": revision, "cache_dir": tmp_path / "cache"}
    model = AutoModelForCausalLM.from_pretrained(TINY.name, **arguments)
    local = AutoModelForCausalLM.from_pretrained(tiny_target_dir)
    assert torch.equal(model.get_input_embeddings().weight, local.get_input_embeddings().weight)
    assert len(AutoTokenizer.from_pretrained(TINY.name, **arguments)) == len(
        AutoTokenizer.from_pretrained(tiny_target_dir)
    )


def test_a_snapshot_is_what_was_published_at_that_revision(
    hub: client.Hub, hub_server: server.Hub, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a file.txt").write_text("one")
    (folder / "model.safetensors").write_bytes(b"weights")
    first = upload_folder(hub, folder, TINY)
    old = folder_sha256(folder)
    (folder / "inner" / "a file.txt").write_text("two")
    upload_folder(hub, folder, TINY)
    for revision, files in ((first.revision, old), (first.tag, old), ("main", folder_sha256(folder))):
        snapshot = snapshot_download(
            TINY.name, revision=revision, endpoint=hub_server.url, cache_dir=tmp_path / "cache", token=False
        )
        found = folder_sha256(Path(snapshot))
        assert found.pop(".gitattributes")
        assert found == files
    assert hub.api.list_repo_files(TINY.name) == [".gitattributes", "inner/a file.txt", "model.safetensors"]


def test_what_is_not_there_is_the_clients_own_error(hub: client.Hub, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        hub.api.list_repo_files("specbundle/unknown")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("a")
    upload_folder(hub, tmp_path / "folder", TINY)
    with pytest.raises(RevisionNotFoundError):
        hub.api.list_repo_files(TINY.name, revision="v9")
    with pytest.raises(EntryNotFoundError):
        hub.api.hf_hub_download(TINY.name, "b", cache_dir=tmp_path / "cache")


def test_a_private_repository_is_shown_to_its_owners_alone(
    hub: client.Hub, hub_server: server.Hub, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("a")
    upload_folder(hub, tmp_path / "folder", TINY._replace(private=True))
    assert hub.api.list_repo_files(TINY.name) == [".gitattributes", "a"]
    with pytest.raises(RepositoryNotFoundError):
        hub.api.list_repo_files(TINY.name, token=False)


def test_it_is_used_with_the_line_that_it_prints(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.hub_like", "--root", str(tmp_path / "hub"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        line = process.stdout.readline().strip()
        script = f"{line}; {sys.executable} -c 'from huggingface_hub import whoami; print(whoami()[\"name\"])'"
        used = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
        process.terminate()
    assert used.stdout == "tester\n", used.stderr
