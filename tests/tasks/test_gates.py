"""Each gate lets the threshold itself pass, fails just below it, and says what to do."""

import math

import pytest

from specforge_core.facts import GateFailure, Lossless, Measurement
from specforge_core.manifest_sections import GatesConfig, ServingConfig
from tasks.gates import check_gates
from tests.made_build import measurement, result, vocabulary

BUSY = ServingConfig(concurrency=8)


def failures(gates: GatesConfig, *measurements: Measurement, coverage: float = 1.0) -> tuple[GateFailure, ...]:
    return check_gates(gates, vocabulary(coverage), result(*measurements))


def test_a_draft_just_at_every_threshold_passes() -> None:
    gates = GatesConfig(min_acceptance_length=3.0, min_speedup=2.0, min_vocabulary_coverage=0.95)
    assert failures(gates, measurement("math"), measurement("code"), coverage=0.95) == ()


def test_acceptance_length_must_be_reached_on_every_suite_and_configuration() -> None:
    gates = GatesConfig(min_acceptance_length=3.0)
    # 299 tokens in 100 steps.
    low = measurement("code", num_output_tokens=299)
    low_when_busy = measurement("math", serving=BUSY, num_output_tokens=250)
    failed = failures(gates, measurement("math"), low, low_when_busy)
    assert [(f.gate, f.suite, f.measured, f.required) for f in failed] == [
        ("min_acceptance_length", "code", 2.99, 3.0),
        ("min_acceptance_length", "math", 2.5, 3.0),
    ]
    assert "2.99 on code with 3-1-4 at concurrency 1, 3.00 is required; train on more prompts" in failed[0].message
    assert "at concurrency 8" in failed[1].message


def test_speedup_counts_at_concurrency_1_only() -> None:
    gates = GatesConfig(min_speedup=1.6)
    assert failures(gates, measurement(), measurement(serving=BUSY, speedup=0.9)) == ()
    (failed,) = failures(gates, measurement(speedup=1.59, speedup_low=1.5, speedup_high=1.7))
    assert (failed.gate, failed.measured, failed.required) == ("min_speedup", 1.59, 1.6)
    assert "1.59x (1.50 to 1.70)" in failed.message


def test_a_speedup_that_nobody_measured_does_not_pass() -> None:
    (failed,) = failures(GatesConfig(min_speedup=1.6), measurement(serving=BUSY))
    assert (failed.gate, failed.suite, failed.measured) == ("min_speedup", None, None)
    assert "add `concurrency: 1` to benchmark.serving or set min_speedup to 0" in failed.message
    assert failures(GatesConfig(min_speedup=0.0), measurement(serving=BUSY)) == ()


def test_a_result_without_measurements_does_not_pass() -> None:
    assert {failed.gate for failed in failures(GatesConfig())} == {"min_acceptance_length", "min_speedup"}


def test_vocabulary_coverage() -> None:
    (failed,) = failures(GatesConfig(min_vocabulary_coverage=0.95), measurement(), coverage=0.9499)
    assert (failed.gate, failed.suite, failed.measured, failed.required) == (
        "min_vocabulary_coverage",
        None,
        0.9499,
        0.95,
    )
    assert "raise draft_vocab_size (the target has 4096)" in failed.message


def test_only_a_real_difference_is_a_loss() -> None:
    near_ties = Lossless(num_identical=0, num_near_tie=10, num_different=0)
    different = Lossless(num_identical=9, num_near_tie=0, num_different=1)
    assert failures(GatesConfig(), measurement(lossless=near_ties)) == ()
    (failed,) = failures(GatesConfig(), measurement(lossless=different))
    assert (failed.gate, failed.measured, failed.required) == ("lossless", 1, 0)
    assert "1 of 10 outputs with draft really differ" in failed.message
    assert failures(GatesConfig(lossless=False), measurement(lossless=different)) == ()


def test_a_sampled_run_has_nothing_to_compare() -> None:
    assert failures(GatesConfig(), measurement(lossless=None)) == ()


def test_a_server_must_accept_what_the_reference_accepts() -> None:
    gates = GatesConfig(max_serving_gap=0.02)
    # 1.9 % and 2.1 % from the reference, on either side.
    for factor in (1.019, 0.981):
        assert failures(gates, measurement(served_on_same_prompts=3.0, in_process_acceptance_length=3.0 / factor)) == ()
    (above,) = failures(gates, measurement(served_on_same_prompts=3.0, in_process_acceptance_length=3.0 / 1.021))
    (below,) = failures(gates, measurement(served_on_same_prompts=3.0, in_process_acceptance_length=3.0 / 0.979))
    assert [(f.gate, f.suite, f.required) for f in (above, below)] == [("max_serving_gap", "math", 0.02)] * 2
    assert [above.measured, below.measured] == pytest.approx([0.021, 0.021])
    assert "is +2.1% from the 2.94 of the same draft" in above.message
    assert "is -2.1% from the 3.06 of the same draft" in below.message
    assert "2.0% is allowed" in above.message


def test_the_serving_gap_is_that_of_the_prompts_decoded_in_both() -> None:
    gates = GatesConfig(max_serving_gap=0.02)
    # The other prompts are easier: on those that both decoded, the server is 1 % lower.
    both = measurement(in_process_acceptance_length=2.0, served_on_same_prompts=1.98)
    assert failures(gates, both) == ()
    assert both.serving_gap == pytest.approx(-0.01)
    assert measurement().serving_gap is None


def test_a_server_without_ngram_drafter_and_reference_is_judged_by_the_other_gates() -> None:
    served = measurement(ngram_acceptance_length=None, in_process_acceptance_length=None)
    assert failures(GatesConfig(max_serving_gap=0.0), served) == ()


def test_a_speedup_above_the_acceptance_length_is_an_error_of_the_measurement() -> None:
    assert failures(GatesConfig(), measurement(speedup=3.0)) == ()
    (failed,) = failures(GatesConfig(), measurement(serving=BUSY, speedup=3.01), measurement())
    assert (failed.gate, failed.measured, failed.required) == ("speedup_is_possible", 3.01, 3.0)
    assert "measure again on an idle machine" in failed.message


def test_a_value_that_is_no_number_fails() -> None:
    assert {failed.gate for failed in failures(GatesConfig(), measurement(speedup=math.nan))} == {
        "min_speedup",
        "speedup_is_possible",
    }
