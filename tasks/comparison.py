"""The figures by which MLflow compares drafts, and how its page shows them: those of every suite at a glance.

Left to itself the page draws a chart for each metric, three in a row and sorted by name, so speedups begin below the
fold. It is given a view (the state of MLflow's own "share" button, a tag of the experiment) with a chart for each suite
in front: speedup over acceptance length, a point for each draft. The bars of each metric follow.
"""

import json
from collections.abc import Iterable

from specforge_core.benchmark.headline import headline
from specforge_core.benchmark.sweep import output_speed, speeds_without_draft
from specforge_core.facts import BenchmarkResult, Measurement

ACCEPTANCE, SPEEDUP = "accept_length/", "speedup/"
SHOWN_TAG = "specbundle.shown"
"""`true` on the runs that the page charts: each draft once, as it was measured last."""
SHOWN = f"tags.`{SHOWN_TAG}` = 'true' and attributes.status != 'FAILED'"
VIEW = "specbundle"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
# A search in the address would make the page leave the view out, so that is part of the view.
QUERY = {"compareRunsMode": "CHART", "viewStateShareKey": VIEW}
COLUMNS, CARD_PIXELS = 3, 250


def comparison_view(metrics: Iterable[str]) -> str:
    """The view of runs that have these metrics, as MLflow reads it."""
    found = set(metrics)
    suites = sorted(name.removeprefix(SPEEDUP) for name in found if name.startswith(SPEEDUP))
    charts = [
        {
            "type": "SCATTER",
            "uuid": suite,
            "metricSectionId": VIEW,
            "xaxis": {"type": "METRIC", "key": ACCEPTANCE + suite},
            "yaxis": {"type": "METRIC", "key": SPEEDUP + suite},
        }
        for suite in suites
        if ACCEPTANCE + suite in found
    ]
    sections: list[dict[str, object]] = [
        {"uuid": VIEW, "name": "speedup over acceptance length", "columns": COLUMNS, "cardHeight": CARD_PIXELS},
        {"uuid": ACCEPTANCE, "name": ACCEPTANCE.rstrip("/")},
        {"uuid": SPEEDUP, "name": SPEEDUP.rstrip("/")},
    ]
    return json.dumps(
        {
            "searchFilter": SHOWN,
            "compareRunCharts": charts,
            # MLflow adds the others, and to each section the metrics with its name.
            "compareRunSections": [{**section, "display": True} for section in sections],
            # Or else these would be sorted by name.
            "isAccordionReordered": True,
        }
    )


def result_metrics(result: BenchmarkResult) -> dict[str, float]:
    """`accept_length/<suite>` and `speedup/<suite>`, and their means; the prefix makes a section of the chart view."""
    metrics: dict[str, float] = {}
    for measurement in result.measurements:
        name = _measurement_name(measurement, result)
        metrics[ACCEPTANCE + name] = measurement.acceptance_length
        metrics[SPEEDUP + name] = measurement.speedup
    if means := headline(result):
        metrics |= {f"{ACCEPTANCE}mean": means.acceptance_length, f"{SPEEDUP}mean": means.speedup}
    return metrics


def result_curves(result: BenchmarkResult) -> dict[str, dict[int, float]]:
    """By name, the values by step: `suites/by_position/<suite>`, whose steps are draft positions, and of a sweep
    `throughput/<chain>` (output tokens/s, `without-draft` for the target alone) and `speedup_at/<chain>`, whose steps
    are concurrencies."""
    curves: dict[str, dict[int, float]] = {}
    for measurement in result.measurements:
        shares = [accepted / measurement.num_verify_steps for accepted in measurement.accepted_by_position]
        name = _measurement_name(measurement, result)
        curves[f"suites/by_position/{name}"] = dict(enumerate(shares, start=1))
    if result.sweep:
        curves["throughput/without-draft"] = speeds_without_draft(result.sweep)
    for point in result.sweep:
        chain, concurrency = point.serving.chain(), point.serving.concurrency
        curves.setdefault(f"throughput/{chain}", {})[concurrency] = output_speed(point)
        curves.setdefault(f"speedup_at/{chain}", {})[concurrency] = point.speedup
    return curves


def _measurement_name(measurement: Measurement, result: BenchmarkResult) -> str:
    """The suite; `<suite>-c<concurrency>-<chain>` for other serving configurations than the first."""
    serving = measurement.serving
    is_first = serving == result.measurements[0].serving
    return measurement.suite + ("" if is_first else f"-c{serving.concurrency}-{serving.chain()}")
