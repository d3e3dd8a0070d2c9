"""The model card of a draft: `model_card.md`, filled with what was made and measured. Torch-free."""

import re
from collections.abc import Collection, Iterator
from importlib import resources
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from specforge_core.benchmark.headline import headline
from specforge_core.benchmark.report import EntryReport, Lineage, lineage_rows, making_rows
from specforge_core.benchmark.sweep import LAUNCH_NOTE, launch_lines
from specforge_core.benchmark.tables import (
    markdown_table,
    measured_on,
    position_rows,
    result_legend,
    result_rows,
    sweep_legend,
    sweep_rows,
    switch_off_advice,
    without_empty_columns,
)
from specforge_core.export.verify_speculators import SPECULATORS_FOLDER
from specforge_core.facts import BenchmarkResult
from specforge_core.hub.vllm import has_norms, oldest_version, vllm_commands
from specforge_core.manifest import ManifestEntry
from specforge_core.manifest_sections import BUILTIN_DEMO, ServingConfig

TEMPLATE_NAME = "model_card.md"
LICENSE_NAME = "LICENSE"
LICENSE_FOLDER = "base_model"
"""Of the target's own licence texts."""
PLOTS_FOLDER = "plots"
SGLANG_VERSION = "0.5.14"
"""Whose flags the launch lines have where no server was measured."""


def model_card(report: EntryReport, files: Collection[str], *, target_path: str | None = None) -> str:
    """The text of the repository's README.md, with its metadata.

    Args: files: names of the repository's other files, which the card shows and links; target_path: where a target
    that is no Hub model lies, for a draft that is published in a folder of the same machine.
    """
    entry = report.lineage.entry
    template = resources.files("specforge_core.hub").joinpath(TEMPLATE_NAME).read_text(encoding="utf-8")
    # `card.validate()` would ask the public Hub.
    card = ModelCard.from_template(
        card_data(report, files),
        template_str=template,
        entry=entry,
        report=report,
        repository=entry.publish.repository,
        method=method_name(entry),
        target=entry.target.model,
        is_on_hub=report.lineage.target_revision is not None,
        **_measured(report),
        **_use(report, target_path),
        data=markdown_table(data_rows(report)),
        making=markdown_table(making_rows(report)),
        cost=markdown_table(cost_rows(report.lineage)),
        lineage=markdown_table(lineage_rows(report.lineage)),
        speculators_folder=SPECULATORS_FOLDER,
        has_speculators=f"{SPECULATORS_FOLDER}/config.json" in files,
        plots={name.split("/")[1].split(".")[0]: name for name in files if name.startswith(f"{PLOTS_FOLDER}/")},
        has_license=LICENSE_NAME in files,
        target_licenses=sorted(name for name in files if name.startswith(f"{LICENSE_FOLDER}/")),
    )
    return str(card)


def _measured(report: EntryReport) -> dict[str, Any]:
    """What the template says about the benchmark."""
    benchmark = report.benchmark
    return {
        "headline": headline(benchmark),
        "results": markdown_table(result_rows(benchmark)),
        "result_legend": result_legend(benchmark),
        "unsure": unsure_suites(benchmark),
        "positions": markdown_table(position_rows(benchmark)),
        "measured_on": measured_on(benchmark),
        "caveats": caveats(report),
        "sweep": markdown_table(sweep_rows(benchmark.sweep)),
        "sweep_legend": sweep_legend(benchmark.sweep),
        "switch_off_advice": switch_off_advice(benchmark.sweep) if benchmark.sweep else "",
        "has_trees": any(serving.topk > 1 for serving in _servings(benchmark)),
    }


def _use(report: EntryReport, target_path: str | None) -> dict[str, Any]:
    """What the template says about servers. Without a repository the commands are for whoever stands in the folder."""
    entry, benchmark, target = report.lineage.entry, report.benchmark, report.lineage.target()
    repository = entry.publish.repository
    if target_path and not repository:
        target = target.model_copy(update={"model": target_path})
    # vLLM drafts chains alone.
    chains = [serving.num_steps for serving in _servings(benchmark) if serving.topk == 1]
    return {
        "is_served": benchmark.engine == "sglang",
        "server_versions": sorted({server.version for server in benchmark.servers.values()}) or [SGLANG_VERSION],
        "launch_lines": launch_lines(benchmark, target, repository or ".", entry.engine),
        "launch_note": LAUNCH_NOTE,
        "vllm_commands": vllm_commands(
            target,
            repository,
            num_speculative_tokens=chains[0] if chains else entry.draft.num_steps,
            tensor_parallel=entry.engine.tensor_parallel,
        ),
        "vllm_version": oldest_version(entry),
        "needs_vllm_norms": has_norms(entry),
    }


def _servings(benchmark: BenchmarkResult) -> list[ServingConfig]:
    """How the draft was used, in the order measured."""
    return [*(measured.serving for measured in benchmark.measurements), *(point.serving for point in benchmark.sweep)]


def card_data(report: EntryReport, files: Collection[str]) -> ModelCardData:
    """The card's metadata: what the Hub searches by, and the results in its `model-index` form."""
    entry = report.lineage.entry
    # A folder on someone's disk is no base model that the Hub could link to.
    is_on_hub = report.lineage.target_revision is not None
    # Only what has a revision is known to be a data set of the Hub.
    datasets = [source.dataset for source in entry.data.sources if source.revision]
    if entry.publish.dataset and entry.publish.to == "hub":
        datasets.append(entry.publish.dataset)
    return ModelCardData(
        base_model=entry.target.model if is_on_hub else None,
        # The nearest of the Hub's relations: of no use without its base.
        base_model_relation="adapter" if is_on_hub else None,
        datasets=datasets or None,
        library_name="sglang",
        license=entry.publish.license,
        license_link=LICENSE_NAME if LICENSE_NAME in files else None,
        model_name=entry.publish.repository or entry.name,
        pipeline_tag="text-generation",
        tags=[
            *("speculative-decoding", "draft-model", entry.draft.algorithm, "sglang"),
            *(["vllm", "speculators"] if f"{SPECULATORS_FOLDER}/config.json" in files else []),
            "specbundle",
        ],
        eval_results=list(_eval_results(report)),
    )


def _eval_results(report: EntryReport) -> Iterator[EvalResult]:
    splits = {suite.name: suite.source.split for suite in report.lineage.entry.benchmark.suites}
    for one in report.benchmark.measurements:
        where = f"chain {one.serving.chain()}, concurrency {one.serving.concurrency}"
        length = (one.acceptance_length, one.acceptance_length_low, one.acceptance_length_high)
        for metric_type, metric_name, (value, low, high) in (
            ("acceptance_length", "Acceptance length", length),
            ("speedup", "Speedup of output tokens/s", one.speedup_interval),
        ):
            yield EvalResult(
                task_type="text-generation",
                # Results are grouped by this type, and two suites may be parts of one data set.
                dataset_type=one.suite,
                dataset_name=one.suite,
                dataset_split=splits.get(one.suite),
                metric_type=metric_type,
                metric_name=f"{metric_name} ({where})",
                metric_value=round(value, 3),
                metric_args=None if low is None or high is None else {"interval_95": [round(low, 3), round(high, 3)]},
            )


def method_name(entry: ManifestEntry) -> str:
    """The method as the literature calls it."""
    return "EAGLE-3.1" if entry.draft.fc_norm and entry.draft.norm_output else "EAGLE-3"


def unsure_suites(result: BenchmarkResult) -> list[str]:
    """The suites on which a gain is not shown: the interval of a speedup there reaches down to 1."""
    return list(dict.fromkeys(one.suite for one in result.measurements if one.speedup_low <= 1))


def caveats(report: EntryReport) -> list[str]:
    """What keeps the figures from being those of someone's own server."""
    entry, benchmark = report.lineage.entry, report.benchmark
    found = []
    if benchmark.engine != "sglang":
        found.append("The engine is SpecBundle's own decoder on `transformers`; a server's rates differ.")
    if not benchmark.environment.gpu:
        found.append("There was no GPU: these speedups say nothing about one.")
    if any(suite.source.dataset == BUILTIN_DEMO for suite in entry.benchmark.suites):
        has_ngram = any(one.ngram_acceptance_length for one in benchmark.measurements)
        extent = "; the n-gram figures show by how much" if has_ngram else ""
        found.append(f"The suites are text that a program wrote, far more predictable than people's{extent}.")
    return found


def data_rows(report: EntryReport) -> list[dict[str, str]]:
    """One row per source of prompts."""
    rows = [
        {
            "prompts of": f"`{source.dataset}`",
            "part": ", ".join(filter(None, (source.config, source.split))),
            "revision": source.revision or "",
            "conversations at most": f"{source.limit:,}" if source.limit else "",
        }
        for source in report.lineage.entry.data.sources
    ]
    return without_empty_columns(rows)


def cost_rows(lineage: Lineage) -> list[dict[str, str]]:
    """One row per stage: how long it took on what, and the sums."""
    stages = [(name, stage.elapsed_s, stage.hardware or "") for name, stage in lineage.stages.items()]
    gpu_hours = [seconds * num_gpus(hardware) / 3600 for _, seconds, hardware in stages]
    rows = [
        {"stage": name, "seconds": f"{seconds:,.0f}", "on": hardware, "GPU hours": f"{hours:,.2f}" if hours else ""}
        for (name, seconds, hardware), hours in zip(stages, gpu_hours, strict=True)
    ]
    total = {
        "stage": "**all**",
        "seconds": f"{sum(seconds for _, seconds, _ in stages):,.0f}",
        "on": "",
        "GPU hours": f"{sum(gpu_hours):,.2f}" if any(gpu_hours) else "",
    }
    return without_empty_columns([*rows, total])


def num_gpus(hardware: str) -> int:
    """The GPUs of a stage's hardware as its record names it: `2 x NVIDIA H200`, or a processor."""
    found = re.match(r"(\d+) x ", hardware)
    return int(found[1]) if found else 0
