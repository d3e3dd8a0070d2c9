"""Tests of the benchmark: its arithmetic by hand, its report, its refusals; on a GPU that it times what it says."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specforge_core.facts import Environment
from specforge_core.kernels import bench
from specforge_core.kernels.bench import Ceilings, KernelReport, Row, Timing, markdown, write_report
from specforge_core.kernels.cases import Case, Numbers, as_tuple
from specforge_core.kernels.cases_elementwise import add_rope_case, residual_rms_norm_case, swiglu_case

MADE_ON = Environment(
    cpu="a CPU", num_threads=2, gpu="NVIDIA H100 80GB HBM3", versions={"triton": "3.6.0"}, commit="abc", command="bench"
)
CEILINGS = Ceilings(copy_bytes_per_s=2e12, matmul_flops_per_s=8e14)


def timing(median: float) -> Timing:
    return Timing(median=median, p10=median, p90=median, num_repeats=7)


def report(**failures: str) -> KernelReport:
    """A kernel that moves 3 GB in 2 ms, where a copy would take 1.5 ms."""
    least_ms, bound = CEILINGS.bound(3 * 10**9, 10**9)
    row = Row(
        case="copy",
        direction="forward",
        shapes={"R": 3},
        num_bytes=3 * 10**9,
        num_flops=10**9,
        least_ms=least_ms,
        bound=bound,
        eager_ms=timing(6.0),
        eager_is_captured=True,
        compiled_ms=timing(3.0),
        ours_ms=timing(2.0),
    )
    return KernelReport(
        environment=MADE_ON, ceilings=CEILINGS, dtype="bfloat16", rows=(row,), failures=failures, seconds=9
    )


def test_the_ceiling_that_takes_longer_is_the_bound() -> None:
    # 4e9 bytes at 2e12 bytes/s are 2 ms; 8e11 FLOPs at 8e14 FLOP/s are 1 ms.
    assert CEILINGS.bound(4 * 10**9, 8 * 10**11) == (pytest.approx(2.0), "memory")
    assert CEILINGS.bound(4 * 10**9, 32 * 10**11) == (pytest.approx(4.0), "arithmetic")


def test_the_report_says_rate_distance_to_the_ceiling_and_speedup() -> None:
    (line,) = [line for line in markdown(report()).splitlines() if line.startswith("| copy")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    # 3e9 bytes in 2 ms are 1500 GB/s, 75 % of 2000; torch.compile takes 3 ms.
    assert cells[-3:] == ["1,500 GB/s", "75%", "1.50x"]


def test_the_report_marks_a_rival_that_waits_for_the_device() -> None:
    captured = report()
    waiting = captured.model_copy(update={"rows": (captured.rows[0].model_copy(update={"eager_is_captured": False}),)})
    assert "| 6.000 (6.000 to 6.000) |" in markdown(captured)
    assert "| 6.000 (6.000 to 6.000) * |" in markdown(waiting)


def test_the_report_is_written_for_programs_and_for_people(tmp_path: Path) -> None:
    path = write_report(tmp_path / "kernels", report(broken="output 0 is off"))
    assert path == tmp_path / "kernels" / "nvidia-h100-80gb-hbm3.md"
    text = path.read_text()
    for fact in (
        "NVIDIA H100 80GB HBM3",
        "triton 3.6.0",
        "commit abc",
        "**broken** failed its check",
        "output 0 is off",
    ):
        assert fact in text
    loaded = KernelReport.model_validate_json(path.with_suffix(".json").read_text())
    assert loaded == report(broken="output 0 is off")


def test_a_name_that_fits_no_case_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "rms_nrom"])
    with pytest.raises(SystemExit, match=r"no case has 'rms_nrom' in its name: .*rms_norm"):
        bench.main()


def test_a_machine_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench.main()


def test_what_is_timed_gives_the_gradients_where_they_belong(device: torch.device) -> None:
    case = add_rope_case(3, {"query": (2, 2)}, head_width=8)
    inputs = case.make_inputs(device, torch.float32)
    bench.forward(case.op, inputs)()
    assert not inputs["query_grad"].any()
    bench.forward_and_backward(case.op, inputs)()
    assert inputs["query_grad"].any()
    assert inputs["x_RE"].grad is None


@pytest.mark.gpu
def test_a_wrong_case_is_not_timed_and_the_others_are(device: torch.device) -> None:
    right, swiglu = residual_rms_norm_case(512, 1024), swiglu_case(64, 1024)
    wrong = dataclasses.replace(swiglu, op=lambda gate_up_R2I: 1.5 * swiglu.reference(gate_up_R2I))
    found = bench.measure([wrong, right], MADE_ON)
    assert found.failures.keys() == {wrong.name}
    assert [(row.case, row.direction) for row in found.rows] == [
        (right.name, "forward"),
        (right.name, "forward + backward"),
    ]
    for row in found.rows:
        assert row.eager_ms is not None
        assert row.compiled_ms is not None
        assert row.ours_ms.median > 0


@pytest.mark.gpu
def test_a_rival_that_waits_for_the_device_is_timed_without_a_graph(device: torch.device) -> None:
    swiglu = swiglu_case(64, 1024)

    def waits(gate_up_R2I: Tensor) -> Tensor:
        return swiglu.reference(gate_up_R2I) * int(gate_up_R2I.isfinite().all())

    found = bench.measure(
        [dataclasses.replace(swiglu, reference=waits, reference_waits=True, has_compiled_rival=False)], MADE_ON
    )
    assert not found.failures
    assert all(row.eager_ms is not None and not row.eager_is_captured for row in found.rows)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [residual_rms_norm_case, swiglu_case])
def test_a_replayed_graph_computes_anew(make: Callable[[int, int], Case], device: torch.device) -> None:
    case = make(64, 1024)
    inputs = case.make_inputs(device, torch.bfloat16)
    static = {name: value.detach().clone().requires_grad_(value.requires_grad) for name, value in inputs.items()}
    kept: list[Tensor] = []

    def call() -> None:
        kept[:] = as_tuple(case.op(**static))

    graph = bench.captured(call)
    fresh = {name: Numbers(device, value.dtype, seed=9).normal(*value.shape) for name, value in inputs.items()}
    for name, value in fresh.items():
        static[name].data.copy_(value)
    graph.replay()
    for actual, expected in zip(kept, as_tuple(case.op(**fresh)), strict=True):
        assert torch.equal(actual, expected)
