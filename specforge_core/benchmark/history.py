"""Every report of an entry: `<store>/reports/history/<entry>/<time>-<content id>.json`. Torch-free.

`<store>/reports/<entry>.json` is the last one, and the next build writes over it; these stay. A build that finds out
nothing new adds none.
"""

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from specforge_core.artifacts import write_atomically
from specforge_core.benchmark.report import EntryReport, load_report
from specforge_core.digests import digest

logger = logging.getLogger(__name__)

TIME_FORMAT = "%Y%m%dT%H%M%S%fZ"


class RecordedReport(NamedTuple):
    """A report, and when it came to be."""

    recorded_at: datetime
    report: EntryReport


class History(NamedTuple):
    """What is known of an entry's builds."""

    reports: tuple[RecordedReport, ...]
    """Oldest first."""
    unreadable: tuple[str, ...]
    """Names of files that this version cannot read."""


def record_report(store: Path, report: EntryReport, *, at: datetime | None = None) -> Path:
    """The report's file in the history, written unless it is the newest. Args: at: now, unless it is given."""
    folder = _folder(store, report.lineage.entry.name)
    suffix = f"-{digest(report.model_dump(mode='json'))}.json"
    before = max(folder.glob("*.json"), default=None)
    if before and before.name.endswith(suffix):
        return before
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{(at or datetime.now(UTC)).astimezone(UTC):{TIME_FORMAT}}{suffix}"
    write_atomically(path, report.model_dump_json(indent=1) + "\n")
    return path


def load_history(store: Path, name: str) -> History:
    """The reports of an entry, with the last one of a store that is older than histories."""
    reports: list[RecordedReport] = []
    unreadable: list[str] = []
    last = store / "reports" / f"{name}.json"
    for path in [*sorted(_folder(store, name).glob("*.json")), *([last] if last.is_file() else [])]:
        try:
            report = load_report(path)
            at = report.lineage.stages["benchmark"].created_at if path == last else _recorded_at(path)
        except (ValueError, KeyError) as error:
            logger.warning("left out: %s is no report that this version can read: %s", path, str(error).splitlines()[0])
            unreadable.append(path.name)
            continue
        # The last report is one of the history's, but for a store from before it.
        if path != last or all(recorded.report != report for recorded in reports):
            reports.append(RecordedReport(at, report))
    return History(tuple(sorted(reports, key=lambda recorded: recorded.recorded_at)), tuple(unreadable))


def _recorded_at(path: Path) -> datetime:
    return datetime.strptime(path.name.partition("-")[0], TIME_FORMAT).replace(tzinfo=UTC)


def _folder(store: Path, name: str) -> Path:
    return store / "reports" / "history" / name
