"""What will not fit, and the way out that is named."""

from collections.abc import Callable
from typing import Any

import pytest

from specforge_core.cost.configs import hub_facts
from specforge_core.cost.fit import colocated_bytes_per_gpu, problems
from specforge_core.cost.hardware import GIB
from specforge_core.cost.job import Job
from tests.cost.conftest import entry_of

JobOf = Callable[..., Job]
QWEN_235B = "Qwen/Qwen3-235B-A22B-Instruct-2507"


def on(num_gpus: int, tensor_parallel: int, **engine: Any) -> dict[str, Any]:
    return {"resources": {"num_gpus": num_gpus}, "engine": {"tensor_parallel": tensor_parallel} | engine}


def test_what_fits_has_no_problems(job_of: JobOf) -> None:
    assert problems(job_of(entry_of()), free_disk_bytes=1e12) == ()


def test_weights_that_do_not_fit_name_the_parallelism_and_the_gpus_that_do(job_of: JobOf) -> None:
    (problem,) = problems(job_of(entry_of(QWEN_235B, **on(4, 4))), None)
    # 470 GB / 4 is more than 0.85 x 85 GB; a quarter fits an H200's 127 GB; in float8 it is 59 GB.
    assert problem == (
        "the target does not fit: 470 GB of weights over 4 x 85 GB, of which engine.mem_fraction_static=0.85 is a "
        "server's, leave room for 0 tokens, and one conversation can have 4,096: set engine.tensor_parallel: 8 with "
        "resources.num_gpus: 8 or take an FP8 revision of the target, which fits 4 of these GPUs or take 4 x h200 or "
        "b200"
    )


def test_an_fp8_revision_is_not_proposed_where_its_blocks_cannot_be_dealt(
    job_of: JobOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Experts of 1,536 rows are 12 blocks of 128, which 8 GPUs cannot share.
    revision = hub_facts()["configs"][QWEN_235B] | {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}
    }
    monkeypatch.setitem(hub_facts()["configs"], QWEN_235B, revision)
    found = problems(job_of(entry_of(QWEN_235B, **on(8, 8, colocate=False))), None)
    assert found == (
        "experts of 1536 rows in blocks of 128 that share a scale cannot be dealt to engine.tensor_parallel=8; "
        "set one of 1, 2, 4",
    )


def test_two_copies_that_do_not_fit_side_by_side_need_colocate_false(job_of: JobOf) -> None:
    job = job_of(entry_of(QWEN_235B, **on(8, 8)))
    # Twice 470 GB / 8, and the cache of 812 tokens twice; the draft's bfloat16 weights, a width of 12,288.
    draft = 2 * (3 * 4096**2 + 8192 * (8192 + 1024) + 8192 * 4096 + 3 * 4096 * 12_288 + 4096 * 32_000)
    expected = 2 * (470_187_220_992 + 4) / 8 + 2 * 812 * 192_512 / 4 + draft / 8
    assert colocated_bytes_per_gpu(job) == pytest.approx(expected, rel=1e-3)
    assert problems(job, None) == (
        f"two copies of the target and its draft take {expected / GIB:,.0f} GiB of each GPU's 79 GiB: set "
        "engine.colocate: false",
    )
    assert problems(job_of(entry_of(QWEN_235B, **on(8, 8, colocate=False))), None) == ()


def test_a_server_over_two_hosts_is_named(job_of: JobOf) -> None:
    batch = {"training": {"tokens_per_batch": 131_072}}
    # Without it the draft would take 7168 / 64 = 112, see below.
    draft = {"head_dim": 128}
    entry = entry_of("moonshotai/Kimi-K2-Instruct", **on(16, 16, colocate=False), draft=draft, **batch)
    (problem,) = problems(job_of(entry), None)
    assert problem.startswith(
        "engine.tensor_parallel=16 needs one host with so many GPUs, and hosts have 8: take 8 x b200"
    )


def test_a_full_disk_names_float8_and_live_features(job_of: JobOf) -> None:
    job = job_of(entry_of(resources={"num_gpus": 2}))
    (problem,) = problems(job, free_disk_bytes=20e9)
    assert "features need 0.01 TB and the target 0.02 TB, but 0.02 TB are free" in problem
    assert "features.dtype: float8 (half of the features) or features.mode: live with features.serve_gpus: 1" in problem
    assert problem.endswith("or lower data.sources.limit")
    (problem,) = problems(job_of(entry_of(features={"dtype": "float8"})), free_disk_bytes=18e9)
    assert problem.endswith("are free where the store is: lower data.sources.limit")


def test_heads_that_cannot_be_dealt_are_named(job_of: JobOf) -> None:
    scout, batch = "meta-llama/Llama-4-Scout-17B-16E-Instruct", {"training": {"tokens_per_batch": 131_072}}
    assert problems(job_of(entry_of(scout, **on(8, 8))), None) == ()
    found = problems(job_of(entry_of(scout, **on(16, 16), **batch)), None)
    assert "40 attention heads cannot be dealt to engine.tensor_parallel=16; set a divisor" in found


def test_a_better_split_of_live_gpus_is_proposed(job_of: JobOf) -> None:
    live: dict[str, Any] = {"resources": {"num_gpus": 8}, "features": {"mode": "live", "serve_gpus": 7}}
    found = problems(job_of(entry_of(data={"sources": [{"dataset": "a/b", "limit": 1_000_000}]}, **live)), None)
    assert len(found) == 1
    assert found[0].startswith("features.serve_gpus=7 trains for ")


def test_sizes_that_training_does_not_take_are_said_before_anything_is_captured(job_of: JobOf) -> None:
    (problem,) = problems(job_of(entry_of(draft={"head_dim": 96})), None)
    assert problem == "heads of 96 are none that training's attention takes on a GPU; set draft.head_dim: 128"
    # Llama 3.1 8B has 8 KV heads, which the draft takes.
    (problem,) = problems(job_of(entry_of(draft={"num_attention_heads": 4})), None)
    assert problem == "4 heads cannot share the draft's 8 KV heads evenly; set draft.num_key_value_heads to a divisor"
    training = {"float8_matmuls": True}
    (problem,) = problems(job_of(entry_of(draft={"draft_vocab_size": 32_001}, training=training)), None)
    assert problem == (
        "training.float8_matmuls takes multiples of 16, not draft.draft_vocab_size=32001; set draft.draft_vocab_size: "
        "32000"
    )
    assert problems(job_of(entry_of(draft={"head_dim": 64}, training=training)), None) == ()
