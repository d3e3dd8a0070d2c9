"""A report shows the numbers that were measured, and its JSON twin loses none of them."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from specforge_core.benchmark.report import (
    EntryReport,
    load_report,
    make_report,
    markdown_table,
    position_rows,
    report_markdown,
    result_rows,
    write_report,
)
from specforge_core.facts import GateFailure
from specforge_core.manifest_sections import ServingConfig
from tests import made_build
from tests.made_build import measurement, result

FAILURE = GateFailure(
    gate="min_speedup", suite="math", measured=1.2, required=1.5, message="speedup 1.20x, 1.50x is required"
)


def report(root: Path, *failures: GateFailure) -> EntryReport:
    return make_report(made_build.entry(), made_build.TARGET, made_build.artifacts(root), failures)


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
    path = write_report(tmp_path / "reports", written)
    assert path == tmp_path / "reports/demo.md"
    assert path.read_text() == report_markdown(written)
    assert load_report(tmp_path / "reports/demo.json") == written
    (tmp_path / "reports/demo.json").write_text("{}")
    with pytest.raises(ValidationError):
        load_report(tmp_path / "reports/demo.json")


def test_a_table_without_rows_is_empty_and_bars_are_escaped() -> None:
    assert markdown_table([]) == ""
    assert markdown_table([{"a": "x|y", "b": ""}]) == "| a | b |\n| --- | --- |\n| x\\|y |  |"
