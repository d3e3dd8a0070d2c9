"""Every distinct report stays, and one that cannot be read stops nothing."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from specforge_core.benchmark.history import load_history, record_report
from specforge_core.benchmark.report import EntryReport, write_report
from tests.site import made_store

FIRST, SECOND, THIRD = (datetime(2026, 11, day, 12, tzinfo=UTC) for day in (1, 2, 3))


@pytest.fixture
def reports(tmp_path: Path) -> tuple[EntryReport, EntryReport]:
    """Of two builds of one entry, the second one faster."""
    entry = made_store.entries()[0]
    one, other = (
        made_store.report(tmp_path / "made" / str(speedup), entry, made_store.suites(speedup)) for speedup in (1.5, 1.8)
    )
    return one, other


def speedups(store: Path) -> list[float]:
    return [recorded.report.benchmark.measurements[0].speedup for recorded in load_history(store, "demo").reports]


def test_reports_are_kept_oldest_first_and_a_build_without_news_adds_none(
    tmp_path: Path, reports: tuple[EntryReport, EntryReport]
) -> None:
    slow, fast = reports
    record_report(tmp_path, slow, at=FIRST)
    path = record_report(tmp_path, fast, at=SECOND)
    assert record_report(tmp_path, fast, at=THIRD) == path
    assert path.parent == tmp_path / "reports" / "history" / "demo"
    assert path.name.startswith("20261102T120000")
    assert [recorded.recorded_at for recorded in load_history(tmp_path, "demo").reports] == [FIRST, SECOND]
    # What a build goes back to is news again.
    record_report(tmp_path, slow, at=THIRD)
    assert speedups(tmp_path) == [1.5, 1.8, 1.5]


def test_the_last_report_of_an_older_store_is_its_history(
    tmp_path: Path, reports: tuple[EntryReport, EntryReport]
) -> None:
    write_report(tmp_path / "reports", reports[1])
    assert speedups(tmp_path) == [1.8]
    # And is not counted twice once it is in the history.
    record_report(tmp_path, reports[1], at=FIRST)
    assert speedups(tmp_path) == [1.8]


def test_what_cannot_be_read_is_named_and_left_out(
    tmp_path: Path, reports: tuple[EntryReport, EntryReport], caplog: pytest.LogCaptureFixture
) -> None:
    folder = record_report(tmp_path, reports[0], at=SECOND).parent
    (folder / "20250101T000000000000Z-old.json").write_text('{"lineage": "of another version"}')
    (folder / "notes.json").write_text(reports[1].model_dump_json())
    history = load_history(tmp_path, "demo")
    assert speedups(tmp_path) == [1.5]
    assert history.unreadable == ("20250101T000000000000Z-old.json", "notes.json")
    assert "is no report that this version can read" in caplog.text


def test_an_entry_that_was_never_built_has_no_history(tmp_path: Path) -> None:
    assert load_history(tmp_path, "demo") == ((), ())
