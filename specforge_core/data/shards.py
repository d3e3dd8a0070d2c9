"""Captured features on disk: packed safetensors shards of whole documents, an index, and the target's head.

    index.json                format version, layers, and a record of each shard
    shard-00000.safetensors   the tensors of `StoredDocument` over all documents of the shard, end to end; document i is
                              document_offsets[i] to document_offsets[i + 1] of the tensors over tokens, and between the
                              same two of teaching_offsets in those over teaching tokens; the ids are in the header
    target_head.safetensors   embedding, head and final norm of the target
    config.json               the target's (text) config

A token teaches if the next one of its document was produced by the target: only there is a draft held against the
target's logits, so only there the last hidden state is stored. A directory needs no target weights beside it.

T tokens of a shard or of a document, U teaching tokens of it, L captured layers, D target width.
"""

import json
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge_core.artifacts import PARTIAL_SUFFIX, write_atomically
from specforge_core.data.float8 import quantised
from specforge_core.data.packed_file import Follower, PackedFile, Rows
from specforge_core.drafts.base import TargetHead
from specforge_core.drafts.rows import is_teaching
from specforge_core.facts import Record
from specforge_core.manifest_sections import FeatureDtype
from specforge_core.targets import TargetFeatures

FORMAT_VERSION = 2
INDEX_NAME = "index.json"
HEAD_NAME = "target_head.safetensors"
CONFIG_NAME = "config.json"
IDS_KEY = "document_ids"
TOKEN_OFFSETS = "document_offsets"
TEACHING_OFFSETS = "teaching_offsets"
NUM_COPIERS = 3
"""Threads that write to one shard, and batches that wait for them."""
WRITE_TOKENS = 1024
"""Of a batch: so many documents are written at once. A longer one is a batch of its own."""


class ShardRecord(Record):
    """One finished shard."""

    name: str = Field(pattern=r"^shard-\d{5,}\.safetensors$")
    """Of its file; nothing else is opened, whatever an index that came from elsewhere says."""
    size_bytes: int
    sha256: str
    num_documents: int
    num_tokens: int
    num_loss_tokens: int


class FeatureIndex(Record):
    """What a feature directory holds."""

    format_version: int = FORMAT_VERSION
    layers: tuple[int, ...]
    hidden_size: int
    dtype: FeatureDtype
    shards: tuple[ShardRecord, ...] = ()


class Document(NamedTuple):
    """A conversation as the target reads it."""

    id: str
    input_ids_T: Tensor
    """int64"""
    loss_mask_T: Tensor
    """bool"""


class StoredDocument(NamedTuple):
    """What is stored of a document; the fields are the tensors of a shard."""

    input_ids: Tensor
    """int32 [T]"""
    loss_mask: Tensor
    """bool [T]"""
    aux_hidden: Tensor
    """[T, L, D], the index's dtype"""
    last_hidden: Tensor
    """[U, D], the index's dtype"""
    target_argmax: Tensor
    """int32 [U]"""
    target_logsumexp: Tensor
    """float32 [U]"""
    aux_scale: Tensor | None = None
    """float32 [T, L]; for float8 alone, what `aux_hidden` is to be multiplied with."""
    last_scale: Tensor | None = None
    """float32 [U]; the same for `last_hidden`."""


FIRST_TENSOR = "aux_hidden"
"""In the file, behind the offsets."""
OVER_TEACHING = frozenset({"last_hidden", "target_argmax", "target_logsumexp", "last_scale"})
"""Of `StoredDocument`: those over teaching tokens; the others are over all tokens."""


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


class _Batch(NamedTuple):
    """Consecutive documents of a shard, by field of `StoredDocument`."""

    parts: dict[str, list[Tensor]]
    tokens: range
    """In the shard."""
    teaching: range


class FilledShard(NamedTuple):
    """A shard that the kernel has, but maybe not yet the disk."""

    number: int
    follower: Follower | None
    """None: it is hashed later."""
    partial: Path
    num_documents: int
    num_tokens: int
    num_loss_tokens: int


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
        self._finished: dict[int, ShardRecord] = {}
        self._lock = threading.Lock()

    def write(self, documents: Sequence[Document], features: Iterable[TargetFeatures]) -> ShardRecord:
        """The record of a new shard of these documents, once it is safe on disk; `features` in the same order."""
        return self.finish(self.fill(len(self.index.shards), documents, features))

    def fill(
        self,
        number: int,
        documents: Sequence[Document],
        features: Iterable[TargetFeatures],
        *,
        is_followed: bool = False,
    ) -> FilledShard:
        """Shard number `number`, to be finished. Each document's features are let go of as soon as they are written.

        Args: is_followed: whether it is hashed meanwhile, so that `finish` has little left to do.
        """
        token_offsets = _offsets(len(document.input_ids_T) for document in documents)
        teaching_offsets = _offsets(int(teaching_in_document(document.loss_mask_T).sum()) for document in documents)
        offsets = {TOKEN_OFFSETS: token_offsets, TEACHING_OFFSETS: teaching_offsets}
        partial = self.directory / f".{_shard_name(number)}{PARTIAL_SUFFIX}"
        metadata = {IDS_KEY: json.dumps([document.id for document in documents])}
        pending: deque[tuple[Future[None], int]] = deque()
        file = follower = None
        # The copiers end before their file is closed.
        with _removed_on_error(partial), ExitStack() as stack, ThreadPoolExecutor(NUM_COPIERS) as pool:
            for batch in _batches(documents, features, self.index.dtype):
                if file is None:
                    file = stack.enter_context(PackedFile(partial, _tensors(batch.parts, offsets), metadata))
                    for name, tensor in offsets.items():
                        file.write(name, 0, [tensor])
                    follower = Follower(partial) if is_followed else None
                pending.append((pool.submit(_write_batch, file, batch), file.place(FIRST_TENSOR, batch.tokens.stop)))
                # Of documents that are on their way to the disk only the copier still has the features.
                del batch
                if len(pending) > NUM_COPIERS:
                    written, end = pending.popleft()
                    written.result()
                    if follower is not None:
                        follower.advance(end)
            for written, _ in pending:
                written.result()
        num_loss_tokens = sum(int(document.loss_mask_T.sum()) for document in documents)
        return FilledShard(number, follower, partial, len(documents), int(token_offsets[-1]), num_loss_tokens)

    def finish(self, filled: FilledShard) -> ShardRecord:
        """The record of the shard, safe on disk. Threads may finish several at once, in any order."""
        sha256 = (filled.follower or Follower(filled.partial)).finish()
        path = self.directory / _shard_name(filled.number)
        record = ShardRecord(
            name=path.name,
            size_bytes=filled.partial.stat().st_size,
            sha256=sha256,
            num_documents=filled.num_documents,
            num_tokens=filled.num_tokens,
            num_loss_tokens=filled.num_loss_tokens,
        )
        filled.partial.replace(path)
        with self._lock:
            self._finished[filled.number] = record
            # A shard counts once the index names it; one that was cut short before that is simply written again.
            while (number := len(self.index.shards)) in self._finished:
                shards = (*self.index.shards, self._finished.pop(number))
                self.index = self.index.model_copy(update={"shards": shards})
                write_atomically(self.directory / INDEX_NAME, self.index.model_dump_json(indent=1) + "\n")
        return record


class Shard:
    """One shard, memory-mapped: only what is read comes from the disk."""

    def __init__(self, path: Path) -> None:
        file = safe_open(path, framework="pt")
        # Each tensor is a view of the mapped file; of the large ones nothing is read yet.
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self._token_offsets: list[int] = tensors.pop(TOKEN_OFFSETS).tolist()
        self._teaching_offsets: list[int] = tensors.pop(TEACHING_OFFSETS).tolist()
        self._stored = tensors
        self.document_ids: list[str] = json.loads(file.metadata()[IDS_KEY])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [stop - start for start, stop in pairwise(self._token_offsets)]

    @property
    def num_teaching(self) -> list[int]:
        """Teaching tokens of each document."""
        return [stop - start for start, stop in pairwise(self._teaching_offsets)]

    def read(self, document: int, num_tokens: int) -> StoredDocument:
        """The first `num_tokens` tokens of the shard's document number `document`, as views of the mapped file.

        In a document that is cut so, the last token does not teach any more.
        """
        token, teaching = self._token_offsets[document], self._teaching_offsets[document]
        tokens = slice(token, token + num_tokens)
        num_teaching = int(teaching_in_document(self._stored["loss_mask"][tokens]).sum())
        over_teaching = slice(teaching, teaching + num_teaching)
        return StoredDocument(
            **{name: part[over_teaching if name in OVER_TEACHING else tokens] for name, part in self._stored.items()}
        )


def teaching_in_document(loss_mask_T: Tensor) -> Tensor:
    """bool [T]: which tokens of one document teach."""
    return is_teaching(loss_mask_T, torch.zeros_like(loss_mask_T, dtype=torch.int32))


def load_index(directory: Path) -> FeatureIndex:
    """The index of a feature directory.

    Raises: ValueError if it has another format, or if a shard is gone or has another size.
    """
    values = json.loads((directory / INDEX_NAME).read_text(encoding="utf-8"))
    if values["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{directory} has features in format {values['format_version']}, this version reads {FORMAT_VERSION}; "
            "delete it and capture again"
        )
    index = FeatureIndex.model_validate(values)
    for shard in index.shards:
        path = directory / shard.name
        size_bytes = path.stat().st_size if path.exists() else 0
        if size_bytes != shard.size_bytes:
            raise ValueError(
                f"{path} has {size_bytes} bytes, its index says {shard.size_bytes}; "
                f"delete {directory} and capture again"
            )
    return index


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


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _tensors(parts: Mapping[str, Sequence[Tensor]], offsets: Mapping[str, Tensor]) -> dict[str, Rows]:
    """What a shard's tensors will be, in its order, by the parts of some of its documents.

    What is known is first, then the largest one: the file is written from its front as long as documents come. So each
    tensor also lies where its elements are aligned.
    """
    num_tokens, num_teaching = (int(offsets[name][-1]) for name in (TOKEN_OFFSETS, TEACHING_OFFSETS))
    whole = {name: Rows(len(tensor), (), tensor.dtype) for name, tensor in offsets.items()}
    rows = {name: (tuple(tensors[0].shape[1:]), tensors[0].dtype) for name, tensors in parts.items()}
    for name in sorted(rows, key=lambda name: (name != FIRST_TENSOR, name != "last_hidden", -rows[name][1].itemsize)):
        whole[name] = Rows(num_teaching if name in OVER_TEACHING else num_tokens, *rows[name])
    return whole


def _batches(
    documents: Sequence[Document], features: Iterable[TargetFeatures], dtype: FeatureDtype
) -> Iterator[_Batch]:
    """All documents, in batches."""
    parts: defaultdict[str, list[Tensor]] = defaultdict(list)
    tokens = teaching = range(0)
    for document, captured in zip(documents, features, strict=True):
        num_tokens, num_teaching = len(document.input_ids_T), int(teaching_in_document(document.loss_mask_T).sum())
        if tokens and len(tokens) + num_tokens > WRITE_TOKENS:
            yield _Batch(parts, tokens, teaching)
            parts, tokens, teaching = defaultdict(list), tokens[len(tokens) :], teaching[len(teaching) :]
        for name, part in _encoded(document, captured, dtype).items():
            expected = num_teaching if name in OVER_TEACHING else num_tokens
            assert len(part) == expected, f"{document.id}: {len(part)} rows of {name} for {expected} tokens"
            parts[name].append(part)
        tokens = range(tokens.start, tokens.stop + num_tokens)
        teaching = range(teaching.start, teaching.stop + num_teaching)
        # While the next ones are awaited only the batch has the features.
        del captured, part
    yield _Batch(parts, tokens, teaching)


def _write_batch(file: PackedFile, batch: _Batch) -> None:
    for name, parts in batch.parts.items():
        file.write(name, (batch.teaching if name in OVER_TEACHING else batch.tokens).start, parts)


def _offsets(lengths: Iterable[int]) -> Tensor:
    """int64, where each part begins, and where the last one ends."""
    return torch.tensor([0, *lengths]).cumsum(0)


def _encoded(document: Document, captured: TargetFeatures, dtype: FeatureDtype) -> dict[str, Tensor]:
    """One document by field of `StoredDocument`, features on their device: a CPU takes long to make float8 of them."""
    tensors = {
        "input_ids": document.input_ids_T.int(),
        "loss_mask": document.loss_mask_T,
        "target_argmax": captured.argmax_U,
        "target_logsumexp": captured.logsumexp_U,
    }
    if dtype == "float8":
        tensors["aux_hidden"], tensors["aux_scale"] = quantised(captured.aux_hidden_TLD)
        tensors["last_hidden"], tensors["last_scale"] = quantised(captured.last_hidden_UD)
    else:
        tensors["aux_hidden"] = captured.aux_hidden_TLD.to(getattr(torch, dtype))
        tensors["last_hidden"] = captured.last_hidden_UD.to(getattr(torch, dtype))
    return tensors
