"""Stages of an entry, against hand calculations at round rates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specforge_core.artifacts import Store
from specforge_core.cost.configs import ConfigReader
from specforge_core.cost.conversations import expected_conversations
from specforge_core.cost.draft_model import count_conversation
from specforge_core.cost.estimate import (
    IN_PROCESS_LAYER_S,
    STAGE_START_S,
    TRAIN_START_S,
    benchmark_cost,
    best_serve_gpus,
    capture_cost,
    reading_s,
    regenerate_cost,
    train_cost,
    training_s,
)
from specforge_core.cost.hardware import GIB, find_hardware
from specforge_core.cost.job import SERVER_START_S, Job, make_job
from specforge_core.cost.serving import Answer
from specforge_core.manifest_sections import DataConfig, PromptSource
from specforge_core.training.bench.lengths import Turn
from specforge_core.training.bench.shapes import SHAPES, useful_flops
from tests import made_build
from tests.builds import recipe_of
from tests.cost.conftest import RATES, entry_of
from tests.test_plan import build_all

JobOf = Callable[..., Job]
# Its weights are read at 1 TB/s.
LOAD_8B_S = 16_060_522_496 / 1e12
START_8B_S = STAGE_START_S + SERVER_START_S + LOAD_8B_S
HEAD = 525_336_576
LAYERS_AND_NORMS = 6_979_588_096
# 100 tokens at 500 TFLOP/s, each of which attends to 50 on average.
PROMPT_S = 100 * (2 * LAYERS_AND_NORMS + 524_288 * 50) / 500e12


def test_regeneration_reads_the_weights_once_for_a_token_of_each_slot(job_of: JobOf) -> None:
    cost = regenerate_cost(job_of(entry_of()))
    # 64 requests, half of whose 300 tokens are there on average, of 131,072 bytes each.
    step_s = (2 * (LAYERS_AND_NORMS + HEAD) + 64 * 150 * 131_072) / 1e12
    assert cost.num_tokens == 200_000
    assert cost.wall_s == pytest.approx(200_000 / 64 * step_s + 1000 * PROMPT_S + START_8B_S)
    assert cost.start_s == pytest.approx(START_8B_S)
    assert cost.gpu_hours == pytest.approx(cost.wall_s / 3600)
    # engine.mem_fraction_static
    assert cost.peak_bytes_per_gpu == pytest.approx(0.85 * 79.1 * GIB)


def test_more_servers_divide_the_time_and_more_memory_bandwidth_shortens_steps(job_of: JobOf) -> None:
    one = regenerate_cost(job_of(entry_of())).wall_s - START_8B_S
    two = regenerate_cost(job_of(entry_of(resources={"num_gpus": 2})))
    assert two.wall_s - START_8B_S == pytest.approx(one / 2)
    assert two.gpu_hours == pytest.approx(2 * two.wall_s / 3600)
    h200 = regenerate_cost(job_of(entry_of(), hardware="h200"))
    assert h200.wall_s - START_8B_S == pytest.approx((one - 1000 * PROMPT_S) * 3.35 / 4.8 + 1000 * PROMPT_S)


def test_a_full_cache_lets_fewer_requests_run_at_once(job_of: JobOf) -> None:
    # (0.85 x 79.1 GiB - 16.06 GB) / 131,072 bytes = 428,265 tokens: 1,427 conversations of 300.
    assert job_of(entry_of(engine={"max_running_requests": 2000})).num_slots == 1427
    assert job_of(entry_of()).num_slots == 64


def test_capture_multiplies_each_token_with_the_weights(job_of: JobOf) -> None:
    cost = capture_cost(job_of(entry_of()))
    # Two of three tokens are in answers and go through the head; attention is over 150.5 tokens on average.
    flops = 300_000 * (2 * (LAYERS_AND_NORMS + HEAD * 2 / 3) + 524_288 * 150.5)
    assert cost.wall_s == pytest.approx(flops / 500e12 + START_8B_S)
    # 24 KiB a token and 8 KiB more in answers, ids and masks; and the target's embedding and head.
    features = 300_000 * (24 * 1024 + 5) + 200_000 * (8 * 1024 + 8)
    assert cost.disk_bytes == pytest.approx(features + 2 * 2 * HEAD)
    assert cost.limit == ""


def test_capture_waits_for_a_slow_disk_and_says_so(job_of: JobOf) -> None:
    cost = capture_cost(job_of(entry_of(), rates=RATES._replace(write_bytes_per_s=1e8)))
    features = 300_000 * (24 * 1024 + 5) + 200_000 * (8 * 1024 + 8)
    assert cost.wall_s == pytest.approx(features / 1e8 + START_8B_S)
    assert cost.limit.startswith("features are written at 100 MB/s a host; without that, ")


def pass_s_8b() -> float:
    """8,192 tokens in conversations of 100 and 200, at 500 TFLOP/s; those of attention take 1.7 times as long."""
    counts = count_conversation((Turn(100, 200),), 7)
    # 199 - i slots at step i; the first one reads the prompt and i keys of its own.
    num_keys = sum((199 - i) * (100 + i) + (199 - i) * (198 - i) / 2 for i in range(7))
    flops = useful_flops(SHAPES["llama-3.1-8b"], counts) + 0.7 * 12 * 4096 * num_keys
    return flops / 300 * 8192 / 500e12 + 0.010


def test_training_takes_passes_an_optimizer_step_and_evaluations(job_of: JobOf) -> None:
    cost = train_cost(job_of(entry_of(training={"num_epochs": 3, "eval_fraction": 0.1, "evals_per_run": 2})))
    pass_s = pass_s_8b()
    num_steps = 3 * 0.9 * 300_000 / 65_536
    optimizer_s = 28 * 424_673_280 / 2e12
    evaluated = 2 * 0.1 * 300_000 / 8192 * pass_s / 3
    assert cost.num_tokens == pytest.approx(3 * 0.9 * 300_000)
    assert cost.wall_s == pytest.approx(
        num_steps * (8 * pass_s + optimizer_s) + evaluated + STAGE_START_S + TRAIN_START_S
    )


def test_muon_takes_its_matrix_products_and_moves_more(job_of: JobOf) -> None:
    adamw, muon = (train_cost(job_of(entry_of(training={"optimizer": name}))) for name in ("adamw", "muon"))
    num_steps = 0.98 * 300_000 / 65_536
    # 62 bytes instead of 28 for all weights but the head's, 293.6 M; its products are counted in test_draft_model.
    products_s, moved_s = 27_165_668_147_200 / 800e12, (62 - 28) * 293_601_280 / 2e12
    assert muon.wall_s - adamw.wall_s == pytest.approx(num_steps * (products_s + moved_s))
    # One moment less for the same weights: of three checkpoints, and in memory.
    assert adamw.disk_bytes - muon.disk_bytes == 3 * 4 * 293_601_280
    assert adamw.peak_bytes_per_gpu - muon.peak_bytes_per_gpu == pytest.approx(4 * 293_601_280)


def test_training_memory_is_that_of_the_recorded_rows_and_the_optimizers(job_of: JobOf) -> None:
    cost = train_cost(job_of(entry_of()))
    weights_gradients_moments = 16 * 424_673_280
    tables = 2 * 4096 * (128_256 + 32_000)
    micro_batch = 8192 * (24 * 1024 + 5 + 2 / 3 * (8 * 1024 + 8) + 24 * 4096)
    activations = 6 * 424_673_280 + 2e9
    assert cost.peak_bytes_per_gpu == pytest.approx(weights_gradients_moments + tables + micro_batch + activations)


def test_gpus_share_moments_and_with_tp_the_layer(job_of: JobOf) -> None:
    def needed(num_gpus: int, **training: Any) -> float:
        entry = entry_of(resources={"num_gpus": num_gpus}, training=training)
        return train_cost(job_of(entry)).peak_bytes_per_gpu

    one = needed(1)
    assert one - needed(4) == pytest.approx(8 * 424_673_280 * 3 / 4)
    assert needed(4, parallel={"cp": 2}) == needed(4)
    # Without `fc` and the head; with weight and gradient go the 6 bytes of activations.
    layer = 424_673_280 - 3 * 4096**2 - 4096 * 32_000
    assert needed(4) - needed(4, parallel={"tp": 2}) == pytest.approx((8 + 6) * layer / 2)
    # Only the head's are AdamW's.
    by_muon = needed(1, optimizer="muon") - needed(4, optimizer="muon")
    assert by_muon == pytest.approx(8 * 4096 * 32_000 * 3 / 4)


def test_more_gpus_share_the_micro_batches_of_a_step(job_of: JobOf) -> None:
    pass_s = pass_s_8b()
    num_steps = 0.98 * 300_000 / 65_536
    four = training_s(job_of(entry_of(resources={"num_gpus": 4})), 4)
    # 1.5 times the float32 gradients through a link of 450 GB/s.
    step_s = 2 * pass_s + 28 * 424_673_280 / 2e12 + 1.5 * 4 * 424_673_280 / 450e9
    evaluated = 4 * 0.02 * 300_000 / 8192 * pass_s / 3 / 4
    assert four == pytest.approx(num_steps * step_s + evaluated)
    shared = entry_of(resources={"num_gpus": 4}, training={"parallel": {"cp": 2}})
    # Two replicas, each of which takes four micro-batches, in half of the time but for the overhead.
    assert training_s(job_of(shared), 4) > four


def test_live_features_take_no_disk_and_as_long_as_the_slower_side(job_of: JobOf) -> None:
    entry = entry_of(resources={"num_gpus": 4}, features={"mode": "live", "serve_gpus": 1})
    job = job_of(entry)
    capture, train = capture_cost(job), train_cost(job)
    # The held-out ones alone are stored.
    assert capture.num_tokens == pytest.approx(0.02 * 300_000)
    assert capture.disk_bytes == pytest.approx(0.02 * job.feature_bytes + 4 * HEAD)
    served_s, trained_s = reading_s(job, 1), training_s(job, 3)
    assert served_s > trained_s
    assert train.wall_s == pytest.approx(served_s + START_8B_S + TRAIN_START_S)
    assert train.limit == f"training waits for the target, {trained_s / served_s:.0%} busy"
    # Of 1 to 3 GPUs that serve, the number whose slower side is fastest.
    slower = {n: max(reading_s(job, n), training_s(job, 4 - n)) for n in (1, 2, 3)}
    best = best_serve_gpus(job)
    assert best is not None
    assert slower[best] == min(slower.values())


def test_the_benchmark_measures_with_and_without_draft(job_of: JobOf) -> None:
    cost = benchmark_cost(job_of(entry_of()))
    # 50 answers of 200 tokens twice, one at a time; a server for each side, of which the second finds the weights read.
    step_s = (2 * (LAYERS_AND_NORMS + HEAD) + 150 * 131_072) / 1e12
    assert cost.num_tokens == 20_000
    served_s = 20_000 * step_s + 100 * PROMPT_S + START_8B_S + SERVER_START_S
    assert cost.wall_s == pytest.approx(served_s)
    # The target in the stage's own process, for 20 of them.
    compared = benchmark_cost(job_of(entry_of(benchmark={"num_in_process_prompts": 20})))
    assert compared.wall_s == pytest.approx(served_s + 20 * 200 * 32 * IN_PROCESS_LAYER_S)


def test_a_sweep_answers_as_long_as_it_may_at_each_load(job_of: JobOf) -> None:
    sweep = {"chains": [[3, 1, 4], [5, 1, 6]], "concurrencies": [1, 8], "max_new_tokens": 128, "requests_per_slot": 2}
    swept, suites = (benchmark_cost(job_of(entry_of(benchmark=more))) for more in ({"sweep": sweep}, {}))
    # Two chains of two rounds, with and without draft: 8 times two answers of 128 tokens in each slot.
    steps_s = sum(16 * 128 * (2 * (LAYERS_AND_NORMS + HEAD) + slots * 150 * 131_072) / 1e12 for slots in (1, 8))
    assert swept.num_tokens - suites.num_tokens == 16 * 128 * 9
    # One of the chains is that of the suites.
    assert swept.wall_s - suites.wall_s == pytest.approx(steps_s + 16 * 9 * PROMPT_S + SERVER_START_S)


def test_tensor_parallel_divides_the_weights_but_waits_for_the_others(job_of: JobOf) -> None:
    whole, shared = job_of(entry_of()), job_of(entry_of(engine={"tensor_parallel": 4}, resources={"num_gpus": 4}))
    # 64 answers of 64 tokens take 64 steps: an answer takes one.
    answer = Answer(prompt_tokens=0, num_tokens=64, num_keys=150)
    one, four = whole.server.answer_s(RATES, 64, answer), shared.server.answer_s(RATES, 64, answer)
    # Two sums a layer of 4096 bfloat16 numbers, 1.5 times through the link, and their latency.
    waiting = 64 * 2 * 32 * 1.5 * 4096 * 2 / 450e9 + 2 * 32 * 10e-6
    assert four == pytest.approx(one / 4 + waiting)
    assert shared.server.weight_bytes_per_gpu == 16_060_522_496 / 4


def test_conversations_in_the_store_are_counted_and_not_assumed(tmp_path: Path) -> None:
    source = PromptSource(dataset="builtin:demo", limit=50)
    entry, store = made_build.entry(data=DataConfig(sources=(source,))), Store(tmp_path / "store")
    assumed = expected_conversations(entry, store, (1, 2))
    assert assumed.source == "as --tokens-per-conversation says"
    assert (assumed.num_conversations, assumed.tokens_each) == (50, 3)
    made = build_all(store, recipe_of(entry), tmp_path / "made")["regenerate"].facts
    found = expected_conversations(entry, store, None)
    assert found.num_conversations == made.num_conversations
    assert found.num_tokens == pytest.approx(made.num_tokens, rel=0.01)
    assert found.num_answer_tokens == pytest.approx(made.num_loss_tokens, rel=0.01)


def test_what_is_assumed_about_conversations_is_said() -> None:
    unknown = expected_conversations(entry_of(), None, None)
    assert "short human answers" in unknown.source
    assert unknown.num_conversations == 1000
    perfectblend = {"sources": [{"dataset": "mlabonne/open-perfectblend"}], "max_new_tokens": 400}
    known = expected_conversations(entry_of(data=perfectblend), None, None)
    # Half of 872, of which answers are cut at 400.
    assert (known.num_conversations, known.answer_tokens_each) == (1_420_909, 400)
    with pytest.raises(ValueError, match=r"some/data has no limit .* set data\.sources\.limit"):
        expected_conversations(entry_of(data={"sources": [{"dataset": "some/data"}]}), None, None)


def test_a_target_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the Hub gives no config\.json of nobody/nothing"):
        make_job(
            entry_of("nobody/nothing"),
            configs=ConfigReader(tmp_path),
            store=None,
            rates=RATES,
            hardware=find_hardware("h100"),
        )
