"""How a build ended: one row per entry, on the page of its run and in the tracker."""

from pathlib import Path
from typing import Literal

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from specforge_core.artifacts import Store
from specforge_core.benchmark.headline import headline
from specforge_core.benchmark.tables import markdown_table
from specforge_core.facts import Published, Record, Rejected
from specforge_core.ledger import Outcome, last_artifact
from tasks.progress import artifact_key
from tasks.tracking import server_command

MAX_ERROR_CHARS = 300

Status = Literal["published", "passed", "rejected", "failed", "skipped"]


class EntryRow(Record):
    """How the build of one entry ended."""

    entry: str
    status: Status
    acceptance_length: float | None = None
    """Mean over the suites, at the first serving configuration."""
    speedup: float | None = None
    detail: str
    """Where it was published, the gates that failed, the error, or why it was skipped."""
    place: str | None = None
    """URL or folder of what was published."""
    elapsed_s: float | None = None

    @property
    def is_failure(self) -> bool:
        """Whether it makes the build's exit status non-zero."""
        return self.status in ("rejected", "failed")

    def cells(self) -> dict[str, str]:
        """The row as text, by column."""
        return {
            "entry": self.entry,
            "status": self.status,
            "acceptance length": "" if self.acceptance_length is None else f"{self.acceptance_length:.2f}",
            "speedup": "" if self.speedup is None else f"{self.speedup:.2f}x",
            "seconds": "" if self.elapsed_s is None else f"{self.elapsed_s:.0f}",
            "detail": self.detail,
        }


class BuildSummary(Record):
    """How a whole build ended."""

    rows: tuple[EntryRow, ...]
    store: Path
    tracking_uri: str
    comparison_url: str | None
    """The page that charts the entries' runs side by side; None if tracking failed."""
    site: Path | None = None
    """First page of the site of results; None if it was not written."""

    @property
    def is_failure(self) -> bool:
        """Whether one of its entries did not pass."""
        return any(row.is_failure for row in self.rows)

    @property
    def message(self) -> str:
        """One sentence for the run's final state."""
        failures = [row.entry for row in self.rows if row.is_failure]
        num_built = sum(row.status != "skipped" for row in self.rows)
        if failures:
            return f"{len(failures)} of {num_built} entries did not pass: {', '.join(failures)}"
        return f"{num_built} of {num_built} entries passed"

    def next_steps(self, command: str) -> list[str]:
        """Where to look now, as lines for a terminal.

        Args: command: the program, with the options that name this manifest and store.
        """
        measured = [row.entry for row in self.rows if row.speedup is not None]
        site = [f"site:     {self.site.as_uri()}"] if self.site else []
        reports = [f"report:   {self.store / 'reports' / entry}.md" for entry in measured]
        compare = []
        if self.comparison_url:
            compare.append(f"compare:  {self.comparison_url}")
        if self.comparison_url and not self.tracking_uri.startswith("http"):
            compare.append(f"          served by `{' '.join(server_command(self.tracking_uri))}`, or `{command} up`")
        look = []
        if measured:
            look.append(f"look at:  {command} show conversation --entry {measured[0]}; {command} report")
        return [*site, *reports, *compare, *look]

    def markdown(self) -> str:
        """The table of its rows."""
        return f"{self.message}\n\n{markdown_table([row.cells() for row in self.rows])}\n"


def row_of_outcome(name: str, outcome: Outcome, *, store: Path, elapsed_s: float) -> EntryRow:
    """The row of a build that reached its end."""
    status: Status
    place = None
    if isinstance(outcome, Published):
        place = outcome.url or str(outcome.path)
        status, detail = "published", f"{place}{'' if outcome.changed else ' (unchanged)'}"
    elif isinstance(outcome, Rejected):
        first, *others = outcome.failures
        status, detail = "rejected", first.message + (f" (and {len(others)} more, in its report)" if others else "")
    else:
        status, detail = "passed", f"not published, as asked{f'; {outcome.plan}' if outcome.plan else ''}"
    benchmark = last_artifact(Store(store), name, "benchmark")
    means = headline(benchmark.facts) if benchmark else None
    return EntryRow(
        entry=name,
        status=status,
        acceptance_length=means.acceptance_length if means else None,
        speedup=means.speedup if means else None,
        detail=detail,
        place=place,
        elapsed_s=elapsed_s,
    )


def row_of_error(name: str, error: BaseException) -> EntryRow:
    """The row of a build that failed on the way."""
    # The whole text is in the run's log; here its beginning says which stage and which status.
    return EntryRow(entry=name, status="failed", detail=f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS])


def show_summary(summary: BuildSummary) -> None:
    """Put the rows, and links to what they speak of, on the page of the current flow run."""
    create_table_artifact(
        key="specbundle", table=[row.cells() for row in summary.rows], description="One row per entry of the build"
    )
    create_markdown_artifact(key="specbundle-summary", markdown=summary.markdown(), description="Summary of the build")
    if summary.site:
        create_link_artifact(key="specbundle-site", link=summary.site.as_uri(), link_text="Site of all results")
    if summary.comparison_url:
        create_link_artifact(
            key="specbundle-comparison", link=summary.comparison_url, link_text="All entries side by side in MLflow"
        )
    for row in summary.rows:
        if row.place:
            link = row.place if row.place.startswith("http") else Path(row.place).as_uri()
            create_link_artifact(key=artifact_key(f"draft-{row.entry}"), link=link, link_text=row.place)
