"""Recorded trainings on several GPUs, and on live features, beside what the plan says of them. Torch-free.

The plan's rates are of one GPU and short documents; nothing of these is among them.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from specforge_core.cost.comparison import Check, milliseconds, size
from specforge_core.cost.configs import ConfigReader
from specforge_core.cost.draft_model import add_counts, count_conversation
from specforge_core.cost.estimate import reading_s, step_s, train_bytes_per_gpu
from specforge_core.cost.hardware import find_hardware
from specforge_core.cost.job import Job, make_job
from specforge_core.cost.rates import Rates, json_files, noted_config
from specforge_core.manifest import ManifestEntry
from specforge_core.training.bench.lengths import Conversation, draw_conversations
from specforge_core.training.bench.live_results import LiveBench
from specforge_core.training.bench.results import MILLISECONDS
from specforge_core.training.bench.several_results import OURS, SeveralBench, SeveralRow
from specforge_core.training.bench.shapes import SHAPES

TOKENS = 1_000_000
"""Of which the seconds of live features are said."""
UNKNOWN = "recorded"
"""Target and data set of an entry that stands for a recorded run."""
ANY_LAYERS = 8
"""Of a target that nothing is asked about but its widths."""


def scaling_checks(rates: Rates, reports: Path) -> Iterator[Check]:
    """All rows of all such reports under `reports/training`."""
    for values in json_files(reports / "training"):
        if "serve_alone" in values:
            yield from live_checks(rates, LiveBench.model_validate(values))
        elif any("dp" in row for row in values.get("rows", ())):
            yield from several_checks(rates, SeveralBench.model_validate(values))


def several_checks(rates: Rates, bench: SeveralBench) -> Iterator[Check]:
    """Steps on several GPUs, and their memory."""
    for row in bench.rows:
        if row.path == OURS and row.num_gpus > 1 and bench.environment.gpu:
            job = _several_job(rates, row, bench.num_steps, bench.environment.gpu)
            documents = "real lengths" if row.lengths == "real" else f"{row.document_tokens:,} tokens a document"
            what = f"{row.shape}, dp {row.dp} x cp {row.cp} x tp {row.tp}, {documents}, {row.share:.0%} in answers"
            measured_s = median(row.ms) / MILLISECONDS
            yield Check(what, row.steps * step_s(job, row.num_gpus), measured_s, milliseconds)
            # Of several micro-batches the measurement holds all at once.
            if row.peak_bytes and row.steps * row.micro_batches == 1:
                yield Check(f"memory of {what}", train_bytes_per_gpu(job), row.peak_bytes, size)


def live_checks(rates: Rates, bench: LiveBench) -> Iterator[Check]:
    """Serving alone, training alone, and both, for a million tokens; documents of one length alone."""
    setup, gpu = bench.setup, bench.environment.gpu
    found = re.search(r"([\d,]+) tokens each", setup.documents)
    if gpu is None or found is None or not (bench.serve_alone and bench.train_alone and bench.live):
        return
    length = int(found.group(1).replace(",", ""))
    config = noted_config(setup.note)
    conversations = draw_conversations(
        "uniform", setup.supervised_share, num_tokens=length, max_tokens=length, document_tokens=length, seed=0
    )
    job = _job(
        rates,
        config,
        conversations,
        gpu,
        draft={"num_steps": setup.num_steps},
        features={"mode": "live", "serve_gpus": setup.serve_gpus},
        training={
            "tokens_per_batch": setup.tokens_per_batch,
            "tokens_per_micro_batch": setup.tokens_per_micro_batch,
            "parallel": {"cp": setup.cp},
        },
        engine={"name": "sglang", "tensor_parallel": setup.tensor_parallel},
        resources={"num_gpus": setup.serve_gpus + setup.train_gpus},
    )
    served_s = TOKENS / job.documents.num_tokens * reading_s(job, setup.serve_gpus)
    trained_s = TOKENS / setup.tokens_per_batch * step_s(job, setup.train_gpus)
    what = f"{bench.setup.target.partition(',')[0]}, {setup.supervised_share:.0%} in answers"
    for name, predicted_s, rate in (
        ("serving alone", served_s, bench.serve_alone),
        ("training alone", trained_s, bench.train_alone),
        ("live features", max(served_s, trained_s), bench.live.sustained),
    ):
        yield Check(f"{name}, {what}", predicted_s, TOKENS / rate.tokens_per_s, milliseconds)


def _several_job(rates: Rates, row: SeveralRow, num_steps: int, gpu: str) -> Job:
    of_all = row.micro_batches * (1 if row.lengths == "real" else row.dp)
    tokens_per_micro_batch = round(row.num_tokens / (of_all * row.steps))
    conversations = draw_conversations(
        row.lengths,
        row.share,
        num_tokens=row.num_tokens,
        max_tokens=tokens_per_micro_batch,
        document_tokens=row.document_tokens,
        seed=0,
    )
    return _job(
        rates,
        SHAPES[row.shape].target_config() | {"num_hidden_layers": ANY_LAYERS},
        conversations,
        gpu,
        draft={"num_steps": num_steps},
        training={
            "tokens_per_batch": of_all * tokens_per_micro_batch,
            "tokens_per_micro_batch": tokens_per_micro_batch,
            "parallel": {"cp": row.cp, "tp": row.tp},
        },
        resources={"num_gpus": row.num_gpus},
    )


def _job(
    rates: Rates, config: dict[str, Any], conversations: list[Conversation], gpu: str, **sections: dict[str, Any]
) -> Job:
    """Of an entry with those conversations, one of each. Args: sections: of its manifest."""
    entry = ManifestEntry.model_validate(
        {
            "name": UNKNOWN,
            "target": {"model": UNKNOWN},
            "data": {"sources": [{"dataset": UNKNOWN, "limit": len(conversations)}]},
            "benchmark": {"suites": [{"name": UNKNOWN, "source": {"dataset": "none"}}]},
            **sections,
        }
    )
    reader = ConfigReader(Path(), recorded={UNKNOWN: config})
    job = make_job(entry, configs=reader, store=None, rates=rates, hardware=find_hardware(gpu))
    return job._replace(
        documents=job.documents._replace(sample=tuple(conversations)),
        counts=add_counts(count_conversation(conversation, entry.draft.num_steps) for conversation in conversations),
    )
