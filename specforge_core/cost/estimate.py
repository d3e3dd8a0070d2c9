"""What each stage of an entry takes on named hardware: tokens, bytes, time, memory. Torch-free."""

import math

from pydantic import computed_field

from specforge_core.benchmark.sweep import SWEEP_ROUNDS, sweep_servings
from specforge_core.cost.configs import hub_facts
from specforge_core.cost.draft_model import (
    COMPUTE_BYTES,
    MASTER_BYTES,
    checkpoint_bytes,
    feature_bytes,
    frozen_bytes,
    muon_flops,
    num_muon_parameters,
    num_parameters,
    num_split_parameters,
    optimizer_bytes,
)
from specforge_core.cost.hardware import GPUS_PER_HOST, NETWORK_BYTES_PER_S
from specforge_core.cost.job import Job
from specforge_core.cost.rates import ADAMW_BYTES, TOKEN_BYTES, fit_line
from specforge_core.cost.serving import Answer
from specforge_core.cost.units import duration, quantity
from specforge_core.facts import Record
from specforge_core.training.bench.shapes import attention_flops, useful_flops

CONVERSATION_BYTES_PER_TOKEN = 10
"""Its text, its id in 32 bits and the mask, in Parquet: an upper bound."""
CHECKPOINTS_KEPT = 3
"""At most, while it trains: the last two and the best."""
MAP_BYTES = 8
"""Of a target token, in the two maps of the vocabulary: an upper bound."""
FORWARD_SHARE = 1 / 3
"""Of a forward and backward pass."""
ATTENTION_COST = 1.7
"""So much longer than others takes a FLOP of training's attention: its kernel reaches 353 TFLOP/s on an H100, a whole
pass over short documents 616. By passes over documents of 32,768 to 131,072 tokens on an H200 it is 1.70 to 1.73."""
STAGE_START_S = 20.0
"""Of a stage beside its servers and its work: imports, the tokenizer, buffers, and hashing what it leaves. 16 s of
training, 20 to 28 s of what serves in the build of `demo-8b` on an H100."""
TRAIN_START_S = 35.0
"""Until the kernels of the first step are compiled, in that build."""
MUON_BYTES = 62
"""Read and written for each weight by `torch.optim.Muon`: the gradient divided (8), the momentum and Nesterov's update
(12 each), a bfloat16 copy of that and its norm (12), the decay (8) and the step (10)."""
IN_PROCESS_LAYER_S = 0.3e-3
"""For each token and layer, where the target is run by Transformers, with its draft: 47 s for 5,013 tokens of 32 layers
in that build."""
SUITE_PROMPTS = 200
"""Of a suite whose size is not known."""


class StageCost(Record):
    """One stage."""

    stage: str
    num_tokens: float
    """Read by capture, written by regeneration, seen by training over all epochs."""
    disk_bytes: float
    """What it leaves in the store, and the checkpoints that it needs until it is done."""
    num_gpus: int
    wall_s: float
    """0 of what takes a minute on the CPU."""
    start_s: float = 0.0
    """Of that, what it takes however little work there is."""
    peak_bytes_per_gpu: float
    limit: str = ""
    """What it waits for, in words."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def gpu_hours(self) -> float:
        """Of all GPUs that the entry holds meanwhile, idle or not."""
        return self.num_gpus * self.wall_s / 3600


class EntryCost(Record):
    """One entry."""

    entry: str
    target: str
    hardware: str
    num_gpus: int
    weight_bytes: float
    """Of the target: to be downloaded, and to be read by each server."""
    num_parameters: int
    num_active_parameters: float
    num_draft_parameters: int
    num_conversations: int
    stages: tuple[StageCost, ...]
    assumptions: tuple[str, ...]
    problems: tuple[str, ...] = ()
    """What will not work as the manifest says, with the way out."""

    @property
    def disk_bytes(self) -> float:
        """In the store, of all stages."""
        return sum(stage.disk_bytes for stage in self.stages)

    @property
    def gpu_hours(self) -> float:
        """Of all stages."""
        return sum(stage.gpu_hours for stage in self.stages)

    @property
    def wall_s(self) -> float:
        """Of all stages, one after the other."""
        return sum(stage.wall_s for stage in self.stages)


def regenerate_cost(job: Job) -> StageCost:
    """Answers, written by as many servers as there are GPUs for."""
    conversations, slots = job.conversations, job.num_slots
    num_answers = conversations.num_conversations * conversations.answers_each
    answer_s = job.server.answer_s(job.rates, slots, _answer(job))
    start_s = STAGE_START_S + job.servers_start_s(1)
    return StageCost(
        stage="regenerate",
        num_tokens=conversations.num_answer_tokens,
        disk_bytes=CONVERSATION_BYTES_PER_TOKEN * conversations.num_tokens,
        num_gpus=job.num_gpus,
        wall_s=num_answers / job.num_servers * answer_s + start_s,
        start_s=start_s,
        peak_bytes_per_gpu=job.served_bytes_per_gpu,
        limit=f"{slots} requests at once on each of {job.num_servers} servers",
    )


def _answer(job: Job, max_new_tokens: int | None = None) -> Answer:
    """An average one of the conversations, cut at `max_new_tokens`."""
    conversations = job.conversations
    num_tokens = min(conversations.answer_tokens, max_new_tokens or math.inf)
    return Answer(conversations.prompt_tokens, num_tokens, num_keys=conversations.tokens_each / 2)


def capture_cost(job: Job) -> StageCost:
    """Hidden states of all conversations, or of the held-out ones alone: the servers, or the disk that they go to."""
    share = job.entry.training.eval_fraction if job.is_live else 1.0
    served_s = share * reading_s(job, job.num_gpus)
    stored = share * job.feature_bytes
    written_s = stored / (job.num_hosts * job.rates.write_bytes_per_s)
    start_s = STAGE_START_S + job.servers_start_s(1)
    head_bytes = COMPUTE_BYTES * 2 * job.draft.width * job.draft.vocab_size
    return StageCost(
        stage="capture",
        num_tokens=share * job.documents.num_tokens,
        disk_bytes=stored + head_bytes,
        num_gpus=job.num_gpus,
        wall_s=max(served_s, written_s) + start_s,
        start_s=start_s,
        peak_bytes_per_gpu=job.served_bytes_per_gpu,
        limit=_disk_limit(written_s, served_s, "written", job.rates.write_bytes_per_s),
    )


def train_cost(job: Job) -> StageCost:
    """All epochs and evaluations: the passes, or what features come from."""
    trained_s = training_s(job, job.entry.num_training_gpus)
    fed_s, start_s, limit = 0.0, STAGE_START_S + TRAIN_START_S, ""
    if job.is_live:
        serve_gpus = job.entry.features.serve_gpus or 0
        fed_s = job.entry.training.num_epochs * reading_s(job, serve_gpus)
        start_s += job.servers_start_s(1)
        waits, busy = ("training", "the target") if fed_s > trained_s else ("the target", "training")
        limit = f"{waits} waits for {busy}, {min(fed_s, trained_s) / max(fed_s, trained_s):.0%} busy"
    else:
        fed_s = job.entry.training.num_epochs * job.feature_bytes / (job.num_hosts * job.rates.read_bytes_per_s)
        limit = _disk_limit(fed_s, trained_s, "read", job.rates.read_bytes_per_s)
    return StageCost(
        stage="train",
        num_tokens=_training_tokens(job),
        disk_bytes=CHECKPOINTS_KEPT * checkpoint_bytes(job.draft, job.entry.training)
        + MASTER_BYTES * num_parameters(job.draft),
        num_gpus=job.num_gpus,
        wall_s=max(trained_s, fed_s) + start_s,
        start_s=start_s,
        peak_bytes_per_gpu=max(train_bytes_per_gpu(job), job.served_bytes_per_gpu if job.is_live else 0.0),
        limit=limit,
    )


def reading_s(job: Job, num_gpus: int) -> float:
    """Seconds in which servers on so many GPUs read all documents once."""
    documents = job.documents
    head_share = job.num_teaching / job.counts.num_tokens
    request_s = job.server.capture_s(job.rates, documents.tokens_each, documents.keys_per_token, head_share)
    return documents.num_conversations * request_s / max(1, num_gpus // job.server.tensor_parallel)


def training_s(job: Job, num_gpus: int) -> float:
    """Seconds in which so many GPUs train all epochs, and evaluate, if nothing keeps them waiting."""
    training = job.entry.training
    num_steps = _training_tokens(job) / (_micro_batches(job) * training.tokens_per_micro_batch)
    eval_tokens = training.evals_per_run * training.eval_fraction * job.scale * job.counts.num_tokens
    eval_passes = eval_tokens / training.tokens_per_micro_batch / _num_replicas(job, num_gpus)
    return num_steps * step_s(job, num_gpus) + FORWARD_SHARE * _pass_s(job) * eval_passes


def step_s(job: Job, num_gpus: int) -> float:
    """Seconds of one optimizer step on so many GPUs."""
    passes = math.ceil(_micro_batches(job) / _num_replicas(job, num_gpus))
    return passes * _pass_s(job) + _optimizer_s(job) + _reduction_s(job, num_gpus)


def _micro_batches(job: Job) -> int:
    """Of a step."""
    return max(1, job.entry.training.tokens_per_batch // job.entry.training.tokens_per_micro_batch)


def _num_replicas(job: Job, num_gpus: int) -> int:
    return max(1, num_gpus // job.entry.training.parallel.gpus_per_replica)


def best_serve_gpus(job: Job) -> int | None:
    """How many GPUs should run the target while the others train on live features; None if they are too few."""
    epochs, shared_by = job.entry.training.num_epochs, job.entry.training.parallel.gpus_per_replica
    multiples = range(job.server.tensor_parallel, job.num_gpus, job.server.tensor_parallel)
    choices = [n for n in multiples if (job.num_gpus - n) % shared_by == 0]
    return min(
        choices,
        key=lambda n: max(epochs * reading_s(job, n), training_s(job, job.num_gpus - n)),
        default=None,
    )


def train_bytes_per_gpu(job: Job) -> float:
    """Of each GPU that trains: weights and gradients, of which tp splits the layer's; moments, which are in shards; the
    target's tables; a micro-batch, whole whatever cp is; and activations as measured.
    """
    draft, training = job.draft, job.entry.training
    parameters = num_parameters(draft) - (1 - 1 / training.parallel.tp) * num_split_parameters(draft)
    inputs = feature_bytes(draft.width, "bfloat16", 1, job.num_teaching / job.counts.num_tokens)
    return (
        2 * MASTER_BYTES * parameters
        + optimizer_bytes(draft, training, job.entry.num_training_gpus)
        + frozen_bytes(draft)
        + (inputs + TOKEN_BYTES * draft.width) * training.tokens_per_micro_batch
        + fit_line(job.rates.activation_bytes).seconds(parameters)
    )


def vocabulary_cost(job: Job) -> StageCost:
    """A count of the answers' tokens on the CPU."""
    return _without_gpus("vocabulary", job.conversations.num_answer_tokens, MAP_BYTES * job.draft.vocab_size)


def export_cost(job: Job) -> StageCost:
    """The draft in bfloat16, written by the CPU."""
    return _without_gpus("export", 0, COMPUTE_BYTES * num_parameters(job.draft))


def _without_gpus(stage: str, num_tokens: float, disk_bytes: float) -> StageCost:
    """Of a stage that takes a minute at most, which is not counted."""
    return StageCost(
        stage=stage, num_tokens=num_tokens, disk_bytes=disk_bytes, num_gpus=0, wall_s=0, peak_bytes_per_gpu=0
    )


def benchmark_cost(job: Job) -> StageCost:
    """Suites and sweep, each with and without draft, with which they are taken to last as long as without; then the
    target in the stage's own process."""
    benchmark = job.entry.benchmark
    chains = {serving.chain() for serving in benchmark.serving}
    num_tokens = seconds = 0.0
    for suite in benchmark.suites:
        known = hub_facts()["suites"].get(suite.source.dataset, suite.source.limit or SUITE_PROMPTS)
        num_prompts, answer = min(suite.source.limit or known, known), _answer(job, suite.max_new_tokens)
        for serving in benchmark.serving:
            num_tokens += 2 * num_prompts * answer.num_tokens
            seconds += 2 * num_prompts * job.server.answer_s(job.rates, serving.concurrency, answer)
        num_compared = len(chains) * min(num_prompts, benchmark.num_in_process_prompts)
        seconds += num_compared * answer.num_tokens * job.server.model.num_layers * IN_PROCESS_LAYER_S
    if sweep := benchmark.sweep:
        chains |= {serving.chain() for serving in sweep_servings(sweep)}
        # A round ends with its last answer, which is taken to be as long as is allowed.
        longest = _answer(job)._replace(num_tokens=float(sweep.max_new_tokens))
        for slots in sweep.concurrencies:
            num_answers = 2 * SWEEP_ROUNDS * len(sweep.chains) * sweep.requests_per_slot * slots
            num_tokens += num_answers * longest.num_tokens
            seconds += num_answers * job.server.answer_s(job.rates, slots, longest)
    start_s = STAGE_START_S + job.servers_start_s(1 + len(chains))
    return StageCost(
        stage="benchmark",
        num_tokens=num_tokens,
        disk_bytes=0,
        num_gpus=job.num_gpus,
        wall_s=seconds + start_s,
        start_s=start_s,
        peak_bytes_per_gpu=job.served_bytes_per_gpu,
        limit=f"{1 + len(chains)} starts of servers",
    )


STAGES = (regenerate_cost, vocabulary_cost, capture_cost, train_cost, export_cost, benchmark_cost)


def _pass_s(job: Job) -> float:
    """Seconds of one full micro-batch, forward and backward; GPUs that share it are taken to do so evenly."""
    points = job.rates.passes
    if job.entry.training.float8_matmuls and job.rates.float8_passes:
        points = job.rates.float8_passes
    flops = useful_flops(job.draft, job.counts) + (ATTENTION_COST - 1) * attention_flops(job.draft, job.counts)
    speed = job.server.hardware.bf16_flops / job.rates.hardware.bf16_flops
    flops *= job.entry.training.tokens_per_micro_batch / job.counts.num_tokens
    return fit_line(points).seconds(flops / job.entry.training.parallel.gpus_per_replica, speed)


def _training_tokens(job: Job) -> float:
    """Of all epochs."""
    training = job.entry.training
    return training.num_epochs * (1 - training.eval_fraction) * job.scale * job.counts.num_tokens


def _optimizer_s(job: Job) -> float:
    """Of one step of the optimizers: what they read and write, and Muon's matrix products."""
    rates, hardware = job.rates, job.server.hardware
    by_muon = num_muon_parameters(job.draft, job.entry.training)
    moved = ADAMW_BYTES * (num_parameters(job.draft) - by_muon) + MUON_BYTES * by_muon
    speed = hardware.memory_bytes_per_s / rates.hardware.memory_bytes_per_s
    seconds = moved / (rates.optimizer_bytes_per_s * speed)
    if by_muon:
        seconds += muon_flops(job.draft) * rates.hardware.bf16_flops / (rates.matmul_flops * hardware.bf16_flops)
    return seconds


def _reduction_s(job: Job, num_gpus: int) -> float:
    """Of the float32 gradients over all GPUs, once a step and not hidden behind anything."""
    sent = 2 * (num_gpus - 1) / num_gpus * MASTER_BYTES * num_parameters(job.draft)
    return sent / (NETWORK_BYTES_PER_S if num_gpus > GPUS_PER_HOST else job.server.hardware.link_bytes_per_s)


def _disk_limit(disk_s: float, other_s: float, verb: str, bytes_per_s: float) -> str:
    if disk_s <= other_s:
        return ""
    return f"features are {verb} at {quantity(bytes_per_s)}B/s a host; without that, {duration(other_s)}"
