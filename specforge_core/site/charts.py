"""The charts of the site, as Vega-Lite specifications: data and encodings. Colours come from the page. Torch-free.

Values from records stand in data alone, never in an expression or a field's name.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from specforge_core.benchmark.headline import headline
from specforge_core.benchmark.history import RecordedReport
from specforge_core.benchmark.plots import position_lines
from specforge_core.benchmark.sweep import best_per_load, output_speed, speeds_without_draft
from specforge_core.facts import BenchmarkResult, SweepPoint
from specforge_core.site.anchors import Anchor, comparable
from specforge_core.site.collect import Curve, EntryView

Spec = dict[str, Any]

NUMBER = {"type": "quantitative"}
FIGURE = {"format": ".2f", "type": "quantitative"}
SPEEDUP = {**NUMBER, "scale": {"zero": False, "padding": 14}, "axis": {"tickCount": 6}}
ROW_PIXELS = 46
AT_BOTTOM = {"orient": "bottom", "direction": "horizontal", "title": None, "columns": {"expr": "width < 420 ? 2 : 5"}}


def _chart(rows: Sequence[dict[str, Any]], *, height: int, **rest: Any) -> Spec:
    return {
        "width": "container",
        "height": height,
        "data": {"values": list(rows)},
        **rest,
    }


def _tooltip(**titles: str) -> list[Spec]:
    """Fields with their titles; those of figures, `_f` at the end of their names, with two decimals."""
    return [
        {"field": field, "title": title, **(FIGURE if field.endswith("_f") else {"type": "nominal"})}
        for field, title in titles.items()
    ]


def _one_is_even() -> Spec:
    """The line at which a draft neither helps nor harms."""
    return {"data": {"values": [{"even": 1}]}, "mark": {"type": "rule", "style": "reference"}}


def speedup_by_entry(views: Iterable[EntryView]) -> Spec:
    """Speedups of each measured entry: a faint dot for each suite, a strong one for their mean."""
    rows = [
        {
            "entry": view.name,
            "suite": m.suite,
            "speedup_f": m.speedup,
            "acceptance_f": m.acceptance_length,
            "of": "suite",
        }
        for view in views
        if view.report
        for m in view.report.benchmark.measurements
        if m.serving == view.report.benchmark.measurements[0].serving
    ]
    rows += [
        {
            "entry": view.name,
            "suite": "mean of the suites",
            "speedup_f": view.means.speedup,
            "acceptance_f": view.means.acceptance_length,
            "of": "mean",
        }
        for view in views
        if view.means
    ]
    y = {"field": "entry", "type": "nominal", "title": None, "sort": {"field": "speedup_f", "order": "descending"}}
    x = {"field": "speedup_f", **SPEEDUP, "title": "speedup over the target alone"}
    tooltip = _tooltip(entry="entry", suite="suite", speedup_f="speedup", acceptance_f="acceptance length")
    dots = {"type": "circle", "clip": False}
    return _chart(
        rows,
        height=ROW_PIXELS * len({row["entry"] for row in rows}),
        # A filter of the page leaves fewer rows.
        usermeta={"rowHeight": ROW_PIXELS},
        encoding={"y": y},
        layer=[
            {**_one_is_even(), "encoding": {"x": {"datum": 1, **NUMBER}, "y": None}},
            {
                "transform": [{"filter": {"field": "of", "equal": "suite"}}],
                "mark": {**dots, "size": 70, "opacity": 0.4},
                "encoding": {"x": x, "tooltip": tooltip},
            },
            {
                "transform": [{"filter": {"field": "of", "equal": "mean"}}],
                "mark": {**dots, "size": 190, "opacity": 1},
                "encoding": {"x": x, "tooltip": tooltip},
            },
        ],
    )


def speedup_by_suite(result: BenchmarkResult, target: str, anchors: tuple[Anchor, ...]) -> Spec:
    """Speedup with its interval for each suite and serving configuration; diamonds are comparable anchors."""
    rows, public = [], []
    for m in result.measurements:
        serving = f"{m.serving.chain()}, {m.serving.concurrency} at once"
        rows.append(
            {
                "suite": m.suite,
                "serving": serving,
                "speedup_f": m.speedup,
                "low_f": m.speedup_low,
                "high_f": m.speedup_high,
                "acceptance_f": m.acceptance_length,
            }
        )
        public += [
            {"suite": m.suite, "serving": serving, "speedup_f": a.speedup, "draft": a.draft, "source": a.source.name}
            for a in comparable(anchors, target, m)
            if a.speedup
        ]
    servings = list(dict.fromkeys(row["serving"] for row in rows))
    by_serving: Spec = {}
    if len(servings) > 1:
        by_serving = {
            "yOffset": {"field": "serving", "sort": servings},
            "color": {"field": "serving", "type": "nominal", "sort": servings, "legend": AT_BOTTOM},
        }
    x = {"field": "speedup_f", **SPEEDUP, "title": "speedup over the target alone"}
    measured = _tooltip(
        suite="suite",
        serving="serving",
        speedup_f="speedup",
        low_f="from",
        high_f="to",
        acceptance_f="acceptance length",
    )
    quoted = _tooltip(suite="suite", serving="serving", speedup_f="speedup", draft="draft", source="source")
    return _chart(
        rows,
        height=max(200, len({row["suite"] for row in rows}) * max(ROW_PIXELS, 20 * len(servings))),
        encoding={"y": {"field": "suite", "type": "nominal", "title": None, "sort": None}, **by_serving},
        layer=[
            {**_one_is_even(), "encoding": {"x": {"datum": 1, **NUMBER}, "y": None, **dict.fromkeys(by_serving)}},
            {"mark": {"type": "rule", "style": "interval"},
             "encoding": {"x": {**x, "field": "low_f"}, "x2": {"field": "high_f"}, "tooltip": measured}},
            {"mark": {"type": "circle", "size": 150, "opacity": 1}, "encoding": {"x": x, "tooltip": measured}},
            *(
                [{"data": {"values": public},
                  "mark": {"type": "point", "style": "anchor", "shape": "diamond", "size": 110, "filled": False},
                  "encoding": {"x": x, "tooltip": quoted}}]
                if public
                else []
            ),
        ],
    )  # fmt: skip


def acceptance_by_position(result: BenchmarkResult) -> Spec:
    """Share of the verification steps that accepted each draft position: a line for each suite and chain."""
    lines = position_lines(result.measurements)
    rows = [
        {"suite": line.suite, "chain": line.chain, "position": position, "share": share}
        for line in lines
        for position, share in enumerate(line.shares, start=1)
    ]
    encoding: Spec = {
        "x": {"field": "position", "type": "ordinal", "title": "draft position", "axis": {"labelAngle": 0}},
        "y": {
            "field": "share",
            **NUMBER,
            "title": "accepted",
            "axis": {"format": "%"},
            "scale": {"domain": [0, 1]},
        },
        "color": {"field": "suite", "type": "nominal", "sort": None, "legend": AT_BOTTOM},
        "tooltip": [
            *_tooltip(suite="suite", chain="chain", position="position"),
            {"field": "share", "title": "accepted", **NUMBER, "format": ".1%"},
        ],
    }
    if len({line.chain for line in lines}) > 1:
        encoding["strokeDash"] = {
            "field": "chain",
            "type": "nominal",
            "sort": None,
            "legend": {**AT_BOTTOM, "symbolType": "stroke"},
        }
    return _chart(rows, height=280, mark={"type": "line", "point": {"size": 60}}, encoding=encoding)


def throughput_over_load(points: Sequence[SweepPoint]) -> Spec:
    """Output tokens/s over the requests at once, a line for each chain and the target alone; rings mark the best."""
    alone = [{"load": load, "rate": speed} for load, speed in speeds_without_draft(points).items()]
    best = [{"load": a.concurrency, "rate": a.output_tokens_per_s} for a in best_per_load(points) if a.serving]
    scale = {"scale": {"type": "log", "nice": False}, "axis": {"format": ",.0f", "tickCount": 5}}
    return _over_load(points, alone, best, {"field": "rate", **NUMBER, "title": "output tokens/s", **scale})


def speedup_over_load(points: Sequence[SweepPoint]) -> Spec:
    """Speedup over the target alone, at as many requests at once; rings mark the best."""
    alone = [{"load": load, "speedup_f": 1.0} for load in _loads(points)]
    best = [{"load": a.concurrency, "speedup_f": a.speedup} for a in best_per_load(points) if a.serving]
    axis = {"axis": {"tickCount": 6}, "scale": {"zero": True}}
    return _over_load(points, alone, best, {"field": "speedup_f", **NUMBER, "title": "speedup", **axis})


def _over_load(points: Sequence[SweepPoint], alone: list[Spec], best: list[Spec], y: Spec) -> Spec:
    rows = [
        {"chain": p.serving.chain(), "load": p.serving.concurrency, "rate": output_speed(p), "speedup_f": p.speedup}
        for p in points
    ]
    x = {
        "field": "load",
        **NUMBER,
        "title": "requests at once",
        "scale": {"type": "log", "base": 2, "nice": False, "padding": 12},
        "axis": {"values": _loads(points), "format": "d"},
    }
    color = {"field": "chain", "type": "nominal", "sort": None, "legend": AT_BOTTOM}
    tooltip = [
        *_tooltip(chain="chain", load="requests at once", speedup_f="speedup"),
        {"field": "rate", "title": "output tokens/s", **NUMBER, "format": ",.0f"},
    ]
    return _chart(
        rows,
        height=300,
        encoding={"x": x, "y": y},
        layer=[
            {"data": {"values": alone}, "mark": {"type": "line", "style": "baseline"}},
            {
                "data": {"values": alone[-1:]},
                "mark": {"type": "text", "style": "baseline-name", "text": "without draft"},
            },
            {"mark": "line", "encoding": {"color": color}},
            {"mark": {"type": "circle", "size": 60, "opacity": 1}, "encoding": {"color": color, "tooltip": tooltip}},
            {"data": {"values": best}, "mark": {"type": "point", "style": "best", "filled": False, "size": 260}},
        ],
    )


def _loads(points: Sequence[SweepPoint]) -> list[int]:
    return sorted({point.serving.concurrency for point in points})


def history(builds: Sequence[RecordedReport], *, field: str, title: str, required: float) -> Spec:
    """A headline over the builds, oldest first; a cross where a gate failed. Dashed: what the gates ask of each suite.

    Args: field: of `Headline`; required: 0 draws no such line.
    """
    rows = [
        {
            "build": number,
            "value_f": getattr(means, field),
            "gates": "failed" if recorded.report.failures else "passed",
            "at": f"{recorded.recorded_at:%Y-%m-%d %H:%M} UTC",
            "commit": (recorded.report.lineage.commit or "unknown")[:7],
        }
        for number, recorded in enumerate(builds, start=1)
        if (means := headline(recorded.report.benchmark))
    ]
    x = {"field": "build", "type": "ordinal", "title": "build", "axis": {"labelAngle": 0, "labelOverlap": True}}
    y = {"field": "value_f", **NUMBER, "title": title, "scale": {"zero": False, "padding": 14}}
    tooltip = _tooltip(build="build", value_f=title, gates="gates", at="recorded", commit="commit")
    verdicts: dict[str, Spec] = {"passed": {"shape": "circle"}, "failed": {"shape": "cross", "style": "failed"}}
    point: Spec = {"type": "point", "size": 120, "filled": True, "opacity": 1}
    layers: list[Spec] = [
        {"mark": {"type": "line", "opacity": 0.5}},
        *(
            {
                "transform": [{"filter": {"field": "gates", "equal": gates}}],
                "mark": point | mark,
                "encoding": {"tooltip": tooltip},
            }
            for gates, mark in verdicts.items()
        ),
    ]
    if required:
        layers.insert(
            0,
            {
                "data": {"values": [{"required": required}]},
                "mark": {"type": "rule", "style": "reference"},
                "encoding": {"y": {"field": "required", **NUMBER}, "x": {"value": 0}, "x2": {"value": "width"}},
            },
        )
    return _chart(rows, height=220, encoding={"x": x, "y": y}, layer=layers)


def training_loss(curves: Sequence[Curve]) -> Spec:
    """Loss over optimizer steps: a line in training, points on held-out conversations."""
    return _training(curves, {"train/loss": "training", "eval/loss": "held out"}, title="loss", axis={})


def training_acceptance(curves: Sequence[Curve]) -> Spec:
    """Expected acceptance by draft position over optimizer steps: lines in training, points held out."""
    prefix = "train/acceptance_"
    positions = sorted(int(c.name.removeprefix(prefix)) for c in curves if c.name.startswith(prefix))
    names = {f"{part}/acceptance_{k}": f"position {k + 1}" for part in ("train", "eval") for k in positions}
    return _training(curves, names, title="expected acceptance", axis={"format": "%"})


def _training(curves: Sequence[Curve], names: dict[str, str], *, title: str, axis: Spec) -> Spec:
    rows = [
        {"line": names[curve.name], "step": step, "value": value, "is_eval": curve.name.startswith("eval/")}
        for curve in curves
        if curve.name in names
        for step, value in zip(curve.steps, curve.values, strict=True)
    ]
    color = {"field": "line", "type": "nominal", "sort": list(dict.fromkeys(names.values())), "legend": AT_BOTTOM}
    tooltip = [
        *_tooltip(line="", step="step"),
        {"field": "value", "title": title, **NUMBER, "format": ".3f"},
    ]
    return _chart(
        rows,
        height=260,
        encoding={
            "x": {"field": "step", **NUMBER, "title": "optimizer step", "axis": {"format": "d", "tickCount": 6}},
            "y": {"field": "value", **NUMBER, "title": title, "axis": axis},
            "color": color,
        },
        layer=[
            {
                "transform": [{"filter": {"field": "is_eval", "equal": False}}],
                "mark": {"type": "line", "strokeWidth": 1.5, "opacity": 0.8},
            },
            {
                "transform": [{"filter": {"field": "is_eval", "equal": True}}],
                "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1, "shape": "diamond"},
                "encoding": {"tooltip": tooltip},
            },
        ],
    )
