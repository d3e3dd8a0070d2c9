"""What the figures of servers are held against by the target in this process, once the servers have left its memory."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from specforge_core.benchmark.in_process import decoded
from specforge_core.benchmark.lossless import LosslessCheck
from specforge_core.benchmark.measure import (
    UNTIMED_BATCH_SIZE,
    Rounds,
    Workload,
    acceptance_length,
    first_answers,
    lossless_counts,
)
from specforge_core.decoding.eagle3_drafter import load_eagle3_drafter
from specforge_core.facts import Measurement
from specforge_core.progress import progress
from specforge_core.stages import BenchmarkSpec
from specforge_core.targets.hf import HFTarget


class MeasuredSuite(NamedTuple):
    """A suite at one serving configuration, its rounds and what follows from them alone."""

    workload: Workload
    rounds: Rounds
    figures: Measurement


def with_references(spec: BenchmarkSpec, measured: Sequence[MeasuredSuite]) -> tuple[Measurement, ...]:
    """The figures, with losslessness and, where it was asked for, the acceptance of the reference loop.

    The target is loaded only if a prompt was answered in two ways, or the reference loop was asked for.
    """
    in_process = _in_process_lengths(spec, measured) if spec.benchmark.num_in_process_prompts else {}
    if torch.cuda.is_available():
        # That target is gone, and a float32 copy may be next.
        torch.cuda.empty_cache()
    check = LosslessCheck(spec.target, device=spec.device)
    return tuple(
        figures.model_copy(
            update={
                "lossless": lossless_counts(check, workload, rounds),
                "in_process_acceptance_length": in_process.get(_chain_of(workload)),
                "served_on_same_prompts": _served_length(spec, workload, rounds)
                if _chain_of(workload) in in_process
                else None,
            }
        )
        for workload, rounds, figures in measured
    )


def _chain_of(workload: Workload) -> tuple[str, str]:
    """What acceptance depends on: not on how many requests run at once."""
    return workload.suite, workload.serving.chain()


def _served_length(spec: BenchmarkSpec, workload: Workload, rounds: Rounds) -> float | None:
    answers = first_answers(rounds.speculative)
    return acceptance_length(
        answers[request.id] for request in workload.requests[: spec.benchmark.num_in_process_prompts]
    )


def _in_process_lengths(spec: BenchmarkSpec, measured: Sequence[MeasuredSuite]) -> dict[tuple[str, str], float | None]:
    """Acceptance length by suite and chain, on the first prompts of each suite. Trees are not decoded here."""
    target = HFTarget(spec.target, device=spec.device)
    drafter = load_eagle3_drafter(spec.draft, target)
    workloads = {_chain_of(one.workload): one.workload for one in measured if one.workload.serving.topk == 1}
    lengths = {}
    for key, workload in workloads.items():
        requests = workload.requests[: spec.benchmark.num_in_process_prompts]
        found = decoded(target, workload, requests, drafter, UNTIMED_BATCH_SIZE)
        desc = f"in process {workload.suite} {workload.serving.chain()}"
        lengths[key] = acceptance_length(
            generation for _, generation in progress(found, desc=desc, total=len(requests), unit="answer")
        )
    return lengths
