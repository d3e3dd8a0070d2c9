import logging
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from specforge_core.data.loader import (
    FeatureSet,
    StoredBatch,
    deal,
    dequantised,
    plan_epoch,
    plan_steps,
    prefetched,
)
from specforge_core.data.shards import Document, FeatureWriter
from specforge_core.drafts.base import DraftBatch
from specforge_core.drafts.rows import index_rows
from specforge_core.targets import TargetFeatures
from tests.data.feature_files import INDEX, make_document, make_features, write_features

LENGTHS = [7, 5, 20, 1, 3, 9, 9, 14, 2, 6]
BUDGET = 24


@pytest.fixture
def features(tmp_path: Path) -> FeatureSet:
    write_features(tmp_path, LENGTHS, tokens_per_shard=30)
    return FeatureSet(tmp_path)


def unprepared(batch: DraftBatch) -> DraftBatch:
    return batch


def with_rows(batch: DraftBatch) -> DraftBatch:
    rows = index_rows(batch.loss_mask_T, batch.document_ids_T, batch.teaching_U, num_steps=2, rows_per_pass=8)
    return batch._replace(rows=rows)


def tensors(stored: StoredBatch) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(stored) if isinstance(leaf, Tensor)]


def test_a_plan_has_every_document_once_and_no_batch_over_budget():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 400, (1000,), generator=generator).tolist()
    plan = plan_epoch(lengths, 1000, seed=3, epoch=1)
    assert Counter(i for batch in plan for i in batch) == Counter(range(1000))
    assert max(sum(lengths[i] for i in batch) for batch in plan) <= 1000
    # Documents of 200 tokens on average fill batches of 1000 nearly whole.
    assert sum(lengths) / (1000 * len(plan)) > 0.98


def test_documents_that_fit_exactly_leave_no_room():
    assert sorted(map(len, plan_epoch([4] * 7, 8, seed=0, epoch=0))) == [1, 2, 2, 2]


def test_a_plan_depends_on_seed_and_epoch_and_on_nothing_else():
    lengths = list(range(1, 50))
    plan = plan_epoch(lengths, 100, seed=0, epoch=0)
    assert plan == plan_epoch(lengths, 100, seed=0, epoch=0)
    assert plan != plan_epoch(lengths, 100, seed=0, epoch=1)
    assert plan != plan_epoch(lengths, 100, seed=1, epoch=0)


def test_a_document_over_budget_is_refused():
    with pytest.raises(ValueError, match="a document has 9 tokens, a micro-batch 8"):
        plan_epoch([3, 9], 8, seed=0, epoch=0)


def test_a_batch_is_its_documents_end_to_end(features: FeatureSet):
    numbers = [6, 0, 3]  # three shards, not in stored order; 9 + 7 + 1 tokens
    stored = features.load_batch(numbers)
    batch = stored.batch
    documents = [make_document(number, LENGTHS[number]) for number in numbers]
    captured = [make_features(number, LENGTHS[number]) for number in numbers]
    assert batch.input_ids_T.tolist() == [*range(600, 609), *range(7), 300]
    assert batch.position_ids_T.tolist() == [*range(9), *range(7), 0]
    assert batch.document_ids_T.tolist() == [0] * 9 + [1] * 7 + [2]
    assert torch.equal(batch.loss_mask_T, torch.cat([document.loss_mask_T for document in documents]))
    assert torch.equal(batch.aux_hidden_TLD, torch.cat([c.aux_hidden_TLD for c in captured]).bfloat16())
    # Before tokens 1, 2, 4, 5, 7 and 8 of the first and 1, 2, 4 and 5 of the second; no last token teaches.
    assert batch.teaching_U.tolist() == [0, 1, 3, 4, 6, 7, 9, 10, 12, 13]
    assert torch.equal(batch.last_hidden_UD, torch.cat([c.last_hidden_UD for c in captured]).bfloat16())
    assert torch.equal(batch.target_argmax_U, torch.cat([c.argmax_U for c in captured]).long())
    assert torch.equal(batch.target_logsumexp_U, torch.cat([c.logsumexp_U for c in captured]))
    assert {name: tensor.dtype for name, tensor in batch._asdict().items() if tensor is not None} == {
        "input_ids_T": torch.int64,
        "loss_mask_T": torch.bool,
        "position_ids_T": torch.int64,
        "document_ids_T": torch.int32,
        "aux_hidden_TLD": torch.bfloat16,
        "teaching_U": torch.int64,
        "last_hidden_UD": torch.bfloat16,
        "target_argmax_U": torch.int64,
        "target_logsumexp_U": torch.float32,
    }
    assert dequantised(stored) is batch


def test_a_batch_of_float8_is_multiplied_out_on_its_device(tmp_path: Path):
    write_features(tmp_path, LENGTHS, tokens_per_shard=30, index=INDEX.model_copy(update={"dtype": "float8"}))
    stored = FeatureSet(tmp_path).load_batch([6, 0])
    assert stored.batch.aux_hidden_TLD.dtype == stored.batch.last_hidden_UD.dtype == torch.float8_e4m3fn
    batch, captured = dequantised(stored), [make_features(6, 9), make_features(0, 7)]
    assert batch.aux_hidden_TLD.dtype == batch.last_hidden_UD.dtype == torch.float32
    # Three bits of mantissa are off by a sixteenth at most, and elements below 448 / 2^6 of the largest by more.
    for restored, exact in (
        (batch.aux_hidden_TLD, torch.cat([c.aux_hidden_TLD for c in captured])),
        (batch.last_hidden_UD, torch.cat([c.last_hidden_UD for c in captured])),
    ):
        largest = exact.abs().amax(-1, keepdim=True)
        assert ((restored - exact).abs() <= exact.abs() / 16 * (1 + 1e-6) + largest / 448 / 2**10).all()
        assert not torch.equal(restored, exact)
    assert batch.teaching_U is stored.batch.teaching_U


def test_a_batch_without_a_token_that_teaches_is_loaded(features: FeatureSet):
    batch = features.load_batch([3]).batch
    assert batch.teaching_U.tolist() == []
    assert batch.last_hidden_UD.shape == (0, 4)


def test_an_epoch_gives_every_token_once(features: FeatureSet):
    plan = features.plan(range(len(LENGTHS)), BUDGET, seed=0, epoch=0)
    loaded = features.batches(plan, prepare=unprepared)
    tokens = [token for stored in loaded for token in stored.batch.input_ids_T.tolist()]
    assert sorted(tokens) == sorted(100 * n + t for n, length in enumerate(LENGTHS) for t in range(length))


def test_a_plan_names_documents_of_the_part_it_was_made_for(features: FeatureSet):
    part = [2, 5, 9]
    plan = features.plan(part, BUDGET, seed=0, epoch=0)
    assert sorted(document for batch in plan for document in batch) == part


def test_packing_efficiency_is_reported(features: FeatureSet, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        plan = features.plan([2, 7], BUDGET, seed=0, epoch=0)
    assert len(plan) == 2  # 20 + 14 tokens need two batches of 24
    assert "2 micro-batches of 24 tokens, 70.8 % full" in caplog.text


def test_resuming_in_an_epoch_gives_the_batches_of_the_undisturbed_run_and_reads_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_features(tmp_path, LENGTHS, tokens_per_shard=30)
    undisturbed = FeatureSet(tmp_path)
    plan = undisturbed.plan(range(len(LENGTHS)), BUDGET, seed=5, epoch=2)
    expected = list(undisturbed.batches(plan, prepare=with_rows))
    resumed = FeatureSet(tmp_path)
    loaded = []
    load_batch = resumed.load_batch
    monkeypatch.setattr(
        resumed, "load_batch", lambda documents, **options: loaded.append(documents) or load_batch(documents, **options)
    )
    steps = plan_steps(resumed.plan(range(len(LENGTHS)), BUDGET, seed=5, epoch=2), per_step=1)
    batches = list(resumed.batches((micro_batch for step in steps[2:] for micro_batch in step), prepare=with_rows))
    assert len(batches) == len(expected) - 2 > 0
    assert sorted(loaded) == sorted(plan[2:])
    for batch, undisturbed_batch in zip(batches, expected[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(batch), tensors(undisturbed_batch), strict=True))


def test_batches_are_prepared_by_the_threads_that_load_them(features: FeatureSet):
    threads = set()

    def prepare(batch: DraftBatch) -> DraftBatch:
        threads.add(threading.current_thread().name)
        return with_rows(batch)

    (stored,) = features.batches([[7, 4]], prepare=prepare)
    assert all(name.startswith("prefetch") for name in threads)
    assert stored.batch.rows is not None
    # Slot 0 is supervised by tokens 1 and 2, and so on; the tokens of the second document start at 14.
    slots = [slot for one_pass in stored.batch.rows.passes for slot in one_pass.slot_R.tolist()]
    assert slots == [0, 3, 6, 9, 14]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_a_pinned_batch_is_pinned_as_a_whole_and_holds_the_same(tmp_path: Path, dtype: str):
    write_features(tmp_path, LENGTHS, tokens_per_shard=30, index=INDEX.model_copy(update={"dtype": dtype}))
    features = FeatureSet(tmp_path)
    plan = [[6, 0, 3], [7, 4]]
    pinned = list(features.batches(plan, prepare=with_rows, pin_memory=True))
    plain = list(features.batches(plan, prepare=with_rows))
    for a, b in zip(pinned, plain, strict=True):
        assert all(tensor.is_pinned() for tensor in tensors(a))
        for tensor, expected in zip(tensors(a), tensors(b), strict=True):
            assert torch.equal(tensor.flatten().view(torch.uint8), expected.flatten().view(torch.uint8))
        on_gpu = dequantised(tree_map_only(Tensor, lambda tensor: tensor.cuda(), a))
        assert on_gpu.aux_hidden_TLD.dtype == torch.bfloat16
        torch.testing.assert_close(
            on_gpu.aux_hidden_TLD.cpu(), dequantised(b).aux_hidden_TLD.bfloat16(), rtol=0, atol=0
        )


@pytest.mark.parametrize(
    ("loads", "num_replicas", "takers"),
    [
        ([5, 1, 4, 2], 1, [0, 0, 0, 0]),
        # 5 + 1 and 4 + 2.
        ([5, 1, 4, 2], 2, [0, 0, 1, 1]),
        ([3, 3, 3, 3], 2, [0, 1, 1, 0]),
        # 7 + 2 + 1, 6 + 3 and 5 + 4.
        ([1, 2, 3, 4, 5, 6, 7], 3, [0, 0, 1, 2, 2, 1, 0]),
        # A short last step leaves some without work.
        ([8], 2, [0]),
        ([], 2, []),
    ],
)
def test_loads_are_dealt_out_in_equal_numbers_and_sums(loads: list[int], num_replicas: int, takers: list[int]):
    assert deal(loads, num_replicas) == takers


def test_replicas_share_micro_batches_by_their_teaching_tokens_in_the_order_of_the_plan(tmp_path: Path):
    writer = FeatureWriter(tmp_path, INDEX)
    for number, (length, num_teaching) in enumerate([(20, 3), (30, 2), (10, 9), (4, 3)]):
        document = Document(f"{number}", torch.zeros(length).int(), torch.arange(length) >= length - num_teaching)
        features = TargetFeatures(
            torch.zeros(length, 2, 4), torch.zeros(num_teaching, 4), *torch.zeros(2, num_teaching).int()
        )
        writer.write([document], [features])
    stored = FeatureSet(tmp_path)
    step = [[0], [1], [2], [3]]
    # In turn it would be 0, 1, 0, 1, and by tokens 1, 0, 1, 0.
    assert stored.dealt(step, 2) == [1, 0, 0, 1]
    assert [stored.share(step, replica, 2) for replica in range(2)] == [[[1], [2]], [[0], [3]]]
    assert stored.share(step, 0, 1) == step


def test_long_documents_are_cut_and_it_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_features(tmp_path, LENGTHS, tokens_per_shard=30)
    features = FeatureSet(tmp_path, max_document_tokens=9)
    assert features.lengths == [7, 5, 9, 1, 3, 9, 9, 9, 2, 6]
    batch = features.load_batch([2, 3]).batch
    assert batch.input_ids_T.tolist() == [*range(200, 209), 300]
    # Token 9 is a prompt's and not there any more, so 8 would not teach anyway; cut at 8, 7 does not teach any more.
    assert batch.teaching_U.tolist() == [0, 1, 3, 4, 6, 7]
    assert torch.equal(batch.last_hidden_UD, make_features(2, 20).last_hidden_UD[:6].bfloat16())
    batch = FeatureSet(tmp_path, max_document_tokens=8).load_batch([2, 3]).batch
    assert batch.teaching_U.tolist() == [0, 1, 3, 4, 6]
    assert torch.equal(batch.last_hidden_UD, make_features(2, 20).last_hidden_UD[:5].bfloat16())
    assert [record.getMessage() for record in caplog.records] == [
        "2 documents are cut at 9 tokens; 16 tokens are lost",  # 20 - 9 and 14 - 9
        "4 documents are cut at 8 tokens; 20 tokens are lost",  # 20 - 8, 14 - 8 and twice 9 - 8
    ]


def test_a_document_stays_on_its_side_of_the_split_when_others_are_added(tmp_path: Path):
    few, many = tmp_path / "few", tmp_path / "many"
    for directory, count in ((few, 100), (many, 400)):
        directory.mkdir()
        write_features(directory, [2] * count, tokens_per_shard=1000)
    split, larger = FeatureSet(few).split(0.2), FeatureSet(many).split(0.2)
    assert sorted([*split.train, *split.eval]) == list(range(100))
    assert [i for i in larger.eval if i < 100] == split.eval
    # 400 draws with probability 0.2: 80, and five standard deviations of 8.
    assert abs(len(larger.eval) - 80) < 40


def test_a_split_without_documents_on_one_side_is_refused(features: FeatureSet):
    with pytest.raises(ValueError, match="eval_fraction=1e-09 puts 0 of 10 documents into evaluation"):
        features.split(1e-9)


def test_batches_are_loaded_ahead_by_other_threads_in_order():
    loaded, threads = [], set()

    def load(item: int) -> int:
        loaded.append(item)
        threads.add(threading.get_ident())
        # So that later ones are done first.
        time.sleep(0.002 * (item % 3 == 0))
        return -item

    results = prefetched(load, range(100))
    assert next(results) == 0
    assert list(results) == [-item for item in range(1, 100)]
    assert sorted(loaded) == list(range(100))
    assert threading.get_ident() not in threads


def test_a_reader_that_stops_early_leaves_no_thread_and_little_read():
    loaded = []
    results = prefetched(loaded.append, range(100))
    next(results)
    results.close()
    assert len(loaded) <= 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_an_error_while_loading_reaches_the_reader():
    def load(item: int) -> int:
        return 1 // item

    results = prefetched(load, [1, 0])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
