"""The last question of a build: does the draft reach what its manifest entry asks for?"""

from specforge_core.benchmark.compare import Comparison, Standing, baseline_name, baseline_speeds, in_percent, where
from specforge_core.facts import BenchmarkResult, GateFailure, Measurement, Vocabulary
from specforge_core.manifest_gates import GatesConfig, ThresholdConfig

AGAIN = (
    "measure again on an idle machine (without its folder, which `specbundle show` names, a benchmark is made again)"
)
REGRESSION_ADVICE = {
    "acceptance length": "train on more prompts like this suite's or for more epochs",
    "speedup": f"try a smaller draft_vocab_size or another num_steps, or {AGAIN}",
}


def check_gates(
    gates: GatesConfig, vocabulary: Vocabulary, result: BenchmarkResult, standing: Standing
) -> tuple[GateFailure, ...]:
    """The gates that this draft fails, in the manifest's order; empty if it may be published.

    A gate that nothing measured fails too: publishing needs evidence, not the absence of a complaint.
    """
    checks = (
        _thresholds(gates, result),
        _coverage(gates, vocabulary),
        _lossless(gates, result),
        _serving_gap(gates, result),
        _baseline(gates, result, standing),
        _relative(gates, standing),
        _speedup_is_possible(result),
        [] if standing.rolled_back is None else [rolled_back(standing.rolled_back)],
    )
    return tuple(failure for failures in checks for failure in failures)


# Comparisons are written as "not (measured >= required)", so that a NaN fails.


def _thresholds(gates: GatesConfig, result: BenchmarkResult) -> list[GateFailure]:
    failures = []
    for threshold in gates.all_thresholds():
        fitting = [m for m in result.measurements if threshold.fits(m.suite, m.serving.concurrency)]
        length, speedup = threshold.min_acceptance_length, threshold.min_speedup
        if length is not None:
            below = [m for m in fitting if not m.acceptance_length >= length]
            failures += [_acceptance_length(measurement, length) for measurement in below]
        # At 0 nobody needs to measure it.
        if speedup:
            failures += [
                _speedup(measurement, speedup) for measurement in fitting if not measurement.speedup >= speedup
            ]
        if not fitting:
            asked = {"min_acceptance_length": length, "min_speedup": speedup}
            failures += [_unmeasured(gate, required, threshold) for gate, required in asked.items() if required]
    return failures


def _unmeasured(gate: str, required: float, threshold: ThresholdConfig) -> GateFailure:
    suite = f" of {threshold.suite}" if threshold.suite else ""
    load = f" at concurrency {threshold.concurrency}" if threshold.concurrency else ""
    message = (
        f"no measurement{suite}{load}, {gate} is {required:.2f} there; add it to benchmark.suites and "
        f"benchmark.serving, or {'set it to 0' if gate == 'min_speedup' else 'remove it'}"
    )
    return GateFailure(gate=gate, suite=threshold.suite, measured=None, required=required, message=message)


def _acceptance_length(measurement: Measurement, required: float) -> GateFailure:
    return GateFailure(
        gate="min_acceptance_length",
        suite=measurement.suite,
        measured=measurement.acceptance_length,
        required=required,
        message=f"acceptance length {measurement.acceptance_length:.2f} {where(measurement)}, {required:.2f} is "
        "required; train on more prompts like this suite's or for more epochs, or lower min_acceptance_length",
    )


def _speedup(measurement: Measurement, required: float) -> GateFailure:
    return GateFailure(
        gate="min_speedup",
        suite=measurement.suite,
        measured=measurement.speedup,
        required=required,
        message=f"speedup {measurement.speedup:.2f}x ({measurement.speedup_low:.2f} to "
        f"{measurement.speedup_high:.2f}) {where(measurement)}, {required:.2f}x is required; "
        "try another num_steps, a smaller draft_vocab_size, or measure on an idle machine",
    )


def _coverage(gates: GatesConfig, vocabulary: Vocabulary) -> list[GateFailure]:
    required = gates.min_vocabulary_coverage
    if vocabulary.coverage >= required:
        return []
    message = (
        f"the draft vocabulary of {vocabulary.draft_vocab_size} covers {vocabulary.coverage:.2%} of the target's "
        f"tokens, {required:.2%} is required; raise draft_vocab_size (the target has {vocabulary.target_vocab_size})"
    )
    return [
        GateFailure(
            gate="min_vocabulary_coverage", suite=None, measured=vocabulary.coverage, required=required, message=message
        )
    ]


def _lossless(gates: GatesConfig, result: BenchmarkResult) -> list[GateFailure]:
    if not gates.lossless:
        return []
    return [
        GateFailure(
            gate="lossless",
            suite=measurement.suite,
            measured=measurement.lossless.num_different,
            required=0,
            message=f"{measurement.lossless.num_different} of {measurement.num_prompts} outputs with draft really "
            f"differ from those without {where(measurement)}, 0 may; a draft cannot change greedy output, so this is "
            "an error of the engine: report it with the benchmark's artifact",
        )
        for measurement in result.measurements
        # Sampled runs have no such check: there the distribution is equal, not the text.
        if measurement.lossless is not None and measurement.lossless.num_different > 0
    ]


def _serving_gap(gates: GatesConfig, result: BenchmarkResult) -> list[GateFailure]:
    required = gates.max_serving_gap
    return [
        GateFailure(
            gate="max_serving_gap",
            suite=measurement.suite,
            measured=abs(gap),
            required=required,
            message=f"the server's acceptance length is {gap:+.1%} from the "
            f"{measurement.in_process_acceptance_length:.2f} of the same draft in this project's own loop, "
            f"{where(measurement)}, {required:.1%} is allowed; see the server's log for tensors that it ignored, or "
            "raise benchmark.num_in_process_prompts if they are few",
        )
        for measurement in result.measurements
        # Not every benchmark has the reference: it takes the target in a process of its own.
        if (gap := measurement.serving_gap) is not None and not abs(gap) <= required
    ]


def _baseline(gates: GatesConfig, result: BenchmarkResult, standing: Standing) -> list[GateFailure]:
    required, failures = gates.max_baseline_factor, []
    for name, speed in baseline_speeds(result).items():
        usual = standing.usual_speeds.get(name)
        # The first draft that is measured in a setting defines what is usual there.
        if usual is None or 1 / required <= speed / usual <= required:
            continue
        measurement = next(m for m in result.measurements if baseline_name(m) == name)
        message = (
            f"without draft {speed:,.0f} output tokens/s on {measurement.suite} at concurrency "
            f"{measurement.serving.concurrency}, {speed / usual:.2f} times the usual {usual:,.0f} of "
            f"{standing.setting}; {1 / required:.2f} to {required:.2f} times is allowed: {AGAIN}, or raise "
            "max_baseline_factor"
        )
        failures.append(
            GateFailure(
                gate="max_baseline_factor",
                suite=measurement.suite,
                measured=speed / usual,
                required=required,
                message=message,
            )
        )
    return failures


def _relative(gates: GatesConfig, standing: Standing) -> list[GateFailure]:
    comparison, asked = standing.comparison, gates.relative()
    if standing.unknown:
        reason = (
            f"the champion is unknown: {standing.unknown}; build again once the tracking server answers, which reuses "
            f"every stage, or remove {' and '.join(asked)}"
        )
    elif comparison is None:
        return []
    elif comparison.mean_acceptance() is None:
        reason = (
            f"nothing shows how this draft compares to the champion (version {comparison.version}): "
            f"{'; '.join(comparison.not_compared)}; measure the champion again with this benchmark, or remove "
            f"{' and '.join(asked)}"
        )
    else:
        return [*_regression(gates, comparison), *_improvement(gates, comparison)]
    return [
        GateFailure(gate=gate, suite=None, measured=None, required=required, message=reason)
        for gate, required in asked.items()
    ]


def _regression(gates: GatesConfig, comparison: Comparison) -> list[GateFailure]:
    allowed = gates.max_regression
    if allowed is None:
        return []
    return [
        GateFailure(
            gate="max_regression",
            suite=change.suite,
            measured=change.ratio.value - 1,
            required=-allowed,
            message=f"{change.metric} {change.measured:.2f} {where(change)}, the champion (version "
            f"{comparison.version}) has {change.champion:.2f}: {in_percent(change.ratio)}, -{allowed:.1%} is allowed; "
            f"{REGRESSION_ADVICE[change.metric]}, or raise max_regression",
        )
        for change in comparison.changes
        # A fall that the interval does not show may be chance.
        if not (change.ratio.value >= 1 - allowed or change.high >= 1)
    ]


def _improvement(gates: GatesConfig, comparison: Comparison) -> list[GateFailure]:
    required, mean = gates.min_improvement, comparison.mean_acceptance()
    if required is None or mean is None:
        return []
    # A rise must be shown, and so must a fall.
    passes = mean.value >= 1 + required and mean.low > 1 if required > 0 else mean.high >= 1
    message = (
        f"mean acceptance length {in_percent(mean)} from the champion's (version {comparison.version}), "
        f"+{required:.1%} is required; train on more prompts or for more epochs, measure more prompts if the interval "
        "is wide, or lower min_improvement"
    )
    failure = GateFailure(
        gate="min_improvement", suite=None, measured=mean.value - 1, required=required, message=message
    )
    return [] if passes else [failure]


def rolled_back(version: int) -> GateFailure:
    """Why a draft is not published that an entry was rolled back from."""
    message = (
        f"this draft is version {version}, from which the entry was rolled back; change what it is made of, or take it "
        f"back with `specbundle rollback ENTRY --to {version}`"
    )
    return GateFailure(gate="rolled_back", suite=None, measured=None, required=0, message=message)


def _speedup_is_possible(result: BenchmarkResult) -> list[GateFailure]:
    # A verification step costs at least a target step, so its tokens per step bound what can be gained.
    return [
        GateFailure(
            gate="speedup_is_possible",
            suite=measurement.suite,
            measured=measurement.speedup,
            required=measurement.acceptance_length,
            message=f"speedup {measurement.speedup:.2f}x is above the acceptance length "
            f"{measurement.acceptance_length:.2f} {where(measurement)}, which no draft can do; the baseline was "
            "slowed down or counted wrongly: measure again on an idle machine",
        )
        for measurement in result.measurements
        if not measurement.speedup <= measurement.acceptance_length
    ]
