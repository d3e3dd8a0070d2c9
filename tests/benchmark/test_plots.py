"""Plots show what was measured: the lines hold the figures, and equal results give equal files."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from specforge_core.benchmark.plots import (
    PositionLine,
    acceptance_figure,
    png_plots,
    position_lines,
    speedup_figure,
    sweep_figure,
    write_plots,
)
from specforge_core.manifest_sections import ServingConfig
from tests.made_build import chain, measurement, result, served_result, sweep


def texts(path: Path) -> set[str]:
    """All that can be read in an SVG file."""
    return {(node.text or "").strip() for node in ElementTree.parse(path).iter() if node.tag.endswith("}text")}


def test_a_line_adds_up_the_concurrencies_of_a_suite_and_chain() -> None:
    # 90 + 150 of 100 + 200 steps, 70 + 80, 40 + 20.
    busy = measurement(serving=ServingConfig(concurrency=8), num_verify_steps=200, accepted_by_position=(150, 80, 20))
    long = measurement(serving=chain(4, 1, 5), accepted_by_position=(80, 60, 40, 20))
    assert position_lines([measurement(), busy, long]) == [
        PositionLine("math", "3-1-4", (0.8, 0.5, 0.2)),
        PositionLine("math", "4-1-5", (0.8, 0.6, 0.4, 0.2)),
    ]


def test_speedups_are_drawn_with_their_intervals_below_what_bounds_them() -> None:
    unsure = measurement("code", speedup=1.5, speedup_low=0.75, speedup_high=2.5)
    (panel,) = speedup_figure([measurement("math"), unsure]).axes
    ((_, _, (bars,)),) = panel.containers
    # math: 2.0 (1.9 to 2.1) in row 0; code in row 1.
    assert [segment.tolist() for segment in bars.get_segments()] == [
        [pytest.approx([1.9, 0]), pytest.approx([2.1, 0])],
        [pytest.approx([0.75, 1]), pytest.approx([2.5, 1])],
    ]
    lines = {line.get_label(): list(line.get_xdata()) for line in panel.get_lines()}
    assert lines["acceptance length, its bound"] == [3.0, 3.0]
    assert lines["the target alone"] == [1, 1]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["math", "code"]


def test_a_suite_that_was_measured_twice_is_told_apart() -> None:
    busy = measurement(serving=ServingConfig(concurrency=8))
    (panel,) = speedup_figure([measurement(), busy]).axes
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert labels == ["math, 3-1-4, 1 at once", "math, 3-1-4, 8 at once"]


def test_acceptance_is_drawn_in_percent_over_the_positions() -> None:
    panel = acceptance_figure([measurement("math"), measurement("code", accepted_by_position=(50, 40, 30))]).axes[0]
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in panel.get_lines()}
    assert lines == {
        "math": ([1, 2, 3], pytest.approx([90, 70, 40])),
        "code": ([1, 2, 3], pytest.approx([50, 40, 30])),
    }
    assert panel.get_title() == "Acceptance by position, chain 3-1-4"


def test_the_sweep_is_drawn_over_the_concurrency_with_its_best_chains_marked() -> None:
    throughput, speedup = sweep_figure(sweep()).axes
    alone, best = (
        next(line for line in throughput.get_lines() if line.get_label() == label)
        for label in ("without draft", "best")
    )
    # Medians over the repeats of all chains at that load.
    assert list(zip(alone.get_xdata(), alone.get_ydata(), strict=True)) == [
        (1, 155), (8, 1130), (16, 2200), (32, 4200)
    ]  # fmt: skip
    assert list(zip(best.get_xdata(), best.get_ydata(), strict=True)) == [(1, 340), (8, 1470)]
    bars = {container.get_label(): container.lines[0] for container in speedup.containers}
    assert set(bars) == {"2-1-3", "7-1-8", "5-4-16"}
    # Medians 1470, 2200 and 3800 over 1130, 2200 and 4200.
    assert bars["2-1-3"].get_ydata() == pytest.approx([295 / 155, 1470 / 1130, 1.0, 3800 / 4200])
    (shade,) = speedup.patches
    # From half way (of the logarithms) to the first load at which no chain pays, 16.
    assert shade.get_x() == pytest.approx(16 / 2**0.5)
    assert throughput.get_xscale() == speedup.get_xscale() == "log"


def test_files_are_the_same_for_the_same_result_and_hold_their_text_as_text(tmp_path: Path) -> None:
    made = served_result(measurement("math"), measurement("code"))
    (tmp_path / "again").mkdir()
    first, again = (write_plots(directory, "demo", made) for directory in (tmp_path, tmp_path / "again"))
    assert [path.name for path in first] == ["demo-speedup.svg", "demo-acceptance.svg", "demo-throughput.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert {"math", "code", "draft position"} <= texts(first[1])
    assert {"without draft", "2-1-3", "7-1-8", "5-4-16", "speculation off", "output tokens/s"} <= texts(first[2])


def test_only_what_was_measured_is_drawn(tmp_path: Path) -> None:
    files = [path.name for path in write_plots(tmp_path, "demo", result(measurement()))]
    assert files == ["demo-speedup.svg", "demo-acceptance.svg"]
    assert write_plots(tmp_path, "empty", result()) == ()
    assert "speculation off" not in {patch.get_label() for patch in sweep_figure(sweep()[:3]).axes[1].patches}


def test_pictures_are_the_same_for_the_same_result() -> None:
    made = served_result(measurement("math"), measurement("code"))
    pictures = png_plots(made)
    assert list(pictures) == ["speedup.png", "acceptance.png", "throughput.png"]
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())
    assert png_plots(made) == pictures
    assert png_plots(result()) == {}
