"""The last question of a build: does the draft reach what its manifest entry asks for?"""

from specforge_core.facts import BenchmarkResult, GateFailure, Measurement, Vocabulary
from specforge_core.manifest_sections import GatesConfig


def check_gates(gates: GatesConfig, vocabulary: Vocabulary, result: BenchmarkResult) -> tuple[GateFailure, ...]:
    """The gates that this draft fails, in the manifest's order; empty if it may be published.

    A gate that nothing measured fails too: publishing needs evidence, not the absence of a complaint.
    """
    checks = (
        _acceptance_length(gates, result),
        _speedup(gates, result),
        _coverage(gates, vocabulary),
        _lossless(gates, result),
        _serving_gap(gates, result),
        _speedup_is_possible(result),
    )
    return tuple(failure for failures in checks for failure in failures)


def _where(measurement: Measurement) -> str:
    return f"on {measurement.suite} with {measurement.serving.chain()} at concurrency {measurement.serving.concurrency}"


# Comparisons are written as "not (measured >= required)", so that a NaN fails.


def _acceptance_length(gates: GatesConfig, result: BenchmarkResult) -> list[GateFailure]:
    required = gates.min_acceptance_length
    if not result.measurements:
        message = f"nothing was measured, {required:.2f} is required; give the entry a benchmark suite"
        return [
            GateFailure(gate="min_acceptance_length", suite=None, measured=None, required=required, message=message)
        ]
    return [
        GateFailure(
            gate="min_acceptance_length",
            suite=measurement.suite,
            measured=measurement.acceptance_length,
            required=required,
            message=f"acceptance length {measurement.acceptance_length:.2f} {_where(measurement)}, {required:.2f} is "
            "required; train on more prompts like this suite's or for more epochs, or lower min_acceptance_length",
        )
        for measurement in result.measurements
        if not measurement.acceptance_length >= required
    ]


def _speedup(gates: GatesConfig, result: BenchmarkResult) -> list[GateFailure]:
    required = gates.min_speedup
    alone = [measurement for measurement in result.measurements if measurement.serving.concurrency == 1]
    if not alone and required > 0:
        message = (
            f"no measurement at concurrency 1, a speedup of {required:.2f}x is required there; "
            "add `concurrency: 1` to benchmark.serving or set min_speedup to 0"
        )
        return [GateFailure(gate="min_speedup", suite=None, measured=None, required=required, message=message)]
    return [
        GateFailure(
            gate="min_speedup",
            suite=measurement.suite,
            measured=measurement.speedup,
            required=required,
            message=f"speedup {measurement.speedup:.2f}x ({measurement.speedup_low:.2f} to "
            f"{measurement.speedup_high:.2f}) {_where(measurement)}, {required:.2f}x is required; "
            "try another num_steps, a smaller draft_vocab_size, or measure on an idle machine",
        )
        for measurement in alone
        if not measurement.speedup >= required
    ]


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
            f"differ from those without {_where(measurement)}, 0 may; a draft cannot change greedy output, so this is "
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
            f"{_where(measurement)}, {required:.1%} is allowed; see the server's log for tensors that it ignored, or "
            "raise benchmark.num_in_process_prompts if they are few",
        )
        for measurement in result.measurements
        # Not every benchmark has the reference: it takes the target in a process of its own.
        if (gap := measurement.serving_gap) is not None and not abs(gap) <= required
    ]


def _speedup_is_possible(result: BenchmarkResult) -> list[GateFailure]:
    # A verification step costs at least a target step, so its tokens per step bound what can be gained.
    return [
        GateFailure(
            gate="speedup_is_possible",
            suite=measurement.suite,
            measured=measurement.speedup,
            required=measurement.acceptance_length,
            message=f"speedup {measurement.speedup:.2f}x is above the acceptance length "
            f"{measurement.acceptance_length:.2f} {_where(measurement)}, which no draft can do; the baseline was "
            "slowed down or counted wrongly: measure again on an idle machine",
        )
        for measurement in result.measurements
        if not measurement.speedup <= measurement.acceptance_length
    ]
