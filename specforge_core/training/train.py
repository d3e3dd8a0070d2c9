"""Stage `train`: hidden states and a draft vocabulary in, a draft checkpoint out. `step.py` is the heart of it.

    draft.safetensors     the draft under its serving names, float32
    draft_config.json     the `config.json` that it is served with

One process, or several under torchrun that share each step's micro-batches; gloo on CPUs, NCCL on GPUs.
"""

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch.optim import Optimizer

from specforge_core.artifacts import METRICS_NAME, PROGRESS_DIRECTORY, write_atomically
from specforge_core.data.loader import DocumentSet, FeatureSet, plan_steps
from specforge_core.data.shards import load_index, load_target_config, load_target_head
from specforge_core.data.vocab import load_vocabulary
from specforge_core.drafts import ALGORITHMS
from specforge_core.drafts.base import DraftBatch, DraftModel
from specforge_core.facts import DraftCheckpoint
from specforge_core.kernels.float8_product import multiplies_float8
from specforge_core.manifest_sections import TrainingConfig
from specforge_core.progress import progress
from specforge_core.stages import TrainSpec
from specforge_core.training.checkpoint import Checkpointer, TrainingState, load_state
from specforge_core.training.evaluate import Evaluation, evaluate
from specforge_core.training.metrics import Meter, append_metrics, drop_metrics_after, milestones
from specforge_core.training.optim import build_optimizers, learning_rate_factor, set_learning_rate
from specforge_core.training.parallel import parallelize, reassemble
from specforge_core.training.prefetch import device_batches
from specforge_core.training.sharding import Sharding
from specforge_core.training.step import train_step
from specforge_core.training.workers import Workers, join_workers

logger = logging.getLogger(__name__)

DRAFT_NAME = "draft.safetensors"
DRAFT_CONFIG_NAME = "draft_config.json"
REPORTS_PER_RUN = 200
"""Points of a training curve."""


class Plan(NamedTuple):
    """Document indices by micro-batch."""

    steps: list[Sequence[list[int]]]
    """The micro-batches of each optimizer step of the run, the same for any number of processes."""
    eval: list[list[int]]


class Run(NamedTuple):
    """A training on one of its workers."""

    config: TrainingConfig
    draft: DraftModel
    features: DocumentSet
    plan: Plan
    workers: Workers


def main(spec: TrainSpec, out: Path) -> DraftCheckpoint:
    """Facts about the trained draft; an interrupted training goes on from its last checkpoint.

    Raises: ValueError for sizes that do not fit together, FloatingPointError if the loss diverges.
    """
    with join_workers(spec.device, spec.training.parallel) as workers, open_features(spec, out, workers) as features:
        check_float8(spec.training, workers.device)
        plan = plan_training(features, spec.training, workers.num_replicas)
        draft = create_draft(spec).to(workers.device)
        draft.compute_dtype = workers.compute_dtype
        draft.float8_matmuls = spec.training.float8_matmuls
        state, evaluation = train(Run(spec.training, draft, features, plan, workers), out, spec.key())
        reassemble(draft)
        if workers.is_first:
            save_file(draft.serving_state_dict(), out / DRAFT_NAME)
            write_atomically(out / DRAFT_CONFIG_NAME, json.dumps(draft.serving_config(), indent=1) + "\n")
    metrics = evaluation.metrics()
    return DraftCheckpoint(
        algorithm=spec.draft.algorithm,
        step=state.step,
        tokens_seen=state.tokens_seen,
        num_parameters=sum(parameter.numel() for parameter in draft.parameters()),
        eval_loss=metrics["eval/loss"],
        eval_accuracy=tuple(metrics[f"eval/accuracy_{k}"] for k in range(draft.num_positions)),
        eval_acceptance=tuple(metrics[f"eval/acceptance_{k}"] for k in range(draft.num_positions)),
        eval_acceptance_length=evaluation.acceptance_length,
    )


@contextlib.contextmanager
def open_features(spec: TrainSpec, out: Path, workers: Workers) -> Iterator[DocumentSet]:
    """The documents to train on, whose features are stored, or made while the block runs."""
    if spec.live is None:
        yield FeatureSet(spec.hidden_states, max_document_tokens=spec.training.max_document_tokens)
        return
    # Brings what runs the target, which takes seconds to import.
    from specforge_core.training.live import live_features

    with live_features(spec, out, workers) as features:
        yield features


def check_float8(config: TrainingConfig, device: torch.device) -> None:
    """Nothing, if the device can train so. Raises: ValueError for float8 products that it has no matrix units for."""
    if config.float8_matmuls and not multiplies_float8(device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        raise ValueError(
            f"training.float8_matmuls=true needs a GPU with matrix units for float8 (Ada, Hopper or newer), and this "
            f"trains on {name}; set it to false"
        )


def plan_training(features: DocumentSet, config: TrainingConfig, num_processes: int) -> Plan:
    """The whole run, planned before anything is read. Raises: ValueError if a process would have nothing to do."""
    budget = config.tokens_per_micro_batch
    per_step = config.tokens_per_batch // budget
    if per_step < num_processes:
        raise ValueError(
            f"a step of tokens_per_batch={config.tokens_per_batch} has {per_step} micro-batches of {budget} tokens for "
            f"{num_processes} processes; raise training.tokens_per_batch to {budget * num_processes}, or lower "
            "training.tokens_per_micro_batch"
        )
    split = features.split(config.eval_fraction)
    epochs = (features.plan(split.train, budget, seed=config.seed, epoch=epoch) for epoch in range(config.num_epochs))
    return Plan(
        steps=[step for micro_batches in epochs for step in plan_steps(micro_batches, per_step)],
        eval=features.plan(split.eval, budget, seed=config.seed, epoch=0),
    )


def create_draft(spec: TrainSpec) -> DraftModel:
    """The draft as it starts, the same in every process."""
    torch.manual_seed(spec.training.seed)
    (draft_token_ids,) = load_vocabulary(spec.vocabulary).t2d.nonzero()
    return ALGORITHMS[spec.draft.algorithm].create(
        spec.draft,
        load_target_config(spec.hidden_states),
        load_target_head(spec.hidden_states),
        torch.from_numpy(draft_token_ids),
        load_index(spec.hidden_states).layers,
    )


def train(run: Run, out: Path, key: str) -> tuple[TrainingState, Evaluation]:
    """Train the draft in place, to what it was at its best. Returns: where that was, and its evaluation."""
    sharding = parallelize(run.draft, run.config, run.workers)
    optimizers = build_optimizers(sharding, run.config)
    with Checkpointer(out / PROGRESS_DIRECTORY / "checkpoints", sharding, optimizers, run.workers) as checkpointer:
        state = TrainingState(key=key, step=0, tokens_seen=0)
        if newest := checkpointer.newest():
            logger.info("going on from %s", newest)
            state = checkpointer.load(newest, key=key)
        if run.workers.is_first:
            drop_metrics_after(out / METRICS_NAME, state.step)
        state, evaluation = take_steps(run, sharding, optimizers, checkpointer, state, out / METRICS_NAME)
        best = checkpointer.best()
        assert best is not None, "the last step ends with an evaluation and a checkpoint"
        if load_state(best) != state:
            logger.info("the draft is the best one that was evaluated, not the last: %s", best)
            state, evaluation = checkpointer.load(best, key=key), None
    # None there also behind an interruption after the last step.
    return state, evaluation or evaluate(
        run.draft, eval_batches(run.draft, run.features, run.plan, run.workers), run.workers
    )


def take_steps(
    run: Run,
    sharding: Sharding,
    optimizers: list[Optimizer],
    checkpointer: Checkpointer,
    state: TrainingState,
    metrics_path: Path,
) -> tuple[TrainingState, Evaluation | None]:
    """The steps behind `state`. Returns: the state behind the last one, and the last evaluation, if there was one."""
    config, plan, draft, features, workers = run.config, run.plan, run.draft, run.features, run.workers
    num_steps = len(plan.steps)
    step_tokens = [sum(features.lengths[i] for batch in step for i in batch) for step in plan.steps]
    shares = [features.share(step, workers.replica, workers.num_replicas) for step in plan.steps]
    features.begin(plan.steps, state.step)
    batches = prepared_batches(draft, features, (batch for share in shares[state.step :] for batch in share), workers)
    evaluate_at = milestones(num_steps, config.evals_per_run)
    # Every evaluation is a checkpoint, so that the best one can be gone back to.
    save_at = milestones(num_steps, config.checkpoints_per_run) | evaluate_at
    # Every checkpoint ends a report, so that no sum has to be carried over an interruption.
    report_at = milestones(num_steps, REPORTS_PER_RUN) | save_at
    evaluation = None
    meter = Meter(draft.num_positions, workers.device)
    with progress(
        desc="train", total=sum(step_tokens), initial=state.tokens_seen, unit="token", disable=not workers.is_first
    ) as bar:
        for step in range(state.step, num_steps):
            factor = learning_rate_factor(step, num_steps, config.warmup_fraction)
            set_learning_rate(optimizers, factor)
            micro_batches = islice(batches, len(shares[step]))
            losses, grad_norm = train_step(draft, optimizers, micro_batches, config.max_grad_norm, workers, sharding)
            state = TrainingState(key=state.key, step=step + 1, tokens_seen=state.tokens_seen + step_tokens[step])
            bar.update(step_tokens[step])
            meter.add(losses, step_tokens[step])
            if state.step not in report_at:
                continue
            metrics = meter.metrics(factor * config.learning_rate, grad_norm) | features.metrics()
            bar.set_postfix(loss=f"{metrics['train/loss']:.3f}", refresh=False)
            if state.step in evaluate_at:
                evaluation = evaluate(draft, eval_batches(draft, features, plan, workers), workers)
                metrics |= evaluation.metrics()
                state = state.model_copy(update={"acceptance_length": evaluation.acceptance_length})
            if workers.is_first:
                append_metrics(metrics_path, state.step, metrics)
            if state.step in save_at:
                checkpointer.save(state)
            meter.restart()
    checkpointer.finish()
    return state, evaluation


def prepared_batches(
    draft: DraftModel, features: DocumentSet, micro_batches: Iterable[Sequence[int]], workers: Workers
) -> Iterator[DraftBatch]:
    """The micro-batches of a plan on this worker's device, ready for the draft."""
    stored = features.batches(micro_batches, prepare=draft.prepare, pin_memory=workers.device.type == "cuda")
    return device_batches(stored, workers.device)


def eval_batches(draft: DraftModel, features: DocumentSet, plan: Plan, workers: Workers) -> Iterator[DraftBatch]:
    """This worker's share of the held-out documents."""
    share = features.share(plan.eval, workers.replica, workers.num_replicas)
    return prepared_batches(draft, features, share, workers)
