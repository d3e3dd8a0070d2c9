"""What of an entry will not work on named hardware, each with the way out. Torch-free."""

from collections.abc import Iterator

from specforge_core.cost.draft_model import COMPUTE_BYTES, frozen_bytes, num_parameters
from specforge_core.cost.estimate import best_serve_gpus, capture_cost, train_bytes_per_gpu, train_cost
from specforge_core.cost.hardware import GIB, GPUS_PER_HOST, HARDWARE
from specforge_core.cost.job import Job
from specforge_core.cost.serving import ServerShape
from specforge_core.cost.units import duration
from specforge_core.manifest import ManifestEntry

GB, TB = 1e9, 1e12
WORTH_A_CHANGE = 0.95
"""Of the time as it is: a smaller gain is within what the rates are off."""
TENSOR_PARALLEL = (1, 2, 4, 8, 16, 32)
FLOAT8_BLOCK = 128
"""Of the public FP8 revisions."""
NARROWEST_HEAD = 16
"""Of `kernels/ttt_attention.py`, which takes powers of two."""
FLOAT8_MULTIPLE = 16
"""Of `kernels/float8_product.py`."""
LARGEST_FRACTION = 0.95
"""Of a GPU's memory for two servers that share it; the rest is their activations and contexts."""


def problems(job: Job, free_disk_bytes: float | None) -> tuple[str, ...]:
    """What will not work, or only slowly, in words.

    Args: free_disk_bytes: where the store is; None if that is not the disk that the build would use.
    """
    return (
        *_server_problems(job),
        *_live_problems(job),
        *_benchmark_problems(job),
        *_draft_problems(job),
        *_training_problems(job),
        *_disk_problems(job, free_disk_bytes),
    )


def fits(server: ServerShape, job: Job) -> bool:
    """Whether a server has room for its weights and at least one of the longest conversations."""
    data = job.entry.data
    return server.kv_tokens(job.entry.engine.mem_fraction_static) >= data.max_prompt_tokens + data.max_new_tokens


def _server_problems(job: Job) -> Iterator[str]:
    server, model, engine = job.server, job.server.model, job.entry.engine
    parallel = server.tensor_parallel
    if model.num_heads % parallel:
        yield f"{model.num_heads} attention heads cannot be dealt to engine.tensor_parallel={parallel}; set a divisor"
    if not _divides(server):
        block, width = model.float8_block, model.expert_width
        divisors = [n for n in TENSOR_PARALLEL if _divides(server._replace(tensor_parallel=n))]
        yield (
            f"experts of {width} rows in blocks of {block} that share a scale cannot be dealt to "
            f"engine.tensor_parallel={parallel}; set one of {', '.join(map(str, divisors))}"
        )
    if not fits(server, job):
        yield _does_not_fit(job)
    elif job.num_slots < engine.max_running_requests:
        yield (
            f"the KV cache has room for {job.num_slots} conversations at once on each server, not for "
            f"engine.max_running_requests={engine.max_running_requests}: raise engine.tensor_parallel or "
            "engine.mem_fraction_static, or take GPUs with more memory"
        )
    if server.spans_hosts:
        yield (
            f"engine.tensor_parallel={parallel} needs one host with so many GPUs, and hosts have {GPUS_PER_HOST}: "
            f"{_ways_to_fewer_gpus(job)}; what is counted here assumes a network of 400 Gbit/s for each GPU"
        )


def _divides(server: ServerShape) -> bool:
    """Whether each GPU gets whole blocks of every expert."""
    block, width = server.model.float8_block, server.model.expert_width
    return not block or not width or width % (block * server.tensor_parallel) == 0


def _does_not_fit(job: Job) -> str:
    server, data = job.server, job.entry.data
    capacity = server.hardware.memory_bytes / GB
    left = server.kv_tokens(job.entry.engine.mem_fraction_static)
    return (
        f"the target does not fit: {server.model.weight_bytes / GB:,.0f} GB of weights over {server.tensor_parallel} x "
        f"{capacity:.0f} GB, of which engine.mem_fraction_static={job.entry.engine.mem_fraction_static:g} is a "
        f"server's, leave room for {max(0, left):,.0f} tokens, and one conversation can have "
        f"{data.max_prompt_tokens + data.max_new_tokens:,}: {_ways_to_fit(job)}"
    )


def _ways_to_fit(job: Job) -> str:
    ways = []
    larger = [n for n in TENSOR_PARALLEL if n > job.server.tensor_parallel and job.server.model.num_heads % n == 0]
    enough = next((n for n in larger if fits(job.server._replace(tensor_parallel=n), job)), None)
    if enough:
        more = "" if enough <= job.num_gpus else f" with resources.num_gpus: {enough}"
        ways.append(f"set engine.tensor_parallel: {enough}{more}")
    return " or ".join([*ways, *_other_ways(job, job.server.tensor_parallel)])


def _ways_to_fewer_gpus(job: Job) -> str:
    return " or ".join(_other_ways(job, GPUS_PER_HOST)) or "nothing known here fits one host"


def _other_ways(job: Job, parallel: int) -> list[str]:
    """Other weights or GPUs with which `parallel` GPUs are enough."""
    model = job.server.model
    server = job.server._replace(tensor_parallel=parallel)
    ways = []
    halved = {name: part._replace(bytes=part.parameters) for name, part in model.parts.items()}
    in_float8 = server._replace(model=model._replace(parts=halved, float8_block=FLOAT8_BLOCK))
    if model.weight_bytes > 1.5 * model.num_parameters and _divides(in_float8) and fits(in_float8, job):
        ways.append(f"take an FP8 revision of the target, which fits {parallel} of these GPUs")
    larger = [gpu.name for gpu in HARDWARE if gpu.memory_bytes > server.hardware.memory_bytes]
    if names := [gpu.name for gpu in HARDWARE if gpu.name in larger and fits(server._replace(hardware=gpu), job)]:
        ways.append(f"take {parallel} x {' or '.join(names)}")
    return ways


def _benchmark_problems(job: Job) -> Iterator[str]:
    """Two servers on the same GPUs: the target twice, with its draft once, and the KV cache of the widest load each."""
    if not job.entry.engine.colocate or not fits(job.server, job):
        return
    needed = colocated_bytes_per_gpu(job)
    room = LARGEST_FRACTION * job.server.hardware.memory_bytes
    if needed > room:
        yield (
            f"two copies of the target and its draft take {needed / GIB:,.0f} GiB of each GPU's "
            f"{job.server.hardware.memory_bytes / GIB:,.0f} GiB: set engine.colocate: false"
            + (", or a larger engine.tensor_parallel" if job.num_gpus > job.server.tensor_parallel else "")
        )


def colocated_bytes_per_gpu(job: Job) -> float:
    """Of the benchmark's two servers together."""
    server, benchmark, prompt = job.server, job.entry.benchmark, job.conversations.tokens_each
    longest = max(suite.max_new_tokens for suite in benchmark.suites)
    loads = [serving.concurrency * (prompt + longest) for serving in benchmark.serving]
    if sweep := benchmark.sweep:
        loads += [slots * (prompt + sweep.max_new_tokens) for slots in sweep.concurrencies]
    kv_bytes = max(loads) * server.model.kv_bytes_per_gpu(server.tensor_parallel)
    draft_bytes = COMPUTE_BYTES * num_parameters(job.draft) / server.tensor_parallel
    return 2 * (server.weight_bytes_per_gpu + kv_bytes) + draft_bytes


def _draft_problems(job: Job) -> Iterator[str]:
    """Sizes that training refuses, hours later."""
    draft = job.draft
    wider = max(NARROWEST_HEAD, 1 << (draft.head_dim - 1).bit_length())
    if wider != draft.head_dim:
        yield (
            f"heads of {draft.head_dim} are none that training's attention takes on a GPU; set draft.head_dim: {wider}"
        )
    if draft.num_heads % draft.num_kv_heads:
        yield (
            f"{draft.num_heads} heads cannot share the draft's {draft.num_kv_heads} KV heads evenly; "
            "set draft.num_key_value_heads to a divisor"
        )
    if not job.entry.training.float8_matmuls:
        return
    for name in ("intermediate_size", "draft_vocab_size"):
        size = getattr(draft, name)
        if size % FLOAT8_MULTIPLE:
            yield (
                f"training.float8_matmuls takes multiples of {FLOAT8_MULTIPLE}, not draft.{name}={size}; "
                f"set draft.{name}: {size // FLOAT8_MULTIPLE * FLOAT8_MULTIPLE}"
            )


def _training_problems(job: Job) -> Iterator[str]:
    needed, room = train_bytes_per_gpu(job), job.server.hardware.memory_bytes
    if needed > room:
        yield (
            f"training needs {needed / GIB:,.0f} GiB of each GPU's {room / GIB:,.0f} GiB "
            f"({frozen_bytes(job.draft) / GIB:,.1f} GiB of them the target's tables): lower "
            "training.tokens_per_micro_batch or draft.intermediate_size"
        )


def _disk_problems(job: Job, free_disk_bytes: float | None) -> Iterator[str]:
    stored = capture_cost(job).disk_bytes
    # The target is downloaded once for all of the entry's stages.
    needed = stored + job.server.model.weight_bytes
    if free_disk_bytes is not None and needed > free_disk_bytes:
        ways = [] if job.entry.features.dtype == "float8" else ["set features.dtype: float8 (half of the features)"]
        serve_gpus = best_serve_gpus(job)
        if not job.is_live and serve_gpus:
            ways.append(f"features.mode: live with features.serve_gpus: {serve_gpus}")
        ways.append("lower data.sources.limit")
        yield (
            f"features need {stored / TB:,.2f} TB and the target {job.server.model.weight_bytes / TB:,.2f} TB, but "
            f"{free_disk_bytes / TB:,.2f} TB are free where the store is: {' or '.join(ways)}"
        )


def _live_problems(job: Job) -> Iterator[str]:
    """Where another split of the GPUs between target and training is clearly faster."""
    best = best_serve_gpus(job) if job.is_live else None
    if best is None:
        return
    proposed = job._replace(entry=_served_by(job.entry, best))
    now_s, then_s = train_cost(job).wall_s, train_cost(proposed).wall_s
    if then_s < WORTH_A_CHANGE * now_s:
        yield (
            f"features.serve_gpus={job.entry.features.serve_gpus} trains for {duration(now_s)}; "
            f"{best} would take {duration(then_s)}"
        )


def _served_by(entry: ManifestEntry, serve_gpus: int) -> ManifestEntry:
    features = entry.features.model_copy(update={"serve_gpus": serve_gpus})
    return entry.model_copy(update={"features": features})
