"""What a benchmark measured, as rows of tables and sentences, for reports, model cards and terminals. Torch-free."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

from specforge_core.benchmark.compare import Comparison, in_percent
from specforge_core.benchmark.sweep import (
    baseline_speed,
    best_per_load,
    output_speed,
    rounds_without_draft,
    switch_off_at,
)
from specforge_core.facts import BenchmarkResult, Environment, Measurement, SweepPoint

RESULT_LEGEND = (
    "Acceptance length: output tokens per verification step of the target, its own token included. Tokens/s: medians "
    "without and with draft, from interleaved repeats. Intervals are 95 %: over prompts of the acceptance length, over "
    "repeats of the speedup. Lossless: outputs identical / apart at a near-tie / really different."
)
# Each goes with a column that not every benchmark has.
COLUMN_LEGENDS = {
    "n-gram": "n-gram: acceptance length with a drafter that only repeats what it has seen.",
    "in process": "In process: acceptance length of the same draft in this project's own loop, on the first prompts of "
    "the suite, and how far the server's is from it on those.",
    "answers right": "Answers right: with draft / without, of those that have a reference.",
}
IMPOSSIBLE = "above the acceptance length, so measured wrongly"
SWEEP_LEGEND = (
    "Output tokens/s of all requests together, medians of the rounds: with draft / of the target alone, in turns with "
    "it = speedup (acceptance length). Without draft: median and range of the target alone, beside all chains. "
    "Bold: the fastest of those that the rounds show to beat the target alone."
)
UNSTEADY = 1.25
"""Where the fastest round is faster than the slowest by more than this factor, a sweep's legend says so."""


def result_rows(result: BenchmarkResult) -> list[dict[str, str]]:
    """One row per measurement, ready for a table: column name to text. Only columns that were measured."""
    return without_empty_columns([measurement_row(measurement) for measurement in result.measurements])


def result_legend(result: BenchmarkResult) -> str:
    """What the columns of `result_rows` mean."""
    columns = [column for row in result_rows(result)[:1] for column in row]
    return " ".join([RESULT_LEGEND, *(text for column, text in COLUMN_LEGENDS.items() if column in columns)])


def measurement_row(measurement: Measurement) -> dict[str, str]:
    """All columns; empty where nothing was measured."""
    ngram = measurement.ngram_acceptance_length
    return {
        "suite": measurement.suite,
        "chain": measurement.serving.chain(),
        "concurrency": str(measurement.serving.concurrency),
        "prompts": str(measurement.num_prompts),
        "acceptance length": _acceptance_length(measurement),
        "n-gram": "" if ngram is None else f"{ngram:.2f}",
        "in process": _in_process(measurement),
        "tokens/s without": f"{median(measurement.baseline_output_tokens_per_s):,.0f}",
        "tokens/s with": f"{median(measurement.output_tokens_per_s):,.0f}",
        "speedup": _speedup(measurement),
        "answers right": _answers(measurement),
        "lossless": _lossless(measurement),
    }


def without_empty_columns(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The rows without the columns that are empty in all of them."""
    columns = [column for column in (rows[0] if rows else ()) if any(row[column] for row in rows)]
    return [{column: row[column] for column in columns} for row in rows]


def position_rows(result: BenchmarkResult) -> list[dict[str, str]]:
    """One row per measurement: which share of the verification steps accepted each draft position."""
    longest = max((len(measurement.accepted_by_position) for measurement in result.measurements), default=0)
    rows = []
    for measurement in result.measurements:
        shares = [f"{count / measurement.num_verify_steps:.1%}" for count in measurement.accepted_by_position]
        # Chains of several lengths share the table.
        cells = shares + [""] * (longest - len(shares))
        row = {"suite": measurement.suite, "chain": measurement.serving.chain()}
        rows.append(row | {str(position): cell for position, cell in enumerate(cells, start=1)})
    return rows


def comparison_rows(comparison: Comparison) -> list[dict[str, str]]:
    """One row per figure of a draft beside the champion's."""
    return [
        {
            "suite": change.suite,
            "chain": change.serving.chain(),
            "concurrency": str(change.serving.concurrency),
            "figure": change.metric,
            "champion": f"{change.champion:.2f}",
            "this draft": f"{change.measured:.2f}",
            "change": in_percent(change.ratio),
        }
        for change in comparison.changes
    ]


def sweep_rows(points: Sequence[SweepPoint]) -> list[dict[str, str]]:
    """One row per concurrency, one column per chain."""
    chains = list(dict.fromkeys(point.serving.chain() for point in points))
    alone = rounds_without_draft(points)
    rows = []
    for advice in best_per_load(points):
        here = {p.serving.chain(): p for p in points if p.serving.concurrency == advice.concurrency}
        best = advice.serving.chain() if advice.serving else None
        cells = {chain: _sweep_cell(here[chain], chain == best) if chain in here else "" for chain in chains}
        rows.append(
            {
                "requests at once": str(advice.concurrency),
                "without draft": _median_and_range(alone[advice.concurrency]),
                **cells,
                "best": best or "no draft",
            }
        )
    return rows


def sweep_legend(points: Sequence[SweepPoint]) -> str:
    """What the cells of `sweep_rows` mean, and which rounds differ so much that a speedup is uncertain."""
    of_target = []
    for load, rates in rounds_without_draft(points).items():
        here = next(point for point in points if point.serving.concurrency == load)
        of_target.append(_rounds("the target alone", here, rates))
    of_drafts = [_rounds(f"chain {point.serving.chain()}", point, point.output_tokens_per_s) for point in points]
    named = [max(rounds) for rounds in (of_target, of_drafts) if rounds and max(rounds).ratio > UNSTEADY]
    if not named:
        return SWEEP_LEGEND
    return (
        f"{SWEEP_LEGEND} Rounds differ: {'; '.join(one.text for one in named)}. Speedups there are as uncertain; more "
        "requests per slot (`benchmark.sweep.requests_per_slot`) make longer rounds."
    )


def switch_off_advice(points: Sequence[SweepPoint]) -> str:
    """One sentence: from which load on speculation should be off."""
    loads = [point.serving.concurrency for point in points]
    off_at = switch_off_at(points)
    if off_at is None:
        return f"Speculation pays up to the highest load that was measured, {max(loads)} requests at once."
    if off_at == min(loads):
        return (
            "Switch speculation off: at no load that was measured was a chain shown to be faster than the target alone."
        )
    return (
        f"Switch speculation off from {off_at} requests at once: there and above, no chain was shown to be faster than "
        "the target alone."
    )


def server_rows(result: BenchmarkResult) -> list[dict[str, str]]:
    """One row per server that took part."""
    rows = [
        {
            "server": name,
            "SGLang": server.version,
            "GPUs": ", ".join(server.gpus),
            "restarts": str(server.num_restarts),
            "options it lacks": ", ".join(server.dropped_flags),
        }
        for name, server in result.servers.items()
    ]
    return without_empty_columns(rows)


def measured_on(result: BenchmarkResult) -> str:
    """One sentence: engine, processor, threads, GPU, versions, commit."""
    environment = result.environment
    servers = sorted({server.version for server in result.servers.values()})
    engine = f"SGLang {', '.join(servers)}; " if servers else ""
    return (
        f"{engine}{environment.gpu or 'No GPU'}; {processor(environment)}; {environment.packages}; "
        f"commit {environment.commit or 'unknown'}."
    )


def processor(environment: Environment) -> str:
    """`AMD EPYC, 2 threads`."""
    return f"{environment.cpu}, {environment.num_threads} thread{'' if environment.num_threads == 1 else 's'}"


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A markdown table whose columns are the first row's; the empty text without rows."""
    if not rows:
        return ""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _acceptance_length(measurement: Measurement) -> str:
    low, high = measurement.acceptance_length_low, measurement.acceptance_length_high
    interval = "" if low is None else f" ({low:.2f} to {high:.2f})"
    return f"{measurement.acceptance_length:.2f}{interval}"


def _in_process(measurement: Measurement) -> str:
    length, gap = measurement.in_process_acceptance_length, measurement.serving_gap
    if length is None:
        return ""
    return f"{length:.2f}" if gap is None else f"{length:.2f} ({gap:+.1%})"


def _speedup(measurement: Measurement) -> str:
    cell = f"{measurement.speedup:.2f}x ({measurement.speedup_low:.2f} to {measurement.speedup_high:.2f})"
    # A verification step costs at least a target step, so its tokens per step bound what can be gained.
    return f"{cell} **{IMPOSSIBLE}**" if measurement.speedup > measurement.acceptance_length else cell


class _Rounds(NamedTuple):
    """Rounds of one load, by how much they differ."""

    ratio: float
    text: str


def _rounds(who: str, point: SweepPoint, rates: Sequence[float]) -> _Rounds:
    num_rounds = len(point.output_tokens_per_s)
    num_requests, num_tokens = point.num_requests // num_rounds, point.num_output_tokens / num_rounds
    slow, fast = min(rates), max(rates)
    return _Rounds(
        fast / slow,
        f"at {point.serving.concurrency} requests at once {who} made {slow:,.0f} to {fast:,.0f} tokens/s "
        f"({len(rates)} rounds of {num_requests:,} requests, {num_tokens / fast:.1f} to {num_tokens / slow:.1f} s)",
    )


def _median_and_range(rates: Sequence[float]) -> str:
    return f"{median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


def _sweep_cell(point: SweepPoint, is_best: bool) -> str:
    speed = f"**{output_speed(point):,.0f}**" if is_best else f"{output_speed(point):,.0f}"
    cell = f"{speed} / {baseline_speed(point):,.0f} = {point.speedup:.2f}x ({point.acceptance_length:.2f})"
    return f"{cell} **{IMPOSSIBLE}**" if point.speedup > point.acceptance_length else cell


def _answers(measurement: Measurement) -> str:
    answers = measurement.answers
    if answers is None:
        return ""
    return f"{answers.num_correct} / {answers.num_correct_without_draft} of {answers.num_checked}"


def _lossless(measurement: Measurement) -> str:
    if measurement.lossless is None:
        return "sampled"
    counts = measurement.lossless
    return f"{counts.num_identical} / {counts.num_near_tie} / {counts.num_different}"
