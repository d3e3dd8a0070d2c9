"""`python -m specforge_core STAGE --spec spec.json --out DIR`: run one stage in this process, without Prefect."""

import argparse
import errno
import importlib
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from specforge_core.artifacts import RECORD_NAME, seal
from specforge_core.facts import Record
from specforge_core.gpus import cpu_name, list_gpus
from specforge_core.launch import THREADS_VARIABLE, num_threads
from specforge_core.stages import SPECS, USER_ERROR_STATUS, StageSpec

# Each module has `main(spec, out) -> facts`, and may have `known_sha256(out)`: of files that it hashed when it wrote
# them. Imported one at a time, because most bring torch.
MODULES = {
    "regenerate": "specforge_core.data.regenerate",
    "vocabulary": "specforge_core.data.vocab",
    "capture": "specforge_core.targets.capture",
    "train": "specforge_core.training.train",
    "export": "specforge_core.export.run",
    "benchmark": "specforge_core.benchmark.run",
}


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 once the artifact in `--out` is whole, 2 for what a user must change first, 1 for all else."""
    parser = argparse.ArgumentParser(prog="python -m specforge_core", description=__doc__)
    parser.add_argument("stage", choices=sorted(MODULES))
    parser.add_argument(
        "--spec", type=Path, required=True, help="JSON of the stage's spec, see specforge_core/stages.py"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="directory of the artifact; an interrupted run goes on there"
    )
    args = parser.parse_args(argv)
    is_first_rank = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if is_first_rank else logging.WARNING,
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
    )
    spec = SPECS[args.stage].model_validate_json(args.spec.read_text(encoding="utf-8"))
    key, inputs = spec.key(), spec.inputs()
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / RECORD_NAME).exists():
        raise SystemExit(f"{args.out} holds a finished artifact already; name another --out or delete it")
    # Read when torch is imported.
    os.environ.setdefault(THREADS_VARIABLE, str(num_threads()))
    started_at = time.monotonic()
    try:
        facts = stage_main(args.stage, args.out)(spec, args.out)
        if is_first_rank:
            with full_disk_refused(args.out):
                seal(
                    args.out,
                    facts,
                    stage=args.stage,
                    key=key,
                    inputs=inputs,
                    elapsed_s=time.monotonic() - started_at,
                    hardware=hardware_name(spec.device),
                    known_sha256=getattr(sys.modules[MODULES[args.stage]], "known_sha256", no_files)(args.out),
                )
    except ValueError:
        traceback.print_exc()
        return USER_ERROR_STATUS
    return 0


def no_files(out: Path) -> dict[str, str]:
    """Of a stage that hashes nothing itself."""
    return {}


def stage_main(stage: str, out: Path) -> Callable[[StageSpec, Path], Record]:
    """The stage's `main`; under torchrun one that leaves its exception where torchrun looks for the first failure."""
    main_of_stage: Callable[[StageSpec, Path], Record] = importlib.import_module(MODULES[stage]).main
    function = full_disk_refused(out)(main_of_stage)
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return function
    from torch.distributed.elastic.multiprocessing.errors import record

    # It says None for where it raises.
    return record(function)  # type: ignore[return-value]


@contextmanager
def full_disk_refused(out: Path) -> Iterator[None]:
    """Raises: ValueError where anything found a disk full, because only a user can make room."""
    try:
        yield
    # DCP's CheckpointException is no Exception, and the error of safetensors no OSError.
    except BaseException as error:
        # `datasets` says only in the cause what happened.
        lines = f"{error.__cause__}\n{error}".splitlines()
        said = [line for line in lines if os.strerror(errno.ENOSPC) in line]
        if not said:
            raise
        raise ValueError(
            f"a disk is full: {said[-1].strip()}; {shutil.disk_usage(out).free / 2**20:,.0f} MiB are free where {out} "
            "lies. Make room and start again, which goes on from here; or use another --store"
        ) from error


def hardware_name(device: str) -> str:
    """What this stage computes on: the processor, or how many of which GPU."""
    gpus = list_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")) if device == "cuda" else ()
    # Of torchrun: the nodes are alike.
    num_nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    return f"{num_nodes * len(gpus)} x {gpus[0].name}" if gpus else cpu_name()


if __name__ == "__main__":
    sys.exit(main())
