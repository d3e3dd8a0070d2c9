"""The benchmark of several GPUs, on processes of a CPU and on numbers made by hand."""

from pathlib import Path

import pytest
import torch

from specforge_core.environment import environment
from specforge_core.manifest_sections import ParallelConfig
from specforge_core.training.bench.several import (
    Case,
    SeveralBench,
    SeveralRow,
    Work,
    markdown,
    measured,
    measured_rows,
)
from specforge_core.training.workers import Workers
from tests.processes import on_processes

TINY = Work("tiny", num_tokens=128, document_tokens=64, micro_batches=2)


def test_one_process_does_the_work_of_one_replica():
    row = measured(TINY, Workers(0, 1, torch.device("cpu")), num_steps=3, num_repeats=2)
    # Two micro-batches of two documents of 64 tokens: a prompt of one token, so 62 of 64 slots are supervised.
    assert (row.num_tokens, row.num_supervised, row.num_gpus, len(row.ms)) == (256, 248, 1, 2)
    assert row.peak_bytes is None


def measured_on(rank: int) -> list[dict[str, object]]:
    workers = Workers(rank, 2, torch.device("cpu")).arranged(ParallelConfig())
    case = Case(TINY, ("dp", "cp"))
    rows = measured_rows([case], workers, num_steps=3, num_repeats=1)
    return [row.model_dump() for row in rows]


@pytest.mark.slow
def test_replicas_add_work_and_shares_divide_it(tmp_path: Path):
    first, second = on_processes(2, measured_on, tmp_path)
    assert [(row["dp"], row["cp"], row["num_tokens"]) for row in first] == [(1, 1, 256), (2, 1, 512), (1, 2, 256)]
    # One process at a time is the first one.
    assert [(row["dp"], row["cp"], row["num_tokens"]) for row in second] == [(2, 1, 512), (1, 2, 256)]


def test_the_table_compares_equal_work_alone():
    def row(dp: int, ms: float, **changes: int) -> SeveralRow:
        counts = {"micro_batches": 1, "cp": 1, "tp": 1, "document_tokens": 64, "num_supervised": 500 * dp, **changes}
        flops = {"dense_flops": 4e12 * dp, "useful_flops": 2e12 * dp}
        return SeveralRow(
            shape="tiny", share=0.5, dp=dp, num_tokens=1000 * dp, ms=(ms,), peak_bytes=2**30, **counts, **flops
        )

    made_on = environment(num_threads=1, gpu="some GPU")
    rows = (row(1, 10.0), row(2, 10.0), row(2, 12.5), row(2, 10.0, document_tokens=128))
    result = SeveralBench(
        environment=made_on, num_steps=7, num_warm_ups=3, dtype="bfloat16", peak_flops=1e15, rows=rows
    )
    lines = [line for line in markdown(result).splitlines() if line.startswith("| tiny")]
    against = [line.split(" | ")[7] for line in lines]
    # 1000 tokens in 10 ms alone; 2000 in 10 ms and in 12.5 ms on two; nothing to compare the last one with.
    assert against == ["1.00", "2.00", "1.60", "-"]
    # 4e12 FLOPs in 10 ms are 4e14 a second.
    assert lines[0].split(" | ")[8:10] == ["40%", "20%"]
