"""Hidden states out of an unpatched SGLang server, by its `--forward-hooks`. Runs inside the server.

A copy of this one file lies on the server's PYTHONPATH, so it imports torch and the standard library alone. A hook on
each captured decoder layer keeps that layer's output; a hook on the logits processor, which ends every forward, adds
the last hidden state, the greedy token and the log-sum-exp, and hands on the rows of each request:

    forward -> side stream -> ring of pinned memory -> writer threads -> DIRECTORY/ATTEMPT/START-STOP.DTYPE

A file is the piece of a request that one forward computed (more than one with chunked prefill), and is there when it is
whole. It holds, end to end: log-sum-exp float32 [U], greedy token int32 [U], last hidden state [U, D], captured layers
[T, L, D]. `DIRECTORY/ATTEMPT/error` says why there will be none. The request's id says which rows teach.

N rows of a forward, T rows of a piece, U teaching rows of either, L captured layers, D width, V vocabulary (of this
tensor-parallel rank), R ranks.
"""

import contextlib
import ctypes
import logging
import os
import queue
import re
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

ERROR_NAME = "error"
LOGIT_CHUNK_ELEMENTS = 2**26
"""Logits that exist at once while they are reduced: 256 MiB in float32."""
ALIGNMENT = 512
"""Of a piece in the ring, in bytes: what a device copies fastest."""
FUSION_MARK = "_sglang_needs_allreduce_fusion"
"""SGLang sets it on an output that is not summed over the ranks yet, because the next layer's norm does that."""
RID = re.compile(r"capture-(?P<document>\d+)-(?P<num_tokens>\d+)-(?P<runs>[\d.]*)(?P<again>[#\w]*)")

Hook = Callable[[Any, Any, Any], None]


class Wanted(NamedTuple):
    """What the id of a request asks for."""

    attempt: str
    """Name of its folder; another one if the same document is sent again."""
    num_tokens: int
    teaching: tuple[range, ...]


def request_id(document: int, num_tokens: int, teaching: Sequence[range]) -> str:
    """An id that `wanted` reads. A client may add `#` and its number to that of a request that is sent again."""
    runs = ".".join(f"{run.start}.{run.stop}" for run in teaching)
    return f"capture-{document}-{num_tokens}-{runs}"


def wanted(rid: str) -> Wanted | None:
    """What a request asks for; None if it is somebody else's (a health check)."""
    match = RID.fullmatch(rid)
    if match is None:
        return None
    ends = [int(end) for end in match["runs"].split(".") if end]
    runs = tuple(range(*run) for run in zip(ends[::2], ends[1::2], strict=True))
    return Wanted(match["document"] + match["again"], int(match["num_tokens"]), runs)


def piece_name(start: int, stop: int, dtype: torch.dtype) -> str:
    """Of the rows `start` to `stop` of a request, whose hidden states have this dtype."""
    return f"{start}-{stop}.{str(dtype).removeprefix('torch.')}"


def overlap(run: range, start: int, stop: int) -> range:
    """The part of a run within `start` to `stop`, which may be empty."""
    return range(max(run.start, start), max(run.start, start, min(run.stop, stop)))


class Piece(NamedTuple):
    """The rows of one request in one forward."""

    wanted: Wanted
    rows: range
    """In the request."""
    first: int
    """In the forward."""

    def teaching(self) -> list[slice]:
        """The forward's rows that teach, run by run."""
        runs = [overlap(run, self.rows.start, self.rows.stop) for run in self.wanted.teaching]
        shift = self.first - self.rows.start
        return [slice(run.start + shift, run.stop + shift) for run in runs if run]


class Ring:
    """One block of memory, of which parts are taken end to end and given back in any order."""

    def __init__(self, size_bytes: int, *, pinned: bool) -> None:
        self.buffer = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pinned)
        self.memory = memoryview((ctypes.c_ubyte * size_bytes).from_address(self.buffer.data_ptr()))
        self._parts: deque[list[int]] = deque()
        """[start, stop, is it given back], the oldest first."""
        self._changed = threading.Condition()

    def take(self, size_bytes: int) -> int:
        """Where a free part of that size begins, once there is one. Raises: ValueError if there can be none."""
        size_bytes = -(-size_bytes // ALIGNMENT) * ALIGNMENT
        if size_bytes > len(self.memory):
            raise ValueError(f"a piece of {size_bytes} bytes does not fit the ring of {len(self.memory)} bytes")
        with self._changed:
            self._changed.wait_for(lambda: self._free(size_bytes) is not None)
            start = self._free(size_bytes)
            assert start is not None
            self._parts.append([start, start + size_bytes, False])
            return start

    def give_back(self, start: int) -> None:
        """Free the part that begins there."""
        with self._changed:
            next(part for part in self._parts if part[0] == start)[2] = True
            while self._parts and self._parts[0][2]:
                self._parts.popleft()
            self._changed.notify_all()

    def _free(self, size_bytes: int) -> int | None:
        if not self._parts:
            return 0
        (oldest, _, _), (newest, end, _) = self._parts[0], self._parts[-1]
        if newest < oldest:
            return end if end + size_bytes <= oldest else None
        if end + size_bytes <= len(self.memory):
            return end
        return 0 if size_bytes <= oldest else None


class PieceWriter:
    """Brings pieces from the device into files. Only a full ring makes the caller wait."""

    def __init__(self, directory: Path, ring_bytes: int, num_threads: int, device: torch.device) -> None:
        self._directory = directory
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ring = Ring(ring_bytes, pinned=self._stream is not None)
        self._jobs: queue.SimpleQueue[tuple[Path, int, int, Any]] = queue.SimpleQueue()
        for _ in range(num_threads):
            threading.Thread(target=self._write_jobs, daemon=True).start()

    def write(self, pieces: Sequence[tuple[Piece, Sequence[Tensor]]], whole: Sequence[Tensor]) -> None:
        """Write the tensors of each piece, end to end. Args: whole: the tensors that those are views of."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            for tensor in whole:
                # Their memory is not used again before the side stream is through with them.
                tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            for piece, tensors in pieces:
                name = piece_name(piece.rows.start, piece.rows.stop, tensors[-1].dtype)
                start = self._ring.take(sum(tensor.nbytes for tensor in tensors))
                stop = start
                for tensor in tensors:
                    part = self._ring.buffer[stop : stop + tensor.nbytes]
                    part.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
                    stop += tensor.nbytes
                copied = None
                if self._stream is not None:
                    # A thread that waits for this event sleeps.
                    copied = torch.cuda.Event(blocking=True)
                    copied.record(self._stream)
                self._jobs.put((self._directory / piece.wanted.attempt / name, start, stop, copied))

    def _write_jobs(self) -> None:
        while True:
            path, start, stop, copied = self._jobs.get()
            try:
                if copied is not None:
                    copied.synchronize()
                write_whole(path, self._ring.memory[start:stop])
            except Exception:
                report(path.parent, traceback.format_exc())
            finally:
                self._ring.give_back(start)


def write_whole(path: Path, content: memoryview | bytes) -> None:
    """Write a file that is not there before it is whole."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb", buffering=0) as file:
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) :]
        partial.rename(path)
    except OSError:
        # Room for the error that tells of this.
        partial.unlink(missing_ok=True)
        raise


def report(attempt: Path, message: str) -> None:
    """Tell whoever waits for this attempt that it failed."""
    logger.error("no hidden states of %s: %s", attempt, message)
    try:
        write_whole(attempt / ERROR_NAME, message.encode())
    except OSError:
        # The reader is gone, or the disk is full: then the reader gives up by itself.
        logger.exception("%s cannot be told", attempt)


class Capture:
    """What the hooks of one server process share."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._layers: list[int] = config["layers"]
        self._directory = Path(config["directory"])
        self._config = config
        self._hidden: dict[int, Tensor] = {}
        self._seen: dict[int, Any] = {}
        self._problem: str | None = None
        self._num_done: dict[str, int] = {}
        self._writer: PieceWriter | None = None

    @torch.no_grad()
    def keep_layer(self, layer: int, module: Any, output: Any) -> None:
        """Take a layer's output, which is (what its last block adds, residual) or the sum."""
        try:
            if self._seen.setdefault(layer, module) is not module:
                raise ValueError(f"two modules are layer {layer}: the pattern of the hook fits too many")
            parts = output if isinstance(output, tuple) else (output,)
            if getattr(parts[0], FUSION_MARK, False):
                raise ValueError(
                    f"the output of layer {layer} is not summed over the ranks: start the server with "
                    "--enforce-disable-flashinfer-allreduce-fusion"
                )
            has_residual = len(parts) > 1 and isinstance(parts[1], Tensor)
            # The next layer adds in place, so the sum is a copy in any case.
            hidden = parts[0] + parts[1] if has_residual else parts[0].clone()
            self._hidden[layer] = hidden.flatten(0, -2)
        except Exception:
            # Raised here it would end the server; the end of the forward knows whom to tell.
            self._problem = traceback.format_exc()

    @torch.no_grad()
    def end_forward(self, processor: Any, inputs: Any) -> None:
        """Hand on the rows of the forward that ends. Inputs are the logits processor's."""
        hidden, self._hidden = self._hidden, {}
        problem, self._problem = self._problem, None
        _, last_hidden_ND, head, batch = inputs[:4]
        rids = batch.rids if batch.forward_mode.is_extend() else None
        found = [] if rids is None else [wanted(rid) for rid in rids]
        if not any(found):
            return
        try:
            if problem is not None:
                raise ValueError(problem)
            self._hand_on(self._pieces(found, batch, len(last_hidden_ND)), processor, hidden, last_hidden_ND, head)
        except Exception:
            for request in filter(None, found):
                report(self._directory / request.attempt, traceback.format_exc())

    def _pieces(self, found: Sequence[Wanted | None], batch: Any, num_rows: int) -> list[Piece]:
        lengths = [int(length) for length in batch.extend_seq_lens_cpu]
        if sum(lengths) != num_rows or getattr(batch, "global_num_tokens_cpu", None):
            raise ValueError(
                f"{num_rows} rows for {sum(lengths)} tokens: the rows are padded or spread over ranks (data-parallel "
                "attention?), which capture cannot read"
            )
        pieces = []
        first = 0
        for request, length, prefix in zip(found, lengths, batch.extend_prefix_lens_cpu, strict=True):
            if request is not None:
                num_done = self._num_done.pop(request.attempt, 0)
                start, stop = int(prefix), int(prefix) + length
                # Anew from its first row is what a server does with a request that it had to put aside.
                if start not in (0, num_done):
                    raise ValueError(
                        f"rows {num_done} to {start} of document {request.attempt} come out of a cache: start the "
                        "server with --disable-radix-cache"
                    )
                if stop < request.num_tokens:
                    self._num_done[request.attempt] = stop
                pieces.append(Piece(request, range(start, stop), first))
            first += length
        return pieces

    def _hand_on(
        self, pieces: Sequence[Piece], processor: Any, hidden: dict[int, Tensor], last_hidden_ND: Tensor, head: Any
    ) -> None:
        refuse_scaled_logits(processor)
        rows = {layer: len(hidden.get(layer, ())) for layer in self._layers}
        if set(rows.values()) != {len(last_hidden_ND)}:
            raise ValueError(
                f"{len(last_hidden_ND)} rows of the last hidden state, but by layer {rows}: a layer has another name "
                "than the hooks expect, or it is on another GPU (pipeline parallel?)"
            )
        slices = [piece.teaching() for piece in pieces]
        # Slices instead of an index: an index would have to be sent to the device, and the scheduler wait for it.
        last_hidden_UD = torch.cat([last_hidden_ND[:0], *(last_hidden_ND[part] for parts in slices for part in parts)])
        group = tensor_parallel_group()
        greedy_U, logsumexp_U = greedy_and_normalizer(last_hidden_UD, *vocabulary_part(head), group)
        if group is not None and torch.distributed.get_rank(group) != 0:
            return
        if self._writer is None:
            ring_bytes, num_threads = self._config["ring_bytes"], self._config["num_threads"]
            self._writer = PieceWriter(self._directory, ring_bytes, num_threads, last_hidden_ND.device)
        aux_hidden_NLD = torch.stack([hidden[layer] for layer in self._layers], dim=1)
        of_teaching = (logsumexp_U, greedy_U, last_hidden_UD)
        written = []
        begin = 0
        for piece, parts in zip(pieces, slices, strict=True):
            end = begin + sum(part.stop - part.start for part in parts)
            aux_hidden_TLD = aux_hidden_NLD[piece.first : piece.first + len(piece.rows)]
            written.append((piece, (*(tensor[begin:end] for tensor in of_teaching), aux_hidden_TLD)))
            begin = end
        self._writer.write(written, (*of_teaching, aux_hidden_NLD))


def refuse_scaled_logits(processor: Any) -> None:
    """Raises: ValueError if the server changes logits after the head, which a draft cannot do."""
    if (cap := getattr(processor, "final_logit_softcapping", None)) is not None:
        raise ValueError(f"the target caps its logits at {cap}: drafts cannot do that")
    if (scale := getattr(processor, "logit_scale", None)) not in (None, 1):
        raise ValueError(f"the target scales its logits by {scale}: drafts cannot do that")


def vocabulary_part(head: Any) -> tuple[Tensor, int]:
    """The rows of the head that this rank has, without padding, and the token of the first."""
    weight_VD = getattr(head, "weight", None)
    if weight_VD is None or weight_VD.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the head {type(head).__name__} has no plain weight (quantised?), which capture needs")
    if getattr(head, "bias", None) is not None:
        raise ValueError("the head has a bias: drafts cannot do that")
    part = getattr(head, "shard_indices", None)
    return (weight_VD, 0) if part is None else (weight_VD[: part.num_org_elements], part.org_vocab_start_index)


def tensor_parallel_group() -> Any:
    """The process group that a server's head is split over; None if there is only this process."""
    distributed = sys.modules.get("sglang.srt.distributed")
    if distributed is None or not torch.distributed.is_initialized():
        return None
    group = distributed.get_tp_group().device_group
    return group if torch.distributed.get_world_size(group) > 1 else None


def greedy_and_normalizer(last_hidden_UD: Tensor, weight_VD: Tensor, first: int, group: Any) -> tuple[Tensor, Tensor]:
    """The greedy token (int32 [U]) and the log-sum-exp of the logits (float32 [U]), over the vocabulary of all ranks.

    Logits are float32 sums of products of the given values, and exist for a chunk of rows at a time.

    Args: first: the token of this rank's first row; group: the ranks that have the others, or None.
    """
    chunk_rows = max(1, LOGIT_CHUNK_ELEMENTS // max(1, len(weight_VD)))
    parts = []
    for chunk_CD in last_hidden_UD.split(chunk_rows):
        logits_CV = float32_logits(chunk_CD, weight_VD)
        best_C, greedy_C = logits_CV.max(dim=-1)
        # In float64 every token id is exact too.
        parts.append(torch.stack([best_C.double(), greedy_C.double() + first, logits_CV.logsumexp(dim=-1).double()]))
    part_3U = torch.cat(parts, dim=1)
    _, greedy_U, logsumexp_U = part_3U
    if group is not None:
        parts_R = [torch.empty_like(part_3U) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(parts_R, part_3U, group=group)
        best_RU, greedy_RU, logsumexp_RU = torch.stack(parts_R, dim=1)
        greedy_U = greedy_RU.gather(0, best_RU.argmax(dim=0, keepdim=True))[0]
        logsumexp_U = logsumexp_RU.logsumexp(dim=0)
    return greedy_U.int(), logsumexp_U.float()


def float32_logits(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """float32 [N, V]: products of the given values, summed and kept in float32."""
    if hidden_ND.dtype != torch.float32 and hidden_ND.is_cuda:
        return torch.mm(hidden_ND, weight_VD.T, out_dtype=torch.float32)
    return hidden_ND.float() @ weight_VD.float().T


_captures: dict[str, Capture] = {}


def layer_hook(config: dict[str, Any]) -> Hook:
    """The hook of decoder layer `config["layer"]`; SGLang calls this."""
    capture = _captures.setdefault(config["directory"], Capture(config))
    return lambda module, inputs, output: capture.keep_layer(config["layer"], module, output)


def forward_hook(config: dict[str, Any]) -> Hook:
    """The hook of the logits processor; SGLang calls this."""
    capture = _captures.setdefault(config["directory"], Capture(config))
    return lambda module, inputs, output: capture.end_forward(module, inputs)
