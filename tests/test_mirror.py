"""Artifacts on their way between hosts: whole or absent, verified, and gone on with after an interruption."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest

from specforge_core.artifacts import RECORD_NAME, Artifact, Store, damaged_files, seal
from specforge_core.facts import BenchmarkResult, Vocabulary
from specforge_core.mirror import Mirror

FACTS = Vocabulary(draft_vocab_size=2, target_vocab_size=4, coverage=0.5)
STAGE, KEY = "vocabulary", "k"
FILES = {"a.bin": "first file", "sub/b.bin": "second file, longer", "empty": ""}


def build(root: Path, files: dict[str, str] = FILES) -> Artifact[Vocabulary]:
    """An artifact in a store of its own, with the notes of its stage."""
    store = Store(root)
    with store.building(STAGE, KEY) as (directory, _):
        for name, text in {**files, "stage.log": "12:00 it ran", "servers/0.log": "up"}.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(text)
        seal(directory, FACTS, stage=STAGE, key=KEY, inputs={"conversations": "c"}, elapsed_s=1.0)
        return store.commit(directory, STAGE, KEY, Vocabulary)


@pytest.fixture(params=["memory", "file", pytest.param("s3", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place for a mirror. The one for S3 is a real server that speaks S3's protocol."""
    if request.param == "memory":
        return f"memory://{uuid4()}"
    if request.param == "file":
        return f"file://{tmp_path}/mirror"
    return str(request.getfixturevalue("s3_url"))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    # As a user would set them: nothing in the program knows of the server.
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"bucket-{uuid4()}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
    return f"s3://{bucket}/specbundle"


def names_at(url: str) -> set[str]:
    files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return {name.removeprefix(f"{root}/") for name in files.find(root)}


def overwrite(url: str, text: str) -> None:
    files, path = fsspec.core.url_to_fs(url)
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    files.pipe_file(path, text.encode())


class Interrupted(Exception):
    pass


class FailingFiles:
    """A file system that breaks at the n-th call of one of its methods, and counts them."""

    def __init__(self, files: Any, method: str, *, fail_at: int | None = None) -> None:
        self._files, self._method, self._fail_at = files, method, fail_at
        self.num_calls = 0

    def __getattr__(self, name: str) -> Any:
        original = getattr(self._files, name)
        if name != self._method:
            return original

        def call(*args: Any) -> Any:
            self.num_calls += 1
            if self.num_calls == self._fail_at:
                raise Interrupted
            return original(*args)

        return call


def watched(mirror: Mirror, method: str, *, fail_at: int | None = None) -> FailingFiles:
    mirror._files = FailingFiles(mirror._files, method, fail_at=fail_at)
    return mirror._files


def pull(url: str, directory: Path) -> bool:
    return Mirror(url).pull(STAGE, KEY, Vocabulary, directory)


def test_an_artifact_comes_back_as_it_was_pushed(tmp_path: Path, url: str) -> None:
    artifact = build(tmp_path / "one")
    Mirror(url).push(artifact)
    pulled = tmp_path / "two" / STAGE / ".pulling-k"
    assert pull(url, pulled)
    other = Store(tmp_path / "two").commit(pulled, STAGE, KEY, Vocabulary)
    assert other.model_dump() == artifact.model_dump()
    assert damaged_files(other, read_content=True) == []
    assert {name: (other.path / name).read_text() for name in FILES} == FILES
    # The notes of the stage come along: `specbundle show` and the tracker read them.
    assert (other.path / "stage.log").read_text() == "12:00 it ran"
    assert (other.path / "servers/0.log").read_text() == "up"


def test_what_is_not_there_is_not_pulled(tmp_path: Path, url: str) -> None:
    assert not pull(url, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_files_lie_under_their_content_id_and_the_record_beside_them(tmp_path: Path, url: str) -> None:
    artifact = build(tmp_path)
    Mirror(url).push(artifact)
    files = {*FILES, "stage.log", "servers/0.log"}
    assert names_at(url) == {"vocabulary/k/artifact.json"} | {f"vocabulary/k/{artifact.content_id}/{n}" for n in files}


@pytest.mark.parametrize("fail_at", [1, 3, 5])
def test_an_interrupted_push_leaves_nothing_that_a_pull_takes_and_is_gone_on_with(
    tmp_path: Path, url: str, fail_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One file after the other, so that some were sent before.
    monkeypatch.setattr("specforge_core.mirror.NUM_AT_ONCE", 1)
    artifact, mirror = build(tmp_path / "one"), Mirror(url)
    watched(mirror, "put_file", fail_at=fail_at)
    with pytest.raises(Interrupted):
        mirror.push(artifact)
    assert not pull(url, tmp_path / "pulled")
    num_there = len(names_at(url))
    assert num_there >= fail_at - 1

    again = Mirror(url)
    sent = watched(again, "put_file")
    again.push(artifact)
    assert sent.num_calls == 5 - num_there
    assert pull(url, tmp_path / "pulled")


def test_a_file_that_was_cut_off_is_sent_again(tmp_path: Path, url: str) -> None:
    artifact = build(tmp_path / "one")
    overwrite(f"{url}/{STAGE}/{KEY}/{artifact.content_id}/a.bin", "firs")
    Mirror(url).push(artifact)
    assert pull(url, tmp_path / "pulled")


def test_an_interrupted_pull_is_gone_on_with(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specforge_core.mirror.NUM_AT_ONCE", 1)
    Mirror(url).push(build(tmp_path / "one", {f"{i}.bin": f"file {i}" for i in range(4)}))
    mirror = Mirror(url)
    watched(mirror, "get_file", fail_at=4)
    with pytest.raises(Interrupted):
        mirror.pull(STAGE, KEY, Vocabulary, tmp_path / "pulled")
    assert not (tmp_path / "pulled" / RECORD_NAME).exists()
    # A file that was cut off in the middle has another sha256.
    (tmp_path / "pulled/0.bin").write_text("file")

    again = Mirror(url)
    received = watched(again, "get_file")
    assert again.pull(STAGE, KEY, Vocabulary, tmp_path / "pulled")
    # 0.bin again, 3.bin, and the two notes.
    assert received.num_calls == 4
    assert (tmp_path / "pulled/0.bin").read_text() == "file 0"


def test_a_second_push_sends_nothing(tmp_path: Path, url: str) -> None:
    artifact = build(tmp_path)
    Mirror(url).push(artifact)
    again = Mirror(url)
    sent, written = watched(again, "put_file"), watched(again, "pipe_file")
    again.push(artifact)
    assert (sent.num_calls, written.num_calls) == (0, 0)


@pytest.mark.parametrize("text", ["second FILE, longer", "short", None])
def test_a_file_that_is_not_what_the_record_says_is_refused_and_replaced_by_the_next_push(
    tmp_path: Path, url: str, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = build(tmp_path / "one")
    Mirror(url).push(artifact)
    damaged = f"{url}/{STAGE}/{KEY}/{artifact.content_id}/sub/b.bin"
    if text is None:
        files, path = fsspec.core.url_to_fs(damaged)
        files.rm_file(path)
    else:
        overwrite(damaged, text)

    mirror = Mirror(url)
    assert not mirror.pull(STAGE, KEY, Vocabulary, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    assert f"{url}/vocabulary/k is refused and built again: 1 of 3 files" in caplog.text
    assert "sub/b.bin" in caplog.text
    # The host that met it builds the same again and pushes it.
    mirror.push(build(tmp_path / "two"))
    assert pull(url, tmp_path / "pulled")
    assert (tmp_path / "pulled/sub/b.bin").read_text() == FILES["sub/b.bin"]


def test_of_two_contents_under_one_key_the_last_one_counts_and_is_whole(tmp_path: Path, url: str) -> None:
    # As from two hosts whose training is not deterministic; their files never mix, in whatever order they arrive.
    one, two = build(tmp_path / "one"), build(tmp_path / "two", FILES | {"a.bin": "FIRST FILE"})
    first = Mirror(url)
    watched(first, "pipe_file", fail_at=1)
    with pytest.raises(Interrupted):
        first.push(one)
    Mirror(url).push(two)
    Mirror(url).push(one)
    assert pull(url, tmp_path / "pulled")
    assert (tmp_path / "pulled/a.bin").read_text() == FILES["a.bin"]
    Mirror(url).push(two)
    assert pull(url, tmp_path / "pulled two")
    assert (tmp_path / "pulled two/a.bin").read_text() == "FIRST FILE"


def test_an_artifact_of_another_form_is_reported_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"file://{tmp_path}/mirror"
    Mirror(url).push(build(tmp_path / "one"))
    assert not Mirror(url).pull(STAGE, KEY, BenchmarkResult, tmp_path / "pulled")
    assert f"{url}/vocabulary/k has an unreadable artifact.json" in caplog.text
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside"])
def test_a_record_that_names_files_outside_of_its_folder_is_refused(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"file://{tmp_path}/mirror"
    Mirror(url).push(build(tmp_path / "one"))
    path = tmp_path / "mirror" / STAGE / KEY / RECORD_NAME
    record = json.loads(path.read_text())
    record["files"][name] = record["files"].pop("a.bin")
    path.write_text(json.dumps(record))
    assert not pull(url, tmp_path / "pulled")
    assert f"its record names {name}, outside of its folder" in caplog.text


def test_a_content_id_that_leads_elsewhere_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"file://{tmp_path}/mirror"
    artifact = build(tmp_path / "one")
    Mirror(url).push(artifact)
    (tmp_path / "mirror" / STAGE / KEY / artifact.content_id).rename(tmp_path / "elsewhere")
    path = tmp_path / "mirror" / STAGE / KEY / RECORD_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"content_id": "../../../elsewhere"}))
    assert not pull(url, tmp_path / "pulled")
    assert "names ../../../elsewhere, outside of its folder" in caplog.text


@pytest.mark.parametrize("name", ["progress/step-1/.metadata", "artifact.json", "spec.json"])
def test_a_record_that_counts_progress_or_notes_as_content_is_refused(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"file://{tmp_path}/mirror"
    artifact = build(tmp_path / "one")
    Mirror(url).push(artifact)
    path = tmp_path / "mirror" / STAGE / KEY / RECORD_NAME
    record = json.loads(path.read_text())
    record["files"][name] = record["files"].pop("a.bin")
    path.write_text(json.dumps(record))
    overwrite(f"{url}/{STAGE}/{KEY}/{artifact.content_id}/{name}", FILES["a.bin"])
    assert not pull(url, tmp_path / "pulled")
    assert f"its record names {name}, which is no content" in caplog.text
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("root", ["memory", pytest.param("s3", marks=pytest.mark.slow)])
def test_a_note_whose_name_leads_elsewhere_is_left_there(
    tmp_path: Path, root: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A bucket's keys are any text, and two dots are no parent there.
    url = str(request.getfixturevalue("s3_url")) if root == "s3" else f"memory://{uuid4()}"
    artifact = build(tmp_path / "one")
    Mirror(url).push(artifact)
    files, path = fsspec.core.url_to_fs(url)
    files.pipe_file(f"{path}/{STAGE}/{KEY}/{artifact.content_id}/servers/../../outside", b"evil")
    assert "outside" in "".join(names_at(url)), "the mirror has lost the file that this test is about"
    assert pull(url, tmp_path / "deep/pulled")
    assert not list(tmp_path.rglob("outside"))


def test_a_record_in_the_wrong_place_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"file://{tmp_path}/mirror"
    Mirror(url).push(build(tmp_path / "one"))
    (tmp_path / "mirror" / STAGE / KEY).rename(tmp_path / "mirror" / STAGE / "other")
    assert not Mirror(url).pull(STAGE, "other", Vocabulary, tmp_path / "pulled")
    assert "its record is that of vocabulary/k" in caplog.text


def test_progress_of_an_interrupted_build_stays_here(tmp_path: Path) -> None:
    artifact = build(tmp_path / "one")
    (artifact.path / "progress").mkdir()
    (artifact.path / "progress/step-3").write_text("half")
    Mirror(f"file://{tmp_path}/mirror").push(artifact)
    assert not [name for name in names_at(f"file://{tmp_path}/mirror") if "progress" in name]


def test_a_url_that_nobody_can_read_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="Protocol not known: s4"):
        Mirror("s4://bucket")
    if importlib.util.find_spec("ossfs"):
        pytest.skip("here the package for oss:// is installed")
    with pytest.raises(ValueError, match=r"oss://bucket: .*; for s3:// that is `pip install 'specbundle\[s3\]'`"):
        Mirror("oss://bucket")


def test_a_mirror_that_cannot_be_written_says_so_and_the_artifact_stays(tmp_path: Path) -> None:
    (tmp_path / "mirror").write_text("a file where the folder should be")
    artifact = build(tmp_path / "one")
    with pytest.raises(OSError, match="mirror"):
        Mirror(f"file://{tmp_path}/mirror").push(artifact)
    assert Store(tmp_path / "one").find(STAGE, KEY, Vocabulary) == artifact
