"""What a build made and measured, as one typed record, and as markdown for people. Torch-free."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median

from specforge_core.artifacts import BuildArtifacts, write_atomically
from specforge_core.facts import (
    BenchmarkResult,
    Conversations,
    DraftCheckpoint,
    GateFailure,
    HiddenStates,
    Measurement,
    Record,
    ServingDraft,
    Vocabulary,
)
from specforge_core.manifest import ManifestEntry
from specforge_core.stages import ResolvedTarget


class StageLineage(Record):
    """Where one artifact of a build comes from."""

    key: str
    content_id: str
    inputs: dict[str, str]
    """Content id by input name."""
    created_at: datetime
    elapsed_s: float
    hardware: str | None


class Lineage(Record):
    """Everything that a draft follows from."""

    entry: ManifestEntry
    target_revision: str | None
    """Commit, for a target from the Hub."""
    target_content_id: str
    stages: dict[str, StageLineage]
    """By stage name, in the order of the build."""
    versions: dict[str, str]
    """Of the packages, when the draft was measured."""
    commit: str | None
    """Of this project."""


class EntryReport(Record):
    """One build of one entry."""

    lineage: Lineage
    conversations: Conversations
    vocabulary: Vocabulary
    hidden_states: HiddenStates
    checkpoint: DraftCheckpoint
    draft: ServingDraft
    benchmark: BenchmarkResult
    failures: tuple[GateFailure, ...]


def make_report(
    entry: ManifestEntry, target: ResolvedTarget, artifacts: BuildArtifacts, failures: Sequence[GateFailure]
) -> EntryReport:
    """The report of a build whose stages are done."""
    environment = artifacts.benchmark.facts.environment
    lineage = Lineage(
        entry=entry,
        target_revision=target.revision,
        target_content_id=target.content_id,
        stages={
            artifact.stage: StageLineage(
                key=artifact.key,
                content_id=artifact.content_id,
                inputs=artifact.inputs,
                created_at=artifact.created_at,
                elapsed_s=artifact.elapsed_s,
                hardware=artifact.hardware,
            )
            for artifact in artifacts
        },
        versions=environment.versions,
        commit=environment.commit,
    )
    return EntryReport(
        lineage=lineage,
        failures=tuple(failures),
        **{name: artifact.facts for name, artifact in artifacts._asdict().items()},
    )


def write_report(directory: Path, report: EntryReport) -> Path:
    """The markdown file written; `<entry>.json`, its typed twin, lies beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{report.lineage.entry.name}.md"
    write_atomically(path.with_suffix(".json"), report.model_dump_json(indent=1) + "\n")
    write_atomically(path, report_markdown(report))
    return path


def load_report(path: Path) -> EntryReport:
    """The report in a JSON file. Raises: FileNotFoundError, pydantic.ValidationError if it is another version's."""
    return EntryReport.model_validate_json(path.read_text(encoding="utf-8"))


def report_markdown(report: EntryReport) -> str:
    """A build as markdown: results first, then gates, training, hardware and lineage."""
    lineage = report.lineage
    verdict = "passed its gates" if not report.failures else f"failed {len(report.failures)} of its gates"
    sections = [
        f"# {lineage.entry.name}",
        f"A {report.checkpoint.algorithm} draft for `{lineage.entry.target.model}`"
        f" ({lineage.target_revision or lineage.target_content_id}); it {verdict}.",
        "## Results",
        markdown_table(result_rows(report.benchmark)),
        RESULT_LEGEND,
        "## Acceptance by position",
        markdown_table(position_rows(report.benchmark)),
        "Share of the verification steps that accepted the draft token at this position.",
        "## Gates",
        "\n".join(f"* **{failure.gate}**: {failure.message}" for failure in report.failures)
        or "All passed: " + ", ".join(f"`{name}` {value}" for name, value in lineage.entry.gates) + ".",
        "## How it was made",
        markdown_table(making_rows(report)),
        "## Measured on",
        measured_on(report.benchmark),
        f"```\n{report.benchmark.environment.command}\n```",
        "## Lineage",
        markdown_table(lineage_rows(lineage)),
    ]
    return "\n\n".join(sections) + "\n"


RESULT_LEGEND = (
    "Acceptance length: output tokens per verification step of the target, its own token included. n-gram: the same "
    "with a drafter that only repeats what it has seen. Tokens/s: medians without and with draft, from interleaved "
    "repeats; the interval is 95 %. Lossless: outputs identical / apart at a near-tie / really different."
)


def result_rows(result: BenchmarkResult) -> list[dict[str, str]]:
    """One row per measurement, ready for a table: column name to text."""
    return [
        {
            "suite": measurement.suite,
            "chain": measurement.serving.chain(),
            "concurrency": str(measurement.serving.concurrency),
            "prompts": str(measurement.num_prompts),
            "acceptance length": f"{measurement.acceptance_length:.2f}",
            "n-gram": f"{measurement.ngram_acceptance_length:.2f}",
            "tokens/s without": f"{median(measurement.baseline_output_tokens_per_s):,.0f}",
            "tokens/s with": f"{median(measurement.output_tokens_per_s):,.0f}",
            "speedup": f"{measurement.speedup:.2f}x ({measurement.speedup_low:.2f} to {measurement.speedup_high:.2f})",
            "lossless": _lossless(measurement),
        }
        for measurement in result.measurements
    ]


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


def making_rows(report: EntryReport) -> list[dict[str, str]]:
    """Data, training and export in numbers: one row per fact."""
    data, checkpoint, hidden = report.conversations, report.checkpoint, report.hidden_states
    vocabulary, training = report.vocabulary, report.lineage.stages["train"]
    facts = {
        "conversations": f"{data.num_conversations:,} ({data.num_failed:,} failed, {data.num_cut_off:,} cut off)",
        "tokens": f"{data.num_tokens:,}, of which the target wrote {data.num_loss_tokens:,}",
        "captured": f"{hidden.num_tokens:,} tokens of {hidden.num_documents:,} documents in {hidden.dtype}; outputs of "
        f"layers {', '.join(map(str, hidden.layers))} of {hidden.num_target_layers}, counted from 0",
        "draft vocabulary": f"{vocabulary.draft_vocab_size:,} of {vocabulary.target_vocab_size:,} tokens, "
        f"{vocabulary.coverage:.2%} of what the target wrote",
        "training": f"{checkpoint.step:,} steps, {checkpoint.tokens_seen:,} tokens, "
        f"{training.elapsed_s:,.0f} s on {training.hardware or 'unrecorded hardware'}",
        "parameters": f"{checkpoint.num_parameters:,}",
        "held-out loss": f"{checkpoint.eval_loss:.4f}",
        "held-out greedy accuracy": _by_position(checkpoint.eval_accuracy),
        "held-out expected acceptance": _by_position(checkpoint.eval_acceptance),
        "held-out acceptance length": f"{checkpoint.eval_acceptance_length:.2f}",
        "reload error": f"{report.draft.max_reload_error:g}",
    }
    return [{"fact": name, "value": value} for name, value in facts.items()]


def lineage_rows(lineage: Lineage) -> list[dict[str, str]]:
    """One row per stage: its digests, when and how long."""
    return [
        {
            "stage": name,
            "key": stage.key,
            "content": stage.content_id,
            "inputs": ", ".join(f"{name} {content_id}" for name, content_id in stage.inputs.items()),
            "made at": f"{stage.created_at:%Y-%m-%d %H:%M} UTC",
            "seconds": f"{stage.elapsed_s:,.1f}",
        }
        for name, stage in lineage.stages.items()
    ]


def measured_on(result: BenchmarkResult) -> str:
    """One sentence: processor, threads, GPU, versions, commit."""
    environment = result.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    return (
        f"{environment.gpu or 'No GPU'}; {environment.cpu}, {environment.num_threads} threads; {versions}; "
        f"commit {environment.commit or 'unknown'}."
    )


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A markdown table whose columns are the first row's; the empty text without rows."""
    if not rows:
        return ""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _by_position(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.1%}" for share in shares)


def _lossless(measurement: Measurement) -> str:
    if measurement.lossless is None:
        return "sampled"
    counts = measurement.lossless
    return f"{counts.num_identical} / {counts.num_near_tie} / {counts.num_different}"
