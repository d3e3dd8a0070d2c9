"""A published draft is the artifact that it was made from, or it is refused."""

from pathlib import Path

import pytest

from specforge_core.artifacts import damaged_files
from specforge_core.benchmark.report import EntryReport, make_report
from specforge_core.hub.repository import publish_directory, repository_files
from specforge_core.hub.restore import recorded_artifacts, restore_draft
from tests import made_build
from tests.pickle_bomb import plant


@pytest.fixture
def report(tmp_path: Path) -> EntryReport:
    return make_report(made_build.entry(), made_build.TARGET, made_build.artifacts(tmp_path / "made"), ())


@pytest.fixture
def published(tmp_path: Path, report: EntryReport) -> Path:
    """The folder of a published draft."""
    artifacts = made_build.artifacts(tmp_path / "made-again")
    files = repository_files(report, artifacts, made_build.TARGET)
    return publish_directory(tmp_path / "published", "demo", files).path


def test_a_published_folder_gives_the_exported_draft_back(tmp_path: Path, report: EntryReport, published: Path) -> None:
    recorded = recorded_artifacts(report, tmp_path / "store")
    draft = restore_draft(published, recorded.draft, tmp_path / "store")
    exported = made_build.artifacts(tmp_path / "expected").draft
    assert (draft.stage, draft.key, draft.content_id) == ("export", "key-export", exported.content_id)
    assert draft.files == exported.files
    # When it was made is part of the lineage that is published.
    assert draft.created_at == recorded.draft.created_at
    assert damaged_files(draft, read_content=True) == []
    assert {path.name for path in draft.path.iterdir()} == {*exported.files, "artifact.json"}
    # Once it is there it is used again; a damaged copy is replaced.
    (draft.path / "config.json").write_text("{}")
    (tmp_path / "store/restored_drafts" / f".building-{draft.content_id}").mkdir()
    again = restore_draft(published, recorded.draft, tmp_path / "store")
    assert damaged_files(again, read_content=True) == []


def test_the_artifacts_of_a_report_make_the_same_report(tmp_path: Path, report: EntryReport) -> None:
    recorded = recorded_artifacts(report, tmp_path / "store")
    assert make_report(made_build.entry(), made_build.TARGET, recorded, ()) == report
    assert recorded.conversations.path == tmp_path / "store/regenerate/key-regenerate"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_another_draft_in_the_folder_is_refused(
    tmp_path: Path, report: EntryReport, published: Path, name: str
) -> None:
    recorded = recorded_artifacts(report, tmp_path / "store").draft
    (published / name).write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"{published} is not the draft that was published: its 2 files have"):
        restore_draft(published, recorded, tmp_path / "store")
    (published / name).unlink()
    with pytest.raises(ValueError, match="its 1 files have the content id"):
        restore_draft(published, recorded, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_pickle_in_the_folder_is_not_even_copied(tmp_path: Path, report: EntryReport, published: Path) -> None:
    plant(published / "pytorch_model.bin", tmp_path / "ran")
    draft = restore_draft(published, recorded_artifacts(report, tmp_path / "store").draft, tmp_path / "store")
    assert not (draft.path / "pytorch_model.bin").exists()
    assert not (tmp_path / "ran").exists()
