"""How long a build of one entry takes, and how much memory: from an empty store, then again with nothing changed.

    python -m flows.measure --entry demo --out reports/factory

Starts `specbundle build` as a user would. Elapsed times are of a whole command on whatever else the machine does, so
the record keeps every repeat and the machine's load before it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from specforge_core.artifacts import write_atomically
from specforge_core.benchmark.tables import markdown_table
from specforge_core.environment import environment
from specforge_core.facts import Environment, Record

SAMPLE_INTERVAL_S = 0.5
GIB = 2**30


class BuildRun(Record):
    """One `specbundle build`."""

    elapsed_s: float
    peak_memory_bytes: int
    """Largest sum of the resident memory of all processes of the build; what they share counts once for each."""
    load_before: float
    """Processes that wanted a core during the minute before."""
    stages_s: dict[str, float]
    """Inside the stages' own processes, without their start; empty where every stage was reused."""


class FactoryResult(Record):
    """What building an entry costs."""

    entry: str
    fresh: tuple[BuildRun, ...]
    repeated: tuple[BuildRun, ...]
    """Each right after the fresh one, on the same store."""
    num_cores: int
    environment: Environment


class MemoryWatch(threading.Thread):
    """Follows the memory of a process and all its descendants until it is gone."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root = psutil.Process(pid)
        self.peak_bytes = 0

    def run(self) -> None:
        while self.root.is_running() and self.root.status() != psutil.STATUS_ZOMBIE:
            self.peak_bytes = max(self.peak_bytes, sum(map(_resident_bytes, self._family())))
            time.sleep(SAMPLE_INTERVAL_S)

    def _family(self) -> list[psutil.Process]:
        try:
            return [self.root, *self.root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def run_build(entry: str, store: Path) -> BuildRun:
    """One build of `entry` in `store`. Raises: CalledProcessError if it does not pass."""
    command = [sys.executable, "-m", "specforge_core.cli", "--store", str(store), "build", "--only", entry]
    load_before, started_at = os.getloadavg()[0], time.monotonic()
    already_built = set(store.glob("*/*/artifact.json"))
    process = subprocess.Popen(command)
    watch = MemoryWatch(process.pid)
    watch.start()
    if status := process.wait():
        raise subprocess.CalledProcessError(status, command)
    return BuildRun(
        elapsed_s=round(time.monotonic() - started_at, 1),
        peak_memory_bytes=watch.peak_bytes,
        load_before=load_before,
        stages_s=_stage_seconds(set(store.glob("*/*/artifact.json")) - already_built),
    )


def _stage_seconds(records: set[Path]) -> dict[str, float]:
    made = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(records, key=lambda path: path.stat().st_mtime)
    ]
    return {record["stage"]: record["elapsed_s"] for record in made}


def markdown(result: FactoryResult) -> str:
    """The result for people."""
    rows = [
        {
            "build": kind,
            "repeat": str(repeat),
            "seconds": f"{run.elapsed_s:.0f}",
            "peak memory, GiB": f"{run.peak_memory_bytes / GIB:.2f}",
            "load before": f"{run.load_before:.1f}",
            "stages, seconds": ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in run.stages_s.items())
            or "all reused",
        }
        for kind, runs in (("from an empty store", result.fresh), ("again, nothing changed", result.repeated))
        for repeat, run in enumerate(runs, start=1)
    ]
    made_on = result.environment
    return (
        f"# What building `{result.entry}` takes\n\n{markdown_table(rows)}\n\n"
        f"`specbundle build --only {result.entry}`, packages installed. Memory is the largest sum over the build's "
        "processes; what they share counts once for each. Stage seconds leave out the start of the stage's process.\n\n"
        f"{result.num_cores} cores of {made_on.cpu}, a shared machine; {made_on.packages}; commit {made_on.commit}.\n\n"
        f"```\n{made_on.command}\n```\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entry", required=True)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="folder of <entry>.json and <entry>.md")
    args = parser.parse_args()
    fresh, repeated = [], []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as store:
            fresh.append(run_build(args.entry, Path(store)))
            repeated.append(run_build(args.entry, Path(store)))
    num_cores = os.cpu_count() or 1
    result = FactoryResult(
        entry=args.entry,
        fresh=tuple(fresh),
        repeated=tuple(repeated),
        num_cores=num_cores,
        environment=environment(num_threads=num_cores, gpu=None, more_versions=("prefect", "mlflow")),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / f"{args.entry}.json", result.model_dump_json(indent=1) + "\n")
    write_atomically(args.out / f"{args.entry}.md", markdown(result))
    print(markdown(result))  # noqa: T201


if __name__ == "__main__":
    main()
