"""Training batches from captured features: whole documents, packed without padding, planned before anything is read.

T tokens of a packed batch, U teaching tokens of it, L captured layers, D target width.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import compress, cycle
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from specforge_core.data import float8
from specforge_core.data.shards import Shard, StoredDocument, load_index
from specforge_core.drafts.base import DraftBatch
from specforge_core.drafts.rows import is_teaching

logger = logging.getLogger(__name__)

OPEN_BATCHES = 32
"""Batches that are filled side by side; more of them waste less room and scatter the shuffled order no further."""
BATCHES_AHEAD = 2
LOADING_THREADS = 2
"""Each loads a batch of its own: the disk does not rest while one batch is copied or its rows are indexed."""

ItemT = TypeVar("ItemT")
LoadedT = TypeVar("LoadedT")


class Split(NamedTuple):
    """Indices of documents, ascending."""

    train: list[int]
    eval: list[int]


class StoredBatch(NamedTuple):
    """A batch as it comes from the disk: `dequantised` makes of it what a draft reads, on any device."""

    batch: DraftBatch
    """Hidden states in the dtype that is stored."""
    aux_scale_TL: Tensor | None
    """float32; None unless that is float8."""
    last_scale_U: Tensor | None
    """float32; None unless that is float8."""


class DocumentSet(ABC):
    """Documents to train on: how long they are, how they are split, and in which batches they come."""

    def __init__(
        self,
        document_ids: Sequence[str],
        lengths: Sequence[int],
        num_teaching: Sequence[int],
        *,
        max_document_tokens: int | None,
    ) -> None:
        """Args: lengths, num_teaching: of the whole documents; max_document_tokens: cut longer ones here."""
        self.document_ids = document_ids
        limit = max_document_tokens or max(lengths)
        self.lengths = [min(length, limit) for length in lengths]
        """Tokens of each document."""
        self._num_teaching = num_teaching
        if num_cut := sum(length > limit for length in lengths):
            lost_tokens = sum(lengths) - sum(self.lengths)
            logger.warning("%d documents are cut at %d tokens; %d tokens are lost", num_cut, limit, lost_tokens)

    def split(self, eval_fraction: float) -> Split:
        """About `eval_fraction` of the documents for evaluation, chosen by their ids alone.

        So a document stays on its side when others are added. Raises: ValueError if a side would be empty.
        """
        held_out = [is_held_out(document_id, eval_fraction) for document_id in self.document_ids]
        split = Split(
            train=[i for i, is_eval in enumerate(held_out) if not is_eval],
            eval=[i for i, is_eval in enumerate(held_out) if is_eval],
        )
        if not split.train or not split.eval:
            raise ValueError(
                f"eval_fraction={eval_fraction} puts {len(split.eval)} of {len(held_out)} documents into evaluation "
                "and both sides need one; change training.eval_fraction or add data"
            )
        return split

    def plan(self, documents: Sequence[int], budget: int, *, seed: int, epoch: int) -> list[list[int]]:
        """The micro-batches of an epoch over these documents, each a list of document indices."""
        lengths = [self.lengths[document] for document in documents]
        batches = [[documents[i] for i in batch] for batch in plan_epoch(lengths, budget, seed, epoch)]
        fill = sum(lengths) / (budget * len(batches))
        logger.info("epoch %d: %d micro-batches of %d tokens, %.1f %% full", epoch, len(batches), budget, 100 * fill)
        return batches

    def dealt(self, step: Sequence[Sequence[int]], num_replicas: int) -> list[int]:
        """Which replica takes each of these micro-batches.

        Time goes with teaching tokens: for Llama-3.1-8B's draft one takes a dozen times as long as another token.
        """
        return deal([sum(self._num_teaching[document] for document in batch) for batch in step], num_replicas)

    def share(self, step: Sequence[Sequence[int]], replica: int, num_replicas: int) -> list[Sequence[int]]:
        """The micro-batches that are dealt to this replica; none for some in a short last step."""
        return list(compress(step, (taker == replica for taker in self.dealt(step, num_replicas))))

    def begin(self, steps: Sequence[Sequence[Sequence[int]]], first_step: int) -> None:  # noqa: B027
        """Say what a training will ask for, from which step on, before it does: features may have to be made first."""

    @abstractmethod
    def batches(
        self,
        micro_batches: Iterable[Sequence[int]],
        *,
        prepare: Callable[[DraftBatch], DraftBatch],
        pin_memory: bool = False,
    ) -> Iterator[StoredBatch]:
        """The micro-batches of a plan, loaded and prepared in order by threads that stay a little ahead.

        Args: prepare: as of `prepared`; it runs on two batches at once. pin_memory: put every tensor into pinned
        memory, from where a copy to a GPU does not hold up the host.
        """

    def metrics(self) -> dict[str, float]:
        """What there is to report about where the batches come from, since the last time that it was asked for."""
        return {}


class FeatureSet(DocumentSet):
    """All documents of a feature directory, in stored order, memory-mapped."""

    def __init__(self, directory: Path, *, max_document_tokens: int | None = None) -> None:
        """Args: max_document_tokens: cut longer documents here, which must be done for those over a batch's budget."""
        shards = [Shard(directory / record.name) for record in load_index(directory).shards]
        self._places = [(shard, i) for shard in shards for i in range(len(shard.document_ids))]
        super().__init__(
            [document_id for shard in shards for document_id in shard.document_ids],
            [length for shard in shards for length in shard.lengths],
            [count for shard in shards for count in shard.num_teaching],
            max_document_tokens=max_document_tokens,
        )

    def load_batch(self, documents: Sequence[int], *, pin_memory: bool = False) -> StoredBatch:
        """These documents one after the other, on the CPU. Args: as of `packed`."""
        places = [(*self._places[document], self.lengths[document]) for document in documents]
        return packed([shard.read(number, length) for shard, number, length in places], pin_memory=pin_memory)

    def batches(
        self,
        micro_batches: Iterable[Sequence[int]],
        *,
        prepare: Callable[[DraftBatch], DraftBatch],
        pin_memory: bool = False,
    ) -> Iterator[StoredBatch]:
        """See `DocumentSet`; the micro-batches may be any."""

        def load(documents: Sequence[int]) -> StoredBatch:
            return prepared(self.load_batch(documents, pin_memory=pin_memory), prepare, pin_memory=pin_memory)

        return prefetched(load, micro_batches)


def packed(documents: Sequence[StoredDocument], *, pin_memory: bool = False) -> StoredBatch:
    """These documents one after the other, on the CPU.

    Args: pin_memory: copy the stored tensors, which are nearly all bytes, straight into pinned memory.
    """
    lengths = [len(document.input_ids) for document in documents]
    stored = StoredDocument(*(_joined(parts, pin_memory) for parts in zip(*documents, strict=True)))
    document_ids_T = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    batch = DraftBatch(
        input_ids_T=stored.input_ids.long(),
        loss_mask_T=stored.loss_mask,
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        document_ids_T=document_ids_T,
        aux_hidden_TLD=stored.aux_hidden,
        teaching_U=is_teaching(stored.loss_mask, document_ids_T).nonzero().squeeze(1),
        last_hidden_UD=stored.last_hidden,
        target_argmax_U=stored.target_argmax.long(),
        target_logsumexp_U=stored.target_logsumexp,
    )
    return StoredBatch(batch, stored.aux_scale, stored.last_scale)


def prepared(
    stored: StoredBatch, prepare: Callable[[DraftBatch], DraftBatch], *, pin_memory: bool = False
) -> StoredBatch:
    """The batch with what a draft wants on the CPU.

    Args: prepare: adds that, from ids, masks and teaching tokens alone: a hidden state may still be in float8.
    pin_memory: put every tensor into pinned memory.
    """
    stored = stored._replace(batch=prepare(stored.batch))
    return tree_map_only(Tensor, Tensor.pin_memory, stored) if pin_memory else stored


def dequantised(stored: StoredBatch) -> DraftBatch:
    """The batch that a draft reads: float8 becomes bfloat16 on a GPU and float32 elsewhere, all else stays."""
    batch = stored.batch
    if stored.aux_scale_TL is None or stored.last_scale_U is None:
        return batch
    dtype = torch.bfloat16 if batch.aux_hidden_TLD.is_cuda else torch.float32
    aux_hidden = float8.ScaledFloat8(batch.aux_hidden_TLD, stored.aux_scale_TL)
    last_hidden = float8.ScaledFloat8(batch.last_hidden_UD, stored.last_scale_U)
    return batch._replace(
        aux_hidden_TLD=float8.dequantised(aux_hidden, dtype), last_hidden_UD=float8.dequantised(last_hidden, dtype)
    )


def plan_epoch(lengths: Sequence[int], budget: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of documents by micro-batch: each document once, whole, at most `budget` tokens together.

    The order is a shuffle by (seed, epoch); each document goes into the first of the open batches that has room.
    Raises: ValueError for a document longer than the budget.
    """
    if max(lengths) > budget:
        raise ValueError(f"a document has {max(lengths)} tokens, a micro-batch {budget}; cut documents or raise it")
    batches: list[list[int]] = []
    room: list[int] = []
    first_open = 0
    for document in np.random.default_rng([seed, epoch]).permutation(len(lengths)).tolist():
        length = lengths[document]
        for batch in range(first_open, len(batches)):
            if room[batch] >= length:
                batches[batch].append(document)
                room[batch] -= length
                break
        else:
            batches.append([document])
            room.append(budget - length)
            first_open = max(first_open, len(batches) - OPEN_BATCHES)
    return batches


def plan_steps(micro_batches: Sequence[ItemT], per_step: int) -> list[Sequence[ItemT]]:
    """The micro-batches of each optimizer step; the last step may have fewer."""
    return [micro_batches[start : start + per_step] for start in range(0, len(micro_batches), per_step)]


def deal(loads: Sequence[float], num_replicas: int) -> list[int]:
    """Which replica takes each load: equally many for all, up to one, and about as much.

    From the largest to the smallest in turn, to and fro.
    """
    there_and_back = [*range(num_replicas), *reversed(range(num_replicas))]
    takers = [0] * len(loads)
    largest_first = sorted(range(len(loads)), key=lambda place: -loads[place])
    for place, taker in zip(largest_first, cycle(there_and_back), strict=False):
        takers[place] = taker
    return takers


def prefetched(load: Callable[[ItemT], LoadedT], items: Iterable[ItemT]) -> Iterator[LoadedT]:
    """`load(item)` for each item in order, worked out ahead by a few threads."""
    pool = ThreadPoolExecutor(LOADING_THREADS, thread_name_prefix="prefetch")
    waiting: deque[Future[LoadedT]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(load, item))
            if len(waiting) > BATCHES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def is_held_out(document_id: str, fraction: float) -> bool:
    """Whether a document is in evaluation and not in training: about `fraction` of all are, by their ids alone."""
    return int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:8]) / 2**64 < fraction


def _joined(parts: tuple[Tensor | None, ...], pin_memory: bool) -> Any:
    """The parts end to end, each copied once, straight from the mapped file; None if they are."""
    tensors = [part for part in parts if part is not None]
    if not tensors:
        return None
    num_rows = sum(len(tensor) for tensor in tensors)
    joined = torch.empty(num_rows, *tensors[0].shape[1:], dtype=tensors[0].dtype, pin_memory=pin_memory)
    return torch.cat(tensors, out=joined)
