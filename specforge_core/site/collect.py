"""What the site shows, gathered from a store: every entry with its builds, curves and champion. Torch-free."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from specforge_core.artifacts import METRICS_NAME
from specforge_core.benchmark.headline import Headline, headline
from specforge_core.benchmark.history import History, load_history
from specforge_core.benchmark.interval import Interval, product_interval
from specforge_core.benchmark.report import EntryReport
from specforge_core.curves import metric_points, whole_lines
from specforge_core.facts import Published, Rejected
from specforge_core.ledger import EntryRecord, load_entry_record
from specforge_core.manifest import ManifestEntry

STATUSES = {
    "published": "The last build passed its gates and is published.",
    "passed": "The last build passed its gates.",
    "rejected": "The last build failed a gate, and is kept.",
    "building": "A build is under way; the figures are those of the one before.",
    "started": "A build was started and has no result yet.",
    "never built": "It stands in the manifest alone.",
}
"""What became of the last build of an entry."""


class Champion(NamedTuple):
    """The version of a registered draft that users are to take."""

    version: str
    draft: str
    """Content id of the exported draft, by which a build is known to have made it."""
    repository: str | None = None
    url: str | None = None


class Curve(NamedTuple):
    """One metric of a training run."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


class EntryView(NamedTuple):
    """All that is known of one entry."""

    name: str
    entry: ManifestEntry
    """As the manifest has it, else as it was last built."""
    status: str
    """A key of STATUSES: what became of the last build."""
    record: EntryRecord
    history: History
    curves: tuple[Curve, ...]
    """Of the training of what is shown; empty where its metrics are not in this store."""
    champion: Champion | None

    @property
    def last(self) -> EntryReport | None:
        """The newest report."""
        return self.history.reports[-1].report if self.history.reports else None

    @property
    def report(self) -> EntryReport | None:
        """The one whose figures are shown: the newest of the champion, which users get; else the last."""
        return _shown(self.history, self.champion)

    @property
    def is_published(self) -> bool:
        """Whether users can get a draft of this entry, whatever became of the last build."""
        return self.champion is not None or self.status == "published"

    @property
    def measured_at(self) -> datetime | None:
        """When what is shown was measured."""
        return self.report.lineage.stages["benchmark"].created_at if self.report else None

    @property
    def means(self) -> Headline | None:
        """The headline of what is shown."""
        return headline(self.report.benchmark) if self.report else None

    @property
    def speedup_interval(self) -> Interval | None:
        """The headline's speedup with its 95 % interval, the suites taken for measured apart from each other."""
        measurements = self.report.benchmark.measurements if self.report else ()
        suites = [m for m in measurements if m.serving == measurements[0].serving]
        if not suites:
            return None
        return product_interval([m.speedup_interval for m in suites], power=1 / len(suites))

    @property
    def num_identical(self) -> tuple[int, int] | None:
        """Outputs equal to the target's own or apart at a near-tie, and all that were compared; None if sampled."""
        checks = [m.lossless for m in self.report.benchmark.measurements if m.lossless] if self.report else []
        if not checks:
            return None
        equal = sum(check.num_identical + check.num_near_tie for check in checks)
        return equal, equal + sum(check.num_different for check in checks)


def collect(store: Path, entries: Sequence[ManifestEntry], champions: Mapping[str, Champion]) -> tuple[EntryView, ...]:
    """The manifest's entries in its order, then those that only the store knows."""
    known = {entry.name: entry for entry in entries}
    built = sorted({path.stem for path in (store / "reports").glob("*.json")} - known.keys())
    views = (_view(store, name, known.get(name), champions.get(name)) for name in [*known, *built])
    return tuple(view for view in views if view)


def _view(store: Path, name: str, entry: ManifestEntry | None, champion: Champion | None) -> EntryView | None:
    history, record = load_history(store, name), load_entry_record(store, name)
    last = history.reports[-1].report if history.reports else None
    entry = entry or (last.lineage.entry if last else None)
    if entry is None:
        return None
    shown = _shown(history, champion)
    curves = _curves(store / "train" / shown.lineage.stages["train"].key / METRICS_NAME) if shown else ()
    return EntryView(name, entry, _status(record, last), record, history, curves, champion)


def _shown(history: History, champion: Champion | None) -> EntryReport | None:
    reports = [recorded.report for recorded in history.reports]
    made_champion = [
        report for report in reports if champion and report.lineage.stages["export"].content_id == champion.draft
    ]
    shown = made_champion or reports
    return shown[-1] if shown else None


def _status(record: EntryRecord, last: EntryReport | None) -> str:
    if last is None:
        return "started" if record.keys else "never built"
    match record.outcome:
        case Published():
            return "published"
        case Rejected():
            return "rejected"
        case None if record.keys:
            return "building"
    # Not published on purpose; or the store was not the one that built it, and the report alone is known.
    return "rejected" if last.failures else "passed"


def _curves(path: Path) -> tuple[Curve, ...]:
    """The metrics of a stage by name; none if its file is not there. Of a step that was reported again, the last."""
    curves: dict[str, dict[int, float]] = {}
    for name, step, value in metric_points(whole_lines(path)):
        curves.setdefault(name, {})[step] = value
    return tuple(Curve(name, tuple(by_step), tuple(by_step.values())) for name, by_step in curves.items())
