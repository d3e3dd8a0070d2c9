"""What a benchmark measured, as pictures: speedup with its intervals, acceptance by position, and a sweep's throughput
and speedup. Torch-free."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from specforge_core.artifacts import write_atomically
from specforge_core.benchmark.sweep import LoadAdvice, best_per_load, speeds_without_draft, switch_off_at
from specforge_core.facts import BenchmarkResult, Measurement, SweepPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_INCHES = (5.5, 4.0)
PNG_DPI = 150
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = "osD^vP*X"
# Of Okabe and Ito: told apart by the colour-blind too. Black is the target alone.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
HASH_SALT = "specbundle"
"""Of the ids in a file: equal results give equal files."""


class PositionLine(NamedTuple):
    """One suite with one chain, over all concurrencies: they share their acceptance."""

    suite: str
    chain: str
    shares: tuple[float, ...]
    """Of the verification steps that accepted the draft token at positions 1, 2, ..."""


def figures(result: BenchmarkResult) -> "dict[str, Figure]":
    """What there is to draw, by kind: `speedup`, `acceptance`, and of a sweep `throughput`."""
    drawn = {}
    if result.measurements:
        drawn["speedup"] = speedup_figure(result.measurements)
        drawn["acceptance"] = acceptance_figure(result.measurements)
    if result.sweep:
        drawn["throughput"] = sweep_figure(result.sweep)
    return drawn


def write_plots(directory: Path, name: str, result: BenchmarkResult) -> tuple[Path, ...]:
    """The files written: `<name>-<kind>.svg` of each kind."""
    return tuple(_write(directory / f"{name}-{kind}.svg", figure) for kind, figure in figures(result).items())


def png_plots(result: BenchmarkResult) -> dict[str, bytes]:
    """The pictures by file name, `<kind>.png`: a form that every page shows. Equal results give equal bytes."""
    content = {}
    for kind, figure in figures(result).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=PNG_DPI, metadata={"Software": None})
        content[f"{kind}.png"] = buffer.getvalue()
    return content


def speedup_figure(measurements: Sequence[Measurement]) -> "Figure":
    """A row for each measurement: its speedup with the 95 % interval, and the acceptance length, which bounds it."""
    figure, (panel,) = _figure(1)
    rows = list(range(len(measurements)))
    speedups = [one.speedup for one in measurements]
    below = [one.speedup - one.speedup_low for one in measurements]
    above = [one.speedup_high - one.speedup for one in measurements]
    panel.errorbar(
        speedups, rows, xerr=(below, above), fmt="o", color=COLORS[0], capsize=3, label="speedup, 95 % interval"
    )
    lengths = [one.acceptance_length for one in measurements]
    panel.plot(lengths, rows, "D", color=COLORS[1], markerfacecolor="none", label="acceptance length, its bound")
    panel.axvline(1, color="k", linestyle="--", linewidth=1, label="the target alone")
    panel.set_yticks(rows, labels=_row_names(measurements))
    # The first one on top, and room around.
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlim(left=0)
    panel.set_title("Speedup over the target alone", fontsize="medium")
    panel.set_xlabel("times; tokens a verification step")
    panel.grid(alpha=0.3, axis="x")
    _legend(panel)
    return figure


def _row_names(measurements: Sequence[Measurement]) -> list[str]:
    """The suites, with chain and concurrency where a suite was measured at several."""
    suites = [one.suite for one in measurements]
    if len(set(suites)) == len(suites):
        return suites
    return [f"{one.suite}, {one.serving.chain()}, {one.serving.concurrency} at once" for one in measurements]


def position_lines(measurements: Sequence[Measurement]) -> list[PositionLine]:
    """One line for each suite and chain, in the order measured."""
    together: dict[tuple[str, str], list[Measurement]] = {}
    for measurement in measurements:
        together.setdefault((measurement.suite, measurement.serving.chain()), []).append(measurement)
    return [
        PositionLine(
            suite=suite,
            chain=chain,
            shares=tuple(
                sum(accepted) / sum(one.num_verify_steps for one in group)
                for accepted in zip(*(one.accepted_by_position for one in group), strict=True)
            ),
        )
        for (suite, chain), group in together.items()
    ]


def acceptance_figure(measurements: Sequence[Measurement]) -> "Figure":
    """Acceptance by draft position: a colour for each suite, a line style for each chain."""
    figure, (panel,) = _figure(1)
    lines = position_lines(measurements)
    suites = list(dict.fromkeys(line.suite for line in lines))
    chains = list(dict.fromkeys(line.chain for line in lines))
    for line in lines:
        panel.plot(
            range(1, len(line.shares) + 1),
            [100 * share for share in line.shares],
            color=COLORS[suites.index(line.suite) % len(COLORS)],
            linestyle=LINE_STYLES[chains.index(line.chain) % len(LINE_STYLES)],
            marker=MARKERS[suites.index(line.suite) % len(MARKERS)],
            label=f"{line.suite}, {line.chain}" if len(chains) > 1 else line.suite,
        )
    panel.set_title("Acceptance by position" + (f", chain {chains[0]}" if len(chains) == 1 else ""), fontsize="medium")
    panel.set_xlabel("draft position")
    panel.set_ylabel("verification steps that accepted it, %")
    panel.set_xticks(range(1, max(len(line.shares) for line in lines) + 1))
    panel.set_ylim(0, 100)
    panel.grid(alpha=0.3)
    _legend(panel)
    return figure


def sweep_figure(points: Sequence[SweepPoint]) -> "Figure":
    """Two panels over the concurrency: output tokens/s with the target alone, and speedup, a line for each chain.

    Bars are the range of the repeats. Rings mark the best chain of each load; from where on none pays is shaded.
    """
    from matplotlib.ticker import LogLocator

    figure, (throughput, speedup) = _figure(2)
    alone = speeds_without_draft(points)
    throughput.plot(list(alone), list(alone.values()), "k--", marker=".", label="without draft")
    for index, (chain, line) in enumerate(_by_chain(points).items()):
        style = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)], "label": chain}
        loads = [point.serving.concurrency for point in line]
        _plot_ranges(throughput, loads, [point.output_tokens_per_s for point in line], style)
        _plot_ranges(speedup, loads, [_ratios(point) for point in line], style, [point.speedup for point in line])
    advice = best_per_load(points)
    _ring(throughput, advice, [load.output_tokens_per_s for load in advice])
    _ring(speedup, advice, [load.speedup for load in advice])
    speedup.axhline(1, color="k", linestyle="--", linewidth=1)
    throughput.set_yscale("log")
    for panel in (throughput, speedup):
        _concurrency_axis(panel, list(alone), off_at=switch_off_at(points))
    throughput.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    throughput.yaxis.set_major_formatter("{x:,.0f}")
    throughput.set_title("Throughput", fontsize="medium")
    throughput.set_ylabel("output tokens/s")
    speedup.set_title("Speedup over the target alone", fontsize="medium")
    speedup.set_ylabel("times")
    speedup.set_ylim(bottom=0)
    _legend(speedup, *throughput.get_legend_handles_labels())
    return figure


def _by_chain(points: Sequence[SweepPoint]) -> dict[str, list[SweepPoint]]:
    lines: dict[str, list[SweepPoint]] = {}
    for point in sorted(points, key=lambda point: point.serving.concurrency):
        lines.setdefault(point.serving.chain(), []).append(point)
    return lines


def _ratios(point: SweepPoint) -> tuple[float, ...]:
    pairs = zip(point.output_tokens_per_s, point.baseline_output_tokens_per_s, strict=True)
    return tuple(with_draft / without for with_draft, without in pairs)


def _plot_ranges(
    panel: "Axes",
    x: Sequence[int],
    repeats: Sequence[Sequence[float]],
    style: Mapping[str, Any],
    middle: Sequence[float] | None = None,
) -> None:
    """A line through the medians, or through `middle`, with a bar from the lowest to the highest repeat."""
    y = [median(values) for values in repeats] if middle is None else middle
    below = [max(0.0, m - min(values)) for m, values in zip(y, repeats, strict=True)]
    above = [max(0.0, max(values) - m) for m, values in zip(y, repeats, strict=True)]
    panel.errorbar(x, y, yerr=(below, above), capsize=2, markersize=4, linewidth=1.3, **style)


def _ring(panel: "Axes", advice: Sequence[LoadAdvice], y: Sequence[float]) -> None:
    best = [(load.concurrency, value) for load, value in zip(advice, y, strict=True) if load.serving]
    if best:
        panel.plot(*zip(*best, strict=True), "o", markersize=11, markerfacecolor="none", color="k", label="best")


def _concurrency_axis(panel: "Axes", concurrencies: Sequence[int], *, off_at: int | None) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(concurrencies, labels=[str(load) for load in concurrencies])
    panel.minorticks_off()
    panel.set_xlabel("requests at once")
    panel.grid(alpha=0.3)
    if off_at is not None:
        left, right = panel.get_xlim()
        panel.axvspan(off_at / 2**0.5, right, color="0.5", alpha=0.15, linewidth=0, label="speculation off")
        panel.set_xlim(left, right)


def _figure(num_panels: int) -> "tuple[Figure, Sequence[Axes]]":
    # Only a report needs it, and it takes a second to import.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PANEL_INCHES[0] * num_panels + 1.5, PANEL_INCHES[1]), layout="constrained")
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])


def _legend(panel: "Axes", *content: Any) -> None:
    """Beside the panel: many suites or chains would hide the lines."""
    panel.legend(*content, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize="small", frameon=False)


def _write(path: Path, figure: "Figure") -> Path:
    import matplotlib

    # The same for every figure, because entries of a build write theirs in threads of one process. Text stays text.
    matplotlib.rcParams.update({"svg.hashsalt": HASH_SALT, "svg.fonttype": "none"})
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    write_atomically(path, text.getvalue())
    return path
