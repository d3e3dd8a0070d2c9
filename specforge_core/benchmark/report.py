"""What a build made and measured, as one typed record, and as markdown for people. Torch-free."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import model_validator

from specforge_core.artifacts import BuildArtifacts, write_atomically
from specforge_core.benchmark.compare import Comparison, in_percent
from specforge_core.benchmark.plots import write_plots
from specforge_core.benchmark.sweep import LAUNCH_NOTE, launch_lines
from specforge_core.benchmark.tables import (
    comparison_rows,
    markdown_table,
    measured_on,
    position_rows,
    result_legend,
    result_rows,
    server_rows,
    sweep_legend,
    sweep_rows,
    switch_off_advice,
)
from specforge_core.demo.inflated import InflatedTarget, inflated_target
from specforge_core.facts import (
    BenchmarkResult,
    Conversations,
    DraftCheckpoint,
    GateFailure,
    HiddenStates,
    Record,
    ServingDraft,
    Vocabulary,
)
from specforge_core.manifest import ManifestEntry
from specforge_core.manifest_gates import GatesConfig
from specforge_core.manifest_sections import TargetConfig
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
    inflated: InflatedTarget | None = None
    """What the target says about itself if it is the demo's, enlarged."""

    @model_validator(mode="before")
    @classmethod
    def _older_entries_ran_in_process(cls, values: Any) -> Any:
        # From before a manifest said what runs the target.
        entry = values.get("entry") if isinstance(values, dict) else None
        if not isinstance(entry, dict) or "engine" in entry:
            return values
        return values | {"entry": entry | {"engine": {"name": "transformers"}}}

    def target(self) -> TargetConfig:
        """The target as it was measured: with the commit of a Hub model."""
        return self.entry.target.model_copy(update={"revision": self.target_revision})


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
    comparison: Comparison | None = None
    """With the champion of that time; None if there was none or it was this draft, and in what is published."""


def make_report(
    entry: ManifestEntry,
    target: ResolvedTarget,
    artifacts: BuildArtifacts,
    failures: Sequence[GateFailure],
    comparison: Comparison | None = None,
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
        inflated=inflated_target(Path(target.model)),
    )
    return EntryReport(
        lineage=lineage,
        failures=tuple(failures),
        comparison=comparison,
        **{name: artifact.facts for name, artifact in artifacts._asdict().items()},
    )


def write_report(directory: Path, report: EntryReport) -> tuple[Path, ...]:
    """The files written: the markdown, `<entry>.json`, its typed twin, and the plots that it shows."""
    directory.mkdir(parents=True, exist_ok=True)
    name = report.lineage.entry.name
    path = directory / f"{name}.md"
    plots = write_plots(directory, name, report.benchmark)
    write_atomically(path.with_suffix(".json"), report.model_dump_json(indent=1) + "\n")
    write_atomically(path, report_markdown(report, plots=[plot.name for plot in plots]))
    return (path, path.with_suffix(".json"), *plots)


def load_report(path: Path) -> EntryReport:
    """The report in a JSON file. Raises: FileNotFoundError, pydantic.ValidationError if it is another version's."""
    return EntryReport.model_validate_json(path.read_text(encoding="utf-8"))


def report_markdown(report: EntryReport, *, plots: Sequence[str] = ()) -> str:
    """A build as markdown: results first, then gates, training, hardware and lineage.

    Args: plots: files beside it, as `write_plots` names them.
    """
    lineage, result = report.lineage, report.benchmark
    verdict = "passed its gates" if not report.failures else f"failed {len(report.failures)} of its gates"
    sections = [
        f"# {lineage.entry.name}",
        *([lineage.inflated.note()] if lineage.inflated else []),
        f"A draft ({report.checkpoint.algorithm}) for `{lineage.entry.target.model}`"
        f" ({lineage.target_revision or lineage.target_content_id}); it {verdict}.",
        "## Results",
        markdown_table(result_rows(result)),
        result_legend(result),
        *_images(plots, "speedup"),
        *_load_sections(result, plots),
        "## Serve it",
        *_launch_sections(report),
        "## Acceptance by position",
        *_images(plots, "acceptance"),
        markdown_table(position_rows(result)),
        "Share of the verification steps that accepted the draft token at this position.",
        "## Gates",
        "\n".join(f"* **{failure.gate}**: {failure.message}" for failure in report.failures)
        or f"All passed: {_gates_asked(lineage.entry.gates)}.",
        *_comparison_sections(report.comparison),
        "## How it was made",
        markdown_table(making_rows(report)),
        "## Measured on",
        measured_on(result),
        f"```\n{result.environment.command}\n```",
        *_server_sections(result),
        "## Lineage",
        markdown_table(lineage_rows(lineage)),
    ]
    return "\n\n".join(sections) + "\n"


def _gates_asked(gates: GatesConfig) -> str:
    asked = gates.model_dump(exclude_none=True, exclude={"thresholds"})
    more = [" ".join(f"{k} {v}" for k, v in one.model_dump(exclude_none=True).items()) for one in gates.thresholds]
    return ", ".join([*(f"`{name}` {value}" for name, value in asked.items()), *more])


def _comparison_sections(comparison: Comparison | None) -> list[str]:
    if comparison is None:
        return []
    mean = comparison.mean_acceptance()
    means = f"Mean acceptance length: {in_percent(mean)}. " if mean else ""
    left_out = "\n".join(f"* not compared: {reason}" for reason in comparison.not_compared)
    sections = [
        f"## Against the champion, version {comparison.version}",
        markdown_table(comparison_rows(comparison)),
        f"{means}In brackets the 95 % interval; acceptance lengths are compared prompt by prompt.",
        left_out,
    ]
    return [section for section in sections if section]


def _load_sections(result: BenchmarkResult, plots: Sequence[str]) -> list[str]:
    if not result.sweep:
        return []
    return [
        "## At which load",
        switch_off_advice(result.sweep),
        *_images(plots, "throughput"),
        markdown_table(sweep_rows(result.sweep)),
        sweep_legend(result.sweep),
    ]


def _launch_sections(report: EntryReport) -> list[str]:
    entry = report.lineage.entry
    draft = entry.publish.repository or f"{entry.publish.directory}/{entry.name}"
    lines = launch_lines(report.benchmark, report.lineage.target(), draft, entry.engine)
    return [*(f"{title}:\n\n```bash\n{line}\n```" for title, line in lines.items()), LAUNCH_NOTE]


def _server_sections(result: BenchmarkResult) -> list[str]:
    if not result.servers:
        return []
    commands = [f"# {name}\n{server.command}" for name, server in result.servers.items() if server.command]
    return [markdown_table(server_rows(result)), *(["```bash\n" + "\n".join(commands) + "\n```"] if commands else [])]


def _images(plots: Sequence[str], kind: str) -> list[str]:
    return [f"![{kind}]({name})" for name in plots if name.endswith(f"-{kind}.svg")]


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


def _by_position(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.1%}" for share in shares)
