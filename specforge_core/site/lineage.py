"""The graph of what a draft was made from, laid out from the records' digests. Torch-free."""

from collections.abc import Mapping
from graphlib import TopologicalSorter
from typing import Any, NamedTuple

from specforge_core.benchmark.report import StageLineage

LANE = 1.45
"""How far to the side an edge runs past the generations between its ends; a node is less than 1 wide."""
ROW_PIXELS = 84


class Edge(NamedTuple):
    """One stage read what another one made."""

    source: str
    target: str


def generations(stages: Mapping[str, StageLineage]) -> list[list[str]]:
    """Stages by how many others they wait for in a row, those of the first generation first."""
    sorter: TopologicalSorter[str] = TopologicalSorter({name: [] for name in stages})
    for edge in edges(stages):
        sorter.add(edge.target, edge.source)
    sorter.prepare()
    rows = []
    while ready := sorter.get_ready():
        rows.append(sorted(ready, key=list(stages).index))
        sorter.done(*ready)
    return rows


def edges(stages: Mapping[str, StageLineage]) -> list[Edge]:
    """Who read whose output: inputs name content, and a stage made that content."""
    made_by = {stage.content_id: name for name, stage in stages.items()}
    return [
        Edge(made_by[content_id], name)
        for name, stage in stages.items()
        for content_id in stage.inputs.values()
        if content_id in made_by
    ]


def lineage_chart(stages: Mapping[str, StageLineage]) -> dict[str, Any]:
    """The graph as a Vega-Lite specification, from the prompts at the top to the benchmark at the bottom."""
    rows = generations(stages)
    place = {
        name: (i - (len(row) - 1) / 2, float(depth)) for depth, row in enumerate(rows) for i, name in enumerate(row)
    }
    nodes = [
        {
            "stage": name,
            "x": place[name][0],
            "y": place[name][1],
            "content": stage.content_id[:12],
            "seconds": f"{stage.elapsed_s:,.0f} s",
            "hardware": stage.hardware or "unrecorded hardware",
        }
        for name, stage in stages.items()
    ]
    points = [
        {"edge": f"{edge.source} to {edge.target}", "order": order, "x": x, "y": y}
        for edge in edges(stages)
        for order, (x, y) in enumerate(_path(place[edge.source], place[edge.target]))
    ]
    x = {"field": "x", "type": "quantitative", "axis": None, "scale": {"domain": [-1.1, 1.6]}}
    y = {
        "field": "y",
        "type": "quantitative",
        "axis": None,
        "scale": {"domain": [-0.4, len(rows) - 0.6], "reverse": True},
    }
    tooltip = [
        {"field": field, "title": field, "type": "nominal"} for field in ("stage", "content", "seconds", "hardware")
    ]
    return {
        "width": "container",
        "height": ROW_PIXELS * len(rows),
        "view": {"stroke": None},
        "data": {"values": nodes},
        "encoding": {"x": x, "y": y},
        "layer": [
            {
                "data": {"values": points},
                "mark": {"type": "line", "style": "edge"},
                "encoding": {"detail": {"field": "edge"}, "order": {"field": "order"}},
            },
            {
                "mark": {"type": "rect", "style": "node", "width": {"expr": "min(width / 2.9, 180)"}, "height": 46},
                "encoding": {"tooltip": tooltip},
            },
            {"mark": {"type": "text", "style": "node-name", "dy": -8}, "encoding": {"text": {"field": "stage"}}},
            {
                "mark": {"type": "text", "style": "node-digest", "dy": 10},
                "encoding": {"text": {"field": "content"}},
            },
        ],
    }  # fmt: skip


def _path(source: tuple[float, float], target: tuple[float, float]) -> list[tuple[float, float]]:
    """The corners of an edge; one that passes generations goes around them."""
    if target[1] - source[1] == 1:
        return [source, target]
    return [source, (LANE, source[1] + 0.5), (LANE, target[1] - 0.5), target]
