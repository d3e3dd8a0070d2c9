"""Write the site: pages from templates, and the assets that they share. Torch-free.

Everything that a record says is untrusted: templates escape it, and only addresses of the web become links.
"""

import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata, resources
from pathlib import Path
from statistics import fmean, geometric_mean, median
from typing import Any
from urllib.parse import urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined

from specforge_core.artifacts import write_atomically
from specforge_core.benchmark.headline import headline
from specforge_core.benchmark.report import making_rows
from specforge_core.benchmark.sweep import LAUNCH_NOTE, best_per_load, launch_lines
from specforge_core.benchmark.tables import (
    IMPOSSIBLE,
    comparison_rows,
    measured_on,
    processor,
    result_legend,
    result_rows,
    server_rows,
    switch_off_advice,
)
from specforge_core.facts import BenchmarkResult, GateFailure, Published
from specforge_core.hub.card import method_name
from specforge_core.manifest import ManifestEntry
from specforge_core.site import charts
from specforge_core.site.anchors import Anchor, comparable, load_anchors
from specforge_core.site.collect import STATUSES, Champion, EntryView, collect
from specforge_core.site.lineage import lineage_chart

DIRECTORY = "site"
"""In the store, where nothing else is asked for."""
CHART_LIBRARY = "vl-convert-python"
# Of `result_rows`: what only some benchmarks measure.
MORE_COLUMNS = ("in process", "answers right")
MAX_DECIMALS = 6


def site_directory(store: Path) -> Path:
    """Where the site of a store lies."""
    return store / DIRECTORY


def entry_page(site: Path, name: str) -> Path:
    """The page of an entry."""
    return site / "entries" / f"{name}.html"


def write_site(
    store: Path,
    entries: Sequence[ManifestEntry],
    *,
    champions: Mapping[str, Champion] | None = None,
    comparison_url: str | None = None,
    out: Path | None = None,
) -> Path:
    """The site's first page, written anew with all others from the store's records.

    Args: entries: of the manifest; built ones that it no longer has are shown as well. champions: by entry, as the
    registry knows them. comparison_url: MLflow's page of all entries side by side. out: the folder; `site` in the store
    when absent.
    """
    out = (out or site_directory(store)).absolute()
    views, anchors = collect(store, entries, champions or {}), load_anchors()
    environment = _environment()
    shared = {"comparison_url": comparison_url, "written_at": datetime.now(UTC), "library": _library_name()}

    def write(path: Path, template: str, **values: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        root = "../" * (len(path.relative_to(out).parts) - 1)
        write_atomically(path, environment.get_template(template).render(**shared, root=root, **values))

    _write_assets(out / "assets")
    write(out / "index.html", "index.html", **_overview(views))
    sources, shapes = dict.fromkeys(a.source for a in anchors), dict.fromkeys(a.shape() for a in anchors)
    write(out / "anchors.html", "anchors.html", anchors=anchors, sources=list(sources), shapes=list(shapes))
    for view in views:
        write(entry_page(out, view.name), "entry.html", **_entry(view, anchors))
    return out / "index.html"


def _overview(views: Sequence[EntryView]) -> dict[str, Any]:
    measured = [view for view in views if view.means]
    # The champion may be another store's, and what is shown a draft that was rejected since.
    published = [view for view in measured if view.is_published and view.report and not view.report.failures]
    means = [view.means for view in published or measured if view.means]
    return {
        "views": views,
        "num_published": sum(view.is_published for view in views),
        "num_means": len(means),
        "are_published": bool(published),
        "acceptance_length": fmean(mean.acceptance_length for mean in means) if means else None,
        "is_lossless": all(view.num_identical and len(set(view.num_identical)) == 1 for view in published or measured),
        "speedup": geometric_mean(mean.speedup for mean in means) if means else None,
        "chart": charts.speedup_by_entry(measured) if measured else None,
        "last_measured": max((view.measured_at for view in measured if view.measured_at), default=None),
        "hardware": sorted({hardware_of(view.report.benchmark) for view in measured if view.report}),
    }


def _entry(view: EntryView, anchors: tuple[Anchor, ...]) -> dict[str, Any]:
    public = tuple(anchor for anchor in anchors if anchor.target == view.entry.target.model)
    values: dict[str, Any] = {"view": view, "report": view.report, "last": view.last, "anchors": public}
    report, last = view.report, view.last
    if report is None or last is None:
        return values
    result, gates = report.benchmark, report.lineage.entry.gates
    builds = view.history.reports
    draft = report.lineage.entry.publish.repository or f"{report.lineage.entry.publish.directory}/{view.name}"
    rows = result_rows(result)
    has_curves = any(curve.name == "train/loss" for curve in view.curves)
    return values | {
        "result": result,
        "rows": rows,
        "more_columns": [column for column in MORE_COLUMNS if rows and column in rows[0]],
        "beside": {m: comparable(public, report.lineage.entry.target.model, m) for m in result.measurements},
        "comparison": comparison_rows(last.comparison) if last.comparison else [],
        "legend": result_legend(result),
        "measured_on": measured_on(result),
        "servers": server_rows(result),
        "advice": switch_off_advice(result.sweep) if result.sweep else None,
        "loads": best_per_load(result.sweep),
        "launch_lines": launch_lines(result, report.lineage.target(), draft, report.lineage.entry.engine),
        "launch_note": LAUNCH_NOTE,
        "making": making_rows(report),
        "builds": builds,
        "charts": {
            "suites": charts.speedup_by_suite(result, report.lineage.entry.target.model, public),
            "positions": charts.acceptance_by_position(result),
            "throughput": charts.throughput_over_load(result.sweep) if result.sweep else None,
            "speedup": charts.speedup_over_load(result.sweep) if result.sweep else None,
            "history_acceptance": charts.history(
                builds, field="acceptance_length", title="acceptance length", required=gates.min_acceptance_length
            ),
            "history_speedup": charts.history(builds, field="speedup", title="speedup", required=gates.min_speedup),
            "loss": charts.training_loss(view.curves) if has_curves else None,
            "acceptance": charts.training_acceptance(view.curves) if has_curves else None,
            "lineage": lineage_chart(report.lineage.stages),
        },
    }


def hardware_of(result: BenchmarkResult) -> str:
    """What the figures were measured on, in a word."""
    return result.environment.gpu or processor(result.environment)


def web_url(text: str | None) -> str | None:
    """The address if it is one of the web, else None: records must not bring others into a page."""
    return text if text and urlsplit(text).scheme in ("http", "https") else None


def gate_figures(failure: GateFailure) -> tuple[str, str]:
    """What was measured and what is required, with two decimals, or as many as it takes to tell them apart."""
    if failure.measured is None:
        return "–", f"{failure.required:.2f}"
    decimals = 0 if failure.gate == "lossless" else 2
    while decimals < MAX_DECIMALS and f"{failure.measured:.{decimals}f}" == f"{failure.required:.{decimals}f}":
        decimals += 1
    return f"{failure.measured:.{decimals}f}", f"{failure.required:.{decimals}f}"


def repository_url(view: EntryView) -> str | None:
    """Where a published draft can be seen: its own address, else the folder."""
    outcome = view.record.outcome
    if not isinstance(outcome, Published):
        return None
    return web_url(outcome.url) or outcome.path.absolute().as_uri()


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("specforge_core.site"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "IMPOSSIBLE": IMPOSSIBLE,
        "STATUSES": STATUSES,
        "gate_figures": gate_figures,
        "hardware_of": hardware_of,
        "headline": headline,
        "median": median,
        "method_name": method_name,
        "repository_url": repository_url,
        "web_url": web_url,
    }
    return environment


def _library_name() -> str:
    """The chart library's file: its version is in the name, so that it is written once."""
    return f"vega-{metadata.version(CHART_LIBRARY)}.js"


@lru_cache(maxsize=1)
def _library() -> str:
    # It starts a JavaScript engine, and takes a second.
    import vl_convert

    # Its stub asks for a snippet, which the library takes as optional.
    return vl_convert.javascript_bundle()  # type: ignore[call-arg]


def _write_assets(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with resources.as_file(resources.files("specforge_core.site").joinpath("assets")) as assets:
        for file in sorted(assets.iterdir()):
            shutil.copyfile(file, directory / file.name)
    library = directory / _library_name()
    if not library.is_file():
        for old in directory.glob("vega-*.js"):
            old.unlink()
        write_atomically(library, _library())
