"""Captured features on disk: packed safetensors shards of whole documents, an index, and the target's head.

    index.json                format version, layers, and a record of each shard
    shard-00000.safetensors   the tensors of `StoredDocument` over all documents of the shard, end to end; document i is
                              document_offsets[i] to document_offsets[i + 1]; the ids are in the header
    target_head.safetensors   embedding, head and final norm of the target
    config.json               the target's (text) config

A directory needs no target weights beside it. T tokens of a shard or of a document, L captured layers, D target width.
"""

import json
import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge_core.artifacts import PARTIAL_SUFFIX, Record, file_sha256, write_atomically
from specforge_core.drafts.base import TargetHead
from specforge_core.targets import TargetFeatures

INDEX_NAME = "index.json"
HEAD_NAME = "target_head.safetensors"
CONFIG_NAME = "config.json"
IDS_KEY = "document_ids"
OFFSETS_NAME = "document_offsets"


class ShardRecord(Record):
    """One finished shard."""

    name: str
    size_bytes: int
    sha256: str
    num_documents: int
    num_tokens: int
    num_loss_tokens: int


class FeatureIndex(Record):
    """What a feature directory holds."""

    format_version: Literal[1] = 1
    layers: tuple[int, ...]
    hidden_size: int
    dtype: Literal["bfloat16", "float32"]
    shards: tuple[ShardRecord, ...] = ()


class Document(NamedTuple):
    """A conversation as the target reads it."""

    id: str
    input_ids_T: Tensor
    """int64"""
    loss_mask_T: Tensor
    """bool"""


class StoredDocument(NamedTuple):
    """What is stored of each token; the fields are the tensors of a shard."""

    input_ids: Tensor
    """int32 [T]"""
    loss_mask: Tensor
    """bool [T]"""
    aux_hidden: Tensor
    """[T, L, D], the index's dtype"""
    last_hidden: Tensor
    """[T, D], the index's dtype"""
    target_argmax: Tensor
    """int32 [T]"""
    target_logsumexp: Tensor
    """float32 [T]"""


def plan_shards(lengths: Sequence[int], tokens_per_shard: int) -> list[range]:
    """Consecutive document indices by shard: whole documents, at most `tokens_per_shard`, at least one document."""
    shards: list[range] = []
    held_tokens = 0
    for i, length in enumerate(lengths):
        held_tokens += length
        if shards and held_tokens <= tokens_per_shard:
            shards[-1] = range(shards[-1].start, i + 1)
        else:
            shards.append(range(i, i + 1))
            held_tokens = length
    return shards


class FeatureWriter:
    """Writes a feature directory shard by shard; after an interruption it goes on behind the last finished one."""

    def __init__(self, directory: Path, index: FeatureIndex) -> None:
        """Args: index: a description without shards. Raises: ValueError if `directory` has other features."""
        self.directory = directory
        self.index = index
        if (directory / INDEX_NAME).exists():
            found = load_index(directory)
            if found.model_copy(update={"shards": ()}) != index:
                raise ValueError(f"{directory} was begun with other features ({found}); delete it or name another one")
            self.index = found

    def write(self, documents: Sequence[Document], features: Iterable[TargetFeatures]) -> ShardRecord:
        """The record of a new shard of these documents, once it is safe on disk; `features` in the same order."""
        name = f"shard-{len(self.index.shards):05d}.safetensors"
        record = self._write_shard(self.directory / name, documents, features)
        # A shard counts once the index names it; one that was cut short before that is simply written again.
        self.index = self.index.model_copy(update={"shards": (*self.index.shards, record)})
        write_atomically(self.directory / INDEX_NAME, self.index.model_dump_json(indent=1) + "\n")
        return record

    def _write_shard(
        self, path: Path, documents: Sequence[Document], features: Iterable[TargetFeatures]
    ) -> ShardRecord:
        offsets = torch.tensor([0, *(len(document.input_ids_T) for document in documents)]).cumsum(0)
        num_tokens, hidden_size, dtype = int(offsets[-1]), self.index.hidden_size, getattr(torch, self.index.dtype)
        shard = StoredDocument(
            input_ids=torch.cat([document.input_ids_T for document in documents]).int(),
            loss_mask=torch.cat([document.loss_mask_T for document in documents]),
            aux_hidden=torch.empty(num_tokens, len(self.index.layers), hidden_size, dtype=dtype),
            last_hidden=torch.empty(num_tokens, hidden_size, dtype=dtype),
            target_argmax=torch.empty(num_tokens, dtype=torch.int32),
            target_logsumexp=torch.empty(num_tokens, dtype=torch.float32),
        )
        # Filled in place: a shard of a large target is gigabytes, and is never held twice.
        for (start, stop), captured in zip(pairwise(offsets.tolist()), features, strict=True):
            shard.aux_hidden[start:stop] = captured.aux_hidden_TLD
            shard.last_hidden[start:stop] = captured.last_hidden_TD
            shard.target_argmax[start:stop] = captured.argmax_T
            shard.target_logsumexp[start:stop] = captured.logsumexp_T
        tensors = {**shard._asdict(), OFFSETS_NAME: offsets}
        ids = json.dumps([document.id for document in documents])
        partial = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
        save_file(tensors, partial, metadata={IDS_KEY: ids})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        return ShardRecord(
            name=path.name,
            size_bytes=path.stat().st_size,
            sha256=file_sha256(path),
            num_documents=len(documents),
            num_tokens=num_tokens,
            num_loss_tokens=int(shard.loss_mask.sum()),
        )


class Shard:
    """One shard, memory-mapped: only what is read comes from the disk."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self._offsets: list[int] = self._file.get_tensor(OFFSETS_NAME).tolist()
        self.document_ids: list[str] = json.loads(self._file.metadata()[IDS_KEY])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [stop - start for start, stop in pairwise(self._offsets)]

    def read(self, document: int, num_tokens: int) -> StoredDocument:
        """The first `num_tokens` tokens of the shard's document number `document`."""
        start = self._offsets[document]
        return StoredDocument(
            *(self._file.get_slice(name)[start : start + num_tokens] for name in StoredDocument._fields)
        )


def load_index(directory: Path) -> FeatureIndex:
    """The index of a feature directory. Raises: ValueError if a shard is gone or has another size."""
    index = FeatureIndex.model_validate_json((directory / INDEX_NAME).read_text(encoding="utf-8"))
    for shard in index.shards:
        path = directory / shard.name
        size_bytes = path.stat().st_size if path.exists() else 0
        if size_bytes != shard.size_bytes:
            raise ValueError(
                f"{path} has {size_bytes} bytes, its index says {shard.size_bytes}; "
                f"delete {directory} and capture again"
            )
    return index


def damaged_shards(directory: Path) -> list[str]:
    """Names of shards whose content is not what was written. Reads everything."""
    index = load_index(directory)
    return [shard.name for shard in index.shards if file_sha256(directory / shard.name) != shard.sha256]


def save_target(directory: Path, config: dict[str, Any], head: TargetHead) -> None:
    """Write what training needs of the target: its text config and its head. A tied head is stored once."""
    tensors = {"embedding": head.embedding_VD}
    if head.lm_head_VD is not head.embedding_VD:
        tensors["lm_head"] = head.lm_head_VD
    if head.final_norm_D is not None:
        tensors["final_norm"] = head.final_norm_D
    save_file(tensors, directory / HEAD_NAME)
    write_atomically(directory / CONFIG_NAME, json.dumps(config, indent=1, sort_keys=True) + "\n")


def load_target_head(directory: Path) -> TargetHead:
    """The target's head, as saved by `save_target`."""
    tensors = load_file(directory / HEAD_NAME)
    embedding_VD = tensors["embedding"]
    return TargetHead(embedding_VD, tensors.get("lm_head", embedding_VD), tensors.get("final_norm"))


def load_target_config(directory: Path) -> dict[str, Any]:
    """The target's text config, as saved by `save_target`."""
    config: dict[str, Any] = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    return config
