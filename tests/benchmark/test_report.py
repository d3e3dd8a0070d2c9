"""A report shows the numbers that were measured, and its JSON twin loses none of them."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from specforge_core.benchmark.report import EntryReport, load_report, make_report, report_markdown, write_report
from specforge_core.benchmark.tables import (
    SWEEP_LEGEND,
    markdown_table,
    position_rows,
    result_legend,
    result_rows,
    sweep_legend,
    sweep_rows,
    switch_off_advice,
)
from specforge_core.demo.inflated import InflatedTarget
from specforge_core.facts import Answers, BenchmarkResult, GateFailure
from specforge_core.manifest_sections import ServingConfig
from specforge_core.stages import ResolvedTarget
from tests import made_build
from tests.made_build import chain, measurement, result, served_result, sweep, sweep_point

FAILURE = GateFailure(
    gate="min_speedup", suite="math", measured=1.2, required=1.5, message="speedup 1.20x, 1.50x is required"
)


REPO_ROOT = Path(__file__).parents[2]


def report(root: Path, *failures: GateFailure, benchmark: BenchmarkResult | None = None) -> EntryReport:
    return make_report(made_build.entry(), made_build.TARGET, made_build.artifacts(root, benchmark), failures)


def test_a_row_shows_medians_interval_and_the_ngram_drafter() -> None:
    # Repeats 100, 104, 102 without and 204, 200, 214 with draft: medians 102 and 204. 300 tokens in 100 steps.
    assert result_rows(result(measurement())) == [
        {
            "suite": "math",
            "chain": "3-1-4",
            "concurrency": "1",
            "prompts": "10",
            "acceptance length": "3.00",
            "n-gram": "1.25",
            "tokens/s without": "102",
            "tokens/s with": "204",
            "speedup": "2.00x (1.90 to 2.10)",
            "lossless": "9 / 1 / 0",
        }
    ]


def test_a_servers_row_has_its_reference_and_answers_and_no_ngram_drafter() -> None:
    served = measurement(
        ngram_acceptance_length=None,
        in_process_acceptance_length=3.05,
        # 3.05 * 0.98.
        served_on_same_prompts=2.989,
        answers=Answers(num_checked=9, num_correct=6, num_correct_without_draft=7),
    )
    row, other = result_rows(result(served, measurement("code", ngram_acceptance_length=None)))
    assert "n-gram" not in row
    assert row["in process"] == "3.05 (-2.0%)"
    assert row["answers right"] == "6 / 7 of 9"
    assert list(row) == list(other)
    assert (other["in process"], other["answers right"]) == ("", "")
    legend = result_legend(result(served))
    assert "In process:" in legend
    assert "Answers right:" in legend
    assert "n-gram:" not in legend
    assert "In process:" not in result_legend(result(measurement()))


def test_an_impossible_speedup_is_marked_in_its_row() -> None:
    # 300 tokens in 100 steps.
    possible, impossible = result_rows(result(measurement(speedup=3.0), measurement("code", speedup=3.01)))
    assert "above the acceptance length" not in possible["speedup"]
    assert impossible["speedup"].startswith("3.01x (1.90 to 2.10) **above the acceptance length")
    # Acceptance length 2.7 over 100 tokens/s.
    (row,) = sweep_rows([sweep_point(chain(2, 1, 3), (100.0,), (271.0,))])
    assert "above the acceptance length" in row["2-1-3"]


def test_a_sweep_is_a_table_of_loads_and_chains() -> None:
    rows = sweep_rows(sweep())
    assert rows[0] == {
        "requests at once": "1",
        "without draft": "155 (154 to 157)",
        "2-1-3": "295 / 155 = 1.90x (2.70)",
        "7-1-8": "**340** / 155 = 2.19x (3.50)",
        "5-4-16": "311 / 155 = 2.01x (3.70)",
        "best": "7-1-8",
    }
    assert rows[2]["2-1-3"] == "2,200 / 2,200 = 1.00x (2.70)"
    assert [row["best"] for row in rows] == ["7-1-8", "2-1-3", "no draft", "no draft"]
    # A chain that was not measured at a load leaves its cell empty.
    assert sweep_rows(sweep()[:4])[1]["7-1-8"] == ""


def test_every_factor_of_a_sweep_follows_from_the_rates_beside_it() -> None:
    # Medians: 340 over 100 and 300 over 200, though all rounds without draft together have the median 150.
    points = [
        sweep_point(chain(7, 1, 8), (100.0, 100.0), (340.0, 340.0), num_output_tokens=3500),
        sweep_point(chain(2, 1, 3), (200.0, 200.0), (300.0, 300.0)),
    ]
    (row,) = sweep_rows(points)
    assert row["without draft"] == "150 (100 to 200)"
    assert row["7-1-8"] == "**340** / 100 = 3.40x (3.50)"
    assert row["2-1-3"] == "300 / 200 = 1.50x (2.70)"


def test_rounds_of_a_sweep_that_differ_are_named() -> None:
    assert sweep_legend(sweep()) == SWEEP_LEGEND
    # 1,200 tokens in two rounds: 600 at 100/s and at 150/s.
    points = [
        sweep_point(chain(2, 1, 3, 4), (100.0, 150.0), (200.0, 200.0), num_output_tokens=1200),
        sweep_point(chain(7, 1, 8, 4), (120.0, 120.0), (240.0, 240.0), num_output_tokens=1200),
        sweep_point(chain(7, 1, 8, 8), (200.0, 200.0), (300.0, 600.0), num_output_tokens=1200),
    ]
    legend = sweep_legend(points)
    assert (
        "at 4 requests at once the target alone made 100 to 150 tokens/s (4 rounds of 6 requests, 4.0 to 6.0 s)"
        in legend
    )
    assert "at 8 requests at once chain 7-1-8 made 300 to 600 tokens/s (2 rounds of 6 requests, 1.0 to 2.0 s)" in legend
    assert "requests_per_slot" in legend


def test_a_sweep_ends_with_where_to_switch_off() -> None:
    assert switch_off_advice(sweep()).startswith("Switch speculation off from 16 requests at once")
    assert switch_off_advice(sweep()[:6]) == (
        "Speculation pays up to the highest load that was measured, 8 requests at once."
    )
    assert switch_off_advice(sweep()[6:]).startswith("Switch speculation off: at no load")


def test_a_served_build_shows_its_load_its_plots_and_its_servers(tmp_path: Path) -> None:
    written = report(tmp_path / "store", benchmark=served_result(measurement()))
    files = write_report(tmp_path / "reports", written)
    assert [file.name for file in files][2:] == ["demo-speedup.svg", "demo-acceptance.svg", "demo-throughput.svg"]
    text = files[0].read_text()
    for part in (
        "![speedup](demo-speedup.svg)",
        "![acceptance](demo-acceptance.svg)",
        "![throughput](demo-throughput.svg)",
        "Switch speculation off from 16 requests at once",
        "At 8 requests at once, chain 2-1-3 (1.30x):",
        "--speculative-draft-model-path specbundle/llama-eagle3",
        f"--revision {made_build.REVISION}",
        "SGLang 0.5.14; Made-up GPU; Made-up CPU 9000",
        "| baseline | 0.5.14 | 0 | 0 |",
        "# 3-1-4\npython -m sglang.launch_server --port 31",
    ):
        assert part in text
    assert load_report(files[1]) == written
    # Where its files do not lie beside it, as on a page of the orchestrator.
    assert "![" not in report_markdown(written)


def test_a_report_on_the_enlarged_demo_target_says_first_whose_text_it_is(tmp_path: Path) -> None:
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32}
    said = InflatedTarget(
        demo=sizes, enlarged=sizes, layers=(0,), num_parameters=8_030_261_248, dtype="bfloat16",
        max_position_embeddings=2048,
    )  # fmt: skip
    (tmp_path / "target").mkdir()
    target = ResolvedTarget(model=str(tmp_path / "target"), content_id="c0ffee")
    artifacts = made_build.artifacts(tmp_path / "store")
    assert make_report(made_build.entry(), target, artifacts, ()).lineage.inflated is None
    (tmp_path / "target/inflated.json").write_text(said.model_dump_json())
    made = make_report(made_build.entry(), target, artifacts, ())
    assert made.lineage.inflated == said
    first = report_markdown(made).split("\n\n")[1]
    assert first.startswith("**The text is the demo's, at the shape of a real model.**")
    assert "8,030,261,248 parameters (hidden_size 4,096, num_hidden_layers 32)" in first


def test_reports_from_before_there_were_engines_still_load() -> None:
    committed = load_report(REPO_ROOT / "reports/drafts/demo.json")
    assert committed.lineage.entry.engine.name == "transformers"
    assert committed.benchmark.engine == "transformers"
    assert "## Results" in report_markdown(committed)


def test_a_sampled_run_is_not_shown_as_lossless() -> None:
    (row,) = result_rows(result(measurement(lossless=None)))
    assert row["lossless"] == "sampled"


def test_positions_are_shares_of_the_verification_steps() -> None:
    long = ServingConfig(num_steps=4, num_draft_tokens=5)
    rows = position_rows(result(measurement(), measurement(serving=long, accepted_by_position=(80, 60, 40, 20))))
    assert rows == [
        {"suite": "math", "chain": "3-1-4", "1": "90.0%", "2": "70.0%", "3": "40.0%", "4": ""},
        {"suite": "math", "chain": "4-1-5", "1": "80.0%", "2": "60.0%", "3": "40.0%", "4": "20.0%"},
    ]


def test_the_markdown_has_results_training_and_digests(tmp_path: Path) -> None:
    text = report_markdown(report(tmp_path))
    for part in (
        "it passed its gates",
        "| math | 3-1-4 | 1 | 10 | 3.00 |",
        "98.76% of what the target wrote",
        "150 steps, 300,000 tokens, 90 s on 2 x Made-up GPU",
        "80.0%, 70.0%, 60.0%",
        "Made-up CPU 9000, 4 threads",
        "python -m specforge_core benchmark --spec spec.json --out out",
        "| train | key-train |",
        "`min_speedup` 1.5",
    ):
        assert part in text


def test_a_rejected_draft_says_so_and_why(tmp_path: Path) -> None:
    text = report_markdown(report(tmp_path, FAILURE))
    assert "it failed 1 of its gates" in text
    assert "* **min_speedup**: speedup 1.20x, 1.50x is required" in text
    assert "All passed" not in text


def test_the_json_twin_reads_back_whole(tmp_path: Path) -> None:
    written = report(tmp_path / "store", FAILURE)
    files = write_report(tmp_path / "reports", written)
    plots = ["demo-speedup.svg", "demo-acceptance.svg"]
    assert [file.name for file in files] == ["demo.md", "demo.json", *plots]
    assert set(files) == set((tmp_path / "reports").iterdir())
    assert files[0].read_text() == report_markdown(written, plots=plots)
    assert load_report(tmp_path / "reports/demo.json") == written
    (tmp_path / "reports/demo.json").write_text("{}")
    with pytest.raises(ValidationError):
        load_report(tmp_path / "reports/demo.json")


def test_a_table_without_rows_is_empty_and_bars_are_escaped() -> None:
    assert markdown_table([]) == ""
    assert markdown_table([{"a": "x|y", "b": ""}]) == "| a | b |\n| --- | --- |\n| x\\|y |  |"
