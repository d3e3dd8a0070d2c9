"""A store as four entries leave it, with made-up figures: published, swept on servers, rejected, and never built."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from specforge_core.benchmark.history import record_report
from specforge_core.benchmark.report import EntryReport, make_report
from specforge_core.facts import BenchmarkResult, GateFailure, Published, Rejected
from specforge_core.ledger import record_outcome
from specforge_core.manifest import ManifestEntry
from specforge_core.manifest_sections import EngineConfig, ServingConfig, TargetConfig
from specforge_core.stages import ResolvedTarget
from tests import made_build
from tests.made_build import measurement

SCRIPT = "<script>document.title = 'taken over'</script>"
FIRST_BUILD = datetime(2026, 11, 1, 8, 30, tzinfo=UTC)
INPUTS: dict[str, dict[str, str]] = {
    "regenerate": {},
    "vocabulary": {"conversations": "content-regenerate"},
    "capture": {"conversations": "content-regenerate"},
    "train": {"hidden_states": "content-capture", "vocabulary": "content-vocabulary"},
    "export": {"checkpoint": "content-train"},
    "benchmark": {"draft": "content-export", "conversations": "content-regenerate"},
}


def entries() -> tuple[ManifestEntry, ...]:
    """As a manifest has them."""
    small = TargetConfig(model="made-up/Small-Target", revision=made_build.REVISION)
    return (
        made_build.entry(name="demo", target=small, engine=EngineConfig(name="transformers")),
        made_build.entry(name="llama"),
        made_build.entry(name="worse", target=small.model_copy(update={"model": f"made-up/{SCRIPT}"})),
        made_build.entry(name="big", target=small.model_copy(update={"model": "made-up/Big-Target"})),
    )


def report(
    root: Path, entry: ManifestEntry, benchmark: BenchmarkResult, failures: tuple[GateFailure, ...] = (), build: int = 0
) -> EntryReport:
    """A report whose stages read each other. Args: root: an empty folder for artifacts; build: tells drafts apart."""
    target = ResolvedTarget(model=entry.target.model, revision=None, content_id=made_build.REVISION)
    made = make_report(entry, target, made_build.artifacts(root, benchmark), failures)
    stages = {
        name: stage.model_copy(
            update={"content_id": f"content-{name}", "inputs": INPUTS[name], "created_at": FIRST_BUILD}
        )
        for name, stage in made.lineage.stages.items()
    }
    export, benchmarked = stages["export"], stages["benchmark"]
    draft = f"draft-{build}"
    stages["export"] = export.model_copy(update={"content_id": draft})
    stages["benchmark"] = benchmarked.model_copy(update={"inputs": benchmarked.inputs | {"draft": draft}})
    return made.model_copy(update={"lineage": made.lineage.model_copy(update={"stages": stages})})


def suites(*speedups: float, **changes: Any) -> BenchmarkResult:
    """A measurement of suite gsm8k, math500, ... for each speedup, from 0.2 below to 0.2 above."""
    names = ("gsm8k", "math500", "mtbench")[: len(speedups)]
    return made_build.result(
        *(
            measurement(name, speedup=speedup, speedup_low=speedup - 0.2, speedup_high=speedup + 0.2, **changes)
            for name, speedup in zip(names, speedups, strict=True)
        )
    )


def served() -> BenchmarkResult:
    """Two chains on servers, with a sweep."""
    long = ServingConfig(num_steps=7, num_draft_tokens=8)
    seven = {"serving": long, "accepted_by_position": (90, 80, 60, 40, 30, 20, 10), "num_output_tokens": 430}
    return made_build.served_result(
        measurement("gsm8k"),
        measurement("math500", speedup=2.4, speedup_low=2.3, speedup_high=2.5, accepted_by_position=(92, 80, 66)),
        measurement("gsm8k", **seven),
        measurement("math500", speedup=2.9, speedup_low=2.7, speedup_high=3.1, **seven),
    )


def make_store(store: Path) -> tuple[ManifestEntry, ...]:
    """The manifest's entries, after three of them were built."""
    demo, llama, worse, big = entries()
    failure = GateFailure(
        gate="min_speedup", suite="gsm8k", measured=1.1, required=1.5, message=f"1.1 is below 1.5 {SCRIPT}"
    )
    history = [
        (demo, suites(1.6, 1.8), ()),
        (demo, suites(1.1, 1.3), (failure,)),
        (demo, suites(1.8, 2.0), ()),
        (llama, served(), ()),
        (worse, suites(1.1, 1.6), (failure,)),
    ]
    for number, (entry, benchmark, failures) in enumerate(history):
        made = report(store / f"made-{number}", entry, benchmark, failures, build=number)
        record_report(store, made, at=FIRST_BUILD + timedelta(days=number))
        # What `write_report` leaves, without its plots.
        (store / "reports" / f"{entry.name}.json").write_text(made.model_dump_json())
    for entry in (demo, llama):
        published = Published(path=store / "published" / entry.name, content_id="content-published", changed=True)
        record_outcome(store, entry.name, published)
    record_outcome(store, worse.name, Rejected(failures=(failure,)))
    _write_metrics(store / "train" / "key-train")
    return demo, llama, worse, big


def _write_metrics(artifact: Path) -> None:
    artifact.mkdir(parents=True)
    lines = []
    for step in range(1, 101):
        line = {"step": step, "train/loss": 10 / step, "train/learning_rate": 1e-3}
        line |= {f"train/acceptance_{k}": (0.9 - 0.1 * k) * step / 100 for k in range(3)}
        if step % 25 == 0:
            line |= {"eval/loss": 11 / step} | {f"eval/acceptance_{k}": (0.8 - 0.1 * k) * step / 100 for k in range(3)}
        lines.append(json.dumps(line) + "\n")
    (artifact / "metrics.jsonl").write_text("".join(lines))
