"""What the benchmark stage writes: every single answer, a curve while it runs, and its result."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from specforge_core.artifacts import METRICS_NAME, write_atomically
from specforge_core.benchmark.measure import Workload
from specforge_core.decoding.speculative import Generation
from specforge_core.facts import BenchmarkResult, Measurement, SweepPoint

logger = logging.getLogger(__name__)

RESULT_NAME = "result.json"
REQUESTS_NAME = "requests.jsonl"


class Recorder(Protocol):
    """Takes every single generation; `drafter` is None, `draft` or `ngram`; `more` are further figures of it."""

    def __call__(self, workload: Workload, drafter: str | None, generation: Generation, **more: float) -> None: ...


@contextlib.contextmanager
def recording(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Recorder]:
    """A recorder that writes one JSON line a generation."""
    with path.open("w", encoding="utf-8") as file:

        def record(workload: Workload, drafter: str | None, generation: Generation, **more: float) -> None:
            line = {
                "suite": workload.suite,
                "num_steps": workload.serving.num_steps,
                "topk": workload.serving.topk,
                "num_draft_tokens": workload.serving.num_draft_tokens,
                "concurrency": workload.serving.concurrency,
                "drafter": drafter,
                "id": generation.completion.id,
                "num_output_tokens": len(generation.completion.token_ids),
                "num_verify_steps": generation.num_verify_steps,
                "accepted_by_position": generation.accepted_by_position,
                "elapsed_s": round(generation.elapsed_s, 4),
                **more,
                "finish_reason": generation.completion.finish_reason,
                "text": tokenizer.decode(generation.completion.token_ids),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

        yield record


def announce(figures: Measurement | SweepPoint, workload: Workload, out: Path) -> None:
    """Log what was measured, and add it to the stage's curves: one for each chain, over the concurrency."""
    without_draft, with_draft = median(figures.baseline_output_tokens_per_s), median(figures.output_tokens_per_s)
    logger.info(
        "%s: acceptance length %.2f, speedup %.2f, %.0f output tokens/s with draft and %.0f without",
        workload,
        figures.acceptance_length,
        figures.speedup,
        with_draft,
        without_draft,
    )
    if figures.speedup > figures.acceptance_length:
        logger.warning(
            "%s: a speedup of %.2f above the acceptance length of %.2f is impossible: something else differed between "
            "the two sides",
            workload,
            figures.speedup,
            figures.acceptance_length,
        )
    curve = f"suites/{workload.suite}/{workload.serving.chain()}"
    line = {
        "step": workload.serving.concurrency,
        f"{curve}/acceptance_length": figures.acceptance_length,
        f"{curve}/speedup": figures.speedup,
        f"{curve}/output_tokens_per_s": with_draft,
        f"{curve}/output_tokens_per_s_without_draft": without_draft,
    }
    with (out / METRICS_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def write_result(result: BenchmarkResult, out: Path) -> None:
    """The result as a file of the stage's artifact."""
    write_atomically(out / RESULT_NAME, result.model_dump_json(indent=1) + "\n")
