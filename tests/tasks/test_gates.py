"""Each gate lets the threshold itself pass, fails just below it, and says what to do."""

import math

import pytest

from specforge_core.benchmark.compare import Measured, Standing, compare
from specforge_core.facts import GateFailure, Lossless, Measurement
from specforge_core.manifest_gates import GatesConfig, ThresholdConfig
from specforge_core.manifest_sections import EngineConfig, ServingConfig
from tasks.gates import check_gates
from tests.made_build import measurement, prompts, result, vocabulary

BUSY = ServingConfig(concurrency=8)
FIRST = Standing()
"""That of a draft before which nothing is registered."""


def failures(
    gates: GatesConfig, *measurements: Measurement, coverage: float = 1.0, standing: Standing = FIRST
) -> tuple[GateFailure, ...]:
    return check_gates(gates, vocabulary(coverage), result(*measurements), standing)


def against(*measurements: Measurement, champion: tuple[Measurement, ...]) -> Standing:
    """The standing of a draft with these measurements against a champion with those, version 4."""
    new, before = (Measured(result(*figures), EngineConfig()) for figures in (measurements, champion))
    return Standing(comparison=compare(new, before, version=4))


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
    assert (
        "no measurement at concurrency 1, min_speedup is 1.60 there; add it to benchmark.suites and" in failed.message
    )
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


def test_a_threshold_is_for_its_suite_and_its_load_alone() -> None:
    gates = GatesConfig(
        thresholds=(
            ThresholdConfig(suite="code", min_acceptance_length=3.5),
            ThresholdConfig(concurrency=8, min_speedup=1.5),
            ThresholdConfig(suite="math", concurrency=8, min_speedup=1.8),
        )
    )
    passing = measurement("code", num_output_tokens=350), measurement("math", serving=BUSY, speedup=1.8)
    assert failures(gates, *passing, measurement("math")) == ()
    slow = measurement("code", serving=BUSY, num_output_tokens=350, speedup=1.49)
    below = measurement("code"), slow, measurement("math", serving=BUSY, speedup=1.7)
    assert [(f.gate, f.suite, f.measured, f.required) for f in failures(gates, *below)] == [
        ("min_acceptance_length", "code", 3.0, 3.5),
        ("min_speedup", "code", 1.49, 1.5),
        ("min_speedup", "math", 1.7, 1.8),
    ]


def test_a_threshold_that_nothing_measured_fails() -> None:
    (failed,) = failures(GatesConfig(thresholds=(ThresholdConfig(concurrency=64, min_speedup=1.1),)), measurement())
    assert (failed.gate, failed.measured) == ("min_speedup", None)
    assert "no measurement at concurrency 64" in failed.message


BOTH = GatesConfig(max_regression=0.05, min_improvement=0.0)


def stepped(steps: tuple[int, ...], suite: str = "math", tokens: int = 30) -> Measurement:
    """Every prompt gives so many tokens, in these steps."""
    return measurement(
        suite,
        num_output_tokens=tokens * len(steps),
        num_verify_steps=sum(steps),
        prompts=prompts(*steps, num_output_tokens=tokens),
    )


CHAMPION = stepped((10, 10, 10, 10, 10))


def test_the_first_draft_has_no_champion_to_be_held_against() -> None:
    assert failures(BOTH, measurement()) == ()


def test_a_fall_that_is_allowed_or_may_be_chance_is_no_regression() -> None:
    gates = GatesConfig(max_regression=0.05)
    # 52 steps for 50: 3.8 % less, and certain, for every prompt needs more. Then 8 % less because of a single prompt.
    for steps in ((10, 10, 10, 11, 11), (10, 10, 10, 10, 14)):
        draft = stepped(steps)
        assert failures(gates, draft, standing=against(draft, champion=(CHAMPION,))) == ()


def test_a_suite_that_fell_by_more_than_is_allowed_says_by_how_much_and_how_sure_that_is() -> None:
    gates, code = GatesConfig(max_regression=0.05), stepped((10, 10, 10, 10, 10), "code")
    # 55 steps for 50.
    draft = stepped((11, 11, 11, 11, 11))
    (failed,) = failures(gates, draft, code, standing=against(draft, code, champion=(CHAMPION, code)))
    assert (failed.gate, failed.suite, failed.required) == ("max_regression", "math", -0.05)
    assert failed.measured == pytest.approx(50 / 55 - 1)
    assert (
        "acceptance length 2.73 on math with 3-1-4 at concurrency 1, the champion (version 4) has 3.00: "
        "-9.1% (-9.1% to -9.1%), -5.0% is allowed; train on more prompts like this suite's" in failed.message
    )


def test_a_speedup_that_fell_is_a_regression_where_its_interval_shows_it() -> None:
    gates = GatesConfig(max_regression=0.05)
    noisy = CHAMPION.model_copy(update={"speedup": 1.8, "speedup_low": 1.2, "speedup_high": 2.2})
    assert failures(gates, noisy, standing=against(noisy, champion=(CHAMPION,))) == ()
    # The champion's is 2.0 (1.9 to 2.1): together 10 % -+ 7 %.
    sure = CHAMPION.model_copy(update={"speedup": 1.8, "speedup_low": 1.72, "speedup_high": 1.88})
    (failed,) = failures(gates, sure, standing=against(sure, champion=(CHAMPION,)))
    assert failed.measured == pytest.approx(-0.1)
    assert "speedup 1.80 on math" in failed.message
    assert "without its folder, which `specbundle show` names, a benchmark is made again" in failed.message


def test_the_mean_must_not_be_shown_to_fall_however_little() -> None:
    gates, code = GatesConfig(min_improvement=0.0), stepped((10, 10, 10, 10, 10), "code")
    slightly = stepped((102, 102, 102, 102, 102), tokens=300)
    champion = stepped((100, 100, 100, 100, 100), tokens=300)
    (failed,) = failures(gates, slightly, code, standing=against(slightly, code, champion=(champion, code)))
    assert (failed.gate, failed.suite, failed.required) == ("min_improvement", None, 0.0)
    # The geometric mean of 1/1.02 and 1.
    assert failed.measured == pytest.approx(1.02**-0.5 - 1)
    by_chance = stepped((100, 95, 105, 100, 110), tokens=300)
    assert failures(gates, by_chance, standing=against(by_chance, champion=(champion,))) == ()


def test_a_rise_that_is_asked_for_must_be_large_enough_and_shown() -> None:
    gates, champion = GatesConfig(min_improvement=0.05), stepped((22,) * 5, tokens=60)
    too_small, enough, by_chance = (stepped(steps, tokens=60) for steps in ((21,) * 5, (20,) * 5, (8, 22, 24, 24, 22)))
    assert failures(gates, enough, standing=against(enough, champion=(champion,))) == ()
    for draft, change in ((too_small, 22 / 21 - 1), (by_chance, 0.1)):
        (failed,) = failures(gates, draft, standing=against(draft, champion=(champion,)))
        assert (failed.gate, failed.measured) == ("min_improvement", pytest.approx(change))
        assert "+5.0% is required" in failed.message


def test_without_a_registry_the_gates_that_need_it_fail_and_the_others_do_not() -> None:
    lost = Standing(unknown="http://tracker cannot be asked")
    assert failures(GatesConfig(), measurement(), standing=lost) == ()
    failed = failures(BOTH, measurement(), standing=lost)
    assert [(f.gate, f.measured, f.required) for f in failed] == [
        ("max_regression", None, -0.05),
        ("min_improvement", None, 0.0),
    ]
    assert "the champion is unknown: http://tracker cannot be asked; build again once" in failed[0].message
    assert "or remove max_regression and min_improvement" in failed[0].message


def test_a_draft_that_nothing_can_be_said_about_fails() -> None:
    other_prompts = CHAMPION.model_copy(update={"prompts": prompts(10, 10, 10, 10, 10, ids_digest="others")})
    (failed,) = failures(
        GatesConfig(max_regression=0.5), CHAMPION, standing=against(CHAMPION, champion=(other_prompts,))
    )
    assert (failed.gate, failed.measured) == ("max_regression", None)
    assert "acceptance length on math with 3-1-4 at concurrency 1: it shares no two prompts with version 4" in (
        failed.message
    )


def test_a_baseline_far_from_the_usual_is_no_measurement() -> None:
    gates, usual = (
        GatesConfig(max_baseline_factor=2.0),
        Standing(usual_speeds={"math-c1": 204.0}, setting="sglang on X"),
    )
    # The median without draft is 102.
    assert failures(gates, measurement(), standing=usual) == ()
    assert failures(gates, measurement(serving=BUSY), measurement(), standing=usual) == ()
    (slow,) = failures(gates, measurement(), standing=usual._replace(usual_speeds={"math-c1": 205.0}))
    (fast,) = failures(gates, measurement(), standing=usual._replace(usual_speeds={"math-c1": 50.0}))
    assert [(f.gate, f.suite, f.required) for f in (slow, fast)] == [("max_baseline_factor", "math", 2.0)] * 2
    assert [slow.measured, fast.measured] == pytest.approx([102 / 205, 102 / 50])
    assert "102 output tokens/s on math at concurrency 1, 0.50 times the usual 205 of sglang on X" in slow.message


def test_a_draft_that_was_rolled_back_stays_so() -> None:
    (failed,) = failures(GatesConfig(), measurement(), standing=Standing(rolled_back=3))
    assert failed.gate == "rolled_back"
    assert "`specbundle rollback ENTRY --to 3`" in failed.message
