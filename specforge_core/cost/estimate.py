"""What each stage of an entry takes on named hardware: tokens, bytes, time, memory. Torch-free."""

import math
from typing import NamedTuple

from pydantic import computed_field

from specforge_core.artifacts import Store
from specforge_core.benchmark.sweep import SWEEP_ROUNDS, sweep_servings
from specforge_core.cost.configs import ConfigReader, hub_facts
from specforge_core.cost.conversations import ExpectedConversations, expected_conversations
from specforge_core.cost.draft_model import (
    COMPUTE_BYTES,
    MASTER_BYTES,
    OPTIMIZER_BYTES,
    add_counts,
    checkpoint_bytes,
    count_conversation,
    cut,
    draft_shape,
    feature_bytes,
    frozen_bytes,
    num_parameters,
)
from specforge_core.cost.hardware import GPUS_PER_HOST, NETWORK_BYTES_PER_S, Hardware
from specforge_core.cost.rates import ADAMW_BYTES, Rates, fit_line
from specforge_core.cost.serving import ServerShape
from specforge_core.cost.target_model import target_model
from specforge_core.cost.units import duration, quantity
from specforge_core.facts import Record
from specforge_core.manifest import ManifestEntry
from specforge_core.training.bench.shapes import RowCounts, Shape, useful_flops

CONVERSATION_BYTES_PER_TOKEN = 10
"""Its text, its id in 32 bits and the mask, in Parquet: an upper bound."""
CHECKPOINTS_KEPT = 3
"""At most, while it trains: the last two and the best."""
MAP_BYTES = 8
"""Of a target token, in the two maps of the vocabulary: an upper bound."""
FORWARD_SHARE = 1 / 3
"""Of a forward and backward pass."""
SERVER_START_S = 60.0
"""Until SGLang has imported itself and captured its graphs, without the weights: assumed, not measured here."""
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


class Job(NamedTuple):
    """An entry with all that its cost is counted from."""

    entry: ManifestEntry
    server: ServerShape
    draft: Shape
    conversations: ExpectedConversations
    documents: ExpectedConversations
    """The same, as training cuts them."""
    counts: RowCounts
    """Of the sample's documents together."""
    rates: Rates
    config_source: str

    @property
    def num_gpus(self) -> int:
        """That the entry holds."""
        return self.entry.resources.num_gpus

    @property
    def num_servers(self) -> int:
        """At once, in regenerate and capture."""
        return max(1, self.num_gpus // self.server.tensor_parallel)

    @property
    def num_hosts(self) -> int:
        """That its GPUs are in."""
        return max(1, math.ceil(self.num_gpus / GPUS_PER_HOST))

    @property
    def scale(self) -> float:
        """All conversations against the sample."""
        return self.documents.num_conversations / len(self.documents.sample)

    @property
    def feature_bytes(self) -> float:
        """Of all features, if they are stored."""
        counts, features = self.counts, self.entry.features
        return self.scale * feature_bytes(self.draft.width, features.dtype, counts.num_tokens, self.num_teaching)

    @property
    def num_teaching(self) -> float:
        """Tokens of the sample whose last hidden state is kept: one for each token of an answer."""
        return self.documents.answer_tokens_each * len(self.documents.sample)

    @property
    def is_live(self) -> bool:
        """Whether features are consumed as they are made, and never stored."""
        return self.entry.features.mode == "live"

    @property
    def start_s(self) -> float:
        """Until servers answer: weights come from the disk once, and all servers of a host read them there."""
        return SERVER_START_S + self.server.model.weight_bytes / self.rates.read_bytes_per_s

    @property
    def served_bytes_per_gpu(self) -> float:
        """What a server takes, whatever it holds."""
        return self.entry.engine.mem_fraction_static * self.server.hardware.memory_bytes

    @property
    def num_slots(self) -> int:
        """Requests that a server decodes at once: as many as are allowed, and fit."""
        fit = self.server.kv_tokens(self.entry.engine.mem_fraction_static) / self.conversations.tokens_each
        return max(1, min(self.entry.engine.max_running_requests, int(fit)))


def make_job(
    entry: ManifestEntry,
    *,
    configs: ConfigReader,
    store: Store | None,
    rates: Rates,
    hardware: Hardware,
    tokens_per_conversation: tuple[int, int] | None = None,
) -> Job:
    """The job of an entry. Raises: ValueError if something that its cost depends on is not known."""
    if entry.resources.num_gpus == 0:
        raise ValueError(f"{entry.name} is built on a CPU, whose rates nothing has measured; its cost is not counted")
    found = configs.read(entry.target)
    model = target_model(found.values, entry.target)
    conversations = expected_conversations(entry, store, tokens_per_conversation)
    kept = [cut(conversation, entry.training.max_document_tokens) for conversation in conversations.sample]
    return Job(
        entry=entry,
        server=ServerShape(model, hardware, entry.engine.tensor_parallel),
        draft=draft_shape(entry.draft, found.values, model),
        conversations=conversations,
        documents=conversations._replace(sample=tuple(kept)),
        counts=add_counts(count_conversation(conversation, entry.draft.num_steps) for conversation in kept),
        rates=rates,
        config_source=found.source,
    )


def regenerate_cost(job: Job) -> StageCost:
    """Answers, written by as many servers as there are GPUs for."""
    conversations, slots = job.conversations, job.num_slots
    step_s = job.server.step_s(job.rates, slots, conversations.tokens_each / 2)
    num_tokens = conversations.num_answer_tokens
    return StageCost(
        stage="regenerate",
        num_tokens=num_tokens,
        disk_bytes=CONVERSATION_BYTES_PER_TOKEN * conversations.num_tokens,
        num_gpus=job.num_gpus,
        wall_s=num_tokens / (job.num_servers * slots) * step_s + job.start_s,
        peak_bytes_per_gpu=job.served_bytes_per_gpu,
        limit=f"{slots} requests at once on each of {job.num_servers} servers",
    )


def capture_cost(job: Job) -> StageCost:
    """Hidden states of all conversations, or of the held-out ones alone: the servers, or the disk that they go to."""
    share = job.entry.training.eval_fraction if job.is_live else 1.0
    served_s = share * reading_s(job, job.num_gpus)
    stored = share * job.feature_bytes
    written_s = stored / (job.num_hosts * job.rates.write_bytes_per_s)
    head_bytes = COMPUTE_BYTES * 2 * job.draft.width * job.draft.vocab_size
    return StageCost(
        stage="capture",
        num_tokens=share * job.documents.num_tokens,
        disk_bytes=stored + head_bytes,
        num_gpus=job.num_gpus,
        wall_s=max(served_s, written_s) + job.start_s,
        peak_bytes_per_gpu=job.served_bytes_per_gpu,
        limit=_disk_limit(written_s, served_s, "written", job.rates.write_bytes_per_s),
    )


def train_cost(job: Job) -> StageCost:
    """All epochs and evaluations: the passes, or what features come from."""
    trained_s = training_s(job, job.entry.num_training_gpus)
    fed_s, start_s, limit = 0.0, 0.0, ""
    if job.is_live:
        serve_gpus = job.entry.features.serve_gpus or 0
        fed_s, start_s = job.entry.training.num_epochs * reading_s(job, serve_gpus), job.start_s
        waits, busy = ("training", "the target") if fed_s > trained_s else ("the target", "training")
        limit = f"{waits} waits for {busy}, {min(fed_s, trained_s) / max(fed_s, trained_s):.0%} busy"
    else:
        fed_s = job.entry.training.num_epochs * job.feature_bytes / (job.num_hosts * job.rates.read_bytes_per_s)
        limit = _disk_limit(fed_s, trained_s, "read", job.rates.read_bytes_per_s)
    return StageCost(
        stage="train",
        num_tokens=_training_tokens(job),
        disk_bytes=CHECKPOINTS_KEPT * checkpoint_bytes(job.draft) + MASTER_BYTES * num_parameters(job.draft),
        num_gpus=job.num_gpus,
        wall_s=max(trained_s, fed_s) + start_s,
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
    pass_s = _pass_s(job)
    per_step = max(1, training.tokens_per_batch // training.tokens_per_micro_batch)
    num_steps = _training_tokens(job) / (per_step * training.tokens_per_micro_batch)
    num_replicas = max(1, num_gpus // training.parallel.gpus_per_replica)
    step_s = math.ceil(per_step / num_replicas) * pass_s + _optimizer_s(job) + _reduction_s(job, num_gpus)
    eval_tokens = training.evals_per_run * training.eval_fraction * job.scale * job.counts.num_tokens
    return num_steps * step_s + FORWARD_SHARE * pass_s * eval_tokens / training.tokens_per_micro_batch / num_replicas


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
    """Of a replica: weights, gradients, moments, the target's tables, a micro-batch, and activations as measured."""
    parameters = num_parameters(job.draft)
    inputs = feature_bytes(job.draft.width, "bfloat16", 1, job.num_teaching / job.counts.num_tokens)
    return (
        (2 * MASTER_BYTES + OPTIMIZER_BYTES) * parameters
        + frozen_bytes(job.draft)
        + inputs * job.entry.training.tokens_per_micro_batch
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
    """Suites and sweep, each with and without draft: with it they are taken to last as long as without."""
    benchmark, answer = job.entry.benchmark, job.conversations.answer_tokens_each
    keys = job.conversations.tokens_each / 2
    num_tokens = seconds = 0.0
    for suite in benchmark.suites:
        known = hub_facts()["suites"].get(suite.source.dataset, suite.source.limit or SUITE_PROMPTS)
        written = 2 * min(suite.source.limit or known, known) * min(answer, suite.max_new_tokens)
        for serving in benchmark.serving:
            num_tokens += written
            seconds += written / serving.concurrency * job.server.step_s(job.rates, serving.concurrency, keys)
    chains = {serving.chain() for serving in benchmark.serving}
    if sweep := benchmark.sweep:
        chains |= {serving.chain() for serving in sweep_servings(sweep)}
        steps = 2 * SWEEP_ROUNDS * sweep.requests_per_slot * sweep.max_new_tokens * len(sweep.chains)
        num_tokens += steps * sum(sweep.concurrencies)
        seconds += steps * sum(job.server.step_s(job.rates, slots, keys) for slots in sweep.concurrencies)
    return StageCost(
        stage="benchmark",
        num_tokens=num_tokens,
        disk_bytes=0,
        num_gpus=job.num_gpus,
        wall_s=seconds + (1 + len(chains)) * job.start_s,
        peak_bytes_per_gpu=job.served_bytes_per_gpu,
        limit=f"{1 + len(chains)} starts of servers",
    )


STAGES = (regenerate_cost, vocabulary_cost, capture_cost, train_cost, export_cost, benchmark_cost)


def _pass_s(job: Job) -> float:
    """Seconds of one full micro-batch, forward and backward; GPUs that share it are taken to do so evenly."""
    points = job.rates.passes
    if job.entry.training.float8_matmuls and job.rates.float8_passes:
        points = job.rates.float8_passes
    flops_per_token = useful_flops(job.draft, job.counts) / job.counts.num_tokens
    speed = job.server.hardware.bf16_flops / job.rates.hardware.bf16_flops
    flops = flops_per_token * job.entry.training.tokens_per_micro_batch
    return fit_line(points).seconds(flops / job.entry.training.parallel.gpus_per_replica, speed)


def _training_tokens(job: Job) -> float:
    """Of all epochs."""
    training = job.entry.training
    return training.num_epochs * (1 - training.eval_fraction) * job.scale * job.counts.num_tokens


def _optimizer_s(job: Job) -> float:
    speed = job.server.hardware.memory_bytes_per_s / job.rates.hardware.memory_bytes_per_s
    return ADAMW_BYTES * num_parameters(job.draft) / (job.rates.optimizer_bytes_per_s * speed)


def _reduction_s(job: Job, num_gpus: int) -> float:
    """Of the float32 gradients over all GPUs, once a step and not hidden behind anything."""
    sent = 2 * (num_gpus - 1) / num_gpus * MASTER_BYTES * num_parameters(job.draft)
    return sent / (NETWORK_BYTES_PER_S if num_gpus > GPUS_PER_HOST else job.server.hardware.link_bytes_per_s)


def _disk_limit(disk_s: float, other_s: float, verb: str, bytes_per_s: float) -> str:
    if disk_s <= other_s:
        return ""
    return f"features are {verb} at {quantity(bytes_per_s)}B/s a host; without that, {duration(other_s)}"
