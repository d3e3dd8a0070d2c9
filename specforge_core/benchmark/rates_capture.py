"""Capture against plain prefill: the same documents through a server with the hooks and one without.

The passes of capture are those of the stage, from documents in Parquet to shards that are safe on the disk.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PretrainedConfig

from specforge_core.benchmark.rates_results import Pass
from specforge_core.benchmark.saturation import RawRequest, saturate
from specforge_core.benchmark.server import Server
from specforge_core.benchmark.server_flags import Options, target_options
from specforge_core.data.conversations import Conversation, write_conversations
from specforge_core.data.shards import Document, FeatureIndex, FeatureWriter, plan_shards
from specforge_core.drafts import ALGORITHMS
from specforge_core.manifest_sections import EngineConfig, FeaturesConfig
from specforge_core.stages import CaptureSpec, ResolvedTarget
from specforge_core.targets import TargetFeatures
from specforge_core.targets.capture import capture_request, document_lengths, supervised_documents, write_shards
from specforge_core.targets.handover import Handover, Layout, Traffic, captured
from specforge_core.training.bench.lengths import count_tokens, draw_conversations

ALGORITHM = "eagle3"
HOOKS_FLAG = "--forward-hooks"
BATCH_TOKENS: int = CaptureSpec.model_fields["batch_tokens"].default
MAX_DOCUMENT_TOKENS = 4096
"""Of real documents, as training cuts them by default."""
KV_FORWARDS = 4
"""Room for so many of the widest forward: one computed, one launched, and what is not freed yet."""
SPARE_TOKENS = 64
"""Of the context, which a server does not let a prompt fill."""


class CaptureWork(NamedTuple):
    """The documents of a pass."""

    name: str
    conversations: Path
    """As the stage `regenerate` leaves them."""
    lengths: tuple[int, ...]
    supervised_share: float

    def first(self, num_documents: int) -> "CaptureWork":
        """The same with fewer documents."""
        return self._replace(lengths=self.lengths[:num_documents])


def make_work(lengths: str, share: float, *, num_tokens: int, vocab_size: int, directory: Path) -> CaptureWork:
    """Documents of random tokens, written to `directory`.

    Args: lengths: tokens of each, or `real` for lengths of real conversations; share: of tokens in answers.
    Raises: ValueError for lengths that are neither.
    """
    if lengths != "real" and not lengths.isdecimal():
        raise ValueError(f'lengths "{lengths}" should be a number of tokens, or "real"')
    is_real = lengths == "real"
    drawn = draw_conversations(
        "real" if is_real else "uniform",
        share,
        num_tokens=num_tokens,
        max_tokens=MAX_DOCUMENT_TOKENS if is_real else int(lengths),
        document_tokens=0 if is_real else int(lengths),
        seed=0,
    )
    generator = np.random.default_rng(0)

    def conversations() -> Iterator[Conversation]:
        for number, turns in enumerate(drawn):
            yield Conversation(
                id=str(number),
                source=lengths,
                messages=(),
                input_ids=tuple(generator.integers(vocab_size, size=count_tokens(turns)).tolist()),
                loss_mask=tuple(made for turn in turns for made in [False] * turn.prompt + [True] * turn.answer),
                finish_reasons=("stop",),
            )

    directory.mkdir(parents=True)
    counts = write_conversations(directory, conversations())
    return CaptureWork(
        name="real lengths" if is_real else f"{int(lengths):,} tokens each",
        conversations=directory,
        lengths=tuple(document_lengths(directory, max(map(count_tokens, drawn)))),
        supervised_share=counts.num_loss_tokens / counts.num_tokens,
    )


def with_context(target: ResolvedTarget, config: PretrainedConfig, num_tokens: int, directory: Path) -> ResolvedTarget:
    """The target; or where its context is shorter, a folder of links to its files whose config allows so many tokens.

    Text behind the real context makes no sense; what it costs does not depend on that.
    Raises: ValueError for a target of the Hub with a shorter context.
    """
    if config.max_position_embeddings >= num_tokens:
        return target
    source = Path(target.model)
    if not source.is_dir():
        raise ValueError(
            f"documents of {num_tokens - SPARE_TOKENS} tokens do not fit the context of {target.model}, "
            f"{config.max_position_embeddings} tokens; choose shorter ones"
        )
    directory.mkdir(parents=True)
    for path in source.iterdir():
        (directory / path.name).symlink_to(path.resolve())
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(values | {"max_position_embeddings": num_tokens}))
    return target.model_copy(update={"model": str(directory)})


class CaptureRates:
    """The passes of capture and of its limit."""

    def __init__(
        self,
        target: ResolvedTarget,
        config: PretrainedConfig,
        works: Sequence[CaptureWork],
        features: FeaturesConfig,
        scratch: Path,
    ) -> None:
        """Args: config: of the target; scratch: where shards are written, and the hidden states go if there is no room
        for them in memory."""
        self.works, self._features = works, features
        longest = max(length for work in works for length in work.lengths)
        self._target = with_context(target, config, longest + SPARE_TOKENS, scratch / "longer-context")
        self._hidden_size: int = config.hidden_size
        self._layers = ALGORITHMS[ALGORITHM].capture_layers(None, config.num_hidden_layers)
        layout = Layout(self._layers, self._hidden_size, getattr(torch, target.dtype))
        self._traffic = Traffic(longest, BATCH_TOKENS, num_servers=1)
        self.handover = Handover(layout, self._traffic, fallback=scratch)
        self._shards = scratch / "shards"
        self._num_passes = 0

    def options(self, engine: EngineConfig) -> Options:
        """Of the server with the hooks, inside the handover."""
        bounded = {"--max-total-tokens": KV_FORWARDS * self._traffic.forward_tokens}
        return {**target_options(self._target, engine), **self.handover.options, **bounded}

    def limit(self, server: Server, work: CaptureWork) -> Pass:
        """Plain prefill of all documents."""
        self._num_passes += 1
        requests = [
            RawRequest(f"plain-{self._num_passes}-{number}", document.input_ids_T.tolist(), 0)
            for number, document in enumerate(self._documents(work))
        ]
        done = saturate(server.url, requests)
        return Pass(
            num_requests=len(requests),
            num_tokens=done.num_prompt_tokens,
            elapsed_s=done.elapsed_s,
            served_s=done.elapsed_s,
        )

    def ours(self, server: Server, work: CaptureWork) -> Pass:
        """Capture of all documents into shards."""
        shutil.rmtree(self._shards, ignore_errors=True)
        self._shards.mkdir(parents=True)
        spec = CaptureSpec(
            target=self._target,
            conversations=work.conversations,
            algorithm=ALGORITHM,
            aux_layers=None,
            features=self._features,
            max_document_tokens=max(work.lengths),
        )
        served_at = started_at = time.perf_counter()
        index = FeatureIndex(layers=self._layers, hidden_size=self._hidden_size, dtype=self._features.dtype)
        writer = FeatureWriter(self._shards, index)
        requests = map(capture_request, self._documents(work))
        with closing(captured(self.handover, [server], requests)) as stream:

            def features_of(batch: Sequence[Document]) -> Iterator[TargetFeatures]:
                nonlocal served_at
                yield from islice(stream, len(batch))
                served_at = time.perf_counter()

            planned = plan_shards(work.lengths, self._features.tokens_per_shard)
            write_shards(spec, writer, planned, features_of, sum(work.lengths))
        elapsed_s = time.perf_counter() - started_at
        written_bytes = sum(shard.size_bytes for shard in writer.index.shards)
        shutil.rmtree(self._shards)
        return Pass(
            num_requests=len(work.lengths),
            num_tokens=sum(work.lengths),
            elapsed_s=elapsed_s,
            served_s=served_at - started_at,
            written_bytes=written_bytes,
        )

    def _documents(self, work: CaptureWork) -> Iterator[Document]:
        return islice(supervised_documents(work.conversations, max(work.lengths)), len(work.lengths))


def write_rate(directory: Path, *, num_bytes: int = 2**30, block_bytes: int = 2**23) -> float:
    """Bytes/s that one thread writes to a new file in `directory`, until they are on the disk."""
    path = directory / "probe"
    block = os.urandom(block_bytes)
    started_at = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(num_bytes // block_bytes):
            file.write(block)
        os.fsync(file.fileno())
    elapsed_s = time.perf_counter() - started_at
    path.unlink()
    return num_bytes / elapsed_s
