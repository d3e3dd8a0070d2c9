"""A published folder is whole at every moment, holds exactly what it should, and stays alone if nothing changed."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from specforge_core.benchmark.report import Lineage, make_report
from specforge_core.hub.repository import draft_license, publish_directory, repository_files
from specforge_core.manifest_sections import TargetConfig
from specforge_core.stages import ResolvedTarget
from tests import made_build

OLD = {"model.safetensors": b"old weights", "config.json": b"{}", "only_old.txt": b"old"}
NEW = {"model.safetensors": b"new weights", "config.json": b"{1}", "base_model/LICENSE": b"terms"}


def content(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, by name."""
    paths = [path for path in folder.resolve().rglob("*") if path.is_file()]
    return {path.relative_to(folder.resolve()).as_posix(): path.read_bytes() for path in paths}


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of everything below `root`, links included; locks are touched by every publishing."""
    paths = [path for path in root.rglob("*") if path.suffix != ".lock"]
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in paths}


def test_the_folder_holds_exactly_the_files(tmp_path: Path) -> None:
    published = publish_directory(tmp_path, "demo", NEW)
    assert published.path == tmp_path / "demo"
    assert published.changed
    assert content(tmp_path / "demo") == NEW


def test_a_new_version_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    first = publish_directory(tmp_path, "demo", OLD)
    second = publish_directory(tmp_path, "demo", NEW)
    assert second.changed
    assert second.content_id != first.content_id
    assert content(tmp_path / "demo") == NEW
    assert len(list((tmp_path / ".versions/demo").iterdir())) == 1


def test_unchanged_content_changes_nothing(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(b"new weights")
    first = publish_directory(tmp_path / "published", "demo", NEW)
    before = snapshot(tmp_path / "published")
    second = publish_directory(tmp_path / "published", "demo", NEW | {"model.safetensors": weights})
    assert not second.changed
    assert second.content_id == first.content_id
    assert snapshot(tmp_path / "published") == before


def test_a_damaged_folder_is_published_again(tmp_path: Path) -> None:
    publish_directory(tmp_path, "demo", NEW)
    (tmp_path / "demo/config.json").write_bytes(b"{2}")
    assert publish_directory(tmp_path, "demo", NEW).changed
    (tmp_path / "demo/stray.txt").write_bytes(b"")
    assert publish_directory(tmp_path, "demo", NEW).changed
    assert content(tmp_path / "demo") == NEW


def test_a_file_with_other_bytes_than_were_recorded_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    root, weights, config = tmp_path / "published", tmp_path / "weights", tmp_path / "config"
    publish_directory(root, "demo", OLD)
    before = snapshot(root)
    weights.write_bytes(b"new weights")
    config.write_bytes(b"{}")
    # By sha256sum.
    recorded = {
        "model.safetensors": "75f585ae1855ec1d1ba5e4fc9861e07fbdba3919a965042b2ba78b6fc3e9a18f",
        "config.json": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }
    files: dict[str, Path | bytes] = {"model.safetensors": weights, "config.json": config}
    weights.write_bytes(b"new weightt")
    with pytest.raises(ValueError, match=rf"^{weights} has changed since .*; remove it and build again"):
        publish_directory(root, "demo", files, recorded=recorded)
    assert snapshot(root) == before
    weights.write_bytes(b"new weights")
    assert publish_directory(root, "demo", files, recorded=recorded).changed


KILLED_PUBLISHING = """
import os, signal, sys
from pathlib import Path
from specforge_core.hub import repository

def killing(function):
    def wrapper(*args):
        if {after}:
            function(*args)
        os.kill(os.getpid(), signal.SIGKILL)
    return wrapper

repository.{step} = killing(repository.{step})
repository.publish_directory(Path(sys.argv[1]), "demo", {files!r})
"""


@pytest.mark.parametrize(
    ("step", "after", "expected"),
    [
        ("write_files", False, OLD),
        ("write_files", True, OLD),
        ("os.fsync", False, OLD),
        ("os.symlink", True, OLD),
        ("switch_link", True, NEW),
        ("remove_other_versions", True, NEW),
    ],
)
def test_a_kill_between_two_steps_leaves_a_whole_version(
    tmp_path: Path, step: str, after: bool, expected: dict[str, bytes]
) -> None:
    publish_directory(tmp_path, "demo", OLD)
    script = KILLED_PUBLISHING.format(step=step, after=after, files=NEW)
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert content(tmp_path / "demo") == expected
    # The next publishing goes on as if nothing had happened, and leaves nothing else behind.
    publish_directory(tmp_path, "demo", NEW)
    assert content(tmp_path / "demo") == NEW
    assert len(list((tmp_path / ".versions/demo").iterdir())) == 1


def test_two_publishings_at_once_leave_one_whole_version(tmp_path: Path) -> None:
    versions = [{"a": str(i).encode() * 100_000, "b": str(i).encode() * 100_000} for i in range(8)]
    threads = [threading.Thread(target=publish_directory, args=(tmp_path, "demo", files)) for files in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content(tmp_path / "demo") in versions


def test_the_root_may_be_moved_or_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    publish_directory(tmp_path / "link", "demo", OLD)
    publish_directory(tmp_path / "link", "demo", NEW)
    (tmp_path / "real").rename(tmp_path / "moved")
    assert content(tmp_path / "moved/demo") == NEW


@pytest.mark.parametrize("name", ["..", "../demo", "a/b", "/demo", "", ".versions", "Demo", "demo\n"])
def test_a_name_cannot_leave_the_root(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a published folder"):
        publish_directory(tmp_path / "root", name, NEW)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/../../outside", "", ".", "./a", "a//b"])
def test_a_file_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a file of a repository"):
        publish_directory(tmp_path / "root", "demo", {name: b"x"})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_someone_else_made_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/thesis.txt").write_text("the only copy")
    with pytest.raises(ValueError, match=r"is not a published folder, .* move it away"):
        publish_directory(tmp_path, "demo", NEW)
    assert (tmp_path / "demo/thesis.txt").read_text() == "the only copy"


def test_a_missing_file_leaves_the_published_version(tmp_path: Path) -> None:
    publish_directory(tmp_path, "demo", OLD)
    with pytest.raises(FileNotFoundError, match="gone"):
        publish_directory(tmp_path, "demo", NEW | {"model.safetensors": tmp_path / "gone"})
    assert content(tmp_path / "demo") == OLD


def test_the_repository_of_a_build(tmp_path: Path) -> None:
    target_folder = tmp_path / "target"
    target_folder.mkdir()
    (target_folder / "LICENSE").write_text("terms of the target")
    entry = made_build.entry(target=TargetConfig(model=str(target_folder)))
    target = ResolvedTarget(model=str(target_folder), content_id="c0ffee")
    artifacts = made_build.artifacts(tmp_path / "store")
    report = make_report(entry, target, artifacts, failures=())
    published = publish_directory(tmp_path / "published", "demo", repository_files(report, artifacts, target))
    assert sorted(content(published.path)) == [
        "LICENSE",
        "README.md",
        "base_model/LICENSE",
        "benchmark_result.json",
        "config.json",
        "lineage.json",
        "model.safetensors",
        "plots/acceptance.png",
        "plots/speedup.png",
    ]
    # The entry's licence is llama3.1, whose text comes with the target.
    assert (published.path / "LICENSE").read_text() == "terms of the target"
    assert (published.path / "base_model/LICENSE").read_text() == "terms of the target"
    assert "base_model/LICENSE" in (published.path / "README.md").read_text()
    measured = json.loads((published.path / "benchmark_result.json").read_text())["measurements"]
    assert [m["acceptance_length"] for m in measured] == [3.0, 3.0]

    lineage = Lineage.model_validate_json((published.path / "lineage.json").read_text())
    assert lineage.entry == entry
    assert lineage.target_content_id == "c0ffee"
    assert list(lineage.stages) == ["regenerate", "vocabulary", "capture", "train", "export", "benchmark"]
    assert lineage.stages["export"].key == "key-export"
    assert lineage.stages["export"].content_id == artifacts.draft.content_id
    assert lineage.stages["export"].created_at == artifacts.draft.created_at
    assert lineage.versions["torch"] == "2.13.0"

    again = publish_directory(tmp_path / "published", "demo", repository_files(report, artifacts, target))
    assert not again.changed


def test_the_licence_is_the_one_that_the_entry_names(tmp_path: Path) -> None:
    terms = tmp_path / "LICENSE.txt"
    terms.write_text("terms of the target")
    notice = tmp_path / "NOTICE"
    notice.write_text("a notice")
    free = draft_license("apache-2.0", [terms])
    assert free is not None
    assert b"Apache License" in free
    assert draft_license("llama3.1", [notice, terms]) == b"terms of the target"
    # A notice is no licence, and a name is no path.
    assert draft_license("llama3.1", [notice]) is None
    assert draft_license("../licenses/apache-2.0", []) is None
