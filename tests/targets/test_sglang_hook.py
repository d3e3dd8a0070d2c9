"""The hook alone, driven as a server drives it.

N rows of a forward, T rows of a document, U teaching rows, L layers, D width, V vocabulary.
"""

import ast
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specforge_core.targets import TargetFeatures, handover, sglang_hook
from specforge_core.targets.forward_files import HookError
from specforge_core.targets.handover import FilesLost, Handover, Layout, Traffic, teaching_runs
from specforge_core.targets.sglang_hook import greedy_and_normalizer, reduced, vocabulary_part, wanted
from tests.processes import on_processes

LAYERS = (0, 2)
D, V = 8, 11
LAYOUT = Layout(LAYERS, D, torch.float32)


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Handover]:
    monkeypatch.setattr(handover, "WAIT_S", 2.0)
    monkeypatch.setattr(handover, "MEMORY", tmp_path)
    with Handover(LAYOUT, Traffic(max_document_tokens=40, batch_tokens=40, num_servers=1), fallback=tmp_path) as one:
        yield one


class Server:
    """Calls hooks as a server does, with a head and hidden states of its own choice."""

    def __init__(self, opened: Handover, **config: Any) -> None:
        shared = {"directory": str(opened._directory), "layers": list(LAYERS), "num_buffers": 2, "buffer_bytes": 2**12}
        self.capture = sglang_hook.Capture({**shared, **config})
        self.modules = {layer: nn.Identity() for layer in LAYERS}
        torch.manual_seed(0)
        self.head = nn.Linear(D, V, bias=False).requires_grad_(False)
        self.processor = SimpleNamespace(final_logit_softcapping=None, logit_scale=None)

    def forward(
        self, pieces: Sequence[tuple[str, int, int]], outputs: dict[int, Any], last_ND: Tensor, **batch: Any
    ) -> None:
        """One forward. Args: pieces: (rid, rows computed before, rows); outputs: of layers."""
        for layer, output in outputs.items():
            self.capture.keep_layer(layer, self.modules[layer], output)
        forward_batch = SimpleNamespace(
            forward_mode=SimpleNamespace(is_extend=lambda: True),
            rids=[rid for rid, _, _ in pieces],
            extend_prefix_lens_cpu=[start for _, start, _ in pieces],
            extend_seq_lens_cpu=[num_rows for _, _, num_rows in pieces],
            **batch,
        )
        self.capture.end_forward(self.processor, (None, last_ND, self.head, forward_batch))


def teaching(length: int, *tokens: int) -> Tensor:
    return torch.isin(torch.arange(length), torch.tensor(tokens))


def states(num_rows: int) -> tuple[dict[int, Any], Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    parts = torch.randn(5, num_rows, D, generator=generator)
    return {0: (parts[0], parts[1]), 2: (parts[2], parts[3])}, parts[4]


def check(features: TargetFeatures, outputs: dict[int, Any], last_ND: Tensor, rows: slice, teach: list[int]) -> None:
    """Args: rows, teach: of the document and its teaching tokens, in the forward."""
    sums_TLD = torch.stack([outputs[0][0] + outputs[0][1], outputs[2][0] + outputs[2][1]], dim=1)[rows]
    assert torch.equal(features.aux_hidden_TLD, sums_TLD)
    assert torch.equal(features.last_hidden_UD, last_ND[teach])
    assert features.argmax_U.dtype == torch.int32
    assert len(features.logsumexp_U) == len(teach)


def test_the_hook_needs_nothing_but_torch_triton_and_the_standard_library() -> None:
    tree = ast.parse(Path(sglang_hook.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= {*sys.stdlib_module_names, "torch", "triton"}


def test_a_request_id_says_which_tokens_teach() -> None:
    is_teaching_T = teaching(12, 0, 1, 5, 9, 10, 11)
    runs = [range(2), range(5, 6), range(9, 12)]
    assert teaching_runs(is_teaching_T) == runs
    rid = sglang_hook.request_id(7, 12, runs)
    assert wanted(rid) == (7, "7", 12, tuple(runs))
    assert wanted(f"{rid}#lost#2") == (7, "7#lost#2", 12, tuple(runs))
    assert wanted(sglang_hook.request_id(0, 3, [])) == (0, "0", 3, ())
    assert wanted("HEALTH_CHECK_1712.5") is None


def test_each_request_of_a_forward_gets_its_rows_and_others_are_left_alone(opened: Handover) -> None:
    server = Server(opened)
    first, second = opened.rid(0, teaching(4, 1, 2)), opened.rid(1, teaching(3))
    outputs, last_ND = states(4 + 2 + 3)
    server.forward([(first, 0, 4), ("HEALTH_CHECK", 0, 2), (second, 0, 3)], outputs, last_ND)
    features = opened.collect(first)
    check(features, outputs, last_ND, slice(0, 4), [1, 2])
    logits_UV = last_ND[1:3].double() @ server.head.weight.double().T
    assert features.argmax_U.tolist() == logits_UV.argmax(-1).tolist()
    torch.testing.assert_close(features.logsumexp_U.double(), logits_UV.logsumexp(-1), rtol=1e-6, atol=1e-6)
    # A document may be without any token that teaches.
    check(opened.collect(second), outputs, last_ND, slice(6, 9), [])
    assert list(opened._directory.iterdir()) == []


def test_a_request_may_come_in_chunks_beside_others(opened: Handover) -> None:
    server = Server(opened)
    rid, other = opened.rid(0, teaching(10, 2, 3, 4, 9)), opened.rid(1, teaching(2, 0))
    outputs_a, last_a = states(5)
    outputs_b, last_b = states(7)
    server.forward([(rid, 0, 4), (other, 0, 1)], outputs_a, last_a)
    server.forward([(other, 1, 1), (rid, 4, 6)], outputs_b, last_b)
    features = opened.collect(rid)
    aux_hidden_TLD, *of_teaching = features
    check(TargetFeatures(aux_hidden_TLD[:4], *(part[:2] for part in of_teaching)), outputs_a, last_a, slice(4), [2, 3])
    # Rows 4 to 9 are rows 1 to 6 of the second forward.
    rest = TargetFeatures(aux_hidden_TLD[4:], *(part[2:] for part in of_teaching))
    check(rest, outputs_b, last_b, slice(1, 7), [1, 6])
    opened.collect(other)


def test_a_layer_may_return_the_sum_itself(opened: Handover) -> None:
    outputs, last_ND = states(3)
    sums = {layer: parts[0] + parts[1] for layer, parts in outputs.items()}
    rid = opened.rid(0, teaching(3, 0))
    Server(opened).forward([(rid, 0, 3)], {0: (sums[0],), 2: (sums[2], None)}, last_ND)
    check(opened.collect(rid), outputs, last_ND, slice(0, 3), [0])


def fused(parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    parts[0]._sglang_needs_allreduce_fusion = True  # type: ignore[attr-defined]
    return parts


def scaled(server: Server) -> None:
    server.processor.logit_scale = 0.5


def quantised(server: Server) -> None:
    server.head = SimpleNamespace(qweight=1)


def ambiguous(server: Server) -> None:
    server.capture.keep_layer(2, nn.Identity(), states(3)[0][2])


def small(server: Server) -> None:
    server.capture._config["buffer_bytes"] = 256


@pytest.mark.parametrize(
    ("num_before", "num_rows", "batch", "message"),
    [
        (2, 3, {}, "rows 0 to 2 of document 0 come out of a cache: start the server with --disable-radix-cache"),
        (0, 2, {}, "3 rows for 2 tokens: the rows are padded or spread over ranks"),
        (0, 3, {"global_num_tokens_cpu": [3, 3]}, "spread over ranks .data-parallel attention"),
    ],
)
def test_rows_that_are_not_all_there_are_an_error_that_the_reader_raises(
    opened: Handover, num_before: int, num_rows: int, batch: dict[str, Any], message: str
) -> None:
    rid = opened.rid(0, teaching(5, 0, 1))
    Server(opened).forward([(rid, num_before, num_rows)], *states(3), **batch)
    with pytest.raises(HookError, match=message):
        opened.collect(rid)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scaled, "the target scales its logits by 0.5: drafts cannot do that"),
        (quantised, "the head SimpleNamespace has no plain weight"),
        (ambiguous, "two modules are layer 2: the pattern of the hook fits too many"),
        (small, "a forward of 272 bytes does not fit a buffer of 256 bytes"),
    ],
)
def test_so_is_a_server_that_capture_does_not_understand(
    opened: Handover, change: Callable[[Server], None], message: str
) -> None:
    rid = opened.rid(0, teaching(3, 0, 1))
    server = Server(opened)
    change(server)
    server.forward([(rid, 0, 3)], *states(3))
    with pytest.raises(HookError, match=message):
        opened.collect(rid)


def test_so_are_layers_that_are_missing_or_not_summed_over_the_ranks(opened: Handover) -> None:
    missing, unsummed = opened.rid(0, teaching(3, 0)), opened.rid(1, teaching(3, 0))
    outputs, last_ND = states(3)
    Server(opened).forward([(missing, 0, 3)], {0: outputs[0]}, last_ND)
    with pytest.raises(HookError, match=r"3 rows of the last hidden state, but by layer \{0: 3, 2: 0\}"):
        opened.collect(missing)
    Server(opened).forward([(unsummed, 0, 3)], {0: fused(outputs[0]), 2: outputs[2]}, last_ND)
    with pytest.raises(HookError, match="--enforce-disable-flashinfer-allreduce-fusion"):
        opened.collect(unsummed)


def test_a_file_that_cannot_be_written_is_an_error_too(opened: Handover, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_hook, "_numbers", iter([3, 4]))
    # In the place of the forward's file.
    (opened._directory / f".{os.getpid()}-3").mkdir()
    rid = opened.rid(0, teaching(3, 0))
    Server(opened).forward([(rid, 0, 3)], *states(3))
    with pytest.raises(HookError, match="IsADirectoryError"):
        opened.collect(rid)


def test_answers_without_files_are_noticed_and_older_attempts_are_not_mixed_in(
    opened: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    rid = opened.rid(0, teaching(10, 0))
    server = Server(opened)
    outputs_a, last_a = states(6)
    # The server died behind the first of two chunks.
    server.forward([(rid, 0, 6)], outputs_a, last_a)
    with monkeypatch.context() as impatient:
        impatient.setattr(handover, "WAIT_S", 0.5)
        with pytest.raises(FilesLost, match=r"was answered, but its files did not come within 0\.5 s"):
            opened.collect(rid)
    outputs, last_ND = states(10)
    server.forward([(f"{rid}#2", 0, 10)], outputs, last_ND)
    check(opened.collect(f"{rid}#2"), outputs, last_ND, slice(0, 10), [0])
    assert list(opened._directory.iterdir()) == []


def test_a_forward_waits_only_for_a_free_buffer(opened: Handover, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = threading.Semaphore(0)
    write_whole = sglang_hook.write_whole
    monkeypatch.setattr(sglang_hook, "write_whole", lambda *file: may_write.acquire() and write_whole(*file))
    server = Server(opened, num_buffers=2)
    rids = [opened.rid(i, teaching(3, 0)) for i in range(3)]
    for rid in rids[:2]:
        server.forward([(rid, 0, 3)], *states(3))
    third = threading.Thread(target=server.forward, args=([(rids[2], 0, 3)], *states(3)))
    third.start()
    third.join(timeout=0.1)
    assert third.is_alive()
    may_write.release()
    third.join(timeout=5)
    assert not third.is_alive()
    may_write.release(2)
    for rid in rids:
        check(opened.collect(rid), *states(3), slice(3), [0])


def test_a_stream_of_many_times_the_buffers_comes_through_whole(opened: Handover) -> None:
    server = Server(opened, num_buffers=2)
    for i in range(40):
        rid = opened.rid(i, teaching(7, 3))
        outputs, last_ND = states(7)
        server.forward([(rid, 0, 7)], outputs, last_ND)
        if i % 5 == 4:
            for j in range(i - 4, i + 1):
                check(opened.collect(opened.rid(j, teaching(7, 3))), outputs, last_ND, slice(0, 7), [3])


def test_rows_of_logits_are_reduced_in_one_pass() -> None:
    # Fewer columns than a program reads at a time, and three times as many and some.
    for num_columns in (100, 3 * sglang_hook.BLOCK + 17):
        logits_NV = 20 * torch.randn(3, num_columns, generator=torch.Generator().manual_seed(1))
        # The largest one twice, in different lanes; and far below zero.
        logits_NV[0, [7, 60]] = 200.0
        logits_NV[1] -= 1e4
        best_N, greedy_N, logsumexp_N = reduced(logits_NV, by_kernel=True)
        assert torch.equal(best_N, logits_NV.max(dim=-1).values)
        assert greedy_N.tolist() == [7, *logits_NV[1:].argmax(dim=-1).tolist()]
        torch.testing.assert_close(logsumexp_N.double(), logits_NV.double().logsumexp(-1), rtol=1e-6, atol=1e-6)
    assert reduced(torch.full((1, 9), torch.nan), by_kernel=True)[2].isnan().all()
    assert [part.shape for part in reduced(torch.empty(0, 5), by_kernel=True)] == [(0,)] * 3


def test_late_forwards_of_documents_that_are_read_are_let_go(opened: Handover) -> None:
    server = Server(opened)
    first, second = opened.rid(0, teaching(3, 0)), opened.rid(1, teaching(2, 1))
    # Both were sent twice; the first answer counts.
    server.forward([(f"{first}#2", 0, 3), (f"{second}#2", 0, 2)], *states(5))
    check(opened.collect(f"{first}#2"), *states(5), slice(3), [0])
    server.forward([(first, 0, 3)], *states(3))
    server.forward([(second, 0, 2)], *states(2))
    check(opened.collect(second), *states(2), slice(2), [1])
    assert list(opened._directory.iterdir()) == []
    assert not opened._forwards._parts


def _rank(rank: int) -> tuple[Tensor, Tensor]:
    last_UD, head_VD = _split_problem()
    # 11 tokens over 2 ranks of 8 rows: the second one has 5 of its own, and 3 rows of padding that would win.
    first, stop = [(0, 6), (6, 11)][rank]
    padded = torch.full((8, D), 1e4)
    padded[: stop - first] = head_VD[first:stop]
    shard = SimpleNamespace(num_org_elements=stop - first, org_vocab_start_index=first)
    head = SimpleNamespace(weight=padded, shard_indices=shard)
    return greedy_and_normalizer(last_UD, *vocabulary_part(head), torch.distributed.group.WORLD)


def _split_problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(9, D, generator=generator), torch.randn(V, D, generator=generator)


def test_a_head_split_over_ranks_gives_the_same_on_each(tmp_path: Path) -> None:
    last_UD, head_VD = _split_problem()
    logits_UV = last_UD.double() @ head_VD.double().T
    assert set(logits_UV.argmax(-1).tolist()) & set(range(6, 11)), "the second rank must win sometimes"
    for greedy_U, logsumexp_U in on_processes(2, _rank, tmp_path):
        assert (greedy_U.dtype, logsumexp_U.dtype) == (torch.int32, torch.float32)
        assert greedy_U.tolist() == logits_UV.argmax(-1).tolist()
        torch.testing.assert_close(logsumexp_U.double(), logits_UV.logsumexp(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_on_a_gpu_rows_are_copied_before_their_memory_is_used_again(opened: Handover) -> None:
    server = Server(opened)
    server.head.cuda()
    for i in range(200):
        outputs, last_ND = states(20 + i % 5)
        on_gpu = {layer: tuple(part.cuda() for part in parts) for layer, parts in outputs.items()}
        rid = opened.rid(i, teaching(len(last_ND), 0, 1))
        server.forward([(rid, 0, len(last_ND))], on_gpu, last_ND.cuda())
    for i in range(200):
        outputs, last_ND = states(20 + i % 5)
        check(opened.collect(opened.rid(i, teaching(len(last_ND), 0, 1))), outputs, last_ND, slice(None), [0, 1])
