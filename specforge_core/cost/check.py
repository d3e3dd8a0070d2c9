"""Holds predictions against measurements.

    python -m specforge_core.cost.check
        each recorded row of training and serving, predicted from the rows of other shapes or other work; and those
        of several GPUs and of live features, from the rows of one GPU
    python -m specforge_core.cost.check --manifest M --store S --entry E --hardware h100
        the stages of a build, predicted from its number of tokens
    python -m specforge_core.cost.check --report reports/drafts/E.json --out reports/cost
        the same of a build that was recorded, whose store and target are not needed; leaves the comparison in a file

The status is 1 if one of them is further off than allowed.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from specforge_core.artifacts import Store
from specforge_core.cost.comparison import Check, milliseconds, seconds, size
from specforge_core.cost.entry import CostPlanner
from specforge_core.cost.estimate import EntryCost
from specforge_core.cost.rates import ADAMW_BYTES, Point, Rates, StepRun, fit_line, load_rates
from specforge_core.cost.recorded import MIN_CHECKED_S, recorded_build, write_recorded
from specforge_core.cost.scaling import scaling_checks
from specforge_core.ledger import last_artifact
from specforge_core.manifest import Manifest, ManifestEntry
from specforge_core.selection import named_entries

REPORTS = Path(__file__).parents[2] / "reports"


def recorded_checks(rates: Rates) -> list[Check]:
    """Every recorded row that others predict: the rows of a shape are left out together."""
    kinds = {
        "training pass": rates.passes,
        "float8 training pass": rates.float8_passes,
        "request of capture": rates.captures,
        "answer": rates.answers,
    }
    checks = [check for kind, points in kinds.items() for check in held_out(kind, points)]
    memory = held_out("memory of a training pass", rates.activation_bytes)
    return [
        *checks,
        *map(partial(_step_check, rates), rates.step_runs),
        *(check._replace(show=size) for check in memory),
    ]


def held_out(kind: str, points: Sequence[Point]) -> Iterator[Check]:
    """Each point, predicted from those of other names; from the others where all have one name."""
    by_name = len({point.name for point in points}) > 1
    for left_out in points:
        others = [p for p in points if (p.name != left_out.name if by_name else p is not left_out)]
        if others:
            predicted = left_out.beside + fit_line(others).seconds(left_out.work)
            yield Check(f"{kind}, {left_out.name}", predicted, left_out.beside + left_out.seconds, milliseconds)


def _step_check(rates: Rates, run: StepRun) -> Check:
    """Whole steps from the disk, predicted from passes of other shapes."""
    line = fit_line([point for point in rates.passes if not run.name.startswith(point.name)])
    predicted = run.flops * line.s_per_unit + run.num_passes * line.fixed_s
    predicted += run.num_steps * ADAMW_BYTES * run.num_weights / rates.optimizer_bytes_per_s
    return Check(f"training, {run.name}", predicted, run.seconds, milliseconds)


def build_checks(entry: ManifestEntry, cost: EntryCost, store: Store) -> list[Check]:
    """Time and bytes of the entry's artifacts; stages that took less than a minute are left out.

    Raises: ValueError if the store has none.
    """
    checks = []
    for stage in cost.stages:
        artifact = last_artifact(store, entry.name, stage.stage)
        if artifact is None:
            continue
        measured_bytes = sum(file.size_bytes for file in artifact.files.values())
        if artifact.elapsed_s >= MIN_CHECKED_S and stage.wall_s:
            checks.append(Check(stage.stage, stage.wall_s, artifact.elapsed_s, seconds))
        if stage.stage == "capture":
            checks.append(Check("capture, bytes", stage.disk_bytes, measured_bytes, size))
    if not checks:
        raise ValueError(f"{store.root} has no artifacts of {entry.name} to hold its cost against")
    return checks


def main(argv: list[str] | None = None) -> int:
    """1 if a prediction is off by more than allowed."""
    arguments = _parser().parse_args(argv)
    if arguments.report:
        build = recorded_build(json.loads(arguments.report.read_text(encoding="utf-8")), arguments.reports)
        checks = [Check(s.stage, s.predicted_s, s.measured_s, seconds) for s in build.stages if s.is_checked]
        if arguments.out:
            write_recorded(build, arguments.out)
    elif arguments.entry:
        manifest, store = Manifest.load(arguments.manifest), Store(arguments.store)
        planner = CostPlanner(
            base_dir=manifest.base_dir, store=store, reports=arguments.reports, hardware=arguments.hardware
        )
        (entry,) = named_entries(manifest, [arguments.entry])
        checks = build_checks(entry, planner.cost(entry), store)
    else:
        rates = load_rates(arguments.reports)
        checks = [*recorded_checks(rates), *scaling_checks(rates, arguments.reports)]
    table = Table("what", "predicted", "measured", "off by")
    for check in checks:
        error = f"{check.error:+.0%}" if check.is_close else f"[red]{check.error:+.0%}[/red]"
        table.add_row(check.what, check.show(check.predicted), check.show(check.measured), error)
    Console().print(table)
    return int(not all(check.is_close for check in checks))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m specforge_core.cost.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--reports", type=Path, default=REPORTS, help="default: %(default)s")
    parser.add_argument("--manifest", type=Path, default=Path("bundle_manifest.yaml"))
    parser.add_argument("--store", type=Path, default=Path(".specbundle"))
    parser.add_argument("--entry", help="whose build is checked; the recorded rows when absent")
    parser.add_argument("--report", type=Path, help="of a draft: its build is checked")
    parser.add_argument("--out", type=Path, help="folder for the comparison with --report")
    parser.add_argument("--hardware", help="GPU that it was built on; that of the rates when absent")
    return parser


if __name__ == "__main__":
    sys.exit(main())
