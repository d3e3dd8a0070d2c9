"""A sweep: its points, the best chain at each load, where to switch speculation off, and launch commands. Torch-free.

Acceptance does not depend on the load, but what a draft costs does: a lone request leaves the GPU's arithmetic idle, so
verifying more tokens is nearly free, and at many requests at once it is not.
"""

import shlex
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import NamedTuple

from specforge_core.benchmark.interval import median_interval
from specforge_core.benchmark.server_flags import Options, draft_options, model_options
from specforge_core.facts import BenchmarkResult, SweepPoint
from specforge_core.manifest_sections import EngineConfig, ServingConfig, SweepConfig, TargetConfig

LAUNCH_NOTE = (
    "Attention backend, CUDA graphs and the share of memory are left to the server, which chooses them for its GPU; "
    "the servers of a benchmark have them fixed."
)
SWEEP_ROUNDS = 2
"""Of each point, without and with draft."""


class LoadAdvice(NamedTuple):
    """What to do at one concurrency."""

    concurrency: int
    serving: ServingConfig | None
    """The best chain; None: no chain was shown to be faster than the target alone, so switch speculation off."""
    output_tokens_per_s: float
    """With the above; a median."""
    baseline_output_tokens_per_s: float
    """Of the target alone, in the rounds that took turns with the above; a median."""
    speedup: float
    """The one over the other; 1 without a chain."""


def sweep_servings(sweep: SweepConfig) -> tuple[ServingConfig, ...]:
    """The points that are measured, chain by chain."""
    return tuple(
        ServingConfig(num_steps=num_steps, topk=topk, num_draft_tokens=num_draft_tokens, concurrency=concurrency)
        for num_steps, topk, num_draft_tokens in sweep.chains
        for concurrency in sweep.concurrencies
    )


def best_per_load(points: Sequence[SweepPoint]) -> tuple[LoadAdvice, ...]:
    """The advice for every concurrency of a sweep, ascending."""
    advice = []
    for concurrency, speed_alone in speeds_without_draft(points).items():
        faster = [point for point in points if point.serving.concurrency == concurrency and is_faster(point)]
        if faster:
            # The shorter of two chains that are equally fast.
            best = max(faster, key=lambda point: (output_speed(point), -point.serving.num_draft_tokens))
            advice.append(LoadAdvice(concurrency, best.serving, output_speed(best), baseline_speed(best), best.speedup))
        else:
            advice.append(LoadAdvice(concurrency, None, speed_alone, speed_alone, 1.0))
    return tuple(advice)


def is_faster(point: SweepPoint) -> bool:
    """Whether the repeats show that this chain beats the target alone: each of them does, or the 95 % interval of their
    ratios lies above 1. A tie within noise is no gain that is worth a second model."""
    pairs = zip(point.output_tokens_per_s, point.baseline_output_tokens_per_s, strict=True)
    ratios = [with_draft / without for with_draft, without in pairs]
    return all(ratio > 1 for ratio in ratios) or (len(ratios) >= 2 and median_interval(ratios).low > 1)


def switch_off_at(points: Sequence[SweepPoint]) -> int | None:
    """The lowest concurrency from which on no chain pays; None if one pays at the highest that was measured."""
    off = None
    for advice in reversed(best_per_load(points)):
        if advice.serving is not None:
            break
        off = advice.concurrency
    return off


def output_speed(point: SweepPoint) -> float:
    """Output tokens/s with draft: the median over the repeats."""
    return median(point.output_tokens_per_s)


def baseline_speed(point: SweepPoint) -> float:
    """Output tokens/s of the target alone beside this chain: the median over the repeats."""
    return median(point.baseline_output_tokens_per_s)


def speeds_without_draft(points: Sequence[SweepPoint]) -> dict[int, float]:
    """The target's own output tokens/s by concurrency, ascending: medians over the repeats of all chains."""
    return {concurrency: median(speeds) for concurrency, speeds in rounds_without_draft(points).items()}


def rounds_without_draft(points: Sequence[SweepPoint]) -> dict[int, tuple[float, ...]]:
    """The target's own output tokens/s in each round beside any chain, by concurrency, ascending."""
    speeds: dict[int, tuple[float, ...]] = {}
    for point in sorted(points, key=lambda point: point.serving.concurrency):
        concurrency = point.serving.concurrency
        speeds[concurrency] = speeds.get(concurrency, ()) + point.baseline_output_tokens_per_s
    return speeds


def launch_line(
    target: TargetConfig,
    draft: Path | str,
    serving: ServingConfig | None,
    *,
    tensor_parallel: int = 1,
    max_running_requests: int | None = None,
) -> str:
    """The SGLang command that serves the target, on several lines, to be pasted into a shell.

    Args: draft: folder or Hub id; serving: None serves the target alone; max_running_requests: None leaves it to the
    server, which with a draft takes 48.
    """
    # SGLang does not serve float32.
    served = target.model_copy(update={"dtype": "bfloat16"}) if target.dtype == "float32" else target
    options: Options = {
        **model_options(served, tensor_parallel=tensor_parallel),
        **({"--max-running-requests": max_running_requests} if max_running_requests else {}),
        **(draft_options(draft, serving) if serving else {}),
    }
    parts = [
        flag if value is True else f"{flag} {shell_word(str(value))}"
        for flag, value in options.items()
        if value is not False
    ]
    return " \\\n  ".join(["python3 -m sglang.launch_server", *parts])


def shell_word(value: str) -> str:
    # A shell finds the home directory only where the tilde is not quoted.
    return f"~/{shlex.quote(value[2:])}" if value.startswith("~/") else shlex.quote(value)


def launch_lines(
    result: BenchmarkResult, target: TargetConfig, draft: Path | str, engine: EngineConfig
) -> dict[str, str]:
    """The server's command by a title: one for each load at which the sweep found another one best; without a sweep,
    one for each chain that was measured."""
    is_served = result.engine == "sglang"

    def line(serving: ServingConfig | None) -> str:
        return launch_line(
            target,
            draft,
            serving,
            tensor_parallel=engine.tensor_parallel,
            max_running_requests=engine.max_running_requests if is_served else None,
        )

    if result.sweep:
        return {_title(group): line(group[0].serving) for group in _alike(best_per_load(result.sweep))}
    concurrencies: dict[str, set[int]] = {}
    servings: dict[str, ServingConfig] = {}
    for measurement in result.measurements:
        chain = measurement.serving.chain()
        concurrencies.setdefault(chain, set()).add(measurement.serving.concurrency)
        servings.setdefault(chain, measurement.serving)
    return {
        f"Chain {chain}, measured at concurrency {', '.join(map(str, sorted(concurrencies[chain])))}": line(serving)
        for chain, serving in servings.items()
    }


def _alike(advice: Sequence[LoadAdvice]) -> list[tuple[LoadAdvice, ...]]:
    """Neighbouring loads with one chain, together."""
    return [tuple(group) for _, group in groupby(advice, key=lambda load: load.serving and load.serving.chain())]


def _title(group: Sequence[LoadAdvice]) -> str:
    first, last = group[0].concurrency, group[-1].concurrency
    load = f"{first} to {last} requests" if last > first else f"{first} request{'s' if first > 1 else ''}"
    serving = group[0].serving
    if serving is None:
        return f"At {load} at once, without draft"
    gains = [f"{advice.speedup:.2f}x" for advice in (group[0], group[-1])[: len(group)]]
    return f"At {load} at once, chain {serving.chain()} ({' to '.join(gains)})"
