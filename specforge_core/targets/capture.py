"""The stage `capture`: conversations in, hidden states of the target out, in the format of `data/shards.py`."""

import json
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from specforge_core.data.conversations import scan_columns
from specforge_core.data.shards import (
    Document,
    FeatureIndex,
    FeatureWriter,
    plan_shards,
    save_target,
    teaching_in_document,
)
from specforge_core.drafts import ALGORITHMS
from specforge_core.facts import HiddenStates
from specforge_core.progress import progress
from specforge_core.stages import CaptureSpec
from specforge_core.targets import CaptureRequest, TargetFeatures
from specforge_core.targets.hf import HFTarget

logger = logging.getLogger(__name__)


def main(spec: CaptureSpec, out: Path) -> HiddenStates:
    """Capture every conversation into `out`; finished shards of an interrupted run are kept."""
    lengths = document_lengths(spec.conversations, spec.max_document_tokens)
    target = HFTarget(spec.target, device=spec.device)
    layers = ALGORITHMS[spec.algorithm].capture_layers(spec.aux_layers, target.num_layers)
    save_target(out, portable_config(target.config), target.load_target_head())
    index = FeatureIndex(layers=layers, hidden_size=target.config.hidden_size, dtype=spec.features.dtype)
    writer = FeatureWriter(out, index)
    finished = writer.index.shards
    if finished:
        logger.info("going on behind %d finished shards", len(finished))
    finished_tokens = sum(shard.num_tokens for shard in finished)
    num_finished = sum(shard.num_documents for shard in finished)
    documents = islice(supervised_documents(spec.conversations, spec.max_document_tokens), num_finished, None)
    with progress(desc="capture", total=sum(lengths), unit="token", initial=finished_tokens) as bar:
        # Each shard is captured for itself, so its bytes do not depend on where an interrupted run went on.
        for planned in plan_shards(lengths, spec.features.tokens_per_shard)[len(finished) :]:
            batch = list(islice(documents, len(planned)))
            requests = [CaptureRequest(doc.input_ids_T, teaching_in_document(doc.loss_mask_T)) for doc in batch]
            features = target.capture(requests, layers, batch_tokens=spec.batch_tokens)
            writer.write(batch, _counted(features, bar))
    records = writer.index.shards
    facts = HiddenStates(
        layers=layers,
        num_target_layers=target.num_layers,
        hidden_size=index.hidden_size,
        dtype=index.dtype,
        num_documents=sum(record.num_documents for record in records),
        num_tokens=sum(record.num_tokens for record in records),
        num_loss_tokens=sum(record.num_loss_tokens for record in records),
        num_shards=len(records),
    )
    size_gib = sum(record.size_bytes for record in records) / 2**30
    logger.info("captured layers %s of %d tokens into %.2f GiB", list(layers), facts.num_tokens, size_gib)
    return facts


def read_documents(conversations: Path) -> Iterator[Document]:
    """All conversations of an artifact, whole, in order."""
    for rows in scan_columns(conversations, ["id", "input_ids", "loss_mask"]):
        for conversation_id, input_ids, loss_mask in zip(rows["id"], rows["input_ids"], rows["loss_mask"], strict=True):
            yield Document(
                id=conversation_id.as_py(),
                input_ids_T=torch.tensor(input_ids.values.to_numpy(), dtype=torch.int64),
                loss_mask_T=torch.tensor(loss_mask.values.to_numpy(zero_copy_only=False), dtype=torch.bool),
            )


def cut(document: Document, max_tokens: int) -> Document:
    """The first `max_tokens` tokens of a document."""
    return Document(document.id, document.input_ids_T[:max_tokens], document.loss_mask_T[:max_tokens])


def supervised_documents(conversations: Path, max_tokens: int) -> Iterator[Document]:
    """The conversations, cut, that have a supervised token left."""
    documents = (cut(document, max_tokens) for document in read_documents(conversations))
    return (document for document in documents if document.loss_mask_T.any())


def document_lengths(conversations: Path, max_tokens: int) -> list[int]:
    """Tokens of each of the `supervised_documents`; what is cut and left out is logged. Raises: ValueError if none."""
    num_read = num_cut = num_cut_tokens = 0
    lengths: list[int] = []
    for document in read_documents(conversations):
        num_read += 1
        num_cut += len(document.input_ids_T) > max_tokens
        num_cut_tokens += len(document.input_ids_T[max_tokens:])
        if document.loss_mask_T[:max_tokens].any():
            lengths.append(len(document.input_ids_T[:max_tokens]))
    if not lengths:
        raise ValueError(
            f"none of {num_read} conversations has an answer in its first {max_tokens} tokens; "
            "raise training.max_document_tokens or add data"
        )
    logger.info(
        "%d documents of %d tokens; %d conversations cut at %d tokens (%d tokens lost), %d left out without an answer",
        len(lengths), sum(lengths), num_cut, max_tokens, num_cut_tokens, num_read - len(lengths),
    )  # fmt: skip
    return lengths


def portable_config(config: PretrainedConfig) -> dict[str, Any]:
    """The config as `config.json` would hold it, without what depends on where and by what it was loaded."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in values.items() if name not in ("_name_or_path", "transformers_version")}


def _counted(features: Iterable[TargetFeatures], bar: Any) -> Iterator[TargetFeatures]:
    """The same, moving the bar by each document's tokens."""
    for captured in features:
        yield captured
        bar.update(len(captured.aux_hidden_TLD))
