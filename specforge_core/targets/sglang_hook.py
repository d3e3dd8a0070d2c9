"""Hidden states out of an unpatched SGLang server, by its `--forward-hooks`. Runs inside the server.

A copy of this one file lies on the server's PYTHONPATH, so it imports torch, Triton and the standard library alone. A
hook on each captured decoder layer keeps that layer's output; a hook on the logits processor, which ends every forward,
adds the last hidden state, the greedy token and the log-sum-exp, and hands on the forward:

    forward -> side stream -> buffers of pinned memory -> writer threads -> DIRECTORY/PROCESS-NUMBER

A file is one forward, and is there when it is whole: a line of JSON, then end to end log-sum-exp float32 [U], greedy
token int32 [U], last hidden state [U, D], captured layers [N, L, D]. The line says which rows are whose (`Piece`; more
than one forward has a request's with chunked prefill), or which requests failed and why. The request's id says which
rows teach.

N rows of a forward, U of them teach, L captured layers, D width, V vocabulary (of this tensor-parallel rank), R ranks.
"""

import contextlib
import itertools
import json
import logging
import os
import queue
import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

logger = logging.getLogger(__name__)

LOGIT_CHUNK_ELEMENTS = 2**27
"""Logits that exist at once while they are reduced: 512 MiB in float32."""
ROW_TILE = 256
"""Rows that a GPU multiplies at a time: with 523 instead of 512 it computes 768."""
BLOCK, NUM_WARPS = 4096, 16
"""Logits of a row that the reduction reads at a time."""
ALIGNMENT = 64
"""Of what follows the line in a file, in bytes."""
FUSION_MARK = "_sglang_needs_allreduce_fusion"
"""SGLang sets it on an output that is not summed over the ranks yet, because the next layer's norm does that."""
RID = re.compile(r"capture-(?P<document>\d+)-(?P<num_tokens>\d+)-(?P<runs>[\d.]*)(?P<again>[#\w]*)")
_LOWEST = tl.constexpr(-3.0e38)

Hook = Callable[[Any, Any, Any], None]


class Wanted(NamedTuple):
    """What the id of a request asks for."""

    document: int
    attempt: str
    """The document's number, and what tells it from others if the same document is sent again."""
    num_tokens: int
    teaching: tuple[range, ...]


class Piece(NamedTuple):
    """The rows of one request in one forward."""

    document: int
    attempt: str
    start: int
    """In the request."""
    stop: int
    first: int
    """In the forward."""
    first_teaching: int
    """In the forward, among the rows that teach."""
    num_teaching: int


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
    return Wanted(int(match["document"]), match["document"] + match["again"], int(match["num_tokens"]), runs)


class ForwardWriter:
    """Brings forwards from the device into files. The caller waits only while no buffer is free."""

    def __init__(self, directory: Path, config: dict[str, Any], device: torch.device) -> None:
        self._directory, self._buffer_bytes = directory, config["buffer_bytes"]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[tuple[dict[str, Any], Tensor, int, Any]] = queue.SimpleQueue()
        # One block: each one would be rounded up to a power of two.
        num_bytes = config["num_buffers"] * self._buffer_bytes
        block = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._stream is not None)
        for buffer in block.split(self._buffer_bytes):
            self._buffers.put(buffer)
            threading.Thread(target=self._write_jobs, daemon=True).start()

    def write(self, header: dict[str, Any], tensors: Sequence[Tensor]) -> None:
        """Write a file of the tensors, end to end. Raises: ValueError if they do not fit a buffer."""
        num_bytes = sum(tensor.nbytes for tensor in tensors)
        if num_bytes > self._buffer_bytes:
            raise ValueError(f"a forward of {num_bytes} bytes does not fit a buffer of {self._buffer_bytes} bytes")
        buffer = self._buffers.get()
        copied = None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            stop = 0
            for tensor in tensors:
                part = buffer[stop : stop + tensor.nbytes]
                part.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
                stop += tensor.nbytes
                if self._stream is not None:
                    # Its memory is not used again before the side stream is through with it.
                    tensor.record_stream(self._stream)
            if self._stream is not None:
                # A thread that waits for this event sleeps.
                copied = torch.cuda.Event(blocking=True)
                copied.record(self._stream)
        self._jobs.put((header, buffer, num_bytes, copied))

    def _write_jobs(self) -> None:
        while True:
            header, buffer, num_bytes, copied = self._jobs.get()
            try:
                if copied is not None:
                    copied.synchronize()
                write_whole(self._directory, header, buffer[:num_bytes].numpy().data)
            except Exception:
                report(self._directory, header["pieces"], traceback.format_exc())
            finally:
                self._buffers.put(buffer)


_numbers = itertools.count()


def write_whole(directory: Path, header: dict[str, Any], content: memoryview | bytes) -> None:
    """Write a file that is not there before it is whole."""
    path = directory / f"{os.getpid()}-{next(_numbers)}"
    partial = path.with_name(f".{path.name}")
    line = json.dumps(header).encode()
    # So that what follows the line lies where its elements are aligned.
    line += b" " * (-(len(line) + 1) % ALIGNMENT) + b"\n"
    try:
        with open(partial, "wb", buffering=0) as file:
            for part in (line, content):
                rest = memoryview(part)
                while rest:
                    rest = rest[file.write(rest) :]
        partial.rename(path)
    except OSError:
        # Room for the error that tells of this.
        partial.unlink(missing_ok=True)
        raise


def report(directory: Path, requests: Sequence[Wanted | Piece], message: str) -> None:
    """Tell whoever waits for these requests that they failed."""
    failed = [request[:2] for request in requests]
    logger.error("no hidden states of %s: %s", failed, message)
    try:
        write_whole(directory, {"failed": failed, "error": message}, b"")
    except OSError:
        logger.exception("the reader is not told and gives up by itself: it is gone, or the disk is full")


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
        self._writer: ForwardWriter | None = None

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
            pieces, teaching = self._pieces(found, batch, len(last_hidden_ND))
            refuse_scaled_logits(processor)
            self._hand_on(pieces, teaching, hidden, last_hidden_ND, head)
        except Exception:
            report(self._directory, [request for request in found if request], traceback.format_exc())

    def _pieces(self, found: Sequence[Wanted | None], batch: Any, num_rows: int) -> tuple[list[Piece], list[slice]]:
        """What the forward has of each request, and its rows that teach."""
        lengths = [int(length) for length in batch.extend_seq_lens_cpu]
        if sum(lengths) != num_rows or getattr(batch, "global_num_tokens_cpu", None):
            raise ValueError(
                f"{num_rows} rows for {sum(lengths)} tokens: the rows are padded or spread over ranks (data-parallel "
                "attention?), which capture cannot read"
            )
        pieces, teaching = list[Piece](), list[slice]()
        first = first_teaching = 0
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
                runs = [(max(run.start, start), min(run.stop, stop)) for run in request.teaching]
                runs = [(begin, end) for begin, end in runs if begin < end]
                teaching += [slice(begin - start + first, end - start + first) for begin, end in runs]
                num_teaching = sum(end - begin for begin, end in runs)
                pieces.append(Piece(*request[:2], start, stop, first, first_teaching, num_teaching))
                first_teaching += num_teaching
            first += length
        return pieces, teaching

    def _hand_on(
        self,
        pieces: Sequence[Piece],
        teaching: Sequence[slice],
        hidden: dict[int, Tensor],
        last_hidden_ND: Tensor,
        head: Any,
    ) -> None:
        num_rows = len(last_hidden_ND)
        rows = {layer: len(hidden.get(layer, ())) for layer in self._layers}
        if set(rows.values()) != {num_rows}:
            raise ValueError(
                f"{num_rows} rows of the last hidden state, but by layer {rows}: a layer has another name "
                "than the hooks expect, or it is on another GPU (pipeline parallel?)"
            )
        # Slices instead of an index: an index would have to be sent to the device, and the scheduler wait for it.
        last_hidden_UD = torch.cat([last_hidden_ND[:0], *(last_hidden_ND[rows] for rows in teaching)])
        group = tensor_parallel_group()
        greedy_U, logsumexp_U = greedy_and_normalizer(last_hidden_UD, *vocabulary_part(head), group)
        if group is not None and torch.distributed.get_rank(group) != 0:
            return
        if self._writer is None:
            self._writer = ForwardWriter(self._directory, self._config, last_hidden_ND.device)
        aux_hidden_NLD = torch.stack([hidden[layer] for layer in self._layers], dim=1)
        dtype = str(aux_hidden_NLD.dtype).removeprefix("torch.")
        header = {"dtype": dtype, "num_rows": num_rows, "num_teaching": len(last_hidden_UD), "pieces": pieces}
        self._writer.write(header, (logsumexp_U, greedy_U, last_hidden_UD, aux_hidden_NLD))


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
    chunk_rows = max(1, LOGIT_CHUNK_ELEMENTS // max(1, len(weight_VD)) // ROW_TILE) * ROW_TILE
    parts = []
    for chunk_CD in last_hidden_UD.split(chunk_rows):
        # No name for the logits: those of the chunk before would still be there.
        best_C, greedy_C, logsumexp_C = reduced(float32_logits(chunk_CD, weight_VD), by_kernel=chunk_CD.is_cuda)
        # In float64 every token id is exact too.
        parts.append(torch.stack([best_C.double(), greedy_C.double() + first, logsumexp_C.double()]))
    part_3U = torch.cat(parts, dim=1)
    _, greedy_U, logsumexp_U = part_3U
    if group is not None:
        parts_R = [torch.empty_like(part_3U) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(parts_R, part_3U, group=group)
        best_RU, greedy_RU, logsumexp_RU = torch.stack(parts_R, dim=1)
        greedy_U = greedy_RU.gather(0, best_RU.argmax(dim=0, keepdim=True))[0]
        logsumexp_U = logsumexp_RU.logsumexp(dim=0)
    return greedy_U.int(), logsumexp_U.float()


def reduced(logits_NV: Tensor, *, by_kernel: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of float32 logits the largest, where it is (the first one), and the log-sum-exp."""
    if not by_kernel:
        return *logits_NV.max(dim=-1), logits_NV.logsumexp(dim=-1)
    # Each logit is read once: on a GPU `max` and `logsumexp` together take as long as the head's product.
    num_rows, num_columns = logits_NV.shape
    best_N, logsumexp_N = logits_NV.new_empty(2, num_rows)
    greedy_N = torch.empty_like(best_N, dtype=torch.int32)
    if num_rows:
        _reduce_rows[num_rows,](logits_NV, best_N, greedy_N, logsumexp_N, num_columns, BLOCK, num_warps=NUM_WARPS)
    return best_N, greedy_N, logsumexp_N


@triton.jit
def _reduce_rows(logits, best, greedy, logsumexp, NUM_COLUMNS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    # Each lane for itself: its largest logit, where that is, and the sum of e^(logit - largest).
    # Finite at first: the difference of two infinities is not a number.
    largest = tl.full([BLOCK], _LOWEST, tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, NUM_COLUMNS, BLOCK):
        columns = begin + lanes
        logit = tl.load(logits + row * NUM_COLUMNS + columns, mask=columns < NUM_COLUMNS, other=float("-inf"))
        is_larger = logit > largest
        place = tl.where(is_larger, columns, place)
        before, largest = largest, tl.where(is_larger, logit, largest)
        total = total * tl.exp(before - largest) + tl.exp(logit - largest)
    largest_of_all = tl.max(largest, axis=0)
    total_of_all = tl.sum(total * tl.exp(largest - largest_of_all), axis=0)
    tl.store(best + row, largest_of_all)
    tl.store(greedy + row, tl.min(tl.where(largest == largest_of_all, place, NUM_COLUMNS), axis=0))
    tl.store(logsumexp + row, largest_of_all + tl.log(total_of_all))


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
