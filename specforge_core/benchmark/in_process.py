"""The benchmark stage in this process: the reference, and the way without a GPU."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from specforge_core.artifacts import METRICS_NAME
from specforge_core.benchmark.lossless import LosslessCheck
from specforge_core.benchmark.measure import (
    UNTIMED_BATCH_SIZE,
    Decode,
    Rounds,
    Run,
    Workload,
    acceptance_length,
    first_answers,
    lossless_counts,
    summarise,
    timed_runs,
)
from specforge_core.benchmark.recording import REQUESTS_NAME, Recorder, announce, recording, write_result
from specforge_core.benchmark.suites import Interlocutor, suite_workloads
from specforge_core.data.conversations import scan_columns
from specforge_core.decoding.drafters import Drafter
from specforge_core.decoding.eagle3_drafter import load_eagle3_drafter
from specforge_core.decoding.ngram import NgramDrafter, SupervisedTokens, learn_continuations
from specforge_core.decoding.speculative import Generation, generate
from specforge_core.decoding.threads import fastest_num_threads, torch_threads
from specforge_core.environment import environment
from specforge_core.facts import BenchmarkResult, Environment, Measurement
from specforge_core.stages import BenchmarkSpec
from specforge_core.targets import GenerationRequest
from specforge_core.targets.hf import HFTarget


class Subject(NamedTuple):
    """What is measured: a target, its draft, and the drafter to beat."""

    target: HFTarget
    drafter: Drafter
    ngram_drafter: Drafter
    check: LosslessCheck


def measure_in_process(spec: BenchmarkSpec, out: Path) -> BenchmarkResult:
    """The result of the stage.

    Raises: ValueError for a target that cannot be decoded in this process, a draft of another target, or an unusable
    suite.
    """
    assert spec.conversations is not None
    target = HFTarget(spec.target, device=spec.device)
    subject = Subject(
        target=target,
        drafter=load_eagle3_drafter(spec.draft, target),
        ngram_drafter=NgramDrafter(learn_continuations(supervised_tokens(spec.conversations))),
        check=LosslessCheck(spec.target, device=spec.device, loaded=target),
    )
    context_length: int = target.config.max_position_embeddings
    interlocutor = Interlocutor(
        target.tokenizer,
        context_length,
        lambda requests, sampling: target.generate(requests, sampling, batch_size=UNTIMED_BATCH_SIZE),
    )
    workloads = suite_workloads(spec.benchmark, interlocutor)
    first = workloads[0]
    num_threads = fastest_num_threads(target, first.requests[: first.serving.concurrency])
    measurements = []
    (out / METRICS_NAME).unlink(missing_ok=True)
    with recording(out / REQUESTS_NAME, target.tokenizer) as record, torch_threads(num_threads):
        for workload in workloads:
            measurement = measure(subject, workload, record)
            announce(measurement, workload, out)
            measurements.append(measurement)
    result = BenchmarkResult(
        measurements=tuple(measurements),
        environment=made_on(spec.device, num_threads=num_threads),
        engine=spec.engine.name,
    )
    write_result(result, out)
    return result


def made_on(device: str, *, num_threads: int) -> Environment:
    """What this process measures on."""
    return environment(num_threads=num_threads, gpu=torch.cuda.get_device_name(device) if device == "cuda" else None)


def measure(subject: Subject, workload: Workload, record: Recorder) -> Measurement:
    """The measurement of a workload. Raises: ValueError if every answer is a single token: then no draft took part."""
    sides = [side(subject.target, None), side(subject.target, subject.drafter)]
    rounds = Rounds(*timed_runs(workload, sides))
    ngram = dict(decoded(subject.target, workload, workload.requests, subject.ngram_drafter, UNTIMED_BATCH_SIZE))
    answers = {None: first_answers(rounds.baseline), "draft": first_answers(rounds.speculative), "ngram": ngram}
    for drafter, generations in answers.items():
        for generation in generations.values():
            record(workload, drafter, generation)
    figures = summarise(workload, rounds, subject.target.tokenizer)
    return figures.model_copy(
        update={
            "ngram_acceptance_length": acceptance_length(ngram.values()),
            "lossless": lossless_counts(subject.check, workload, rounds),
        }
    )


def side(target: HFTarget, drafter: Drafter | None) -> Decode:
    """The target with a drafter or without, at the workload's concurrency."""

    def decode(workload: Workload, requests: Sequence[GenerationRequest], advance: Callable[[], object]) -> Run:
        generations = {}
        # The loop waits for the device in every step, so its end is the end of the work.
        started_at = time.perf_counter()
        for id, generation in decoded(target, workload, requests, drafter, workload.serving.concurrency):
            generations[id] = generation
            advance()
        return Run(generations, time.perf_counter() - started_at)

    return decode


def decoded(
    target: HFTarget,
    workload: Workload,
    requests: Sequence[GenerationRequest],
    drafter: Drafter | None,
    batch_size: int,
) -> Iterator[tuple[str, Generation]]:
    """Id and generation, in the order in which they finish."""
    for generation in generate(
        target,
        requests,
        workload.sampling,
        batch_size=batch_size,
        drafter=drafter,
        num_steps=workload.serving.num_steps,
    ):
        yield generation.completion.id, generation


def supervised_tokens(conversations: Path) -> Iterator[SupervisedTokens]:
    """The token ids of regenerated conversations, with their loss masks."""
    for batch in scan_columns(conversations, ["input_ids", "loss_mask"]):
        for row in batch.to_pylist():
            yield SupervisedTokens(row["input_ids"], row["loss_mask"])
