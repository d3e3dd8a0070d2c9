"""Training on live features, against serving alone and training alone, in one run.

    python -m specforge_core.training.bench.live --target DIR --python SGLANG_PYTHON
    python -m specforge_core.training.bench.live ... --num-gpus 4 --serve-gpus 2 --tensor-parallel 2 --lengths real

The processes are those of a build: the producer of live features (`targets/live.py`), and the stage `train` under
torchrun. First the producer fills a spool that is emptied at once; its first pass over the documents is kept, in
memory. Then the training runs on that; then on live features. Each is stopped once it was measured for long enough
in steady state; what is done is in the report at once.
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from specforge_core.arguments import add_report_options
from specforge_core.artifacts import (
    LOG_NAME,
    METRICS_NAME,
    SERVERS_DIRECTORY,
    SPEC_NAME,
    write_atomically,
    write_result,
)
from specforge_core.curves import whole_lines
from specforge_core.data.loader import FeatureSet
from specforge_core.data.shards import load_index, plan_shards
from specforge_core.data.spool import Order, Production, SpoolReader, spool_folder
from specforge_core.demo.inflated import inflated_target
from specforge_core.environment import environment, hardware_stem
from specforge_core.facts import Environment, ServerRecord
from specforge_core.gpus import list_gpus, visible_devices
from specforge_core.launch import stage_command, stage_environment
from specforge_core.manifest_sections import EngineConfig, FeatureDtype, TargetConfig
from specforge_core.process import SupervisedProcess
from specforge_core.scratch import MEMORY
from specforge_core.stages import TrainSpec
from specforge_core.targets.live import REQUEST_NAME, Request
from specforge_core.training.bench.live_results import (
    Interval,
    LiveBench,
    LiveRate,
    Rate,
    Setup,
    live_table,
    markdown,
)
from specforge_core.training.bench.live_work import LiveWork, make_live_work, seal_features, shard_name
from specforge_core.training.live import Producer, producer_environment
from specforge_core.training.train import plan_training

logger = logging.getLogger(__name__)

STEM_SUFFIX = "-live"
INTERVAL_S = 1.0
"""At least, of those that the producer alone is measured in."""
POLL_S = 0.2


class Report(NamedTuple):
    """What a side says about a stretch of time."""

    interval: Interval
    metrics: Mapping[str, float]
    """Of a training's `metrics.jsonl`."""


class Window(NamedTuple):
    """When each is measured."""

    warm_up_s: float
    """Left out, behind the first report, in which kernels are compiled."""
    seconds: float

    def cut(self, reports: Iterable[Report]) -> list[Report]:
        """The reports of the window; those behind it are not waited for. Raises: RuntimeError if they end before."""
        rest, found = iter(reports), []
        next(rest, None)
        warm_up_s = measured_s = 0.0
        for report in rest:
            if warm_up_s < self.warm_up_s:
                warm_up_s += report.interval.elapsed_s
                continue
            found.append(report)
            measured_s += report.interval.elapsed_s
            if measured_s >= self.seconds:
                return found
        raise RuntimeError(
            f"it came to its end before it was measured for {self.seconds:g} s behind {self.warm_up_s:g} s: lower "
            "--seconds or --warm-up"
        )


def main(argv: list[str] | None = None) -> int:
    """0. The report's table is printed."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # Other modules have a line for each epoch.
    logger.setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="specbundle-bench-") as scratch:
        result = measure(arguments, Path(scratch))
    sys.stdout.write(live_table(result) + "\n")
    return 0


def measure(arguments: argparse.Namespace, scratch: Path) -> LiveBench:
    """The result, written after each part."""
    gpus = _gpus(arguments)
    work = make_live_work(arguments, scratch)
    spec, window = work.spec, Window(arguments.warm_up, arguments.seconds)
    result = LiveBench(environment=_environment(arguments), setup=_setup(arguments, work))
    stem = arguments.name or hardware_stem(result.environment) + STEM_SUFFIX
    logs = arguments.out / f"{stem}-logs"
    shutil.rmtree(logs, ignore_errors=True)
    # Of the trainings, and through them of their producer; so that the producer alone has the same.
    environ = stage_environment(spec, gpus)

    def note(**found: Any) -> None:
        nonlocal result
        result = result.model_copy(update=found)
        write_result(arguments.out, stem, result, markdown(result))

    logger.info("serving alone: %d documents of %d tokens, %s", len(work.documents), work.num_tokens, work.name)
    serving = producer_environment(environ, gpus[len(gpus) - arguments.serve_gpus :])
    note(serve_alone=rate_of(serve(work, serving, logs / "serve", window)), server=_server(logs / "serve"))
    logger.info("training alone")
    stored = spec.model_copy(update={"live": None, "conversations": None})
    note(train_alone=rate_of(train(stored, environ, logs / "train", window)))
    logger.info("training on live features")
    note(live=live_rate(train(spec, environ, logs / "live", window)))
    return result


def serve(work: LiveWork, environ: Mapping[str, str], logs: Path, window: Window) -> list[Report]:
    """The producer with nobody to wait for. What it makes first of each document becomes stored features."""
    spec = work.spec
    assert spec.live is not None
    lengths = [len(document.input_ids_T) for document in work.documents]
    # In order, so that stored documents have the numbers that they have in the conversations: one plan for both.
    first_pass = [tuple(documents) for documents in plan_shards(lengths, spec.training.tokens_per_micro_batch)]
    items = first_pass * (1 + spec.training.num_epochs)
    order = Order(first=0, groups=(0,) * len(items), num_members=1)
    with spool_folder(int(spec.live.buffer_gib * 2**30), fallback=logs) as spool:
        request = Request(order=order, micro_batches=tuple(items))
        write_atomically(spool / REQUEST_NAME, request.model_dump_json())
        reader = SpoolReader(spool, order, group=0, member=0)
        with Producer(spec, spool, logs, environ):
            for number in range(len(first_pass)):
                shutil.copyfile(reader.wait(number), spec.hidden_states / shard_name(number))
                reader.done(number)
            reports = window.cut(_emptied(reader, range(len(first_pass), len(items))))
    seal_features(work, first_pass)
    return reports


def _emptied(reader: SpoolReader, numbers: Sequence[int]) -> Iterator[Report]:
    """What the producer does while its items are thrown away, by its own clock."""
    last = Production(0, 0.0, 0.0)
    for number in numbers:
        reader.wait(number)
        reader.done(number)
        now = reader.production()
        assert now is not None
        made = now.since(last)
        if made.elapsed_s >= INTERVAL_S:
            yield Report(Interval(num_tokens=made.num_tokens, elapsed_s=made.elapsed_s), {})
            last = now


def train(spec: TrainSpec, environ: Mapping[str, str], out: Path, window: Window) -> list[Report]:
    """What the stage reports in the window, behind which it is ended. Raises: ProcessError if it fails."""
    spec_path = out / SPEC_NAME
    out.mkdir(parents=True)
    write_atomically(spec_path, spec.model_dump_json(indent=1) + "\n")
    command = stage_command(spec, spec_path, out)
    with SupervisedProcess("the training", command, log=out / LOG_NAME, env=environ) as process:
        return window.cut(_reports(spec, out / METRICS_NAME, process))


def _reports(spec: TrainSpec, path: Path, process: SupervisedProcess) -> Iterator[Report]:
    """One for each line of metrics."""
    features = FeatureSet(spec.hidden_states, max_document_tokens=spec.training.max_document_tokens)
    num_replicas = spec.num_processes // spec.training.parallel.gpus_per_replica
    steps = plan_training(features, spec.training, num_replicas).steps
    step_tokens = [sum(features.lengths[i] for batch in step for i in batch) for step in steps]
    last_step = 0
    for line in _lines(path, process):
        step = int(line["step"])
        num_tokens = sum(step_tokens[last_step:step])
        yield Report(Interval(num_tokens=num_tokens, elapsed_s=num_tokens / line["train/tokens_per_s"]), line)
        last_step = step


def _lines(path: Path, process: SupervisedProcess) -> Iterator[dict[str, float]]:
    """Lines of metrics, as they come. Raises: ProcessError if the process fails."""
    num_read = 0
    is_running = True
    while is_running:
        time.sleep(POLL_S)
        is_running = process.is_running
        lines = whole_lines(path)
        yield from map(json.loads, lines[num_read:])
        num_read = len(lines)
    process.wait()


def rate_of(reports: Sequence[Report]) -> Rate:
    """Of these intervals."""
    return Rate(intervals=tuple(report.interval for report in reports))


def live_rate(reports: Sequence[Report]) -> LiveRate:
    """Both sides, from what a training on live features reports."""
    # There is no figure of the producer for an interval in which it finished nothing.
    of_both = [report for report in reports if "live/producer_wait_share" in report.metrics]
    elapsed_s = sum(report.interval.elapsed_s for report in of_both)

    def share(name: str) -> float:
        return sum(report.metrics[name] * report.interval.elapsed_s for report in of_both) / elapsed_s

    def produced(report: Report) -> Interval:
        at_work_s = report.interval.elapsed_s * (1 - report.metrics["live/producer_wait_share"])
        num_tokens = round(report.metrics["live/produced_tokens_per_s"] * at_work_s)
        return Interval(num_tokens=num_tokens, elapsed_s=report.interval.elapsed_s)

    return LiveRate(
        produced=Rate(intervals=tuple(map(produced, of_both))),
        consumed=rate_of(reports),
        producer_wait_share=share("live/producer_wait_share"),
        trainer_wait_share=share("live/trainer_wait_share"),
    )


def _gpus(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Ids of the GPUs to use. Raises: ValueError if there are too few, or one side has none."""
    visible = visible_devices()
    num_gpus, serve_gpus = arguments.num_gpus, arguments.serve_gpus
    if num_gpus > len(visible) or not (0 < serve_gpus < num_gpus or num_gpus == serve_gpus == 0):
        raise ValueError(
            f"--num-gpus {num_gpus} with --serve-gpus {serve_gpus}: this host has {len(visible)} GPUs, and each side "
            "needs one, or both are 0"
        )
    return visible[:num_gpus]


def _server(logs: Path) -> ServerRecord | None:
    records = sorted((logs / SERVERS_DIRECTORY).glob("*.json"))
    return ServerRecord.model_validate_json(records[0].read_text(encoding="utf-8")) if records else None


def _environment(arguments: argparse.Namespace) -> Environment:
    gpu = next((gpu.name for gpu in list_gpus(None)), None) if arguments.num_gpus else None
    return environment(
        num_threads=torch.get_num_threads(),
        gpu=gpu,
        more_versions=["triton"] if gpu else [],
        named_commit=arguments.commit,
    )


def _setup(arguments: argparse.Namespace, work: LiveWork) -> Setup:
    training, index = work.spec.training, load_index(work.spec.hidden_states)
    inflated = inflated_target(arguments.target)
    return Setup(
        target=f"{arguments.target.name}, {index.hidden_size:,} wide, {arguments.dtype}",
        note=inflated.note() if inflated else None,
        documents=f"{len(work.documents):,} documents, {work.name}",
        supervised_share=work.num_loss_tokens / work.num_tokens,
        features_dtype=index.dtype,
        num_steps=work.spec.draft.num_steps,
        tokens_per_micro_batch=training.tokens_per_micro_batch,
        tokens_per_batch=training.tokens_per_batch,
        buffer_gib=arguments.buffer_gib,
        serve_gpus=arguments.serve_gpus,
        train_gpus=arguments.num_gpus - arguments.serve_gpus,
        tensor_parallel=arguments.tensor_parallel,
        cp=arguments.cp,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m specforge_core.training.bench.live",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--target", type=Path, required=True, help="folder of the target")
    add("--engine", choices=get_args(EngineConfig.model_fields["name"].annotation), default="sglang")
    add("--python", default=sys.executable, help="interpreter of the environment that has SGLang; default: this one")
    add("--dtype", default="bfloat16", choices=get_args(TargetConfig.model_fields["dtype"].annotation))
    add("--num-gpus", type=int, default=2, help="in all; 0: everything on the CPU")
    add("--serve-gpus", type=int, default=1, help="of these, the last ones")
    add("--tensor-parallel", type=int, default=1, help="GPUs of one server")
    add("--cp", type=int, default=1, help="GPUs that share a micro-batch of the training")
    add("--lengths", default="1024", help="of documents: a number of tokens, or `real`")
    add("--share", type=float, default=0.5, help="of their tokens in answers")
    add("--tokens", type=int, default=262_144, help="of all documents, which are taken again and again")
    add("--micro-batch", type=int, default=8192, help="tokens of one")
    add("--ttt-steps", type=int, default=7, help="steps of training-time test")
    add("--draft-vocab", type=int, default=32_000, help="tokens that the draft may propose")
    add("--features", choices=get_args(FeatureDtype), default="bfloat16", help="what items and shards hold")
    add("--buffer-gib", type=float, default=2.0, help="features that may wait for the training")
    add("--seconds", type=float, default=20.0, help="that each is measured")
    add("--warm-up", type=float, default=8.0, help="seconds before that, behind the start")
    add("--scratch", type=Path, default=MEMORY if MEMORY.is_dir() else None, help="for stored features")
    add_report_options(parser, Path("reports/training"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
