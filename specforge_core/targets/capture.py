"""The stage `capture`: conversations in, hidden states of the target out, in the format of `data/shards.py`."""

import json
import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from specforge_core.artifacts import PARTIAL_SUFFIX
from specforge_core.benchmark.server import Server, gpu_groups, server_info
from specforge_core.benchmark.server_flags import target_options
from specforge_core.benchmark.stage_servers import stage_servers
from specforge_core.cost.draft_model import feature_bytes
from specforge_core.cost.units import quantity
from specforge_core.data.conversations import scan_columns
from specforge_core.data.loader import is_held_out
from specforge_core.data.shards import (
    Document,
    FeatureIndex,
    FeatureWriter,
    ShardRecord,
    load_index,
    plan_shards,
    save_target,
    teaching_in_document,
)
from specforge_core.drafts import ALGORITHMS
from specforge_core.facts import HiddenStates
from specforge_core.gpus import visible_devices
from specforge_core.progress import progress
from specforge_core.stages import CaptureSpec, ResolvedTarget, UnmeasuredEngine
from specforge_core.targets import CaptureRequest, TargetFeatures
from specforge_core.targets.handover import Handover, Layout, Traffic, captured
from specforge_core.targets.hf import HFTarget
from specforge_core.targets.weights import TargetFiles

logger = logging.getLogger(__name__)

MAX_UNFINISHED = 2
"""Shards on their way to the disk while the next one is filled."""
BLOCK_BYTES = 512
"""Of `st_blocks`."""

FeaturesOf = Callable[[Sequence[Document]], Iterable[TargetFeatures]]
"""Of the documents of one shard, which come in order."""


class DocumentSize(NamedTuple):
    """What decides how much is stored of a document."""

    num_tokens: int
    num_teaching: int


def main(spec: CaptureSpec, out: Path) -> HiddenStates:
    """Capture the conversations into `out`; finished shards of an interrupted run are kept."""
    sizes = document_sizes(spec.conversations, spec.max_document_tokens, spec.held_out_fraction)
    lengths = [size.num_tokens for size in sizes]
    is_served = spec.engine.name == "sglang"
    target = TargetFiles(spec.target) if is_served else HFTarget(spec.target, device=spec.device)
    layers = ALGORITHMS[spec.algorithm].capture_layers(spec.aux_layers, target.num_layers)
    save_target(out, portable_config(target.config), target.load_target_head())
    writer = FeatureWriter(
        out, FeatureIndex(layers=layers, hidden_size=target.config.hidden_size, dtype=spec.features.dtype)
    )
    num_finished = len(writer.index.shards)
    if num_finished:
        logger.info("going on behind %d finished shards", num_finished)
    todo = plan_shards(lengths, spec.features.tokens_per_shard)[num_finished:]
    if todo:
        refuse_full_disk(spec, target.config.hidden_size, sizes[todo[0].start :], out)
    with ExitStack() as stack:
        features_of: FeaturesOf
        if isinstance(target, HFTarget):
            features_of = partial(_in_process, target, layers, spec.batch_tokens)
        elif todo:
            first = todo[0].start
            features_of = stack.enter_context(
                served_features(
                    spec.target,
                    spec.engine,
                    Layout(layers, target.config.hidden_size, getattr(torch, spec.target.dtype)),
                    islice(spec_documents(spec), first, None),
                    longest=max(lengths[first:]),
                    batch_tokens=spec.batch_tokens,
                    out=out,
                )
            )
        if todo:
            write_shards(spec, writer, todo, features_of, sum(lengths))
    records = writer.index.shards
    facts = HiddenStates(
        layers=layers,
        num_target_layers=target.num_layers,
        hidden_size=target.config.hidden_size,
        dtype=spec.features.dtype,
        num_documents=sum(record.num_documents for record in records),
        num_tokens=sum(record.num_tokens for record in records),
        num_loss_tokens=sum(record.num_loss_tokens for record in records),
        num_shards=len(records),
    )
    size_gib = sum(record.size_bytes for record in records) / 2**30
    logger.info("captured layers %s of %d tokens into %.2f GiB", list(layers), facts.num_tokens, size_gib)
    return facts


def known_sha256(out: Path) -> dict[str, str]:
    """Of the shards, by name. Raises: ValueError if one is gone or has another size."""
    return {shard.name: shard.sha256 for shard in load_index(out).shards}


def refuse_full_disk(spec: CaptureSpec, width: int, sizes: Sequence[DocumentSize], out: Path) -> None:
    """Raises: ValueError if the features of documents of these sizes do not fit where `out` lies."""
    num_tokens, num_teaching = (sum(numbers) for numbers in zip(*sizes, strict=True))
    needed = feature_bytes(width, spec.features.dtype, num_tokens, num_teaching)
    # A shard that was cut short is overwritten in place.
    begun = sum(path.stat().st_blocks * BLOCK_BYTES for path in out.glob(f".*{PARTIAL_SUFFIX}"))
    room = shutil.disk_usage(out).free + begun
    if needed > room:
        is_live = spec.held_out_fraction is not None
        ways = [
            "use another --store",
            *([] if spec.features.dtype == "float8" else ["set features.dtype: float8"]),
            *([] if is_live else ["set features.mode: live (nothing is stored but what is held out)"]),
            "lower data.sources.limit or training.max_document_tokens",
        ]
        raise ValueError(
            f"the features of {num_tokens:,} tokens need {quantity(needed)}B, but {quantity(room)}B are free where "
            f"{out} lies: make room, or {', or '.join(ways)}"
        )


def write_shards(
    spec: CaptureSpec, writer: FeatureWriter, todo: Sequence[range], features_of: FeaturesOf, num_tokens: int
) -> None:
    """Fill one shard after the other; meanwhile the ones before go to the disk and are hashed."""
    finished_tokens = sum(shard.num_tokens for shard in writer.index.shards)
    documents = islice(spec_documents(spec), todo[0].start, None)
    unfinished: deque[Future[ShardRecord]] = deque()
    with (
        progress(desc="capture", total=num_tokens, unit="token", initial=finished_tokens) as bar,
        ThreadPoolExecutor(MAX_UNFINISHED, thread_name_prefix="finish") as pool,
    ):
        for number, planned in enumerate(todo, len(writer.index.shards)):
            batch = list(islice(documents, len(planned)))
            filled = writer.fill(number, batch, _counted(features_of(batch), bar), is_followed=True)
            unfinished.append(pool.submit(writer.finish, filled))
            while unfinished and (len(unfinished) > MAX_UNFINISHED or unfinished[0].done()):
                unfinished.popleft().result()
        for shard in unfinished:
            shard.result()


def _in_process(
    target: HFTarget, layers: tuple[int, ...], batch_tokens: int, documents: Sequence[Document]
) -> Iterator[TargetFeatures]:
    """Features of a shard's documents. Captured for itself, its bytes do not depend on where a run went on."""
    return target.capture(map(capture_request, documents), layers, batch_tokens=batch_tokens)


@contextmanager
def served_features(
    target: ResolvedTarget,
    engine: UnmeasuredEngine,
    layout: Layout,
    documents: Iterable[Document],
    *,
    longest: int,
    batch_tokens: int,
    out: Path,
) -> Iterator[FeaturesOf]:
    """Features of these documents in order, from servers on all GPUs that this process sees, which work ahead.

    Args: longest: tokens of a document; batch_tokens: of a forward; out: folder for what servers log.
    """
    num_servers = len(gpu_groups(visible_devices(), engine.tensor_parallel))
    with Handover(layout, Traffic(longest, batch_tokens, num_servers), fallback=out) as handover:
        options = {**target_options(target, engine), **handover.options}
        with (
            stage_servers(
                engine, options, name="capture", directory=out, environment=handover.environment, allow_urls=False
            ) as servers,
            closing(captured(handover, servers, map(capture_request, documents))) as stream,
        ):
            refuse_longer(servers, longest)
            # One stream over all shards: servers work on the documents of the next one while one ends.
            yield lambda batch: islice(stream, len(batch))


def refuse_longer(servers: Sequence[Server], num_tokens: int) -> None:
    """Raises: ValueError if a server does not take a document of that length."""
    for server in servers:
        # Newer or older servers may not say; then they refuse the document itself.
        limit = server_info(server.url).get("max_req_input_len")
        if limit is not None and num_tokens >= limit:
            raise ValueError(
                f"the longest document has {num_tokens} tokens, the server takes less than {limit} (the context of the "
                "target, or the room for keys and values): lower training.max_document_tokens, or raise "
                "engine.mem_fraction_static"
            )


def capture_request(document: Document) -> CaptureRequest:
    """What a target is to compute of a document."""
    return CaptureRequest(document.input_ids_T, teaching_in_document(document.loss_mask_T))


def read_documents(conversations: Path, held_out_fraction: float | None = None) -> Iterator[Document]:
    """The conversations of an artifact, whole, in order: all, or those that are held out of training."""
    for rows in scan_columns(conversations, ["id", "input_ids", "loss_mask"]):
        ids = rows["id"].to_pylist()
        for conversation_id, input_ids, loss_mask in zip(ids, rows["input_ids"], rows["loss_mask"], strict=True):
            if held_out_fraction is not None and not is_held_out(conversation_id, held_out_fraction):
                continue
            yield Document(
                id=conversation_id,
                input_ids_T=torch.tensor(input_ids.values.to_numpy(), dtype=torch.int64),
                loss_mask_T=torch.tensor(loss_mask.values.to_numpy(zero_copy_only=False), dtype=torch.bool),
            )


def cut(document: Document, max_tokens: int) -> Document:
    """The first `max_tokens` tokens of a document."""
    return Document(document.id, document.input_ids_T[:max_tokens], document.loss_mask_T[:max_tokens])


def supervised_documents(
    conversations: Path, max_tokens: int, held_out_fraction: float | None = None
) -> Iterator[Document]:
    """The conversations, cut, that have a supervised token left; all, or those that are held out of training."""
    documents = (cut(document, max_tokens) for document in read_documents(conversations, held_out_fraction))
    return (document for document in documents if document.loss_mask_T.any())


def spec_documents(spec: CaptureSpec) -> Iterator[Document]:
    """What is to be captured."""
    return supervised_documents(spec.conversations, spec.max_document_tokens, spec.held_out_fraction)


def document_lengths(conversations: Path, max_tokens: int) -> list[int]:
    """Tokens of each of the `supervised_documents`. Raises: as `document_sizes`."""
    return [size.num_tokens for size in document_sizes(conversations, max_tokens)]


def document_sizes(conversations: Path, max_tokens: int, held_out_fraction: float | None = None) -> list[DocumentSize]:
    """Sizes of the `supervised_documents`; what is cut and left out is logged. Raises: ValueError if none."""
    num_read = num_cut = num_cut_tokens = 0
    sizes: list[DocumentSize] = []
    for document in read_documents(conversations, held_out_fraction):
        num_read += 1
        num_cut += len(document.input_ids_T) > max_tokens
        num_cut_tokens += len(document.input_ids_T[max_tokens:])
        kept = cut(document, max_tokens)
        if kept.loss_mask_T.any():
            sizes.append(document_size(kept))
    if not sizes:
        raise ValueError(
            f"none of {num_read} conversations{' that are held out' if held_out_fraction else ''} has an answer in its "
            f"first {max_tokens} tokens; raise training.max_document_tokens or add data"
        )
    logger.info(
        "%d documents of %d tokens; %d conversations cut at %d tokens (%d tokens lost), %d left out without an answer",
        len(sizes), sum(size.num_tokens for size in sizes), num_cut, max_tokens, num_cut_tokens, num_read - len(sizes),
    )  # fmt: skip
    return sizes


def document_size(document: Document) -> DocumentSize:
    """Of the whole document."""
    return DocumentSize(len(document.input_ids_T), int(teaching_in_document(document.loss_mask_T).sum()))


def portable_config(config: PretrainedConfig) -> dict[str, Any]:
    """The config as `config.json` would hold it, without what depends on where and by what it was loaded."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in values.items() if name not in ("_name_or_path", "transformers_version")}


def _counted(features: Iterable[TargetFeatures], bar: Any) -> Iterator[TargetFeatures]:
    """The same, moving the bar by each document's tokens."""
    for of_document in features:
        yield of_document
        bar.update(len(of_document.aux_hidden_TLD))
