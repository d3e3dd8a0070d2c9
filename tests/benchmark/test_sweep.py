"""The best chain of each load is the one that the repeats show to be, and its command is the measured server's."""

import shlex
from pathlib import Path

import pytest

from specforge_core.benchmark.server_flags import draft_options, target_options
from specforge_core.benchmark.sweep import (
    LoadAdvice,
    best_per_load,
    is_faster,
    launch_line,
    launch_lines,
    switch_off_at,
)
from specforge_core.manifest_sections import EngineConfig, ServingConfig, TargetConfig
from tests.made_build import chain, measurement, result, served_result, sweep, sweep_point

TARGET = TargetConfig(model="org/target", revision="0123abc")


def words(line: str) -> list[str]:
    """As a shell reads them."""
    return shlex.split(line.replace("\\\n", ""))


def test_each_load_has_the_fastest_chain_or_none() -> None:
    assert best_per_load(sweep()) == (
        # Medians with draft 295, 340, 311; the long chain over 155: 2.19.
        LoadAdvice(1, chain(7, 1, 8, 1), 340.0, 155.0, 340 / 155),
        # 1470, 1300 and 1000, over 1130.
        LoadAdvice(8, chain(2, 1, 3, 8), 1470.0, 1130.0, 1470 / 1130),
        # A tie: 2250/2200, 2200/2100 and 2200/2300 is faster twice and slower once. All 9 baselines: median 2200.
        LoadAdvice(16, None, 2200.0, 2200.0, 1.0),
        LoadAdvice(32, None, 4200.0, 4200.0, 1.0),
    )


def test_speculation_is_switched_off_where_no_higher_load_gains_either() -> None:
    assert switch_off_at(sweep()) == 16
    assert switch_off_at([point for point in sweep() if point.serving.concurrency <= 8]) is None
    # A loss at 8 between gains at 1 and at 64 is no place to switch off.
    gap = [
        sweep_point(chain(3, 1, 4, 1), (100.0,), (200.0,)),
        sweep_point(chain(3, 1, 4, 8), (100.0,), (90.0,)),
        sweep_point(chain(3, 1, 4, 64), (100.0,), (110.0,)),
    ]
    assert switch_off_at(gap) is None
    assert switch_off_at(gap[:2]) == 8
    assert switch_off_at([]) is None


@pytest.mark.parametrize(
    ("baseline", "with_draft", "expected"),
    [
        ((100.0,), (101.0,), True),
        ((100.0,), (100.0,), False),
        ((100.0, 100.0), (150.0, 170.0), True),
        ((100.0, 100.0), (150.0, 99.0), False),
        # Eight ratios, one below 1: the interval goes from the smallest to the largest, so it holds 1.
        ((100.0,) * 8, (99.0, *[120.0] * 7), False),
        # Nine: from the second smallest on.
        ((100.0,) * 9, (99.0, *[120.0] * 8), True),
    ],
)
def test_a_gain_must_be_seen_in_every_repeat_or_by_the_interval(
    baseline: tuple[float, ...], with_draft: tuple[float, ...], expected: bool
) -> None:
    assert is_faster(sweep_point(chain(3, 1, 4), baseline, with_draft)) is expected


def test_a_fast_chain_that_is_noise_gives_way_to_a_slower_one_that_is_not() -> None:
    noisy = sweep_point(chain(7, 1, 8), (100.0, 100.0, 100.0), (180.0, 170.0, 90.0))
    sure = sweep_point(chain(3, 1, 4), (100.0, 100.0, 100.0), (140.0, 141.0, 142.0))
    (advice,) = best_per_load([noisy, sure])
    assert (advice.serving, advice.output_tokens_per_s) == (chain(3, 1, 4), 141.0)


def test_of_two_equally_fast_chains_the_shorter_is_taken() -> None:
    points = [sweep_point(chain(n, 1, n + 1), (100.0,), (150.0,)) for n in (5, 3, 7)]
    assert best_per_load(points)[0].serving == chain(3, 1, 4)


def test_the_launch_line_says_what_the_measured_server_was_told_and_leaves_its_tuning_out() -> None:
    serving = chain(5, 4, 16)
    line = words(launch_line(TARGET, "org/draft", serving, tensor_parallel=2, max_running_requests=64))
    assert line == [
        *("python3", "-m", "sglang.launch_server", "--model-path", "org/target", "--revision", "0123abc"),
        *("--dtype", "bfloat16", "--tp-size", "2", "--max-running-requests", "64"),
        *("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", "org/draft"),
        *("--speculative-num-steps", "5", "--speculative-eagle-topk", "4", "--speculative-num-draft-tokens", "16"),
    ]
    baseline = target_options(TARGET, EngineConfig(tensor_parallel=2, max_running_requests=64, mem_fraction_static=0.8))
    measured = {**baseline, **draft_options("org/draft", serving)}
    given = dict(zip(line[3::2], line[4::2], strict=True))
    assert given.items() <= {flag: str(value) for flag, value in measured.items()}.items()
    # These are what the benchmark fixes for its own sake.
    assert {flag for flag, value in measured.items() if value is not False} - given.keys() == {
        *("--load-format", "--mem-fraction-static", "--cuda-graph-max-bs-decode", "--cuda-graph-backend-prefill"),
        *("--attention-backend", "--sampling-backend", "--grammar-backend", "--skip-server-warmup", "--enable-metrics"),
    }


def test_a_line_without_draft_serves_the_target_alone() -> None:
    line = launch_line(TargetConfig(model="org/target"), "org/draft", None)
    assert words(line) == [
        *("python3", "-m", "sglang.launch_server", "--model-path", "org/target", "--dtype", "bfloat16"),
        *("--tp-size", "1"),
    ]


def test_a_line_survives_the_shell_and_is_never_in_float32() -> None:
    target = TargetConfig(model="/models/my target", dtype="float32", trust_remote_code=True)
    line = words(launch_line(target, Path("my drafts/one"), ServingConfig()))
    assert line[line.index("--model-path") + 1] == "/models/my target"
    assert line[line.index("--speculative-draft-model-path") + 1] == "my drafts/one"
    assert line[line.index("--dtype") + 1] == "bfloat16"
    assert "--trust-remote-code" in line
    at_home = launch_line(TargetConfig(model="~/my models/one"), ".", None)
    # Quoted, the tilde would be a folder's name.
    assert "--model-path ~/'my models/one'" in at_home


def test_a_sweep_gives_one_line_for_each_load_that_needs_another() -> None:
    lines = launch_lines(served_result(measurement()), TARGET, "org/draft", EngineConfig(max_running_requests=32))
    # 340 over 155 and 1470 over 1130.
    assert list(lines) == [
        "At 1 request at once, chain 7-1-8 (2.19x)",
        "At 8 requests at once, chain 2-1-3 (1.30x)",
        "At 16 to 32 requests at once, without draft",
    ]
    alone, busy, off = (words(line) for line in lines.values())
    assert alone[alone.index("--speculative-num-steps") + 1] == "7"
    assert busy[busy.index("--speculative-num-steps") + 1] == "2"
    assert not [word for word in off if word.startswith("--speculative")]
    assert all(line[line.index("--max-running-requests") + 1] == "32" for line in (alone, busy, off))


def test_loads_with_one_best_chain_share_a_line() -> None:
    points = tuple(
        sweep_point(chain(3, 1, 4, load), (100.0,), (with_draft,)) for load, with_draft in ((1, 210.0), (2, 190.0))
    )
    lines = launch_lines(served_result(measurement(), sweep=points), TARGET, "org/draft", EngineConfig())
    assert list(lines) == ["At 1 to 2 requests at once, chain 3-1-4 (2.10x to 1.90x)"]


def test_without_a_sweep_each_measured_chain_has_a_line() -> None:
    made = result(measurement(), measurement("code"), measurement(serving=ServingConfig(concurrency=8)))
    lines = launch_lines(made, TARGET, ".", EngineConfig(name="transformers"))
    assert list(lines) == ["Chain 3-1-4, measured at concurrency 1, 8"]
    # This project's own loop has no such limit.
    assert "--max-running-requests" not in next(iter(lines.values()))
