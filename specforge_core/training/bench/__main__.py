"""Measures training and writes a report.

    python -m specforge_core.training.bench                        Llama 3.1 8B, every path; some minutes on a GPU
    python -m specforge_core.training.bench --shapes qwen3-8b llama-3.3-70b --paths ours
    python -m specforge_core.training.bench --step --paths ours    the whole training step from disk, too
    python -m specforge_core.training.bench --plot reports/training/nvidia-h100-80gb-hbm3.json

Every row that is done is in the report at once, so a run that is cut off loses nothing.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import get_args

import torch

from specforge_core.arguments import add_report_options
from specforge_core.artifacts import write_result
from specforge_core.environment import hardware_stem
from specforge_core.training.bench.lengths import Lengths
from specforge_core.training.bench.measure import measure_card, measured_environment
from specforge_core.training.bench.paths import PATHS
from specforge_core.training.bench.plot import plot_results
from specforge_core.training.bench.results import TrainingBench, markdown
from specforge_core.training.bench.run import Settings, measured_rows, measured_step_rows
from specforge_core.training.bench.shapes import SHAPES, peak_flops
from specforge_core.training.workers import compute_dtype

DEFAULT_PATHS = ("ours", "reference", "conventional")
NUM_WARM_UPS = 3


def main() -> int:
    """0, or 1 if a path failed otherwise than by running out of memory."""
    arguments = _parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if arguments.plot:
        result = TrainingBench.model_validate_json(arguments.plot.read_text(encoding="utf-8"))
        write_result(arguments.plot.parent, arguments.plot.stem, result, markdown(result, arguments.plot.stem))
        plot_results(result, arguments.plot.with_suffix(".svg"))
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --device cpu measures the processor")
    settings = Settings(
        shapes=tuple(arguments.shapes),
        shares=tuple(arguments.shares),
        lengths=tuple(arguments.lengths),
        paths=tuple(name for name in PATHS if name in arguments.paths),
        num_tokens=arguments.tokens,
        num_steps=arguments.ttt_steps,
        num_warm_ups=NUM_WARM_UPS,
        num_repeats=arguments.steps,
        seed=arguments.seed,
        device=torch.device(arguments.device),
    )
    result = run(settings, arguments)
    return int(any(row.status.startswith("failed") for row in result.rows))


def run(settings: Settings, arguments: argparse.Namespace) -> TrainingBench:
    """The result, written after each row."""
    made_on = measured_environment(settings.device, arguments.commit)
    card = measure_card(settings.device, compute_dtype(settings.device))
    result = TrainingBench(
        environment=made_on,
        num_steps=settings.num_steps,
        num_warm_ups=settings.num_warm_ups,
        dtype=str(compute_dtype(settings.device)).removeprefix("torch."),
        peak_flops=peak_flops(made_on.gpu),
        **card._asdict(),
    )
    stem = arguments.name or hardware_stem(made_on)
    for row in measured_rows(settings, card):
        result = result.model_copy(update={"rows": (*result.rows, row)})
        write_result(arguments.out, stem, result, markdown(result, stem))
    if arguments.step:
        for step_row in measured_step_rows(settings):
            result = result.model_copy(update={"step_rows": (*result.step_rows, step_row)})
            write_result(arguments.out, stem, result, markdown(result, stem))
    plot_results(result, arguments.out / f"{stem}.svg")
    sys.stdout.write(markdown(result, stem))
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m specforge_core.training.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-3.1-8b"])
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.5, 0.2], help="of tokens in answers")
    parser.add_argument("--lengths", nargs="+", choices=get_args(Lengths), default=list(get_args(Lengths)))
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(DEFAULT_PATHS))
    parser.add_argument("--tokens", type=int, default=8192, help="of a batch")
    parser.add_argument("--ttt-steps", type=int, default=7, help="steps of training-time test")
    parser.add_argument("--steps", type=int, default=7, help="timed repeats, behind 3 warm-ups")
    parser.add_argument("--step", action="store_true", help="measure the whole training step from disk, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    add_report_options(parser, Path("reports/training"))
    parser.add_argument("--plot", type=Path, metavar="JSON", help="write report and plot of an earlier run again")
    return parser


if __name__ == "__main__":
    sys.exit(main())
