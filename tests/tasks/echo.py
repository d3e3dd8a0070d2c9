"""A stage of a few milliseconds, for tests of what runs around stages: `python -m tests.tasks.echo ...`."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Annotated, ClassVar

from specforge_core.artifacts import METRICS_NAME, PROGRESS_DIRECTORY, seal
from specforge_core.facts import Record
from specforge_core.stages import EXECUTION, USER_ERROR_STATUS, StageSpec


class Echo(Record):
    """What the stage said."""

    text: str


class EchoSpec(StageSpec):
    """A text in, the same text out; or a failure of the kind that is asked for."""

    stage: ClassVar[str] = "echo"
    version: ClassVar[int] = 1
    facts_type: ClassVar[type[Record]] = Echo

    text: str
    behaviour: Annotated[str, EXECUTION] = "work"
    """`work`, `fail`, `fail once` (a transient fault), `refuse` (the user's error) or `hang`."""


def echo_command(spec: EchoSpec, spec_path: Path, out: Path) -> list[str]:
    """In the place of `tasks.stage.stage_command`."""
    return [sys.executable, "-m", "tests.tasks.echo", spec.stage, "--spec", str(spec_path), "--out", str(out)]


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    spec = EchoSpec.model_validate_json(args.spec.read_text())
    progress = args.out / PROGRESS_DIRECTORY
    is_first_try = not progress.exists()
    progress.mkdir(exist_ok=True)
    say("echoing:  50%|#####     | 1/2 [00:00<00:00, 9.73 step/s]")
    say(f"hearing {spec.text}")
    with (args.out / METRICS_NAME).open("a") as metrics:
        for step in (1, 2):
            metrics.write(json.dumps({"step": step, "loudness": step / 10}) + "\n")
    if spec.behaviour == "hang":
        time.sleep(60)
    if spec.behaviour == "refuse":
        return USER_ERROR_STATUS
    if spec.behaviour == "fail" or (spec.behaviour == "fail once" and is_first_try):
        say("out of breath")
        return 1
    (args.out / "echo.txt").write_text(spec.text)
    seal(args.out, Echo(text=spec.text), stage="echo", key=spec.key(), inputs={}, elapsed_s=0.0, hardware="any")
    return 0


if __name__ == "__main__":
    sys.exit(main())
