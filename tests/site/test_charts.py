"""Charts hold the figures that were measured. That they are drawn is in test_browser."""

import json
from typing import Any

import pytest

from specforge_core.site import charts
from specforge_core.site.anchors import load_anchors
from specforge_core.site.collect import Curve, collect
from tests import made_build
from tests.made_build import measurement
from tests.site import made_store
from tests.site.conftest import MadeSite

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


def rows(spec: dict[str, Any], *fields: str) -> list[tuple[Any, ...]]:
    return [tuple(row.get(field) for field in fields) for row in spec["data"]["values"]]


def layer_rows(spec: dict[str, Any], style: str) -> list[dict[str, Any]]:
    """The data of the layer whose mark has this style."""
    (layer,) = [one for one in spec["layer"] if isinstance(one["mark"], dict) and one["mark"].get("style") == style]
    values: list[dict[str, Any]] = layer["data"]["values"]
    return values


def test_each_draft_has_a_dot_for_each_suite_and_one_for_their_mean(made: MadeSite) -> None:
    drawn = charts.speedup_by_entry(collect(made.store, made.entries, {}))
    assert rows(drawn, "entry", "suite", "speedup_f")[:4] == [
        ("demo", "gsm8k", 1.8),
        ("demo", "math500", 2.0),
        ("llama", "gsm8k", 2.0),
        ("llama", "math500", 2.4),
    ]
    means = {row["entry"]: row["speedup_f"] for row in drawn["data"]["values"] if row["of"] == "mean"}
    assert means == pytest.approx({"demo": 3.6**0.5, "llama": 4.8**0.5, "worse": 1.76**0.5})


def test_suites_show_their_interval_and_the_public_drafts_that_are_comparable() -> None:
    drawn = charts.speedup_by_suite(made_store.served(), LLAMA, load_anchors())
    assert rows(drawn, "suite", "serving", "low_f", "speedup_f", "high_f")[1:3] == [
        ("math500", "3-1-4, 1 at once", 2.3, 2.4, 2.5),
        ("gsm8k", "7-1-8, 1 at once", 1.9, 2.0, 2.1),
    ]
    public = [(row["suite"], row["serving"][:5], row["speedup_f"]) for row in layer_rows(drawn, "anchor")]
    # The dashboard: two drafts, two suites, two chains.
    assert public == [
        ("gsm8k", "3-1-4", 1.77), ("gsm8k", "3-1-4", 1.26), ("math500", "3-1-4", 2.58), ("math500", "3-1-4", 2.09),
        ("gsm8k", "7-1-8", 1.75), ("gsm8k", "7-1-8", 1.09), ("math500", "7-1-8", 3.34), ("math500", "7-1-8", 2.16),
    ]  # fmt: skip
    assert "anchor" not in json.dumps(charts.speedup_by_suite(made_store.suites(1.5), "made-up/Other", load_anchors()))


def test_acceptance_is_a_share_of_the_steps() -> None:
    drawn = charts.acceptance_by_position(made_build.result(measurement()))
    assert rows(drawn, "suite", "position", "share") == [("math", 1, 0.9), ("math", 2, 0.7), ("math", 3, 0.4)]


def test_the_sweep_is_drawn_with_the_target_alone_and_rings_at_the_best() -> None:
    points = made_build.sweep()
    rate, speedup = charts.throughput_over_load(points), charts.speedup_over_load(points)
    assert rows(rate, "chain", "load", "rate")[3:6] == [("2-1-3", 8, 1470), ("7-1-8", 8, 1300), ("5-4-16", 8, 1000)]
    # Medians over the repeats of all chains at that load.
    alone = [(row["load"], row["rate"]) for row in layer_rows(rate, "baseline")]
    assert alone == [(1, 155), (8, 1130), (16, 2200), (32, 4200)]
    assert [(row["load"], row["rate"]) for row in layer_rows(rate, "best")] == [(1, 340), (8, 1470)]
    best = {row["load"]: row["speedup_f"] for row in layer_rows(speedup, "best")}
    assert best == pytest.approx({1: 340 / 155, 8: 1470 / 1130})


def test_history_marks_the_builds_that_failed_a_gate(made: MadeSite) -> None:
    (view,) = collect(made.store, made.entries[:1], {})[:1]
    drawn = charts.history(view.history.reports, field="speedup", title="speedup", required=1.5)
    assert rows(drawn, "build", "gates") == [(1, "passed"), (2, "failed"), (3, "passed")]
    assert [row["value_f"] for row in drawn["data"]["values"]] == pytest.approx([2.88**0.5, 1.43**0.5, 3.6**0.5])
    assert layer_rows(drawn, "reference") == [{"required": 1.5}]
    assert "reference" not in json.dumps(charts.history(view.history.reports, field="speedup", title="", required=0))


def test_training_and_held_out_curves_are_told_apart() -> None:
    curves = (
        Curve("train/loss", (1, 2), (9.0, 8.0)),
        Curve("eval/loss", (2,), (8.5,)),
        Curve("train/acceptance_0", (1,), (0.5,)),
        Curve("eval/acceptance_0", (2,), (0.25,)),
        Curve("train/learning_rate", (1,), (1e-3,)),
    )
    assert rows(charts.training_loss(curves), "line", "step", "value", "is_eval") == [
        ("training", 1, 9.0, False),
        ("training", 2, 8.0, False),
        ("held out", 2, 8.5, True),
    ]
    assert rows(charts.training_acceptance(curves), "line", "value", "is_eval") == [
        ("position 1", 0.5, False),
        ("position 1", 0.25, True),
    ]
