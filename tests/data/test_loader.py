import logging
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from specforge_core.data.loader import FeatureSet, plan_epoch, plan_steps, prefetched, rank_share
from tests.data.feature_files import make_document, make_features, write_features

LENGTHS = [7, 5, 20, 1, 3, 9, 9, 14, 2, 6]
BUDGET = 24


@pytest.fixture
def features(tmp_path: Path) -> FeatureSet:
    write_features(tmp_path, LENGTHS, tokens_per_shard=30)
    return FeatureSet(tmp_path)


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
    batch = features.load_batch(numbers)
    documents = [make_document(number, LENGTHS[number]) for number in numbers]
    captured = [make_features(number, LENGTHS[number]) for number in numbers]
    assert batch.input_ids_T.tolist() == [*range(600, 609), *range(7), 300]
    assert batch.position_ids_T.tolist() == [*range(9), *range(7), 0]
    assert batch.document_ids_T.tolist() == [0] * 9 + [1] * 7 + [2]
    assert torch.equal(batch.loss_mask_T, torch.cat([document.loss_mask_T for document in documents]))
    assert torch.equal(batch.aux_hidden_TLD, torch.cat([c.aux_hidden_TLD for c in captured]).bfloat16())
    assert torch.equal(batch.last_hidden_TD, torch.cat([c.last_hidden_TD for c in captured]).bfloat16())
    assert torch.equal(batch.target_argmax_T, torch.cat([c.argmax_T for c in captured]).long())
    assert torch.equal(batch.target_logsumexp_T, torch.cat([c.logsumexp_T for c in captured]))
    assert [tensor.dtype for tensor in batch] == [
        torch.int64, torch.bool, torch.int64, torch.int32, torch.bfloat16, torch.bfloat16, torch.int64, torch.float32,
    ]  # fmt: skip


def test_an_epoch_gives_every_token_once(features: FeatureSet):
    plan = features.plan(range(len(LENGTHS)), BUDGET, seed=0, epoch=0)
    tokens = [token for batch in features.batches(plan) for token in batch.input_ids_T.tolist()]
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
    expected = list(undisturbed.batches(plan))
    resumed = FeatureSet(tmp_path)
    loaded = []
    load_batch = resumed.load_batch
    monkeypatch.setattr(resumed, "load_batch", lambda documents: loaded.append(documents) or load_batch(documents))
    steps = plan_steps(resumed.plan(range(len(LENGTHS)), BUDGET, seed=5, epoch=2), per_step=1)
    batches = list(resumed.batches(micro_batch for step in steps[2:] for micro_batch in step))
    assert len(batches) == len(expected) - 2 > 0
    assert loaded == plan[2:]
    for batch, undisturbed_batch in zip(batches, expected[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, undisturbed_batch, strict=True))


def test_processes_share_a_step_and_a_short_last_step_leaves_some_without_work():
    steps = plan_steps([[0], [1], [2], [3], [4]], per_step=4)
    assert steps == [[[0], [1], [2], [3]], [[4]]]
    assert [rank_share(steps[0], rank, 2) for rank in range(2)] == [[[0], [2]], [[1], [3]]]
    assert [rank_share(steps[1], rank, 2) for rank in range(2)] == [[[4]], []]
    assert [rank_share(steps[0], rank, 3) for rank in range(3)] == [[[0], [3]], [[1]], [[2]]]


def test_long_documents_are_cut_and_it_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_features(tmp_path, LENGTHS, tokens_per_shard=30)
    features = FeatureSet(tmp_path, max_document_tokens=9)
    assert features.lengths == [7, 5, 9, 1, 3, 9, 9, 9, 2, 6]
    assert features.load_batch([2, 3]).input_ids_T.tolist() == [*range(200, 209), 300]
    assert [record.getMessage() for record in caplog.records] == [
        "2 documents are cut at 9 tokens; 16 tokens are lost"  # 20 - 9 and 14 - 9
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


def test_batches_are_loaded_ahead_by_another_thread_in_order():
    loaded, threads = [], set()

    def load(item: int) -> int:
        loaded.append(item)
        threads.add(threading.get_ident())
        return -item

    results = prefetched(load, range(100))
    assert next(results) == 0
    assert list(results) == [-item for item in range(1, 100)]
    assert loaded == list(range(100))
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
