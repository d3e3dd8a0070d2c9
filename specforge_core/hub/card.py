"""The model card of a draft: `model_card.md`, filled with what was made and measured. Torch-free."""

from collections.abc import Iterator, Sequence
from importlib import resources

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from specforge_core.benchmark.report import EntryReport, lineage_rows, making_rows
from specforge_core.benchmark.sweep import LAUNCH_NOTE, launch_lines
from specforge_core.benchmark.tables import (
    SWEEP_LEGEND,
    markdown_table,
    measured_on,
    position_rows,
    result_legend,
    result_rows,
    sweep_rows,
    switch_off_advice,
)
from specforge_core.manifest import ManifestEntry

TEMPLATE_NAME = "model_card.md"


def model_card(report: EntryReport, *, license_files: Sequence[str]) -> str:
    """The text of the repository's README.md, with its metadata.

    Args: license_files: names within the repository of the target's own licence texts.
    """
    entry, benchmark = report.lineage.entry, report.benchmark
    servings = [measured.serving for measured in benchmark.measurements]
    servings += [point.serving for point in benchmark.sweep]
    template = resources.files("specforge_core.hub").joinpath(TEMPLATE_NAME).read_text(encoding="utf-8")
    # `card.validate()` would ask the public Hub.
    card = ModelCard.from_template(
        card_data(report),
        template_str=template,
        repository=entry.publish.repository or entry.name,
        method=method_name(entry),
        target=entry.target.model,
        target_version=report.lineage.target_revision or report.lineage.target_content_id,
        results=markdown_table(result_rows(benchmark)),
        result_legend=result_legend(benchmark),
        positions=markdown_table(position_rows(benchmark)),
        measured_on=measured_on(benchmark),
        dtype=entry.target.dtype,
        is_served=benchmark.engine == "sglang",
        inflated_note=report.lineage.inflated and report.lineage.inflated.note(),
        sweep=markdown_table(sweep_rows(benchmark.sweep)),
        sweep_legend=SWEEP_LEGEND,
        switch_off_advice=switch_off_advice(benchmark.sweep) if benchmark.sweep else "",
        # Without a repository the commands are for whoever stands in this folder.
        launch_lines=launch_lines(benchmark, report.lineage.target(), entry.publish.repository or ".", entry.engine),
        launch_note=LAUNCH_NOTE,
        has_trees=any(serving.topk > 1 for serving in servings),
        sources=[f"`{source.dataset}` ({source.split})" for source in entry.data.sources],
        data=entry.data,
        draft=entry.draft,
        training=entry.training,
        making=markdown_table(making_rows(report)),
        lineage=markdown_table(lineage_rows(report.lineage)),
        vocabulary=report.vocabulary,
        license_name=entry.publish.license,
        license_files=license_files,
    )
    return str(card)


def card_data(report: EntryReport) -> ModelCardData:
    """The card's metadata: what the Hub searches by, and the results in its `model-index` form."""
    entry = report.lineage.entry
    # A folder on someone's disk is no base model that the Hub could link to.
    is_on_hub = report.lineage.target_revision is not None
    return ModelCardData(
        base_model=entry.target.model if is_on_hub else None,
        # The nearest of the Hub's relations: of no use without its base.
        base_model_relation="adapter" if is_on_hub else None,
        library_name="sglang",
        license=entry.publish.license,
        model_name=entry.publish.repository or entry.name,
        pipeline_tag="text-generation",
        tags=["speculative-decoding", "draft-model", entry.draft.algorithm, "sglang", "specbundle"],
        eval_results=list(_eval_results(report)),
    )


def _eval_results(report: EntryReport) -> Iterator[EvalResult]:
    splits = {suite.name: suite.source.split for suite in report.lineage.entry.benchmark.suites}
    for measurement in report.benchmark.measurements:
        where = f"chain {measurement.serving.chain()}, concurrency {measurement.serving.concurrency}"
        for metric_type, metric_name, value in (
            ("acceptance_length", "Acceptance length", measurement.acceptance_length),
            ("speedup", "Speedup of output tokens/s", measurement.speedup),
        ):
            yield EvalResult(
                task_type="text-generation",
                # Results are grouped by this type, and two suites may be parts of one data set.
                dataset_type=measurement.suite,
                dataset_name=measurement.suite,
                dataset_split=splits.get(measurement.suite),
                metric_type=metric_type,
                metric_name=f"{metric_name} ({where})",
                metric_value=round(value, 3),
            )


def method_name(entry: ManifestEntry) -> str:
    """The method as the literature calls it."""
    return "EAGLE-3.1" if entry.draft.fc_norm and entry.draft.norm_output else "EAGLE-3"
