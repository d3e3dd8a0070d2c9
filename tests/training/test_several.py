"""The benchmark of several GPUs, on processes of a CPU and on numbers made by hand."""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_core.drafts.base import DraftBatch
from specforge_core.environment import environment
from specforge_core.manifest_sections import ParallelConfig
from specforge_core.training.bench.exchanges import attribute, timed
from specforge_core.training.bench.fsdp2 import conventional_step
from specforge_core.training.bench.several import (
    CASES,
    Case,
    Work,
    arrangement,
    drawn_steps,
    measured,
    measured_rows,
    warmed_up,
)
from specforge_core.training.bench.several_results import (
    FSDP2,
    SeveralBench,
    SeveralRow,
    distance_to_linear,
    markdown,
)
from specforge_core.training.bench.shapes import SHAPES
from specforge_core.training.workers import Workers
from tests.processes import on_processes

TINY = Work("tiny", num_tokens=128, document_tokens=64, micro_batches=2)
REAL = TINY._replace(micro_batches=5, share=0.5, lengths="real", steps=2)
ALONE = Workers(0, 1, torch.device("cpu"))


def test_one_process_does_the_work_of_one_replica():
    row = measured(TINY, ALONE, num_steps=3, num_repeats=2)
    # Two micro-batches of two documents of 64 tokens: a prompt of one token, so 62 of 64 slots are supervised.
    assert (row.num_tokens, row.num_supervised, row.num_gpus, len(row.ms)) == (256, 248, 1, 2)
    assert row.peak_bytes is None


def test_half_of_the_processes_are_one_dimension_of_two():
    meshes = ["dp", "cp", "dp x cp", "dp x tp"]
    assert [arrangement(mesh, 4) for mesh in meshes] == [
        ParallelConfig(),
        ParallelConfig(cp=4),
        ParallelConfig(cp=2),
        ParallelConfig(tp=2),
    ]
    assert arrangement("dp x cp", 2) == arrangement("dp", 2)


def test_documents_of_real_lengths_are_dealt_out_once():
    whole = drawn_steps(REAL, ALONE)
    assert [len(batches) for batches in whole] == [5, 5]
    parts = [drawn_steps(REAL, Workers(rank, 2, torch.device("cpu"))) for rank in range(2)]
    assert [[len(batches) for batches in part] for part in parts] == [[3, 3], [2, 2]]

    def drawn(batches: Sequence[DraftBatch]) -> Counter[tuple[int, ...]]:
        return Counter(tuple(batch.input_ids_T.tolist()) for batch in batches)

    for step, batches in enumerate(whole):
        assert drawn(batches) == drawn([*parts[0][step], *parts[1][step]])
    assert len({len(batch.teaching_U) for batches in whole for batch in batches}) > 5


def test_a_step_is_the_shortest_stays_and_the_longest_computations_between_them():
    # Two processes, one repeat: computing, exchange, computing, exchange, computing.
    first, second = [3.0, 4.0, 2.0, 1.0, 1.0], [5.0, 2.0, 1.0, 2.0, 1.0]
    times = attribute([[first], [second]])
    assert times == ((11.0,), (3.0,), (8.0,), (6.5,))


def test_the_time_is_divided_between_the_steps_of_a_process_on_its_own():
    losses = torch.zeros(1)

    def step() -> None:
        ALONE.add_up([losses])

    times = timed(step, 3, ALONE)
    for ms, communication, slowest, mean in zip(*times, strict=True):
        assert 0 < communication < ms
        assert slowest == mean
        assert communication + slowest == pytest.approx(ms)


def test_long_steps_are_repeated_less_often(monkeypatch: pytest.MonkeyPatch):
    def number_of(seconds: float) -> tuple[int, int]:
        taken = 0.0
        count = 0

        def step() -> None:
            nonlocal taken, count
            taken, count = taken + seconds, count + 1

        monkeypatch.setattr("specforge_core.training.bench.several.time.perf_counter", lambda: taken)
        return warmed_up(step, ALONE, num_repeats=7), count

    # Repeats, and warm-ups before.
    assert [number_of(seconds) for seconds in (0.5, 1.5, 8.0)] == [(7, 3), (3, 2), (2, 2)]


def _measured(num_processes: int, cases: Sequence[Case], rank: int) -> list[dict[str, Any]]:
    workers = Workers(rank, num_processes, torch.device("cpu"))
    return [row.model_dump() for row in measured_rows(cases, workers, num_steps=3, num_repeats=1)]


def rows_of(num_processes: int, cases: Sequence[Case], directory: Path) -> list[list[SeveralRow]]:
    """By process."""
    found = on_processes(num_processes, functools.partial(_measured, num_processes, cases), directory)
    return [[SeveralRow.model_validate(row) for row in rows] for rows in found]


@pytest.mark.slow
def test_replicas_add_work_and_shares_divide_it(tmp_path: Path):
    first, second = rows_of(2, [Case(TINY, ("dp", "cp", "tp", "dp x cp"))], tmp_path)
    several = [((2, 1, 1), 512), ((1, 2, 1), 256), ((1, 1, 2), 256)]
    assert [((row.dp, row.cp, row.tp), row.num_tokens) for row in first] == [((1, 1, 1), 256), *several]
    # One process at a time is the first one.
    assert [((row.dp, row.cp, row.tp), row.num_tokens) for row in second] == several


@pytest.mark.slow
def test_four_processes_go_through_every_kind_of_case(tmp_path: Path):
    rows = rows_of(4, CASES["tiny"], tmp_path)[0]
    tiny = [(1, 1, 1), (4, 1, 1), (1, 4, 1), (2, 2, 1), (2, 1, 2)]
    assert [(row.dp, row.cp, row.tp) for row in rows] == [*tiny, *2 * [(1, 1, 1), (4, 1, 1)]]
    real, conventional = rows[5:7], rows[7:]
    assert {row.lengths for row in real} == {"real"}
    assert real[0].num_tokens == real[1].num_tokens
    assert {row.path for row in conventional} == {FSDP2}
    for row in rows:
        distance = distance_to_linear(row, rows)
        assert (distance is None) == (row.num_gpus == 1 or row.path == FSDP2)
        if distance is not None:
            assert 0 < distance.communication < row.ms[0]
            assert distance.waiting >= 0


def norm_of_the_second_step(num_processes: int, rank: int) -> float:
    workers = Workers(rank, num_processes, torch.device("cpu"))
    steps = drawn_steps(REAL, workers)
    norm = conventional_step(SHAPES["tiny"], 3, steps, workers)()
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


@pytest.mark.slow
def test_fsdp2_steps_like_one_process(tmp_path: Path):
    alone = norm_of_the_second_step(1, 0)
    assert alone > 0
    # The second of two steps, of five micro-batches with different numbers of supervised tokens. Both ways in float32.
    for norm in on_processes(2, functools.partial(norm_of_the_second_step, 2), tmp_path):
        assert math.isclose(norm, alone, rel_tol=1e-4)


def row(dp: int, ms: float, **changes: object) -> SeveralRow:
    counts = {"micro_batches": 1, "cp": 1, "tp": 1, "document_tokens": 64, "num_supervised": 500 * dp, **changes}
    flops = {"dense_flops": 4e12 * dp, "useful_flops": 2e12 * dp}
    whole = {"shape": "tiny", "share": 0.5, "dp": dp, "num_tokens": 1000 * dp, "ms": (ms,), "peak_bytes": 2**30}
    return SeveralRow.model_validate({**whole, **counts, **flops})


def cells(report: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| tiny")]


def result_of(*rows: SeveralRow) -> SeveralBench:
    made_on = environment(num_threads=1, gpu="some GPU")
    return SeveralBench(environment=made_on, num_steps=7, num_warm_ups=3, dtype="bfloat16", peak_flops=1e15, rows=rows)


def test_the_table_compares_equal_work_alone():
    cp = row(1, 6.0, cp=2)
    rows = (row(1, 10.0), row(2, 10.0), row(2, 12.5), cp, row(2, 10.0, document_tokens=128), row(2, 9.0, path=FSDP2))
    lines = cells(markdown(result_of(*rows)))
    # 1000 tokens in 10 ms alone; 2000 in 10 ms and in 12.5 ms on two, 1000 in 6 ms; nothing to compare the others with.
    assert [line[9] for line in lines] == ["1.00", "2.00", "1.60", "1.67", "-", "-"]
    # Half of 1000 tokens in 6 ms on each, against 1000 in 10 ms.
    assert [line[10] for line in lines] == ["-", "100%", "80%", "83%", "100%", "100%"]
    # 4e12 FLOPs in 10 ms are 4e14 a second.
    assert lines[0][11:13] == ["40%", "20%"]


def test_the_report_says_what_keeps_a_row_from_linear():
    spans = {"communication_ms": (1.5,), "slowest_ms": (10.5,), "mean_ms": (10.2,)}
    uneven = {"communication_ms": (0.1,), "slowest_ms": (8.0,), "mean_ms": (6.0,)}
    report = markdown(result_of(row(1, 10.0), row(2, 12.0, **spans), row(1, 8.1, cp=2, **uneven)))
    bounded = cells(report.split("## What bounds it")[1])
    # Two replicas take 12 ms for what should take 10; two that share take 8.1 ms for what should take 5.
    assert bounded == [
        ["tiny", "ours", "64", "50%", "1", "2 x 1 x 1", "12.0", "2.0", "1.5", "0.3", "0.2", "1.029", "communication"],
        ["tiny", "ours", "64", "50%", "1", "1 x 2 x 1", "8.1", "3.1", "0.1", "2.0", "1.0", "1.333", "waiting"],
    ]
    assert "The largest part of the distance: communication in 1 of 2 rows, waiting in 1 of 2 rows." in report
