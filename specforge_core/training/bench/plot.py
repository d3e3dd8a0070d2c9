"""Tokens per second over the supervised share, as an SVG file."""

from pathlib import Path

from specforge_core.training.bench.results import Row, TrainingBench

LINE_STYLES = {"uniform": "-", "real": "--"}
PANEL_INCHES = (5.5, 4.0)


def plot_results(result: TrainingBench, path: Path) -> None:
    """Write one panel for each shape: a line for each path and kind of lengths."""
    # Only a report needs it, and it takes a second to import.
    import matplotlib
    from matplotlib.figure import Figure

    # Equal results give an equal file, with its text as text.
    matplotlib.rcParams.update({"svg.hashsalt": path.name, "svg.fonttype": "none"})
    rows = [row for row in result.rows if row.is_measured]
    shapes = list(dict.fromkeys(row.shape for row in rows))
    if not shapes:
        raise ValueError("nothing was measured, so there is nothing to plot; see the status of the rows")
    paths = list(dict.fromkeys(row.path for row in rows))
    figure = Figure(figsize=(PANEL_INCHES[0] * len(shapes), PANEL_INCHES[1]), layout="constrained")
    for panel, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        lines = _lines([row for row in rows if row.shape == shape])
        for (name, lengths), line in sorted(lines.items(), key=lambda item: (paths.index(item[0][0]), item[0][1])):
            panel.plot(
                [100 * row.supervised_share for row in line],
                [row.tokens_per_s for row in line],
                LINE_STYLES[lengths],
                color=f"C{paths.index(name)}",
                marker="o",
                label=f"{name}, {lengths} lengths",
            )
        panel.set_title(f"{shape}, {result.environment.gpu or result.environment.cpu}", fontsize="medium")
        panel.set_xlabel("supervised share of the tokens, %")
        panel.set_ylabel("tokens/s, forward + backward")
        panel.set_xlim(0, 105)
        panel.set_ylim(bottom=0)
        panel.yaxis.set_major_formatter("{x:,.0f}")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def _lines(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.supervised_share):
        lines.setdefault((row.path, row.lengths), []).append(row)
    return lines
