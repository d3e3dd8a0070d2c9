"""The graph of a draft follows from the digests in its stages' records."""

from datetime import UTC, datetime

from specforge_core.benchmark.report import StageLineage
from specforge_core.site.lineage import Edge, edges, generations, lineage_chart
from tests.site.made_store import INPUTS

STAGES = {
    name: StageLineage(
        key=name,
        content_id=f"content-{name}",
        inputs=inputs,
        created_at=datetime(2026, 11, 1, tzinfo=UTC),
        elapsed_s=61.4,
        hardware=None,
    )
    for name, inputs in INPUTS.items()
}


def test_stages_that_wait_for_the_same_stand_side_by_side() -> None:
    assert generations(STAGES) == [["regenerate"], ["vocabulary", "capture"], ["train"], ["export"], ["benchmark"]]


def test_an_edge_goes_from_who_made_it_to_who_read_it() -> None:
    assert edges(STAGES) == [
        Edge("regenerate", "vocabulary"),
        Edge("regenerate", "capture"),
        Edge("capture", "train"),
        Edge("vocabulary", "train"),
        Edge("train", "export"),
        Edge("export", "benchmark"),
        Edge("regenerate", "benchmark"),
    ]


def test_an_input_that_no_stage_made_has_no_edge() -> None:
    outside = STAGES["train"].model_copy(update={"inputs": {"hidden_states": "of another build"}})
    assert edges({"train": outside}) == []
    assert generations({"train": outside}) == [["train"]]


def test_an_edge_that_passes_stages_goes_around_them() -> None:
    chart = lineage_chart(STAGES)
    places = {node["stage"]: (node["x"], node["y"]) for node in chart["data"]["values"]}
    assert places == {
        "regenerate": (0, 0), "vocabulary": (-0.5, 1), "capture": (0.5, 1), "train": (0, 2), "export": (0, 3),
        "benchmark": (0, 4),
    }  # fmt: skip
    corners = [
        (point["x"], point["y"])
        for point in chart["layer"][0]["data"]["values"]
        if point["edge"] == "regenerate to benchmark"
    ]
    assert corners == [(0, 0), (1.45, 0.5), (1.45, 3.5), (0, 4)]
