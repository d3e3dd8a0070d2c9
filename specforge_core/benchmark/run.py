"""Stage `benchmark`: what a draft does for its target, in this process.

An interrupted benchmark begins again: the figures of one result are of one session on one machine.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from specforge_core.artifacts import write_atomically
from specforge_core.benchmark.lossless import LosslessCheck
from specforge_core.benchmark.measure import UNTIMED_BATCH_SIZE, Recorder, Subject, Workload, measure
from specforge_core.benchmark.suites import load_requests
from specforge_core.data.conversations import scan_columns
from specforge_core.decoding.eagle3_drafter import load_eagle3_drafter
from specforge_core.decoding.ngram import NgramDrafter, SupervisedTokens, learn_continuations
from specforge_core.decoding.speculative import Generation
from specforge_core.decoding.threads import fastest_num_threads, torch_threads
from specforge_core.environment import environment
from specforge_core.facts import BenchmarkResult
from specforge_core.stages import BenchmarkSpec
from specforge_core.targets import Sampling
from specforge_core.targets.hf import HFTarget

logger = logging.getLogger(__name__)

RESULT_NAME = "result.json"
REQUESTS_NAME = "requests.jsonl"


def main(spec: BenchmarkSpec, out: Path) -> BenchmarkResult:
    """The result, which `out` holds too, beside every single answer (`requests.jsonl`).

    Raises: ValueError for a target that cannot be decoded in this process, a draft of another target, or an unusable
    suite.
    """
    target = HFTarget(spec.target, device=spec.device)
    subject = Subject(
        target=target,
        drafter=load_eagle3_drafter(spec.draft, target),
        ngram_drafter=NgramDrafter(learn_continuations(supervised_tokens(spec.conversations))),
        check=LosslessCheck(spec.target, target),
    )
    workloads = [
        Workload(
            suite=suite.name,
            requests=requests,
            sampling=Sampling(suite.max_new_tokens, spec.benchmark.temperature, seed=spec.benchmark.seed),
            serving=serving,
            repeats=spec.benchmark.repeats,
        )
        for suite in spec.benchmark.suites
        for requests in [load_requests(suite, target, batch_size=UNTIMED_BATCH_SIZE)]
        for serving in spec.benchmark.serving
    ]
    first = workloads[0]
    num_threads = fastest_num_threads(target, first.requests[: first.serving.concurrency])
    measurements = []
    with recording(out / REQUESTS_NAME, target.tokenizer) as record, torch_threads(num_threads):
        for workload in workloads:
            measurement = measure(subject, workload, record)
            measurements.append(measurement)
            logger.info(
                "%s at concurrency %d: acceptance length %.2f (n-gram %.2f), speedup %.2f (%.2f to %.2f)",
                measurement.suite,
                measurement.serving.concurrency,
                measurement.acceptance_length,
                measurement.ngram_acceptance_length,
                measurement.speedup,
                measurement.speedup_low,
                measurement.speedup_high,
            )
    gpu = torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else None
    made_on = environment(num_threads=num_threads, gpu=gpu)
    result = BenchmarkResult(measurements=tuple(measurements), environment=made_on)
    write_atomically(out / RESULT_NAME, result.model_dump_json(indent=1) + "\n")
    return result


def supervised_tokens(conversations: Path) -> Iterator[SupervisedTokens]:
    """The token ids of regenerated conversations, with their loss masks."""
    for batch in scan_columns(conversations, ["input_ids", "loss_mask"]):
        for row in batch.to_pylist():
            yield SupervisedTokens(row["input_ids"], row["loss_mask"])


@contextlib.contextmanager
def recording(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Recorder]:
    """A recorder that writes one JSON line a generation."""
    with path.open("w", encoding="utf-8") as file:

        def record(workload: Workload, drafter: str | None, generation: Generation) -> None:
            line = {
                "suite": workload.suite,
                "num_steps": workload.serving.num_steps,
                "concurrency": workload.serving.concurrency,
                "drafter": drafter,
                "id": generation.completion.id,
                "num_output_tokens": len(generation.completion.token_ids),
                "num_verify_steps": generation.num_verify_steps,
                "accepted_by_position": generation.accepted_by_position,
                "elapsed_s": round(generation.elapsed_s, 4),
                "finish_reason": generation.completion.finish_reason,
                "text": tokenizer.decode(generation.completion.token_ids),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

        yield record
