"""What is compared with what, and what is left out and said; how sure a change is, is in test_interval.py."""

import pytest

from specforge_core.benchmark.compare import Measured, Setting, baseline_speeds, compare
from specforge_core.facts import BenchmarkResult, ServerRecord
from specforge_core.manifest_sections import EngineConfig, ServingConfig
from tests.made_build import measurement, prompts, result

ON_GPU = {"gpu": "Made-up GPU"}


def measured(found: BenchmarkResult, *, tensor_parallel: int = 1, **environment: object) -> Measured:
    made_on = found.environment.model_copy(update=environment)
    return Measured(found.model_copy(update={"environment": made_on}), EngineConfig(tensor_parallel=tensor_parallel))


def test_every_suite_and_serving_configuration_has_two_changes_and_acceptance_has_a_mean() -> None:
    busy = ServingConfig(concurrency=8)
    # 50 steps for 60; 60 for 50; and at 8 at once no change.
    new = result(
        measurement("math", num_output_tokens=60, num_verify_steps=20, prompts=prompts(10, 10)),
        measurement("code", num_output_tokens=60, num_verify_steps=30, prompts=prompts(15, 15)),
        measurement(
            "math", serving=busy, num_output_tokens=60, num_verify_steps=20, prompts=prompts(10, 10), speedup=1.9
        ),
    )
    before = result(
        measurement("math", num_output_tokens=60, num_verify_steps=24, prompts=prompts(12, 12)),
        measurement("code", num_output_tokens=60, num_verify_steps=24, prompts=prompts(12, 12)),
        measurement("math", serving=busy, num_output_tokens=60, num_verify_steps=20, prompts=prompts(10, 10)),
    )
    comparison = compare(measured(new), measured(before), version=2)
    assert [(c.metric, c.suite, c.serving.concurrency, c.champion, c.measured) for c in comparison.changes] == [
        ("acceptance length", "math", 1, 2.5, 3.0),
        ("speedup", "math", 1, 2.0, 2.0),
        ("acceptance length", "code", 1, 2.5, 2.0),
        ("speedup", "code", 1, 2.0, 2.0),
        ("acceptance length", "math", 8, 3.0, 3.0),
        ("speedup", "math", 8, 2.0, 1.9),
    ]
    assert comparison.not_compared == ()
    # 1.2 and 0.8 at the first configuration: the root of 0.96.
    mean = comparison.mean_acceptance()
    assert mean is not None
    assert mean == pytest.approx((0.96**0.5,) * 3)


def test_speed_is_compared_on_one_engine_and_hardware_and_acceptance_on_any() -> None:
    here = result(measurement(prompts=prompts(10, 10, 10)))
    for elsewhere in (
        measured(here, **ON_GPU),
        measured(here, cpu="Another CPU"),
        Measured(here.model_copy(update={"engine": "sglang"}), EngineConfig()),
    ):
        comparison = compare(measured(here), elsewhere, version=2)
        assert [change.metric for change in comparison.changes] == ["acceptance length"]
        assert comparison.not_compared[0].startswith("speedups: those of version 2 are of ")
    # Two GPUs for each copy of the target are another thing than one.
    comparison = compare(measured(here, **ON_GPU), measured(here, tensor_parallel=2, **ON_GPU), version=2)
    assert comparison.not_compared == ("speedups: those of version 2 are of transformers on 2 x Made-up GPU",)
    # How many threads were fastest is no part of the hardware.
    assert compare(measured(here), measured(here, num_threads=1), version=2).not_compared == ()


def test_what_only_one_of_them_was_measured_on_is_said() -> None:
    new, before = result(measurement("math"), measurement("code")), result(measurement("code"), measurement("chat"))
    comparison = compare(measured(new), measured(before), version=7)
    # Records from before sums were kept by prompt.
    assert [(change.metric, change.suite) for change in comparison.changes] == [("speedup", "code")]
    assert comparison.mean_acceptance() is None
    assert comparison.not_compared == (
        "on math with 3-1-4 at concurrency 1: version 7 was not measured there",
        "acceptance length on code with 3-1-4 at concurrency 1: it shares no two prompts with version 7",
        "on chat with 3-1-4 at concurrency 1: measured of version 7 alone",
    )


def test_a_setting_is_the_engine_with_its_version_and_the_hardware_of_one_server() -> None:
    found = result(measurement())
    assert measured(found).setting() == Setting("transformers", "5.23.0", "Made-up CPU 9000")
    server = ServerRecord(version="0.5.14")
    served = found.model_copy(update={"engine": "sglang", "servers": {"baseline": server, "3-1-4": server}})
    assert str(measured(served, tensor_parallel=4, **ON_GPU).setting()) == "sglang 0.5.14 on 4 x Made-up GPU"


def test_speeds_without_draft_are_known_by_suite_and_load_whatever_the_chain() -> None:
    long = ServingConfig(num_steps=7, num_draft_tokens=8)
    found = result(
        measurement(baseline_output_tokens_per_s=(100.0, 110.0)),
        measurement(serving=long, baseline_output_tokens_per_s=(120.0,)),
        measurement(serving=ServingConfig(concurrency=8), baseline_output_tokens_per_s=(700.0,)),
    )
    assert baseline_speeds(found) == {"math-c1": 110.0, "math-c8": 700.0}
