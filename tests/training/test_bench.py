"""The training benchmark on sizes that a CPU can take."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.profiler import ProfilerActivity, profile, record_function

from specforge_core.training.bench import __main__ as bench
from specforge_core.training.bench.batch import count_rows, make_batch, make_draft
from specforge_core.training.bench.lengths import (
    Conversation,
    Turn,
    count_answer_tokens,
    count_tokens,
    load_real_lengths,
    tilted_weights,
)
from specforge_core.training.bench.make_lengths import make_lengths
from specforge_core.training.bench.measure import Card, measure
from specforge_core.training.bench.parts import parts_of_trace, profiled_parts
from specforge_core.training.bench.paths import PATHS, TrainingPath
from specforge_core.training.bench.results import TrainingBench
from specforge_core.training.bench.run import OUT_OF_MEMORY, Settings, measured_rows
from specforge_core.training.bench.shapes import SHAPES, RowCounts, Shape, dense_flops, useful_flops
from specforge_core.training.bench.workload import make_workload

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]
# Two turns, and answers of fewer tokens than there are steps.
CONVERSATIONS: list[Conversation] = [(Turn(3, 6), Turn(2, 9)), (Turn(11, 2),), (Turn(1, 14),), (Turn(4, 1),)]


def make_settings(**changes: Any) -> Settings:
    settings = Settings(
        shapes=("tiny",),
        shares=(0.5,),
        lengths=("uniform",),
        paths=("ours",),
        num_tokens=64,
        num_steps=3,
        num_warm_ups=0,
        num_repeats=1,
        seed=0,
        device=CPU,
    )
    return settings._replace(**changes)


def test_every_path_computes_the_loss_and_the_gradients_of_the_definition() -> None:
    batch = make_batch(CONVERSATIONS, TINY, seed=3, device=CPU)
    losses, gradients = {}, {}
    for name, make in PATHS.items():
        path = make(make_draft(TINY, num_steps=4, seed=2, device=CPU), CPU)
        losses[name] = float(path.step(path.load(batch)))
        # Paths name their weights differently; no two of one size have gradients of one norm here.
        gradients[name] = sorted(float(p.grad.norm()) for p in path.module.parameters() if p.grad is not None)
    for name in PATHS:
        # float8 rounds what it multiplies: gradients are off by some per cent, their norms by less.
        loss_error, gradient_error = (1e-4, 5e-2) if name == "ours-float8" else (1e-5, 1e-4)
        assert losses[name] == pytest.approx(losses["all-rows"], rel=loss_error), name
        assert gradients[name] == pytest.approx(gradients["all-rows"], rel=gradient_error), name
    assert losses["ours-float8"] != losses["ours"]


def test_uniform_documents_end_in_one_answer_of_the_share() -> None:
    workload = make_workload("uniform", 0.25, budget=8192, document_tokens=4096, seed=0)
    assert workload.packed == workload.padded == ((Turn(3072, 1024),),) * 2


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_real_documents_have_the_share_and_fill_the_budget(share: float) -> None:
    workload = make_workload("real", share, budget=8192, document_tokens=4096, seed=0)
    total = sum(map(count_tokens, workload.packed))
    assert 8000 <= total <= 8192
    assert sum(map(count_answer_tokens, workload.packed)) / total == pytest.approx(share, abs=0.02)
    assert len(workload.padded) * max(map(count_tokens, workload.padded)) <= 8192
    real = set(load_real_lengths().conversations)
    assert real.issuperset(workload.packed)
    assert real.issuperset(workload.padded)


def test_the_tilt_is_exponential_in_the_excess_of_answer_tokens() -> None:
    # With share 1/4, the conversations have 1, 0 and -2 answer tokens too many. exp(lambda x)
    # at these is 2^(1/3), 1, 2^(-2/3) for lambda = ln(2) / 3, whose mean is zero: 2^(1/3) * 1 = 2^(-2/3) * 2.
    conversations: list[Conversation] = [(Turn(5, 3),), (Turn(3, 1),), (Turn(8, 0),)]
    expected = [2 ** (1 / 3), 1.0, 2 ** (-2 / 3)]
    weights = tilted_weights(conversations, 0.25).tolist()
    assert weights == pytest.approx([weight / sum(expected) for weight in expected], rel=1e-5)


def test_a_share_that_no_conversation_reaches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"answers have 0\.250 to 0\.500 of the tokens"):
        tilted_weights([(Turn(1, 1),), (Turn(3, 1),)], 0.6)


def test_shipped_lengths_are_of_every_data_set_with_answers() -> None:
    lengths = load_real_lengths()
    assert set(lengths.sources) == {"gsm8k", "svamp", "aqua", "humaneval", "mbpp", "self_instruct", "gpteacher"}
    assert all(turn.prompt > 10 and turn.answer > 0 for c in lengths.conversations for turn in c)


@pytest.mark.slow
def test_shipped_lengths_are_those_of_the_data() -> None:
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} holds no data sets here")
    assert make_lengths(folder) == load_real_lengths()


def test_counted_are_the_rows_that_exact_training_needs() -> None:
    # A prompt of 2 and an answer of 4: slots 1, 2, 3 are supervised at step 0, slots 1, 2 at step 1, slot 1 at step 2.
    batch = make_batch([(Turn(2, 4),)], TINY, seed=0, device=CPU)
    counts = count_rows(batch, 3)
    assert counts.num_tokens == 6
    assert counts.rows_S == (3, 2, 1)
    # Teachers p2 to p4; keys: 2 + 3 + 4 of step 0, 3 + 4 at step 1, 4 at step 2.
    assert counts.num_teachers == 3
    assert counts.num_keys == 9 + 7 + 4


def test_dense_flops_are_those_of_the_cost_model() -> None:
    # Worked by hand in MFLOP: qkv, output, feed-forward and head of each of 7 steps, then fc; the teacher's head once.
    forward = 7 * (100.663296 + 33.554432 + 352.321536 + 262.144) + 100.663296
    assert dense_flops(SHAPES["llama-3.1-8b"], 1, 7) == pytest.approx((3 * forward + 262.144) * 1e6)


def test_useful_flops_are_those_of_active_rows() -> None:
    shape = Shape(
        width=2, intermediate_size=3, num_heads=1, num_kv_heads=1, head_dim=2, vocab_size=9, draft_vocab_size=5
    )
    counts = RowCounts(num_tokens=6, num_teachers=3, rows_S=(3, 2, 1), num_keys=20)
    # Widths: queries 2, keys and values 4. A row: 2 + 4 (qkv of the hidden state) + 2 + 3 * 3 + 5 = 22.
    fc, embedding_half, teacher = 4 * 6 * (6 * 2), 4 * 2 * (3 * 2 + 6 * 4), 2 * 3 * (2 * 5)
    rows = 6 * 2 * (6 * 22 + 3 * 4)  # the three tokens without a row give a key and a value each
    attention = 20 * 2 * 12
    assert useful_flops(shape, counts) == fc + embedding_half + teacher + rows + attention == 2796


class Square(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return (2 * grad * x).clone()


def test_backward_kernels_belong_to_the_part_of_their_forward_operation(tmp_path: Path) -> None:
    a, b = (torch.randn(8, 8, requires_grad=True) for _ in range(2))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with record_function("projections"):
            x = a @ b
        with record_function("head"):
            y = Square.apply(x)
        with record_function("feed-forward"):
            z = y.exp()
        z.sum().backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    # A GPU would get one kernel of each of these, launched while the operation runs.
    launched = [event for event in events if event.get("name") in ("aten::mm", "aten::exp", "aten::clone")]
    for number, event in enumerate(launched):
        launch = {"name": "cudaLaunchKernel", "ts": event["ts"] + event["dur"] / 2, "dur": 0.0}
        place = {"pid": event["pid"], "tid": event["tid"], "args": {"correlation": number}}
        events.append({"cat": "cuda_runtime", **launch, **place})
        events.append({"cat": "kernel", "name": "k", "ts": 0.0, "dur": 1000.0, **place})
    events.append({"cat": "kernel", "name": "of nobody", "ts": 0.0, "dur": 500.0, "args": {"correlation": -1}})
    # mm once forward and twice backward, exp forward alone, clone in Square's backward alone.
    assert parts_of_trace(events) == {"projections": 3.0, "feed-forward": 1.0, "head": 1.0, "other": 0.5}


@pytest.fixture
def _memory_is_plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    # Looking for some takes a quarter of a second beside all that a whole suite has imported.
    monkeypatch.setattr("specforge_core.training.bench.run.release_memory", lambda: None)


@pytest.mark.usefixtures("_memory_is_plenty")
def test_a_path_without_memory_is_tried_on_half_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = PATHS["ours"]

    def hungry(draft: Any, device: torch.device) -> TrainingPath:
        path = ours(draft, device)

        def step(batch: Any) -> torch.Tensor:
            if len(batch.input_ids_T) > 32:
                raise torch.OutOfMemoryError("more than 32 tokens")
            return path.step(batch)

        return path._replace(step=step)

    monkeypatch.setitem(PATHS, "ours", hungry)
    rows = list(measured_rows(make_settings(), Card(1e12, 1e12)))
    assert [(row.num_tokens, row.status) for row in rows] == [(64, OUT_OF_MEMORY), (32, "measured")]


@pytest.mark.usefixtures("_memory_is_plenty")
def test_a_path_that_fails_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(draft: Any, device: torch.device) -> TrainingPath:
        def step(batch: Any) -> torch.Tensor:
            raise RuntimeError("no compiler")

        return PATHS["all-rows"](draft, device)._replace(step=step)

    monkeypatch.setitem(PATHS, "ours", broken)
    rows = list(measured_rows(make_settings(paths=("ours", "conventional")), Card(1e12, 1e12)))
    assert [row.status for row in rows] == ["failed: RuntimeError", "measured"]


@pytest.fixture
def run_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["bench", *arguments])
        return bench.main()

    return run


@pytest.mark.slow
def test_a_host_without_cuda_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench"])
    with pytest.raises(SystemExit, match="there is no CUDA device here; --device cpu measures the processor"):
        bench.main()


def test_a_run_leaves_result_report_and_plot(
    tmp_path: Path, run_bench: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specforge_core.training.bench.run.BATCHES_FROM_DISK", 5)
    monkeypatch.setattr("specforge_core.training.bench.run.MICRO_BATCHES", (1, 2))
    options = (
        "--shapes tiny --tokens 256 --device cpu --steps 2 --ttt-steps 2 --shares 0.5 --lengths uniform real --step"
    )
    assert run_bench(*options.split(), "--out", str(tmp_path), "--name", "here", "--commit", "abc") == 0
    result = TrainingBench.model_validate_json((tmp_path / "here.json").read_text(encoding="utf-8"))
    assert result.environment.commit == "abc"
    assert {(row.path, row.lengths) for row in result.rows} == {
        (path, lengths) for path in bench.DEFAULT_PATHS for lengths in ("uniform", "real")
    }
    assert all(row.is_measured and len(row.ms) == 2 for row in result.rows)
    # Eight micro-batches, of which three are for warming up: two steps, when each has two.
    assert [(row.lengths, row.micro_batches) for row in result.step_rows] == [
        (lengths, per_step) for lengths in ("uniform", "real") for per_step in (1, 2)
    ]
    assert [len(row.step_ms) for row in result.step_rows[:2]] == [5, 2]
    assert all(len(row.step_ms) == len(row.cold_step_ms) == len(row.forward_backward_ms) for row in result.step_rows)
    report = (tmp_path / "here.md").read_text(encoding="utf-8")
    assert report.count("| ours |") == report.count("| conventional |") == 2
    plot = (tmp_path / "here.svg").read_bytes()
    assert b"conventional, real lengths" in plot
    (tmp_path / "here.svg").unlink()
    assert run_bench("--plot", str(tmp_path / "here.json")) == 0
    assert (tmp_path / "here.svg").read_bytes() == plot


@pytest.mark.gpu
def test_on_a_gpu_every_path_computes_one_loss_and_says_where_its_time_goes() -> None:
    shape = Shape(256, 512, num_heads=4, num_kv_heads=2, head_dim=64, vocab_size=1000, draft_vocab_size=512)
    device = torch.device("cuda")
    batch = make_batch([(Turn(130, 200),), (Turn(40, 90), Turn(5, 20))], shape, seed=3, device=device)
    losses = {}
    for name, make in PATHS.items():
        path = make(make_draft(shape, num_steps=4, seed=2, device=device), device)
        inputs = path.load(batch)
        losses[name] = float(path.step(inputs))
        parts = profiled_parts(partial(path.step, inputs))
        # The definition names no parts.
        if name != "all-rows":
            assert {"attention", "projections", "feed-forward", "head"} <= parts.keys(), name
        timing = measure(path, batch, num_warm_ups=1, num_repeats=2)
        assert timing.peak_bytes is not None
        assert timing.peak_bytes > timing.weight_bytes + timing.gradient_bytes + timing.input_bytes
    for name in PATHS:
        assert losses[name] == pytest.approx(losses["all-rows"], rel=1e-2), name
