"""How drafts are compared in MLflow: the names of their figures, and its page in a real browser."""

import json
from pathlib import Path

import pytest

from specforge_core.manifest_sections import ServingConfig
from tasks.comparison import comparison_view, result_metrics
from tasks.tracking import ENTRIES, comparison_url, start_run, tracking_uri
from tests import made_build
from tests.site.browser import find_chromium, open_browser
from tests.tasks.mlflow_page import mlflow_page

SUITES = ("gsm8k", "math500", "mtbench", "humaneval")
# Plotly's titles of axes, and where they end.
AXES = """
return [...document.querySelectorAll('.xtitle, .ytitle')].map(
    title => [title.textContent, title.getBoundingClientRect().bottom, title.getBoundingClientRect().right]
);
"""


def test_result_metrics_are_named_by_suite_and_mean_over_suites() -> None:
    wide = ServingConfig(concurrency=8)
    result = made_build.result(
        # Acceptance lengths 3.0 and 2.0; speedups 2.0 and 1.125, whose geometric mean is 1.5.
        made_build.measurement("math"),
        made_build.measurement("code", num_output_tokens=200, speedup=1.125),
        made_build.measurement("math", serving=wide, speedup=1.25),
    )
    assert result_metrics(result) == pytest.approx(
        {
            "accept_length/math": 3.0,
            "accept_length/code": 2.0,
            "accept_length/math-c8-3-1-4": 3.0,
            "accept_length/mean": 2.5,
            "speedup/math": 2.0,
            "speedup/code": 1.125,
            "speedup/math-c8-3-1-4": 1.25,
            "speedup/mean": 1.5,
        }
    )


def test_serving_configurations_that_differ_in_their_tree_alone_have_names_of_their_own() -> None:
    servings = (made_build.chain(5, 1, 6), made_build.chain(5, 4, 16), made_build.chain(5, 4, 32))
    result = made_build.result(*(made_build.measurement(serving=serving) for serving in servings))
    names = {name.removeprefix("speedup/") for name in result_metrics(result) if name.startswith("speedup/")}
    assert names == {"math", "math-c1-5-4-16", "math-c1-5-4-32", "mean"}


def test_the_view_begins_with_speedup_over_acceptance_length_of_each_suite() -> None:
    view = json.loads(comparison_view(["speedup/b", "accept_length/b", "speedup/a", "accept_length/a", "train/loss"]))
    axes = [(chart["xaxis"]["key"], chart["yaxis"]["key"]) for chart in view["compareRunCharts"]]
    assert axes == [("accept_length/a", "speedup/a"), ("accept_length/b", "speedup/b")]
    front, *bars = view["compareRunSections"]
    assert {chart["metricSectionId"] for chart in view["compareRunCharts"]} == {front["uuid"]}
    # The sections that MLflow makes of the metrics' names.
    assert [section["name"] for section in bars] == ["accept_length", "speedup"]


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="no chromium and chromedriver on the PATH")
def test_the_page_shows_acceptance_and_speedup_of_every_suite_without_scrolling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for number in (1, 2):
        run = start_run(ENTRIES, f"demo v{number}", store=tmp_path, tags={})
        run.log_result(made_build.result(*(made_build.measurement(suite, speedup=number) for suite in SUITES)))
        run.end("FINISHED")
    wanted = {f"{figure}/{suite}" for figure in ("accept_length", "speedup") for suite in (*SUITES, "mean")}
    with mlflow_page(tracking_uri(tmp_path), directory=tmp_path) as port, open_browser() as browser:
        url = comparison_url(tmp_path, port=port)
        assert url is not None
        width, height = 1440, 900
        browser.resize(width=width, height=height, scale=1.0)
        browser.driver.get(url)
        # Of two runs, in a chart for each suite and one for the mean.
        browser.wait_for(f"return document.querySelectorAll('.scatterlayer .point').length == {2 * len(SUITES) + 2}")
        seen = {name for name, bottom, right in browser.run(AXES) if bottom <= height and right <= width}
    assert seen == wanted
