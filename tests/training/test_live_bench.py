"""The benchmark of live features: numbers made by hand, and the program on processes of a CPU."""

from itertools import repeat
from pathlib import Path

import pytest

from specforge_core.environment import environment
from specforge_core.training.bench import live as program
from specforge_core.training.bench.live import Report, Window, live_rate
from specforge_core.training.bench.live_results import Interval, LiveBench, LiveRate, Rate, Setup, markdown

SETUP = Setup(
    target="T",
    documents="128 documents",
    supervised_share=0.5,
    features_dtype="bfloat16",
    num_steps=7,
    tokens_per_micro_batch=8192,
    tokens_per_batch=16_384,
    buffer_gib=2.0,
    serve_gpus=2,
    train_gpus=2,
    tensor_parallel=2,
    cp=1,
)


def rate(*tokens_in_a_second: int) -> Rate:
    return Rate(intervals=tuple(Interval(num_tokens=count, elapsed_s=1.0) for count in tokens_in_a_second))


def report(num_tokens: int, elapsed_s: float, **metrics: float) -> Report:
    return Report(Interval(num_tokens=num_tokens, elapsed_s=elapsed_s), {f"live/{k}": v for k, v in metrics.items()})


def test_a_window_leaves_out_the_start_and_does_not_wait_for_what_comes_behind_it() -> None:
    reports = (report(number, 2.0) for number in range(100))
    # The first one, then 3 s, which are two reports, then 5 s, which are three.
    assert [one.interval.num_tokens for one in Window(3.0, 5.0).cut(reports)] == [3, 4, 5]
    assert next(reports).interval.num_tokens == 6
    with pytest.raises(RuntimeError, match="lower --seconds"):
        Window(3.0, 5.0).cut(repeat(report(1, 2.0), 5))


def test_both_sides_are_rated_over_the_same_time() -> None:
    found = live_rate(
        [
            report(1000, 1.0, produced_tokens_per_s=1600, producer_wait_share=0.5, trainer_wait_share=0.0),
            # Nothing was finished in this one.
            report(900, 1.0),
            report(2000, 2.0, produced_tokens_per_s=1000, producer_wait_share=0.2, trainer_wait_share=0.3),
        ]
    )
    # 1,600 in half a second; 1,000 a second in 1.6 of 2 s.
    assert [one.num_tokens for one in found.produced.intervals] == [800, 1600]
    assert found.produced.tokens_per_s == 800
    assert found.consumed.tokens_per_s == 975
    assert found.producer_wait_share == pytest.approx((0.5 + 2 * 0.2) / 3)
    assert found.trainer_wait_share == pytest.approx(0.2)
    # 175 tokens of a second came out of the buffer.
    assert found.sustained == found.produced


def test_the_report_holds_the_slower_side_against_the_slower_one_alone() -> None:
    result = LiveBench(
        environment=environment(num_threads=1, gpu="some GPU"),
        setup=SETUP,
        serve_alone=rate(45_000, 43_000),
        train_alone=rate(70_000),
        live=LiveRate(
            produced=rate(43_000, 42_460), consumed=rate(43_500), producer_wait_share=0.0, trainer_wait_share=0.375
        ),
    )
    # 42,730, 43,000 and 42,460 of 44,000.
    assert result.ratios == pytest.approx((0.97114, 0.97727, 0.965), abs=1e-5)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown(result).splitlines()]
    rows = {cells[0]: cells[1:] for cells in lines if len(cells) == 5}
    assert rows["serving alone"] == ["2 serve, tensor parallel 2", "44,000 (43,000 to 45,000)", "-", "2"]
    assert rows["training alone"] == ["2 train, dp 2 x cp 1", "70,000 (70,000 to 70,000)", "-", "1"]
    assert rows["live, trained on"] == ["2 train, dp 2 x cp 1", "43,500 (43,500 to 43,500)", "37.5%", "1"]
    assert rows["**live / slower alone**"][1] == "**97.1% (96.5% to 97.7%)**"
    assert result.model_copy(update={"train_alone": None}).ratios == ()


def test_a_split_that_leaves_a_side_without_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "visible_devices", lambda: ("0", "1", "2", "3"))
    for num_gpus, serve_gpus in ((5, 1), (2, 2), (2, 0), (0, 1)):
        options = ["--target", str(tmp_path), "--num-gpus", str(num_gpus), "--serve-gpus", str(serve_gpus)]
        with pytest.raises(ValueError, match="this host has 4 GPUs"):
            program.main([*options, "--out", str(tmp_path)])


@pytest.mark.slow
def test_the_program_measures_all_three_with_the_processes_of_a_build(
    tmp_path: Path, tiny_target_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    tiny = {
        "target": tiny_target_dir, "engine": "transformers", "dtype": "float32", "features": "float32",
        "num-gpus": 0, "serve-gpus": 0, "lengths": 32, "tokens": 2048, "micro-batch": 256,
        "ttt-steps": 2, "draft-vocab": 64, "seconds": 0.5, "warm-up": 0.1, "buffer-gib": 0.01,
        "scratch": memory, "out": tmp_path / "reports", "name": "test",
    }  # fmt: skip
    assert program.main([word for name, value in tiny.items() for word in (f"--{name}", str(value))]) == 0
    result = LiveBench.model_validate_json((tmp_path / "reports" / "test.json").read_text())
    assert result.serve_alone
    assert result.train_alone
    assert result.live
    for found in (result.serve_alone, result.train_alone, result.live.consumed):
        assert sum(interval.elapsed_s for interval in found.intervals) >= 0.5
        assert found.tokens_per_s > 100
    # Eight micro-batches of 256 tokens; one of an epoch may not be full.
    assert all(1500 < interval.num_tokens <= 2048 for interval in result.train_alone.intervals)
    assert 0.2 < result.ratios[0] < 5
    assert "live / slower alone" in capsys.readouterr().out
    assert "| live, made | CPU |" in (tmp_path / "reports" / "test.md").read_text()
    assert list(memory.iterdir()) == []
