"""Measured rates from `reports/`, as lines: seconds = work * s_per_unit + fixed_s. Torch-free.

A line is what the measurements show: a micro-batch of training takes its useful FLOPs at one rate whatever the draft's
shape, and some milliseconds more; a request of capture, its FLOPs and some overhead; an answer, its share of the bytes
that its steps read and some overhead, for each prompt is read on its own while the other answers wait. So rows of other
shapes predict a shape that nobody measured.
"""

import heapq
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from specforge_core.benchmark.rates_results import Comparison, ServingRates
from specforge_core.cost.configs import hub_facts
from specforge_core.cost.hardware import Hardware, find_hardware
from specforge_core.cost.target_model import TargetModel, target_model
from specforge_core.facts import BenchmarkResult
from specforge_core.manifest_sections import TargetConfig
from specforge_core.training.bench.results import MILLISECONDS, Row, StepRow, TrainingBench
from specforge_core.training.bench.shapes import SHAPES

OURS, OURS_FLOAT8 = "ours", "ours-float8"
GRADIENT_BYTES = 4
"""Of each weight, in float32."""
TOKEN_BYTES = 24
"""For each token of a micro-batch and feature of the draft's width, beside what is read from the disk: the fused hidden
state, the halves that embeddings give, keys and values of step 0, and gradients of these. An H200 took 25, by 8,192 and
131,072 tokens of the 8B shape."""
ADAMW_BYTES = 28
"""Read and written for each weight: float32 weight, gradient and two moments in, all but the gradient out."""
SERVED_KEYS = 128
"""Tokens of a request while it is answered, in measurements that do not say: those of the demo's prompts."""
SERVED_PROMPT_TOKENS = 38
"""That a server read for an answer, in measurements that do not say: 91,449 of 2,383 prompts of the demo, by the log of
a regeneration; the rest, it had from an earlier turn or prompt."""

FULL_PASS_ROWS = 4000
"""Supervised slots from which on a pass is as large as it gets, and so are its activations."""


class Point(NamedTuple):
    """One measurement."""

    work: float
    seconds: float
    name: str = ""
    beside: float = 0.0
    """What comes on top and needs no line: it is counted."""


class Line(NamedTuple):
    """Seconds by work."""

    s_per_unit: float
    fixed_s: float

    def seconds(self, work: float, speed: float = 1.0) -> float:
        """Args: speed: of the hardware, against that of the measurement; overhead does not get faster."""
        return work * self.s_per_unit / speed + self.fixed_s


def fit_line(points: Sequence[Point]) -> Line:
    """The line with the least relative squared error; through the origin where it would pass below it, or one point.

    Raises: ValueError without points.
    """
    if not points:
        raise ValueError("no measurements to fit")
    # Minimises the sum of (a * work / seconds + b / seconds - 1)^2 over a and b.
    x, y = [p.work / p.seconds for p in points], [1 / p.seconds for p in points]
    xx, xy, yy = (sum(u * v for u, v in zip(*pair, strict=True)) for pair in ((x, x), (x, y), (y, y)))
    determinant = xx * yy - xy * xy
    if len(points) > 1 and determinant > 1e-12 * xx * yy:
        slope = (sum(x) * yy - sum(y) * xy) / determinant
        fixed = (sum(y) * xx - sum(x) * xy) / determinant
        if slope > 0 and fixed >= 0:
            return Line(slope, fixed)
    return Line(sum(x) / xx, 0.0)


class StepRun(NamedTuple):
    """A recorded run of whole training steps, from the disk, with optimizer."""

    name: str
    flops: float
    """Useful ones, by those of a batch of the same kind."""
    num_passes: int
    num_steps: int
    num_weights: float
    seconds: float


class Rates(NamedTuple):
    """All measurements of one kind of GPU."""

    hardware: Hardware
    passes: tuple[Point, ...]
    """FLOPs that a micro-batch needs; seconds of its forward and backward pass."""
    float8_passes: tuple[Point, ...]
    optimizer_bytes_per_s: float
    matmul_flops: float
    """FLOP/s of a large matrix product."""
    activation_bytes: tuple[Point, ...]
    """Trained weights; bytes (not seconds) of a pass beside weights, gradients, inputs and `TOKEN_BYTES`."""
    captures: tuple[Point, ...]
    """FLOPs of a request; its seconds on one GPU. The work is unknown where the target is."""
    answers: tuple[Point, ...]
    """Bytes that its decoding steps read, by the number of answers that they extend; seconds of it on one GPU, beside
    its prompt's FLOPs."""
    step_runs: tuple[StepRun, ...]
    """Not needed for a prediction, but to check some."""
    read_bytes_per_s: float
    write_bytes_per_s: float
    source: str
    """What was measured where, in words."""


def load_rates(directory: Path, hardware: Hardware | None = None) -> Rates:
    """The rates under `reports/`: those of `hardware` where it was measured, else those of the GPU with most rows.

    Raises: ValueError if what is needed was not measured.
    """
    benches = [
        TrainingBench.model_validate(values)
        for values in json_files(directory / "training")
        if {"rows", "matmul_flops", "environment"} <= values.keys() and values["environment"]["gpu"]
    ]
    servings = [
        ServingRates.model_validate(values)
        for values in json_files(directory / "serving")
        if "comparisons" in values and values["environment"]["gpu"]
    ]
    measured = find_measured(benches, servings, hardware)
    if measured is None:
        raise ValueError(
            f"{directory} has no GPU's rates of both training and serving; measure them with "
            "`python -m specforge_core.training.bench --step` and `python -m specforge_core.benchmark.rates`, or name "
            "the folder with --reports"
        )
    benches = [bench for bench in benches if _gpu(bench) == measured]
    servings = [serving for serving in servings if _gpu(serving) == measured]
    rows = [row for bench in benches for row in bench.rows if row.is_measured]
    steps = [step for bench in benches for step in bench.step_rows]
    ours = [row for row in rows if row.path == OURS]
    written = [serving.disk_bytes_per_s for serving in servings if serving.disk_bytes_per_s]
    training_commits = sorted({bench.environment.commit or "unknown" for bench in benches})
    serving_commits = sorted({serving.environment.commit or "unknown" for serving in servings})
    targets = ", ".join(sorted({serving.target for serving in servings}))
    captures = tuple(p for serving in servings for p in serving_points(serving, "capture", capture_point))
    prompt_rate = fit_line(captures).s_per_unit
    return Rates(
        hardware=measured,
        passes=tuple(map(pass_point, ours)),
        float8_passes=tuple(pass_point(row) for row in rows if row.path == OURS_FLOAT8),
        optimizer_bytes_per_s=_optimizer_rate(ours),
        matmul_flops=median(bench.matmul_flops for bench in benches),
        activation_bytes=tuple(activation_point(row) for row in ours if row.num_supervised >= FULL_PASS_ROWS),
        captures=captures,
        answers=(
            *(
                p
                for serving in servings
                for p in serving_points(serving, "regenerate", partial(regenerated_point, prompt_rate))
            ),
            *(p for values in json_files(directory / "drafts") for p in sweep_points(values, measured, prompt_rate)),
        ),
        step_runs=tuple(run for bench in benches for run in step_runs(bench)),
        read_bytes_per_s=max(map(_read_rate, steps)),
        write_bytes_per_s=min(written),
        source=(
            f"{measured.name}: training of {', '.join(sorted({row.shape for row in ours}))} at commit "
            f"{', '.join(training_commits)}; serving of {targets} at commit {', '.join(serving_commits)}"
        ),
    )


def find_measured(
    benches: Sequence[TrainingBench], servings: Sequence[ServingRates], wanted: Hardware | None
) -> Hardware | None:
    """The GPU to scale from; None if none has all that is needed."""
    served = {(_gpu(serving), comparison.stage) for serving in servings for comparison in serving.comparisons}
    complete = {
        _gpu(bench)
        for bench in benches
        if any(bench.step_rows) and served >= {(_gpu(bench), "capture"), (_gpu(bench), "regenerate")}
    }
    if wanted in complete:
        return wanted
    return max(complete, key=lambda gpu: sum(len(b.rows) for b in benches if _gpu(b) == gpu), default=None)


def pass_point(row: Row) -> Point:
    """Forward and backward pass of a micro-batch."""
    return Point(row.useful_flops, median(row.ms) / MILLISECONDS, row.shape)


def activation_point(row: Row) -> Point:
    """Memory beside what is counted, by trained weights."""
    counted = (row.weight_bytes or 0) + (row.gradient_bytes or 0) + (row.input_bytes or 0)
    counted += TOKEN_BYTES * SHAPES[row.shape].width * row.num_tokens
    return Point((row.gradient_bytes or 0) / GRADIENT_BYTES, (row.peak_bytes or 0) - counted, row.shape, counted)


def step_runs(bench: TrainingBench) -> list[StepRun]:
    """The whole steps of a run of the benchmark that measured batches of the same kinds, too."""
    runs = []
    for step in bench.step_rows:
        alike = [
            row
            for row in bench.rows
            if row.path == OURS and (row.shape, row.lengths, row.share) == (step.shape, step.lengths, step.share)
        ]
        for row in alike[:1]:
            runs.append(
                StepRun(
                    name=f"{step.shape}, {step.share:.0%} in answers, {step.micro_batches} passes a step",
                    flops=row.useful_flops / row.num_tokens * step.num_tokens,
                    num_passes=step.micro_batches * len(step.step_ms),
                    num_steps=len(step.step_ms),
                    num_weights=(row.gradient_bytes or 0) / GRADIENT_BYTES,
                    seconds=sum(step.step_ms) / MILLISECONDS,
                )
            )
    return runs


def serving_points(
    serving: ServingRates, stage: str, point: Callable[[Comparison, TargetModel, ServingRates], Point]
) -> list[Point]:
    """The points of one stage."""
    model = served_model(serving)
    return [point(comparison, model, serving) for comparison in serving.comparisons if comparison.stage == stage]


def capture_point(comparison: Comparison, model: TargetModel, serving: ServingRates) -> Point:
    """A request of capture, while the server is at work: what comes after, a longer run has once, too."""
    one = comparison.ours[0]
    tokens = one.num_tokens / one.num_requests
    flops = tokens * model.prefill_flops((tokens + 1) / 2, comparison.supervised_share or 0)
    return Point(flops, median(done.served_s for done in comparison.ours) / one.num_requests, comparison.work)


def regenerated_point(
    prompt_s_per_flop: float, comparison: Comparison, model: TargetModel, serving: ServingRates
) -> Point:
    """An answer of regeneration, with all slots taken."""
    one = comparison.ours[0]
    seconds = median(done.served_s / done.num_requests for done in comparison.ours)
    return answer_point(
        model,
        num_running=served_slots(serving),
        num_tokens=one.num_tokens / one.num_requests,
        seconds=seconds,
        prompt_s_per_flop=prompt_s_per_flop,
        name=comparison.work,
    )


def answer_point(
    model: TargetModel, *, num_running: float, num_tokens: float, seconds: float, prompt_s_per_flop: float, name: str
) -> Point:
    """One of `num_running` answers that are written at once."""
    prompt_flops = SERVED_PROMPT_TOKENS * model.prefill_flops(SERVED_PROMPT_TOKENS / 2, head_share=0.0)
    prompt_s = prompt_flops * prompt_s_per_flop
    read = num_tokens * model.decode_bytes(num_running, SERVED_KEYS) / num_running
    return Point(read, seconds - prompt_s, name, beside=prompt_s)


def sweep_points(report: dict[str, Any], hardware: Hardware, prompt_s_per_flop: float) -> list[Point]:
    """Answers without draft by concurrency, of a draft's report; none unless servers on that one GPU were swept."""
    result = BenchmarkResult.model_validate(report["benchmark"])
    gpu = result.environment.gpu
    if not result.sweep or result.engine != "sglang" or gpu is None or find_hardware(gpu) != hardware:
        return []
    captured, sizes = report["hidden_states"], report["vocabulary"]
    shape = (captured["num_target_layers"], captured["hidden_size"], sizes["target_vocab_size"])
    models = [target_model(config, TargetConfig(model=name)) for name, config in hub_facts()["configs"].items()]
    model = next((m for m in models if (m.num_layers, m.width, m.vocab_size) == shape), None)
    one_gpu = all(len(server.gpus) <= 1 for server in result.servers.values())
    entry = report["lineage"]["entry"]
    lengths = answer_lengths(result, entry["benchmark"]["sweep"]["max_new_tokens"])
    if model is None or not one_gpu or not lengths:
        return []
    points = []
    for slots in sorted({point.serving.concurrency for point in result.sweep}):
        # Without draft, all chains are alike.
        alike = [point for point in result.sweep if point.serving.concurrency == slots]
        num_tokens = sum(p.num_output_tokens for p in alike) / sum(p.num_requests for p in alike)
        round_requests = alike[0].num_requests // len(alike[0].baseline_output_tokens_per_s)
        points.append(
            answer_point(
                model,
                num_running=mean_running(lengths, slots, round_requests),
                num_tokens=num_tokens,
                seconds=median(num_tokens / rate for point in alike for rate in point.baseline_output_tokens_per_s),
                prompt_s_per_flop=prompt_s_per_flop,
                name=f"{entry['name']}, {slots} at once",
            )
        )
    return points


def answer_lengths(result: BenchmarkResult, max_new_tokens: int) -> list[int]:
    """Tokens of the answers to all suites' prompts in turns, as a sweep takes them, each cut at its limit."""
    suites = [measurement.prompts.num_output_tokens for measurement in result.measurements if measurement.prompts]
    in_turns = [length for row in itertools.zip_longest(*suites) for length in row if length is not None]
    return [min(length, max_new_tokens) for length in in_turns]


def mean_running(lengths: Sequence[int], num_slots: int, num_requests: int) -> float:
    """Answers that are written at once, on average over the steps of a round: at its end slots wait for the last one.

    Args: lengths: of answers, from the front again where they run out.
    """
    ends = [0] * num_slots
    taken = list(itertools.islice(itertools.cycle(lengths), num_requests))
    for length in taken:
        # Each goes to the slot that is free first.
        heapq.heapreplace(ends, ends[0] + length)
    return sum(taken) / max(ends)


def served_slots(serving: ServingRates) -> int:
    """Requests that the server of regeneration decodes at once. Raises: ValueError if its command does not say."""
    command = serving.servers["regenerate"].command or ""
    found = re.search(r"--max-running-requests[ =](\d+)", command)
    if found is None:
        raise ValueError(f"the measured server does not say how many requests it ran at once: {command}")
    return int(found.group(1))


def served_model(serving: ServingRates) -> TargetModel:
    """The target that was served: an enlarged demo names its sizes, any other one is among those that ship."""
    name = serving.target.partition(",")[0]
    config = noted_config(serving.note)
    if not config:
        configs = hub_facts()["configs"]
        config = next((values for hub_id, values in configs.items() if hub_id.rpartition("/")[2] == name), {})
    return target_model(config, TargetConfig(model=name))


def noted_config(note: str | None) -> dict[str, Any]:
    """The sizes that the note on an enlarged demo names; none of another target."""
    sizes = re.findall(r"(hidden_size|num_\w+|intermediate_size|head_dim|vocab_size) ([\d,]+)", note or "")
    return {key: int(value.replace(",", "")) for key, value in sizes}


def _gpu(measured: TrainingBench | ServingRates) -> Hardware:
    assert measured.environment.gpu
    return find_hardware(measured.environment.gpu)


def _optimizer_rate(rows: Iterable[Row]) -> float:
    """Bytes/s of AdamW over all rows that profiled it."""
    profiled = [(row.gradient_bytes or 0, row.parts_ms["optimizer"]) for row in rows if "optimizer" in row.parts_ms]
    return (
        sum(ADAMW_BYTES * size / GRADIENT_BYTES for size, _ in profiled) * MILLISECONDS / sum(ms for _, ms in profiled)
    )


def _read_rate(step: StepRow) -> float:
    """Of a disk that is at least so fast."""
    return step.stored_bytes * MILLISECONDS / sum(step.cold_step_ms)


def json_files(directory: Path) -> list[dict[str, Any]]:
    """What each of its JSON files holds, where that is an object."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))]
    return [values for values in found if isinstance(values, dict)]
