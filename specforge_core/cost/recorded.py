"""A recorded build beside what the plan says of it: from a draft's report to `reports/cost/`. Torch-free."""

import json
from pathlib import Path
from typing import Any

from specforge_core.artifacts import write_atomically
from specforge_core.benchmark.tables import markdown_table
from specforge_core.cost.comparison import ALLOWED_ERROR
from specforge_core.cost.configs import ConfigReader
from specforge_core.cost.entry import gpu_cost
from specforge_core.cost.hardware import find_hardware
from specforge_core.cost.job import Job, make_job
from specforge_core.cost.rates import load_rates
from specforge_core.facts import Conversations, Record
from specforge_core.manifest import ManifestEntry

MIN_CHECKED_S = 60.0
"""Shorter stages are mostly start-up."""


class StageTimes(Record):
    """One stage."""

    stage: str
    measured_s: float
    predicted_s: float
    """0 of what is not counted."""
    start_s: float
    """Of the predicted, what comes from constants."""
    predicted_by_others_s: float
    """By rates without the points of this build."""

    @property
    def error(self) -> float:
        """As a share of what was measured."""
        return self.predicted_s / self.measured_s - 1

    @property
    def is_checked(self) -> bool:
        """Whether it is long enough to be held to its prediction."""
        return self.predicted_s > 0 and self.measured_s >= MIN_CHECKED_S


class RecordedBuild(Record):
    """A build and its prediction."""

    entry: str
    hardware: str
    commit: str
    """Of the build."""
    rates: str
    own_points: tuple[str, ...]
    """Of the rates: measured by this build's benchmark."""
    assumptions: tuple[str, ...]
    stages: tuple[StageTimes, ...]


def recorded_build(report: dict[str, Any], reports: Path) -> RecordedBuild:
    """The build of a draft's report, on a GPU, as `flows` write it.

    Args: reports: where measured rates are.
    Raises: ValueError for a build that used no GPU, or whose target nothing is known of.
    """
    job, lineage = recorded_job(report, reports), report["lineage"]
    own = [point for point in job.rates.answers if point.name.startswith(f"{job.entry.name}, ")]
    others = tuple(point for point in job.rates.answers if point not in own)
    cost = gpu_cost(job, free_disk_bytes=None)
    cost_by_others = gpu_cost(job._replace(rates=job.rates._replace(answers=others)), None) if others else cost
    by_others = {stage.stage: stage.wall_s for stage in cost_by_others.stages}
    measured = {stage: made["elapsed_s"] for stage, made in lineage["stages"].items()}
    return RecordedBuild(
        entry=cost.entry,
        hardware=report["benchmark"]["environment"]["gpu"],
        commit=lineage["commit"],
        rates=job.rates.source,
        own_points=tuple(point.name for point in own),
        assumptions=cost.assumptions,
        stages=tuple(
            StageTimes(
                stage=stage.stage,
                measured_s=measured[stage.stage],
                predicted_s=stage.wall_s,
                start_s=stage.start_s,
                predicted_by_others_s=by_others[stage.stage],
            )
            for stage in cost.stages
            if stage.stage in measured
        ),
    )


def recorded_job(report: dict[str, Any], reports: Path) -> Job:
    """What the cost of a reported build is counted from: its entry, its conversations, and its target's sizes where the
    report has them. Raises: as `recorded_build`."""
    lineage, gpu = report["lineage"], report["benchmark"]["environment"]["gpu"]
    entry = ManifestEntry.model_validate(lineage["entry"])
    if gpu is None:
        raise ValueError(f"{entry.name} was built without a GPU; costs of such builds are measured, not counted")
    facts = Conversations.model_validate(report["conversations"])
    answer = facts.num_loss_tokens / facts.num_conversations
    prompt = facts.num_tokens / facts.num_conversations - answer
    sizes = (lineage.get("inflated") or {}).get("enlarged")
    hardware = find_hardware(gpu)
    job = make_job(
        entry,
        configs=ConfigReader(Path(), recorded={entry.target.model: sizes} if sizes else None),
        store=None,
        rates=load_rates(reports, hardware),
        hardware=hardware,
        tokens_per_conversation=(round(prompt), round(answer)),
    )
    return job._replace(conversations=job.conversations._replace(source="those that it wrote"))


def write_recorded(build: RecordedBuild, directory: Path) -> None:
    """`<entry>.json` and `<entry>.md`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / f"{build.entry}.json", json.dumps(build.model_dump(mode="json"), indent=1) + "\n")
    write_atomically(directory / f"{build.entry}.md", markdown(build))


def markdown(build: RecordedBuild) -> str:
    """The comparison for people."""
    own = len(build.own_points)
    not_own = f" Of the answers' rates, {own} are this build's own; `by other rates` leaves them out." if own else ""
    sections = [
        f"# What a build of {build.entry} takes: predicted and measured",
        f"`specbundle plan --cost` beside the seconds that each stage took on one {build.hardware}, at commit "
        f"{build.commit[:7]}. A stage of {MIN_CHECKED_S:.0f} s and more must be within {ALLOWED_ERROR:.0%}.",
        markdown_table([_row(stage) for stage in build.stages]),
        f"**How far this is a test.** {STARTS}{not_own}",
        "\n".join(f"* {line}" for line in (*build.assumptions, f"rates: {build.rates}")),
        f"By `python -m specforge_core.cost.check --report reports/drafts/{build.entry}.json --out reports/cost`.",
    ]
    return "\n\n".join(sections) + "\n"


STARTS = """\
Start-up is constants of `specforge_core/cost/` that were read from the logs of the build of `demo-8b` on an H100, and
so is how fast the target runs in the benchmark's own process. The rest is counted: passes, optimizers, requests,
answers."""


def _row(stage: StageTimes) -> dict[str, str]:
    is_counted = stage.predicted_s > 0
    return {
        "stage": stage.stage,
        "predicted": f"{stage.predicted_s:.0f} s" if is_counted else "not counted",
        "of it start-up": f"{stage.start_s:.0f} s" if is_counted else "-",
        "measured": f"{stage.measured_s:.0f} s",
        "off by": f"{stage.error:+.0%}" if stage.is_checked else "too short to be checked",
        "by other rates": f"{stage.predicted_by_others_s:.0f} s" if is_counted else "-",
    }
